# yolo-sos, AGPL-3.0
"""Precision-recall curves and reliability curves as pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from yolo_sos.evaluate.calibration import Reliability
from yolo_sos.evaluate.voc import VOCResult
from yolo_sos.files import save_figure

COLUMNS = 5  # panels side by side: VOC's 20 classes fill four rows


def plot_curves(
    path: str | Path,
    classes: Sequence[str],
    results: Sequence[VOCResult],
    runs: Sequence[str] = (),
    averaged: bool = True,
) -> None:
    """Draw the devkit's precision-recall curve of each class, a panel each, a line for each run.

    Args:
        path (str | Path): The picture; its suffix says what kind.
        classes (Sequence[str]): Names of the K classes.
        results (Sequence[VOCResult]): One per run, at least one. The first run's raw curve lies below its envelope.
        runs (Sequence[str]): Names of the runs, for a legend where there are several.
        averaged (bool): Whether titles hold the mean AP of the runs.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a canvas of our own: leaves pyplot's state alone
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(COLUMNS, len(classes))
    rows = math.ceil(len(classes) / columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.5 * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for k, (axis, name) in enumerate(zip(axes, classes, strict=False)):
        if not results[0].positives[k]:
            axis.text(0.5, 0.5, "no objects", ha="center", va="center", color="gray")
        for i, curve in enumerate(result.curves[k] for result in results if result.positives[k]):
            if i == 0:
                axis.plot(curve.recall, curve.precision, color="0.75", linewidth=0.8)
            recall, envelope = _envelope(curve.recall, curve.precision)
            axis.plot(recall, envelope, drawstyle="steps-pre", color=f"C{i % 10}", linewidth=1.2)
        ap = np.array([r.ap[k] for r in results])
        spread = f" ± {ap.std(ddof=1):.3f}" if len(ap) > 1 else ""
        title = name if not averaged or np.isnan(ap).any() else f"{name}  {ap.mean():.3f}{spread}"
        axis.set_title(title, fontsize=9, parse_math=False)  # a class may be called Ba$$in
        axis.set(xlim=(0, 1), ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    for axis in axes[len(classes) :]:
        axis.set_axis_off()
    # No labels of the axes: constrained layout would put them under the legend.
    titles = "; in the titles AP (VOC10+)" if averaged else ""
    figure.suptitle(f"Precision over recall, VOC devkit at IoU {results[0].iou:g}{titles}", fontsize=10)
    if len(results) > 1 and runs:
        lines = [Line2D([], [], color=f"C{i % 10}") for i in range(len(results))]
        legend = figure.legend(lines, runs, loc="outside lower center", fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)
    save_figure(figure, path, dpi=120)


def plot_reliability(
    path: str | Path, curves: Mapping[str, Mapping[str, Reliability]], target: str = "share of hits"
) -> None:
    """Draw reliability curves, with the number of detections in each bin below.

    Args:
        path (str | Path): The picture; its suffix says what kind.
        curves (Mapping): Title of a column of panels → name of a line in it → what it shows.
        target (str): What the scores should be the probability of.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(4.6 * len(curves), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(curves), sharex=True, squeeze=False, height_ratios=(3, 1))
    for (title, lines), (curve, counts) in zip(curves.items(), axes.T, strict=True):
        curve.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="--")
        for i, (name, r) in enumerate(lines.items()):
            filled = r.count > 0
            label = f"{name if len(name) <= 24 else '…' + name[-23:]}: ECE {r.ece:.4f}"
            curve.plot(r.score[filled], r.target[filled], "o-", markersize=4, color=f"C{i}", label=label)
            counts.stairs(r.count, np.linspace(0, 1, len(r.count) + 1), color=f"C{i}", linewidth=1.2)
        curve.set_title(title, fontsize=10, parse_math=False)
        curve.set(xlim=(0, 1), ylim=(0, 1), ylabel=target)
        for text in curve.legend(fontsize=9, loc="upper left").get_texts():
            text.set_parse_math(False)
        counts.set(yscale="log", ylim=(0.7, None), xlabel="score", ylabel="number")
        counts.yaxis.set_major_formatter("{x:g}")
        counts.yaxis.set_minor_formatter(NullFormatter())  # its own writes 2×10⁰
        for axis in (curve, counts):
            axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=120)


def _envelope(recall: np.ndarray, precision: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the monotone curve from recall 0 on, down to 0 where the detections end."""
    recall = np.append(recall, recall[-1:] if len(recall) else 0.0)
    height = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return np.insert(recall, 0, 0.0), np.insert(height, 0, height[0])
