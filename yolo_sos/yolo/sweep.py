# yolo-sos, AGPL-3.0
"""The trade-off curve of a checkpoint: every method over its range, from one pass over the images."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER, TQDM, plt_settings

from yolo_sos.core import OK, Method, Shift
from yolo_sos.files import atomic_path, write_text
from yolo_sos.yolo.job import ShiftJob, deviations, heldout_moments
from yolo_sos.yolo.score import headline
from yolo_sos.yolo.training import PREFIX

RANKS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)  # fractions of d
BUDGETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
STYLES = {"principal": "o-", "expected": "s-", "budget": "^-", "rows": "x--", "full": "o"}


@dataclass(frozen=True)
class Point:
    """A point of the curve: what one method does at a full step.

    Attributes:
        method (str): Name of the method, or ``baseline``.
        weighting (str): Weighting of the rows; empty for the baseline.
        setting (float): Rank as given (``principal``, ``expected``, ``rows``) or budget; nan where there is none.
        seed (int): Seed of drawn rows.
        squared_norm_ratio (float): ``Σ‖V*‖² / Σ‖V‖²``.
        rank (float): Mean rank over the layers.
        deviation (float): Mean deviation over the layers, on the rows that the solver saw, weighted as it saw them.
        deviation_heldout (float): Mean deviation over the layers, on all rows of the held-out images.
        heldout_loss (float): Loss per held-out image.
        metrics (dict[str, dict[str, float]]): Split → Ultralytics' metrics.
    """

    method: str
    weighting: str
    setting: float
    seed: int
    squared_norm_ratio: float
    rank: float
    deviation: float
    deviation_heldout: float
    heldout_loss: float
    metrics: dict[str, dict[str, float]]

    def row(self) -> dict[str, Any]:
        """Return the point as a row of a table."""
        own = {k: v for k, v in vars(self).items() if k != "metrics"}
        return own | {f"{split}/{name}": v for split, found in self.metrics.items() for name, v in found.items()}


def trials_of(
    weightings: Iterable[str], *, ranks: Sequence[float] = RANKS, solver: str = "svd", draws: int = 1, seed: int = 0
) -> list[tuple[Method, int]]:
    """Return every method over its range, with the seeds of the drawings."""
    trials: list[tuple[Method, int]] = []
    for w in weightings:
        trials.append((Method("full", weighting=w), seed))
        trials += [(Method(name, r, weighting=w), seed) for name in ("principal", "expected") for r in ranks]
        trials += [(Method("budget", budget=b, weighting=w), seed) for b in BUDGETS]
        trials += [(Method("rows", r, solver=solver, weighting=w), seed + k) for r in ranks for k in range(draws)]
    return trials


def trace(
    job: ShiftJob, trials: Sequence[tuple[Method, int]], splits: Sequence[str]
) -> tuple[list[Point], dict[str, float]]:
    """Return the points of ``trials`` at full steps, the baseline first, and the seconds that each part took.

    Seconds: ``images`` (the pass over them, held-out ones included), ``algebra`` (solving, held-out losses and
    deviations), ``validation`` (of the model as it is, all splits) and ``points`` (scoring all others beside it).

    Raises:
        ValueError: If a layer cannot be solved; names the method and why.
    """
    start = time.perf_counter()
    engine = job.fitted(trials)
    heldout = engine.hold_out(job.images.batches("heldout"))
    moments = heldout_moments(job.layers, heldout)
    seconds = {"images": time.perf_counter() - start, "algebra": 0.0, "validation": 0.0, "points": 0.0}
    start = time.perf_counter()
    shifts = [engine.solve(method, seed) for method, seed in trials]
    names = [("baseline", "", math.nan, 0), *map(_name, shifts)]
    figures = [(1.0, math.nan, 0.0, 0.0, heldout.before)]
    for shift in TQDM(shifts, desc="held-out loss", unit="point"):
        if shift.status != OK:
            raise ValueError(f"{shift.method}: {shift.status}.")
        changes = deviations(job.layers, moments, shift.weights()).values()
        loss = heldout.loss(shift.weights())
        figures.append((shift.squared_norm_ratio, shift.rank, shift.deviation, sum(changes) / len(changes), loss))
    seconds["algebra"] = time.perf_counter() - start
    metrics: list[dict[str, dict[str, float]]] = [{} for _ in figures]
    for split in splits:
        found, spent = job.score([shift.weights() for shift in shifts], split)
        for of_point, scores in zip(metrics, found, strict=True):
            of_point[split] = scores
        seconds = {k: v + spent.get(k, 0.0) for k, v in seconds.items()}
    return [Point(*n, *f, metrics=m) for n, f, m in zip(names, figures, metrics, strict=True)], seconds


def _name(shift: Shift) -> tuple[str, str, float, int]:
    method = shift.method
    setting = {"budget": method.budget, "full": math.nan}.get(method.name, method.rank)
    return method.name, method.weighting, setting, shift.seed


def csv_of(points: Sequence[Point]) -> str:
    """Return the points as CSV."""
    text = io.StringIO()
    rows = [point.row() for point in points]
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()


@plt_settings()
def plot(points: Sequence[Point], path: Path) -> None:
    """Draw held-out loss and deviation and each split's main metric over the squared norm ratio, a curve per method."""
    import matplotlib.pyplot as plt

    baseline, *rest = points
    # The first two span decades and touch zero: linear up to 0.1 %, logarithmic above.
    panels: list[tuple[str, Callable[[Point], float], bool]] = [
        ("rise of the held-out loss, %", lambda p: 100 * (p.heldout_loss / baseline.heldout_loss - 1), True),
        ("deviation on held-out images, %", lambda p: 100 * p.deviation_heldout, True),
        *((title, value, False) for title, value in map(_metric, baseline.metrics.items())),
    ]
    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.6), layout="constrained")
    for ax, (title, value, log) in zip(axes, panels, strict=True):
        for name, style in STYLES.items():
            settings: dict[str, list[Point]] = {}
            for p in rest:
                if p.method == name:
                    settings.setdefault(str(p.setting), []).append(p)
            curve = sorted((_mean(of, attrgetter("squared_norm_ratio")), _mean(of, value)) for of in settings.values())
            if not curve:
                continue
            # `full` lies on the baseline where the rows span everything: a ring around it
            look = {"markersize": 13, "fillstyle": "none"} if name == "full" else {"markersize": 5, "linewidth": 1.4}
            (line,) = ax.plot(*zip(*curve, strict=True), style, label=name, **look)
            drawn = [p for of in settings.values() if len(of) > 1 for p in of]  # every draw, faint, behind their mean
            ax.scatter(
                [p.squared_norm_ratio for p in drawn], [value(p) for p in drawn], s=9, alpha=0.4, color=line.get_color()
            )
        ax.axhline(value(baseline), color="black", linewidth=0.8, linestyle=":")
        ax.plot(1.0, value(baseline), "*", color="black", markersize=12, label="baseline", zorder=3)
        if log:
            ax.set_yscale("symlog", linthresh=0.1)
            ax.yaxis.set_major_formatter("{x:g}")
        ax.set_title(title)
        ax.set_xlabel("squared norm ratio  ‖V*‖² / ‖V‖²")
        ax.set_xlim(0, 1.05)
        ax.grid(alpha=0.25)
    axes[0].legend(fontsize=9)
    with atomic_path(path) as temporary:
        fig.savefig(temporary, dpi=200)
    plt.close(fig)


def _metric(scored: tuple[str, dict[str, float]]) -> tuple[str, Callable[[Point], float]]:
    split, metrics = scored
    main = headline(metrics)
    return f"{split} {main.removeprefix('metrics/')}", lambda p: p.metrics[split][main]


def _mean(points: Sequence[Point], value: Callable[[Point], float]) -> float:
    return sum(map(value, points)) / len(points)


class CheckpointSweep(ShiftJob):
    """A sweep over a checkpoint, checked and ready to ``run``. See ``sweep_checkpoint``."""

    draws = 3
    names = ("{}-sweep.csv", "{}-sweep.png")

    def __init__(self, *args: Any, **options: Any):
        """Refuse what a sweep goes through, then check the rest."""
        for key in options:
            if key.removeprefix("sos_") in {"method", "rank", "budget", "guard"}:
                raise ValueError(f"'{key}' has no effect with sweep=true, which goes through all of them, unguarded.")
        super().__init__(*args, **options)

    def run(self) -> list[Point]:
        """Run the images, solve, score, and write ``{stem}-sweep.csv`` and ``{stem}-sweep.png``.

        Returns:
            (list[Point]): The baseline, then the curve.
        """
        c, table, picture = self.config, *self.outputs
        trials = trials_of([c.sos_weighting], solver=c.sos_solver, draws=self.draws, seed=self.seed)
        points, seconds = trace(self, trials, self.splits)
        write_text(table, csv_of(points))
        plot(points, picture)
        LOGGER.info(f"{PREFIX}{len(points) - 1} points: {cost(seconds)}\n{PREFIX}wrote {table} and {picture}")
        return points


def cost(seconds: dict[str, float]) -> str:
    """Return what a sweep cost, in words, against one validation."""
    one = seconds["validation"]
    total = sum(seconds.values())
    parts = ", ".join(f"{k} {v:.1f} s" for k, v in seconds.items())
    return f"{total:.1f} s in all ({parts})" + (f", that is {total / one:.1f} validations" if one else "")


def sweep_checkpoint(model: str | Path, data: str | Path | None = None, **options: Any) -> list[Point]:
    """Trace what every method does to a trained checkpoint, and write ``{stem}-sweep.csv`` and ``.png`` beside it.

    The images run through the model once; each point is algebra on the last layers, and of a validation only what
    follows them. The checkpoint itself is not written.

    Args:
        model (str | Path): A checkpoint of Ultralytics.
        data (str | Path, optional): The data set. None: the one that the model was trained on.
        **options (Any): As ``shift_checkpoint``, except for ``method``, ``rank``, ``budget`` and ``guard``, which the
            sweep goes through; ``draws`` is 3 by default.

    Returns:
        (list[Point]): The model as it is, then a point per method and setting.

    Raises:
        ValueError, TypeError, OSError: As ``shift_checkpoint``.
    """
    return CheckpointSweep(model, data, **options).run()
