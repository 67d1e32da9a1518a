# yolo-sos, AGPL-3.0
"""What a sweep found: its points as CSV and as a picture, and the strongest setting that keeps loss and mAP."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from ultralytics.utils import plt_settings

from yolo_sos.config import SOSConfig
from yolo_sos.core import METHODS
from yolo_sos.files import as_csv, save_figure
from yolo_sos.markdown import markdown_table
from yolo_sos.yolo.score import headline

# Of a recommended setting: the largest relative rise of the held-out loss, and the largest loss of mAP50-95, a tenth of
# a point, below which tables show no difference.
GUARD: float = SOSConfig().sos_guard  # type: ignore[assignment]
LOSS_OF_METRIC = 0.001
# As for a shift whose strength is found: below half of d, and above a budget of 0.1, mAP falls before held-out loss or
# a small val split tell. On BCCD, principal at a quarter of d lost .0003 on val and .0035 on test.
LEAST_RANK, LARGEST_BUDGET = 0.5, 0.1
WORTHWHILE = 0.99  # squared norm ratio above which a shift is not worth a file
STYLES = {"loss": "D-", "principal": "o-", "expected": "s-", "budget": "^-", "rows": "x--", "full": "o"}


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


def csv_of(points: Sequence[Point]) -> str:
    """Return the points as CSV."""
    rows = [point.row() for point in points]
    return as_csv([{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows])


@dataclass(frozen=True)
class Choice:
    """The strongest setting of a method that keeps held-out loss and mAP; of several draws, their means.

    Attributes:
        method (str): Name of the method.
        setting (float): Its rank or budget; nan for ``full``.
        squared_norm_ratio (float): ``Σ‖V*‖² / Σ‖V‖²``.
        rise (float): Relative rise of the held-out loss.
        metrics (dict[str, float]): Split → change of its main metric.
    """

    method: str
    setting: float
    squared_norm_ratio: float
    rise: float
    metrics: dict[str, float]

    @property
    def argument(self) -> str:
        """The setting as an argument of ``yolo-sos shift``."""
        return "" if math.isnan(self.setting) else f"{'budget' if self.method == 'budget' else 'rank'}={self.setting:g}"


def choices(points: Sequence[Point]) -> list[Choice]:
    """Return the strongest setting of each method that keeps held-out loss and mAP, the smallest norm first.

    The limits are ``GUARD``, ``LOSS_OF_METRIC``, ``LEAST_RANK`` and ``LARGEST_BUDGET``.

    Args:
        points (Sequence[Point]): The baseline, then the curve.
    """
    baseline, *rest = points
    names = {split: headline(metrics) for split, metrics in baseline.metrics.items()}
    found = []
    for method in METHODS:
        for of in _by_setting(rest, method):
            setting = of[0].setting
            if setting > LARGEST_BUDGET if method == "budget" else setting < LEAST_RANK:  # full has none: nan
                continue
            rise = _mean(of, attrgetter("heldout_loss")) / baseline.heldout_loss - 1
            changes = {
                split: sum(p.metrics[split][name] for p in of) / len(of) - baseline.metrics[split][name]
                for split, name in names.items()
            }
            if rise <= GUARD and all(change >= -LOSS_OF_METRIC for change in changes.values()):
                ratio = _mean(of, attrgetter("squared_norm_ratio"))
                found.append(Choice(method, setting, ratio, rise, changes))
    found.sort(key=attrgetter("squared_norm_ratio"))
    return [next(c for c in found if c.method == m) for m in dict.fromkeys(c.method for c in found)]


def recommended(points: Sequence[Point]) -> Choice | None:
    """Return the strongest choice of all; None if there is no metric to judge by, or nothing worthwhile."""
    worthwhile = [c for c in choices(points) if c.metrics and c.squared_norm_ratio <= WORTHWHILE]
    return worthwhile[0] if worthwhile else None


def summary(points: Sequence[Point]) -> str:
    """Return the choices as a table, and the recommendation: what to put in place of ``sweep=true``."""
    splits = {split: headline(metrics).removeprefix("metrics/") for split, metrics in points[0].metrics.items()}
    if not splits:
        return (
            "No setting is recommended without mAP, which can fall before the held-out loss tells: leave out val=false."
        )
    chosen = choices(points)
    main = ", ".join(f"{split} {name}" for split, name in splits.items())
    rows = [["method", "setting", "squared norm", "held-out loss", *(f"{s} {n}" for s, n in splits.items())]]
    for c in chosen:
        changes = [f"{change:+.4f}" for change in c.metrics.values()]
        rows.append([c.method, c.argument, f"×{c.squared_norm_ratio:.3f}", f"{c.rise:+.2%}", *changes])
    text = (
        f"The strongest setting of each method whose held-out loss rises by at most {GUARD:.1%} and whose {main} falls "
        f"by at most {LOSS_OF_METRIC:g}, of ranks from {LEAST_RANK:g} of d and budgets up to {LARGEST_BUDGET:g}:\n"
        f"{markdown_table(rows, texts=2)}"
    )
    best = recommended(points)
    if best is None:
        return f"{text}None of them takes a hundredth of the squared norm: leave the checkpoint as it is."
    setting = f"method={best.method} {best.argument}".strip()
    return (
        f"{text}Recommended: {setting} in place of sweep=true. It was chosen among {len(points) - 1} points on this "
        "split: judge it on another one."
    )


def _by_setting(points: Sequence[Point], method: str) -> list[list[Point]]:
    """Return the points of a method, those of one setting together: several draws."""
    settings: dict[str, list[Point]] = {}
    for p in points:
        if p.method == method:
            settings.setdefault(str(p.setting), []).append(p)
    return list(settings.values())


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
    best = recommended(points)
    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.6), layout="constrained")
    for ax, (title, value, log) in zip(axes, panels, strict=True):
        for name, style in STYLES.items():
            settings = _by_setting(rest, name)
            curve = sorted((_mean(of, attrgetter("squared_norm_ratio")), _mean(of, value)) for of in settings)
            if not curve:
                continue
            # `full` lies on the baseline where the rows span everything: a ring around it
            look = {"markersize": 13, "fillstyle": "none"} if name == "full" else {"markersize": 5, "linewidth": 1.4}
            (line,) = ax.plot(*zip(*curve, strict=True), style, label=name, **look)
            drawn = [p for of in settings if len(of) > 1 for p in of]  # every draw, faint, behind their mean
            ax.scatter(
                [p.squared_norm_ratio for p in drawn], [value(p) for p in drawn], s=9, alpha=0.4, color=line.get_color()
            )
        ax.axhline(value(baseline), color="black", linewidth=0.8, linestyle=":")
        ax.plot(1.0, value(baseline), "*", color="black", markersize=12, label="baseline", zorder=3)
        if log:
            ax.set_yscale("symlog", linthresh=0.1)
            ax.yaxis.set_major_formatter("{x:g}")
        if best:
            ax.axvline(best.squared_norm_ratio, color="gray", linewidth=6, alpha=0.2, label="recommended", zorder=0)
        ax.set_title(title)
        ax.set_xlabel("squared norm ratio  ‖V*‖² / ‖V‖²")
        ax.set_xlim(0, 1.05)
        ax.grid(alpha=0.25)
    axes[0].legend(fontsize=9)
    save_figure(fig, path, dpi=200)
    plt.close(fig)


def _metric(scored: tuple[str, dict[str, float]]) -> tuple[str, Callable[[Point], float]]:
    split, metrics = scored
    main = headline(metrics)
    return f"{split} {main.removeprefix('metrics/')}", lambda p: p.metrics[split][main]


def _mean(points: Sequence[Point], value: Callable[[Point], float]) -> float:
    return sum(map(value, points)) / len(points)
