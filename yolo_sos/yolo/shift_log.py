# yolo-sos, AGPL-3.0
"""What a run leaves of its shifts: columns for results.csv, sos.csv, sos.png and a line in the log."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ultralytics.utils import plt_settings

from yolo_sos.core import ShiftReport
from yolo_sos.files import atomic_path, write_text

# Without "loss" and "metric" in their names: Ultralytics plots columns that have them into results.png.
COLUMNS = ("squared_norm_ratio", "rank", "deviation", "heldout_before", "heldout_after", "t", "ms")


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
        return {f"sos/{name}": float("nan") for name in COLUMNS}
    report = reports["ema"]
    milliseconds = sum(sum(r.milliseconds.values()) for r in reports.values())
    values = (
        report.squared_norm_ratio,
        report.rank,
        report.deviation,
        report.heldout_before,
        report.heldout_after,
        report.step,
    )
    return {f"sos/{name}": float(value) for name, value in zip(COLUMNS, (*values, milliseconds), strict=True)}


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
            for record in report.layers:
                self.rows.append(
                    {
                        "epoch": epoch,
                        "model": model,
                        **asdict(record),
                        "heldout_before": report.heldout_before,
                        "heldout_after": report.heldout_after,
                        "t": report.step,
                        "ms": sum(report.milliseconds.values()),
                    }
                )
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(self.rows[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())

    @plt_settings()
    def plot(self, path: Path, on_plot: Callable[[Path], None] | None = None) -> None:
        """Draw the curves of the EMA: norm without and with each shift, held-out loss before and after, accepted t."""
        import matplotlib.pyplot as plt

        shifts: dict[int, list[dict[str, Any]]] = {}
        for row in self.rows:
            if row["model"] == "ema":
                shifts.setdefault(int(row["epoch"]), []).append(row)
        epochs = list(shifts)

        def norm(key: str) -> list[float]:
            return [sum(float(row[key]) ** 2 for row in rows) ** 0.5 for rows in shifts.values()]

        def first(key: str) -> list[float]:
            return [float(rows[0][key]) for rows in shifts.values()]

        fig, axes = plt.subplots(1, 3, figsize=(13, 4), tight_layout=True)
        for ax, title, curves in (
            (axes[0], "norm of the final layers", {"before": norm("norm_before"), "after": norm("norm_after")}),
            (axes[1], "held-out loss", {"before": first("heldout_before"), "after": first("heldout_after")}),
            (axes[2], "accepted step t", {"t": first("t")}),
        ):
            for (label, values), style in zip(curves.items(), ("o-", "s--"), strict=False):
                ax.plot(epochs, values, style, label=label, markersize=4)
            ax.set_title(title)
            ax.set_xlabel("epoch")
            ax.legend()
        axes[2].set_ylim(-0.05, 1.05)
        with atomic_path(path) as temporary:
            fig.savefig(temporary, dpi=200)
        plt.close(fig)
        if on_plot:
            on_plot(path)
