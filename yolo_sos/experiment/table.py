# yolo-sos, AGPL-3.0
"""``yolo-sos table``: the results of an experiment from the records of its runs, as Markdown, CSV, JSON and a plot."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from ultralytics.utils import LOGGER, colorstr, plt_settings

from yolo_sos.experiment.record import Record, difference
from yolo_sos.experiment.statistics import holm, least_p, mean_and_std, sign_flip_p, t_interval
from yolo_sos.files import as_csv, as_json, finite, save_figure, write_text
from yolo_sos.markdown import markdown_table

PREFIX = colorstr("table: ")
BASELINE = "baseline"
PRIMARY = ("metrics/mAP50-95(B)", "metrics/accuracy_top1", "fitness")  # the first that the records hold
ESSENTIALS = ("data", "model", "epochs", "imgsz", "batch", "optimizer")  # of the common config, shown in the Markdown
LEVEL = 0.95
NONE = "–"


@dataclass(frozen=True)
class Row:
    """One metric of one arm on one split; nan where a figure is not defined.

    Attributes:
        split (str): Split of the data.
        metric (str): Name of the metric.
        arm (str): Name of the arm.
        values (dict[int, float]): Value by seed.
        differences (dict[int, float]): Value less the baseline's by seed, over the pairs (see `ResultTable`).
        p_holm (float): p, corrected over the arms; nan for all but the primary metric.
    """

    split: str
    metric: str
    arm: str
    values: dict[int, float]
    differences: dict[int, float]
    p_holm: float

    @cached_property
    def figures(self) -> dict[str, Any]:
        """The row's line of the CSV."""
        differences = list(self.differences.values())
        mean, std = mean_and_std(list(self.values.values()))
        low, high = t_interval(differences, LEVEL)
        return {
            **{"split": self.split, "metric": self.metric, "arm": self.arm},
            **{"n": len(self.values), "mean": mean, "std": std},
            **{"diff": mean_and_std(differences)[0], "low": low, "high": high},
            **{"p": sign_flip_p(differences), "p_holm": self.p_holm, "n_pairs": len(differences)},
        }


class ResultTable:
    """The table of an experiment's results, checked and ready to ``run``.

    Records may differ in arm, in seed, and in the settings that one of their arms sets. Any other difference between
    two configs is refused, as it would be a second reason for different results.

    An arm is compared with the baseline over pairs: the seeds that both have, less those whose model was not shifted
    although its arm asks for it, which would show the baseline's own figures as the effect of shifting.

    Args:
        experiment (str): Name of the experiment, such as ``bccd/screen``.
        results (str | Path): Folder of all experiments' results; the records are in ``<experiment>/records``, the table
            goes to ``<experiment>``.

    Raises:
        FileNotFoundError: If there are no records.
        ValueError: If a file there is no record of this experiment, if configs differ where they may not, if there is
            no arm ``baseline`` or no other, or if two arms have more than 40 seeds in common.
    """

    def __init__(self, experiment: str, results: str | Path = "results"):
        """Read and check all records, and compute the rows."""
        self.experiment = experiment
        self.folder = Path(results) / experiment
        folder = self.folder / "records"
        # A name that starts with a dot is a record that another process is writing.
        paths = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
        if not paths:
            raise FileNotFoundError(f"{folder}: there are no records of experiment '{experiment}'.")
        records = [Record.read(path, experiment) for path in paths]
        self.arms: dict[str, list[Record]] = {}
        for record in sorted(records, key=lambda r: (r.arm != BASELINE, r.arm, r.seed)):
            self.arms.setdefault(record.arm, []).append(record)
        if BASELINE not in self.arms or len(self.arms) == 1:
            lacking = "only an arm" if BASELINE in self.arms else "no arm"
            found = ", ".join(self.arms)
            raise ValueError(f"{folder}: {lacking} '{BASELINE}' to compare with; there are records of {found}.")
        self.records = [record for of_arm in self.arms.values() for record in of_arm]
        self._check_configs()
        self.primary = self._primary()
        self.splits = list(dict.fromkeys(split for r in self.records for split in r.metrics))
        self.rows = [row for split in self.splits for name in self._metrics(split) for row in self._rows(split, name)]

    def _check_configs(self) -> None:
        """Refuse configs that differ in more than the seed within an arm, or than what their arms set between two."""
        pairs: list[tuple[Record, Record, tuple[str, ...]]]
        pairs = [(of_arm[0], other, ()) for of_arm in self.arms.values() for other in of_arm[1:]]
        for one, other in combinations([of_arm[0] for of_arm in self.arms.values()], 2):
            pairs.append((one, other, (*one.differences, *other.differences)))
        for one, other, allowed in pairs:
            if (key := difference(one.config, other.config, allowed)) is not None:
                values = " and ".join(json.dumps(record.config.get(key)) for record in (one, other))
                may = f"what their arms set ({', '.join(dict.fromkeys(allowed))})" if allowed else "the seed"
                where = f"{one.path} and {other.path}"
                raise ValueError(f"{where}: '{key}' differs: {values}. They may differ in {may} alone.")

    def _primary(self) -> str:
        first = self.records[0]
        primary = next((name for name in PRIMARY if name in first.metrics["val"]), None)
        if primary is None:
            raise ValueError(f"{first.path}: 'metrics.val' holds none of {', '.join(PRIMARY)}.")
        for record in self.records:
            for split, values in record.metrics.items():
                if primary not in values:
                    raise ValueError(f"{record.path}: 'metrics.{split}.{primary}' is missing.")
        return primary

    def _metrics(self, split: str) -> list[str]:
        found = dict.fromkeys(name for r in self.records for name in r.metrics.get(split, {}))
        return list(dict.fromkeys((self.primary, *found)))

    def _rows(self, split: str, metric: str) -> list[Row]:
        values = {
            arm: {r.seed: r.metrics[split][metric] for r in of_arm if metric in r.metrics.get(split, {})}
            for arm, of_arm in self.arms.items()
        }
        differences: dict[str, dict[int, float]] = {arm: {} for arm in self.arms}
        for arm in differences.keys() - {BASELINE}:
            paired = [seed for seed in self._pairs(arm) if seed in values[arm] and seed in values[BASELINE]]
            differences[arm] = {seed: values[arm][seed] - values[BASELINE][seed] for seed in paired}
        corrected = [math.nan] * len(values)
        if metric == self.primary:
            corrected = holm([sign_flip_p(list(of_arm.values())) for of_arm in differences.values()])
        arms = zip(self.arms, corrected, strict=True)
        return [Row(split, metric, arm, values[arm], differences[arm], p) for arm, p in arms]

    def _pairs(self, arm: str) -> dict[int, tuple[Record, Record]]:
        """Return by seed the records of an arm and of the baseline that are compared with each other."""
        baseline = {r.seed: r for r in self.arms[BASELINE] if r.comparable}
        return {r.seed: (r, baseline[r.seed]) for r in self.arms[arm] if r.comparable and r.seed in baseline}

    def ratios(self, arm: str, key: str) -> list[float]:
        """Return an arm's ``wall_time`` or ``norm2`` over the baseline's, for the pairs of which both have it."""
        pairs = [(getattr(one, key), getattr(base, key)) for one, base in self._pairs(arm).values()]
        return [one / base for one, base in pairs if None not in (one, base)]

    def run(self) -> Path:
        """Write ``table.md``, ``table.csv``, ``table.json`` and ``table.png``, and print the Markdown.

        Returns:
            (Path): The folder that they are in.
        """
        text = self.markdown()
        write_text(self.folder / "table.md", text)
        write_text(self.folder / "table.csv", self.csv())
        write_text(self.folder / "table.json", as_json(self.json()))
        LOGGER.info(text)
        self.plot(self.folder / "table.png")
        LOGGER.info(f"{PREFIX}wrote {self.folder / 'table'}.md, .csv, .json and .png")
        return self.folder

    def markdown(self) -> str:
        """Return the primary metric with its comparisons, then the means of the other metrics."""
        common, arms = self._common(), len(self.arms) - 1
        essentials = ", ".join(f"{key}={_setting(common[key])}" for key in ESSENTIALS if key in common)
        origins = self._origins()
        alike = ", ".join(f"{name} {next(iter(found))}" for name, found in origins.items() if len(found) == 1)
        parts = [f"# {self.experiment}\n", f"    yolo-sos table {self.experiment}\n"]
        parts += [f"{line}\n" for line in (essentials, alike) if line]
        for split in self.splits:
            parts += [f"## {split} {_short(self.primary)}\n", self._headline(split)]
        for split in self.splits:
            if others := [metric for metric in self._metrics(split) if metric != self.primary]:
                parts += [f"## {split}, further metrics\n", self._further(split, others)]
        notes = [
            f"±: standard deviation over seeds. Δ: mean of the differences to the {BASELINE} of the same seed, with "
            f"its {LEVEL:.0%} t-interval.",
            "p: exact two-sided sign-flip test over the pairs; in parentheses the least that so many pairs can give.",
            f"p Holm: p of {_short(self.primary)}, corrected for the {arms} arm{'s' * (arms > 1)} of this table, on "
            "each split by itself. The p-values of further metrics, in table.csv and table.json, are not corrected.",
            "norm²: squared norm of the final layers of best.pt, time: seconds of training, each over the "
            f"{BASELINE}'s of the same seed: median (least–most).",
        ]
        for name, found in origins.items():
            if len(found) > 1:
                counts = "; ".join(f"{n} × {value}" for value, n in found.items())
                notes.append(f"The {len(self.records)} records do not agree in {name}: {counts}.")
        for record in self.records:
            if not record.comparable:
                why = "its arm shifts, but no shift reached the model that was judged"
                notes.append(f"{record.path.name}: {why}, so it is left out of all comparisons.")
            for split in (split for split, values in record.metrics.items() if math.isnan(values[self.primary])):
                notes.append(f"{record.path.name} has no number on {split}, so the figures that need it are unknown.")
        return "\n".join([*parts, "".join(f"- {note}\n" for note in notes)])

    def _headline(self, split: str) -> str:
        figures = ("mean ± std", f"Δ [{LEVEL:.0%} CI]", "p (least)", "p Holm", "norm²", "time")
        lines = [["arm", "what differs", "seeds", *figures]]
        for row in self._of(split, self.primary):
            f, arm, n, pairs = row.figures, row.arm, len(row.values), len(row.differences)
            first = self.arms[arm][0]
            what = ", ".join(f"{key}={_setting(first.config[key])}" for key in first.differences) or NONE
            seeds = str(n) if pairs == n or arm == BASELINE else f"{n}, {pairs} paired"
            line = [arm, what, seeds, _mean_std(row)]
            if not math.isnan(f["diff"]):
                interval = "" if math.isnan(f["low"]) else f" [{_signed(f['low'])}, {_signed(f['high'])}]"
                p = f"{_bare(f['p'], '.3g')} ({_bare(least_p(pairs), '.3g')})"
                line += [_signed(f["diff"]) + interval, p, _bare(f["p_holm"], ".3g")]
            else:
                line += [NONE] * 3
            ratios = [self.ratios(arm, key) if arm != BASELINE else [] for key in ("norm2", "wall_time")]
            lines.append([*line, *(f"{median(x):.3f} ({min(x):.3f}–{max(x):.3f})" if x else NONE for x in ratios)])
        return markdown_table(lines, texts=2)

    def _further(self, split: str, metrics: Sequence[str]) -> str:
        columns = [[_short(metric), *map(_mean_std, self._of(split, metric))] for metric in metrics]
        return markdown_table(list(zip(["arm", *self.arms], *columns, strict=True)))

    def _of(self, split: str, metric: str) -> list[Row]:
        return [row for row in self.rows if (row.split, row.metric) == (split, metric)]

    def _common(self) -> dict[str, Any]:
        """Return the settings that all runs share."""
        varied = {key for r in self.records for key in r.differences}
        return {key: value for key, value in self.records[0].config.items() if key not in varied}

    def _origins(self) -> dict[str, Counter[str]]:
        """Return, for every version, the device and the commit, how many records have which."""
        names = dict.fromkeys(name for r in self.records for name in r.origin)
        return {name: Counter(r.origin.get(name, "unknown") for r in self.records) for name in names}

    def csv(self) -> str:
        """Return one row per split, metric and arm; empty where a figure is not defined."""
        return as_csv([finite(row.figures) for row in self.rows])

    def json(self) -> dict[str, Any]:
        """Return the rows of the CSV with the values behind them, and the arms; None where a figure is not defined."""
        arms = {}
        for arm, of_arm in self.arms.items():
            arms[arm] = {
                "differences": {key: of_arm[0].config[key] for key in of_arm[0].differences},
                "seeds": [r.seed for r in of_arm],
                "wall_time": [r.wall_time for r in of_arm],
                "norm2": [r.norm2 for r in of_arm],
                "shifted": [r.shifted for r in of_arm],
                "time_ratio": _range(self.ratios(arm, "wall_time")),
                "norm2_ratio": _range(self.ratios(arm, "norm2")),
            }
        rows = []
        for row in self.rows:
            figures = {**row.figures, "p_least": least_p(len(row.differences))}
            rows.append(finite({**figures, "values": row.values, "differences": row.differences}))
        return {
            "experiment": self.experiment,
            "command": f"yolo-sos table {self.experiment}",
            "primary": self.primary,
            "level": LEVEL,
            "origin": self._origins(),
            "config": self._common(),
            "arms": arms,
            "rows": rows,
        }

    @plt_settings()
    def plot(self, path: Path) -> None:
        """Draw a forest plot of the primary metric, a panel per split: differences by seed, their mean and interval."""
        import matplotlib.pyplot as plt

        arms = [arm for arm in self.arms if arm != BASELINE]
        size = (2.2 + 4.2 * len(self.splits), 1.8 + 0.34 * len(arms))
        fig, axes = plt.subplots(1, len(self.splits), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for ax, split in zip(axes[0], self.splits, strict=True):
            ax.axvline(0, color="black", linewidth=0.8)
            for y, row in enumerate(self._of(split, self.primary)[1:]):  # the baseline is the first
                differences, line = list(row.differences.values()), row.figures
                below = [y + 0.25] * len(differences)  # so that the mean does not hide them
                (dots,) = ax.plot(differences, below, "o", color="C1", markersize=4, alpha=0.6)
                (mean,) = ax.plot(line["diff"], y, "D", color="C0", markersize=6)
                (interval,) = ax.plot([line["low"], line["high"]], [y, y], "-", color="C0", linewidth=2)
            ax.set_title(split)
            ax.set_xlabel(f"Δ {_short(self.primary)} to the baseline")
            ax.locator_params(axis="x", nbins=5)
            ax.grid(axis="x", alpha=0.25)
        axes[0][0].set_yticks(range(len(arms)), arms, parse_math=False)  # a name may hold a dollar sign
        axes[0][0].set_ylim(len(arms) - 0.5, -0.5)  # from top to bottom, as in the table
        names = ["one seed", "mean", f"{LEVEL:.0%} interval"]
        fig.legend([dots, mean, interval], names, loc="outside lower center", ncols=3, fontsize=9)
        save_figure(fig, path, dpi=200)
        plt.close(fig)


def _range(values: Sequence[float]) -> dict[str, float] | None:
    return {"median": median(values), "min": min(values), "max": max(values)} if values else None


def _short(metric: str) -> str:
    return metric.removeprefix("metrics/")


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _bare(number: float, spec: str = ".4f") -> str:
    """Format a number without the zero before the point, and with a minus sign instead of a hyphen."""
    return NONE if math.isnan(number) else re.sub(r"^([+-]?)0\.", r"\1.", format(number, spec)).replace("-", "−")


_signed = partial(_bare, spec="+.4f")


def _mean_std(row: Row) -> str:
    mean, std = row.figures["mean"], row.figures["std"]
    return _bare(mean) + ("" if math.isnan(std) else f" ± {_bare(std)}")
