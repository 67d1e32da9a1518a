# yolo-sos, AGPL-3.0
"""Present an evaluation: as a table, as JSON, and in notes on why the metrics differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from yolo_sos.evaluate.boxes import GroundTruth
from yolo_sos.evaluate.calibration import BINS, LA_BINS, LEAST_SCORE
from yolo_sos.evaluate.voc import mean_ap
from yolo_sos.files import finite
from yolo_sos.markdown import markdown_table, mean_std


@dataclass(frozen=True, eq=False)
class Scores:
    """The numbers of one set of detections.

    Attributes:
        name (str): What was evaluated, such as the path of the weights.
        ap (dict[str, np.ndarray]): AP of each class under each metric, shape (K,); NaN where it is undefined.
        details (dict[str, Any]): What else goes into the JSON file.
    """

    name: str
    ap: dict[str, np.ndarray]
    details: dict[str, Any] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Return the mean over classes under each metric."""
        return {metric: mean_ap(ap) for metric, ap in self.ap.items()}


def table(truth: GroundTruth, runs: Sequence[Scores]) -> str:
    """Lay out AP by class and metric, and with several runs also by run, as aligned Markdown.

    Of several runs, which have the same metrics, it shows mean ± sample standard deviation, and a second table, after a
    blank line, has a row for each.
    """
    metrics = list(runs[0].ap)
    difficult = np.bincount(truth.label[truth.difficult], minlength=len(truth.classes))
    rows = [["class", "objects", "difficult", *metrics]]
    for k, name in enumerate(truth.classes):
        counts = [str(truth.positives()[k]), str(difficult[k]) if truth.difficult_known else "?"]
        rows.append([name, *counts, *(_cell([float(r.ap[m][k]) for r in runs]) for m in metrics)])
    counts = [str(truth.positives().sum()), str(difficult.sum()) if truth.difficult_known else "?"]
    rows.append(["**mean**", *counts, *(_cell([r.means()[m] for r in runs]) for m in metrics)])
    text = markdown_table(rows)
    return f"{text}\n{_by_run(runs)}" if len(runs) > 1 else text


def tables(truth: GroundTruth, runs: Sequence[Scores]) -> str:
    """Lay out AP by class and metric, a table for each run, and one of their means over classes."""
    return "\n".join([*(f"{r.name}\n\n{table(truth, [r])}" for r in runs), _by_run(runs)])


def calibration_tables(
    classes: Sequence[str], runs: Sequence[Scores], precision: float, *, averaged: bool = True
) -> str:
    """Lay out calibration errors by run, and thresholds by class, as aligned Markdown.

    Thresholds are the means of the runs, or, where these are not ``averaged``, have a table for each. Runs without
    ``calibration`` in their details have none; where no run has any, the text is empty.
    """
    found = [(r.name, r.details["calibration"]) for r in runs if r.details.get("calibration")]
    if not found:
        return ""
    errors = ("ECE", "LaECE", "NLL", "Brier")
    rows = [[name, str(c["samples"]), *(_cell([c[e]]) for e in errors)] for name, c in found]
    if averaged and len(found) > 1:
        rows.append(["**mean**", "", *(_cell([c[e] for _, c in found]) for e in errors)])
    parts = [markdown_table([["run", "detections", *errors], *rows])]
    head = ["class", "best F1 at", "F1", f"precision {precision:g} at", "recall"]
    for group in [found] if averaged else [[run] for run in found]:
        judged = [[c["thresholds"][k] for _, c in group] for k in range(len(classes))]
        keys = ("best_f1", "f1", "precision", "recall")
        by_class = [[n, *(_cell([t[key] for t in of]) for key in keys)] for n, of in zip(classes, judged, strict=True)]
        parts.append(("" if averaged else f"{group[0][0]}\n\n") + markdown_table([head, *by_class]))
    return "\n".join(parts)


def report_json(truth: GroundTruth, runs: Sequence[Scores], *, averaged: bool = True, **header: Any) -> dict[str, Any]:
    """Return header, ground truth, mean and standard deviation over the runs, and each run, as JSON can hold them.

    What is undefined is None, so are mean and standard deviation of runs that are not ``averaged``. The runs, at least
    one, have the same metrics.
    """
    positives = truth.positives().tolist()
    difficult = np.bincount(truth.label[truth.difficult], minlength=len(truth.classes)).tolist()
    means = {m: [r.means()[m] for r in runs] for m in runs[0].ap}
    report = {
        **header,
        "ground_truth": {
            "images": len(truth.images),
            "objects": dict(zip(truth.classes, positives, strict=True)),
            "difficult": dict(zip(truth.classes, difficult, strict=True)) if truth.difficult_known else None,
        },
        "mean": {m: float(np.mean(values)) if averaged else None for m, values in means.items()},
        "std": {
            m: float(np.std(values, ddof=1)) if averaged and len(runs) > 1 else None for m, values in means.items()
        },
        "runs": [
            {
                "name": r.name,
                "mean": r.means(),
                "per_class": {c: {m: float(ap[k]) for m, ap in r.ap.items()} for k, c in enumerate(truth.classes)},
                **r.details,
            }
            for r in runs
        ],
    }
    return finite(report)


def notes(truth: GroundTruth, iou: float) -> list[str]:
    """Return sentences on why the metrics differ and what about this ground truth limits them.

    The devkit's metric has the threshold ``iou``.
    """
    lines = [
        f"VOC is the devkit's metric at IoU {iou:g}: a detection belongs to the object it overlaps most, and difficult "
        "objects count neither way. VOC10+ is the area under the monotone precision-recall curve, VOC07 the mean of "
        "its height at 11 recalls (in integers, so that a recall of exactly 0.3 reaches 0.3).",
        "COCO gives a detection the best object still free, takes difficult objects as crowd and the 100 best "
        "detections per image and class, and averages precision at 101 recalls; AP is the mean over IoU 0.50 to 0.95.",
        "Ultralytics interpolates linearly between the points of the curve before it averages at 101 recalls, and "
        "leaves difficult objects out of its labels, so that a detection on one is false.",
        f"ECE, LaECE, NLL and Brier score take detections with a score of at least {LEAST_SCORE:g}; a hit is a true "
        f"positive of VOC at IoU {iou:g}. ECE has {BINS} bins for all classes together; LaECE has {LA_BINS} for each, "
        "and the IoU with its object as the target of a hit. A threshold for a precision is the lowest that gives it.",
    ]
    lines += truth.remarks
    if repeated := np.count_nonzero(truth.repeated() & ~truth.difficult):
        lines.append(
            f"Objects repeat the class and box of another one ({repeated}): VOC and COCO count them, the columns "
            "of Ultralytics do not, as its labels hold each object once."
        )
    if not truth.difficult_known:
        lines.append(
            "Difficult flags are unknown: YOLO labels do not hold them, so every object counts as one to be found."
        )
    if undefined := [name for name, n in zip(truth.classes, truth.positives(), strict=True) if not n]:
        lines.append(f"Without an object to be found, so without AP and not in the mean: {', '.join(undefined)}.")
    return lines


def _by_run(runs: Sequence[Scores]) -> str:
    by_run = [[r.name, *(_cell([mean]) for mean in r.means().values())] for r in runs]
    return markdown_table([["run", *runs[0].ap], *by_run])


def _cell(values: Sequence[float]) -> str:
    return "–" if np.isnan(values).any() else mean_std(values, ".4f")
