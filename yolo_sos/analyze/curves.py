# yolo-sos, AGPL-3.0
"""Trace and collapse against epochs: read from the results.csv of runs, drawn in one figure."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER, YAML, colorstr

from yolo_sos.analyze.collapse import MEASURES
from yolo_sos.analyze.figures import TITLES, panels, save
from yolo_sos.analyze.report import Section, digits, labels, number, save_dir, write_report
from yolo_sos.arguments import several
from yolo_sos.core.checks import boolean
from yolo_sos.versions import versions

# Without "loss" and "metric" in their names: Ultralytics plots columns that have them into results.png.
COLUMNS = ("trace", "trace_stderr", "gauss_newton", "gauss_newton_stderr", *MEASURES)
PANELS = {"trace": "Hessian trace before the final layers", "gauss_newton": "Gauss-Newton trace", **TITLES}
Curve = list[dict[str, float]]  # one dictionary per epoch that was analyzed: ``epoch`` and the columns without "sos/"


def columns(measured: dict[str, float] | None = None) -> dict[str, float]:
    """Return the ``sos/*`` columns of an epoch; nan where nothing was measured."""
    return {f"sos/{name}": (measured or {}).get(name, math.nan) for name in COLUMNS}


def read_curve(run: str | Path) -> Curve:
    """Return what a run measured of itself, by its folder or its results.csv.

    Raises:
        FileNotFoundError: If it has no results.csv.
        ValueError: If it was trained without ``sos_analyze``, or stopped before its first measurement.
    """
    path = Path(run) / "results.csv" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise FileNotFoundError(f"runs={run}: there is no results.csv.")
    if not (curve := _measured(path)):
        raise ValueError(f"runs={run} has no measurement: it stopped before its first one.")
    return curve


def _measured(path: Path) -> Curve:
    with open(path, encoding="utf-8", newline="") as f:
        rows = [{str(k).strip(): v for k, v in row.items()} for row in csv.DictReader(f)]
    if rows and not rows[0].keys() >= columns().keys():
        raise ValueError(f"{path}: the run was not analyzed while it trained. Train with sos_analyze=10, for example.")
    try:
        curve = [{"epoch": float(row["epoch"]), **{k: float(row[f"sos/{k}"]) for k in COLUMNS}} for row in rows]
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path}: a line holds something else than numbers: {e}.") from e
    return [point for point in curve if math.isfinite(point["trace"])]


def draw(curves: dict[str, Curve], path: Path) -> Path | None:
    """Draw the curves of runs, a panel per measure; None, and no picture, where no run has two measurements."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if max(map(len, curves.values())) < 2:
        return None
    fig, axes = panels(len(PANELS), 3, 2.9)
    for ax, (key, title) in zip(axes, PANELS.items(), strict=True):
        for i, (name, curve) in enumerate(curves.items()):
            epochs, values = [p["epoch"] for p in curve], [p[key] for p in curve]
            errors = [p[f"{key}_stderr"] for p in curve] if f"{key}_stderr" in COLUMNS else None
            ax.errorbar(epochs, values, errors, fmt="o-", color=f"C{i}", markersize=4, capsize=3, label=name)
        values = [p[key] for curve in curves.values() for p in curve if math.isfinite(p[key])]
        if key == "nc1" and max(values, default=0) > 10 * min(values, default=0) > 0:  # falls by orders of magnitude
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())  # its own writes 3×10²
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("epoch")
    axes[0].legend()
    return save(fig, path)


def plot(results: Path, path: Path, on_plot: Callable[[Path], None]) -> None:
    """Draw the curve of one run from its results.csv, if it has two measurements."""
    if (curve := _measured(results)) and draw({results.parent.name: curve}, path):
        on_plot(path)


class Curves:
    """A comparison of what runs measured while they trained, checked and ready to ``run``.

    Args:
        runs (str | Path | Sequence[str | Path]): Folders of runs; a string may hold several with commas between them.
        project (str, optional): Folder of the result's folder, as in Ultralytics.
        name (str, optional): Name of the result's folder.
        exist_ok (bool): Whether that folder may exist.
    """

    def __init__(
        self,
        runs: str | Path | Sequence[str | Path],
        *,
        project: str | None = None,
        name: str | None = None,
        exist_ok: bool = False,
    ):
        """Read the curves."""
        paths = [Path(run) for run in several("folders")("runs", runs)]
        curves = [read_curve(path) for path in paths]
        folders = [path if path.is_dir() else path.parent for path in paths]
        self.curves = dict(zip(labels(folders), curves, strict=True))
        self.settings = [
            YAML.load(folder / "sos.yaml") if (folder / "sos.yaml").is_file() else {} for folder in folders
        ]
        self.folder = save_dir("", project, name, boolean("exist_ok", exist_ok))

    def run(self) -> dict[str, Any]:
        """Write ``analysis.json``, ``curves.png`` and ``report.html``.

        Returns:
            (dict): What ``analysis.json`` holds.
        """
        result = {
            "config": {"runs": list(self.curves)},
            "versions": versions(),
            "runs": [
                {"name": name, "settings": settings, "curve": curve}
                for (name, curve), settings in zip(self.curves.items(), self.settings, strict=True)
            ],
        }
        path = draw(self.curves, self.folder / "curves.png")

        def trace(point: dict[str, float]) -> str:
            return number({"estimate": point["trace"], "stderr": point["trace_stderr"]})

        text = [
            "What the runs measured of their averaged weights while they trained, on the same few training images at "
            "every epoch, without augmentation: traces per image with their standard errors over probes, and neural "
            "collapse, the mean over detection levels. Runs with one seed and data set see the same images and probes; "
            "what another seed would have changed is not in the standard errors."
        ]
        verdict = [
            f"{name}: from epoch {curve[0]['epoch']:g} to {curve[-1]['epoch']:g} the Hessian trace went from "
            f"{trace(curve[0])} to {trace(curve[-1])}, and the variation within classes, NC1, from "
            f"{digits(curve[0]['nc1'], 3)} to {digits(curve[-1]['nc1'], 3)}."
            for name, curve in self.curves.items()
        ]
        rows = [[key, *(digits(curve[-1][key], 4) for curve in self.curves.values())] for key in ("epoch", *COLUMNS)]
        section = Section("While training", text, path, ["last measurement", *self.curves], rows)
        write_report(self.folder, result, verdict, [section])
        LOGGER.info(f"{colorstr('analyze: ')}wrote {self.folder / 'report.html'} and analysis.json")
        return result
