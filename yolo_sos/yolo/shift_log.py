# yolo-sos, AGPL-3.0
"""What a run leaves of its shifts: columns for results.csv, sos.csv, sos.png and a line in the log."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ultralytics.utils import plt_settings

from yolo_sos.core import ShiftReport
from yolo_sos.files import as_csv, save_figure, write_text

# Column → what it shows of a report. Ultralytics plots columns with "loss" or "metric" in their names into results.png.
COLUMNS = {
    **{f"sos/{name}": name for name in ("squared_norm_ratio", "rank", "deviation", "heldout_before", "heldout_after")},
    "sos/t": "step",
}


def columns(reports: dict[str, ShiftReport]) -> dict[str, float]:
    """Return the ``sos/*`` columns of an epoch.

    Args:
        reports (dict[str, ShiftReport]): Report by model. The columns are those of the EMA, whose weights are validated
            and saved. Empty where no shift ran: the same columns, all nan.

    Returns:
        (dict[str, float]): ``sos/squared_norm_ratio``, ``Σ‖V_t‖²/Σ‖V‖²``; ``sos/rank`` and ``sos/deviation``, means
            over layers; ``sos/heldout_before`` and ``sos/heldout_after``, loss per image; ``sos/t``; ``sos/ms``, of all
            models together.
    """
    if not reports:
        return dict.fromkeys((*COLUMNS, "sos/ms"), math.nan)
    milliseconds = sum(sum(r.milliseconds.values()) for r in reports.values())
    return {**{c: float(getattr(reports["ema"], name)) for c, name in COLUMNS.items()}, "sos/ms": milliseconds}


def log_line(reports: dict[str, ShiftReport]) -> str:
    """Return one line that tells what a shift did."""
    live = f" (live ×{reports['model'].squared_norm_ratio:.3f})" if "model" in reports else ""
    return f"{reports['ema']}{live}, {columns(reports)['sos/ms']:.0f} ms"


class ShiftLog:
    """``sos.csv``: one line per layer, model and shift. The file is whole at any time.

    Args:
        path (Path): The file.
        resume_from (int): Epochs that a resumed run has behind it: later lines of the file belong to an epoch that will
            run again, and go. 0: a new run, which starts without lines.
    """

    def __init__(self, path: Path, resume_from: int = 0):
        """Read the lines that count."""
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if resume_from and path.exists():
            with open(path, encoding="utf-8", newline="") as f:
                try:
                    self.rows = [row for row in csv.DictReader(f) if int(row["epoch"]) <= resume_from]
                except (KeyError, TypeError, ValueError) as e:
                    raise ValueError(f"{path}: not a log of shifts. Remove it to resume without it.") from e

    def add(self, epoch: int, reports: dict[str, ShiftReport]) -> None:
        """Append the shifts at the end of ``epoch``, counted from 1 as in results.csv; 0 is before the first.

        Existing lines of that epoch and model are replaced: Ultralytics runs an epoch again when it recovers from NaN.
        """
        self.rows = [row for row in self.rows if int(row["epoch"]) != epoch or row["model"] not in reports]
        for model, report in reports.items():
            place = {"epoch": epoch, "model": model}
            losses = {"heldout_before": report.heldout_before, "heldout_after": report.heldout_after}
            totals = {**losses, "t": report.step, "ms": sum(report.milliseconds.values())}
            self.rows += [{**place, **asdict(record), **totals} for record in report.layers]
        write_text(self.path, as_csv(self.rows))

    @plt_settings()
    def plot(self, path: Path, on_plot: Callable[[Path], None] | None = None) -> None:
        """Draw what became of the model that is saved: a bar per layer for one shift, curves over the epochs for more.

        That model is the EMA, or a checkpoint that was shifted when training had ended.
        """
        import matplotlib.pyplot as plt

        saved = [row for row in self.rows if row["model"] != "model"]  # which is the live one
        name = next((name for name in ("ema", "best", "last") if any(row["model"] == name for row in saved)), None)
        shifts: dict[int, list[dict[str, Any]]] = {}
        for row in saved:
            if row["model"] == name:
                shifts.setdefault(int(row["epoch"]), []).append(row)
        if not shifts:
            return
        fig = _bars(*shifts.popitem()) if len(shifts) == 1 else _curves(shifts)
        save_figure(fig, path, dpi=200)
        plt.close(fig)
        if on_plot:
            on_plot(path)


def _bars(epoch: int, rows: list[dict[str, Any]]) -> Any:
    """Return a figure of one shift: the squared norm of each layer before and after."""
    import matplotlib.pyplot as plt

    before, after = ([float(row[key]) ** 2 for row in rows] for key in ("norm_before", "norm_after"))
    losses = [float(rows[0][key]) for key in ("heldout_before", "heldout_after")]
    places = range(len(rows))
    fig, ax = plt.subplots(figsize=(9, 2.1 + 0.45 * len(rows)), layout="constrained")
    ax.barh([y - 0.2 for y in places], before, 0.4, label="before", color="C7")
    bars = ax.barh([y + 0.2 for y in places], after, 0.4, label="after", color="C0")
    ratios = [f"×{b / a:.2f}" if a else "" for a, b in zip(before, after, strict=True)]
    ax.bar_label(bars, ratios, padding=4)
    ax.set_yticks(places, [f"{row['name']} ({row['kind']})" for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("squared norm ‖V‖²")
    ax.legend()
    total = f"×{sum(after) / sum(before):.3f} of the squared norm" if sum(before) else "nothing"
    loss = "unknown" if math.isnan(losses[0]) else f"{losses[0]:.4g} → {losses[1]:.4g}"
    ax.set_title(
        f"Shift after epoch {epoch}: {total} is left\nheld-out loss {loss}, step size t={float(rows[0]['t']):g}"
    )
    return fig


def _curves(shifts: dict[int, list[dict[str, Any]]]) -> Any:
    """Return a figure of several shifts by epoch: squared norm and held-out loss before and after, and accepted t."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    def squared_norm(key: str) -> list[float]:
        return [sum(float(row[key]) ** 2 for row in rows) for rows in shifts.values()]

    def first(key: str) -> list[float]:
        return [float(rows[0][key]) for rows in shifts.values()]

    fig, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for ax, title, curves in (
        (axes[0], "squared norm of the final layers", {k: squared_norm(f"norm_{k}") for k in ("before", "after")}),
        (axes[1], "held-out loss", {k: first(f"heldout_{k}") for k in ("before", "after")}),
        (axes[2], "accepted step size t", {"t": first("t")}),
    ):
        for (label, values), style in zip(curves.items(), ("o-", "s--"), strict=False):
            ax.plot(list(shifts), values, style, label=label, markersize=4)
        ax.set_title(title)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.ticklabel_format(axis="y", useOffset=False, style="plain")
        if len(curves) > 1:
            ax.legend()
    axes[2].set_ylim(-0.05, 1.05)
    return fig
