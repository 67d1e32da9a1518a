# yolo-sos, AGPL-3.0
"""What the calibration of a checkpoint did, as a table and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from yolo_sos.core import OWN_MAP, AffineMap
from yolo_sos.evaluate.calibration import LEAST_SCORE, Reliability
from yolo_sos.files import as_json
from yolo_sos.markdown import markdown_table

FALL = 0.001  # of mAP50-95, or of a classifier's accuracy, that is allowed: rounding the weights to half moves it, too


@dataclass(frozen=True)
class BranchReport:
    """What happened to one branch of the head; most heads have one.

    Attributes:
        name (str): ``one-to-one branch`` or ``one-to-many branch`` of a head that has both, else empty.
        mapping (AffineMap): The map.
        fitted_on (dict): ``split``, ``images`` and ``samples``, detections or images, of the fit.
        judged_on (dict): ``split`` and ``images`` of what follows; ``crossed`` tells whether ``after`` is of two maps,
            each fitted on half of the images and judged on the other, as there is no other split.
        before (Reliability): Calibration errors of the model as it was.
        after (Reliability): The same of the written weights, on the same detections.
        metrics_before (dict[str, float]): Ultralytics' metrics of the model as it was.
        metrics_after (dict[str, float]): The same of the written weights.
        thresholds_before (list[dict]): By class, see ``DetectorEvidence.thresholds``; empty for a classifier.
        thresholds_after (list[dict]): The same of the written weights.
        detections (tuple[int, ...]): Detections before and after, and images with as many as ``max_det`` allows before
            and after; empty for a classifier.
    """

    name: str
    mapping: AffineMap
    fitted_on: dict[str, Any]
    judged_on: dict[str, Any]
    before: Reliability
    after: Reliability
    metrics_before: dict[str, float]
    metrics_after: dict[str, float]
    thresholds_before: list[dict[str, float]]
    thresholds_after: list[dict[str, float]]
    detections: tuple[int, ...]

    def accuracies(self) -> dict[str, tuple[float, float]]:
        """Return the metrics that may not fall, before and after: each mAP50-95 of the task, or top-1 accuracy."""
        keys = [k for k in self.metrics_before if "mAP50-95" in k or "top1" in k]
        return {k: (self.metrics_before[k], self.metrics_after[k]) for k in keys}

    def refusals(self) -> list[str]:
        """Return why the map must not be written: sentences; none if it may."""
        found, of = [], f" of the {self.name}" if self.name else ""
        split = self.judged_on["split"]
        if not self.after.nll < self.before.nll:
            found.append(
                f"the negative log-likelihood{of} on the {split} split does not fall: {self.before.nll:.5g} → "
                f"{self.after.nll:.5g}"
            )
        for key, (before, after) in self.accuracies().items():
            if not after >= before - FALL:
                why = ""
                if self.detections:
                    n, m, full, full_after = self.detections
                    why = (
                        ". The order within a class stays, so it comes from the detector's own cut-offs: of "
                        f"{n} detections {m} are left above its least confidence, and {full_after} images hold as many "
                        f"as max_det allows, {full} before"
                    )
                fall = f"{before:.4f} → {after:.4f}"
                found.append(f"{key}{of} on the {split} split falls by more than {FALL}: {fall}{why}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        m = self.mapping
        columns = {k: getattr(m, k).tolist() for k in ("scale", "shift", "scale_error", "shift_error")}
        plain = {k: v for k, v in vars(self).items() if k not in ("mapping", "before", "after")}
        return {
            **plain,
            "mapping": {**columns, "status": list(m.status)},
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }


@dataclass(frozen=True)
class CalibrationReport:
    """What the calibration of a checkpoint did.

    Attributes:
        model (str): The checkpoint.
        data (str): The data set.
        output (str | None): The file written; None if the guard refused the map.
        settings (dict): The settings, as in ``calibrate_checkpoint``.
        classes (list[str]): Names of the classes.
        branches (tuple[BranchReport, ...]): One, or two of a head with a one-to-one and a one-to-many branch.
    """

    model: str
    data: str
    output: str | None
    settings: dict[str, Any]
    classes: list[str]
    branches: tuple[BranchReport, ...]

    @property
    def refusals(self) -> list[str]:
        """Why nothing was written: sentences; none if the guard accepts the map."""
        return [why for branch in self.branches for why in branch.refusals()]

    def refusal(self) -> str:
        """Return why nothing was written, as one text."""
        return f"Nothing was written: {'; '.join(self.refusals)}."

    def note(self) -> dict[str, Any]:
        """Return what the checkpoint itself keeps: the settings and the maps, in plain values."""
        maps = [{"branch": b.name, **b.to_dict()["mapping"]} for b in self.branches]
        return {"settings": self.settings, "maps": maps}

    def curves(self) -> dict[str, dict[str, Reliability]]:
        """Return what ``plot_reliability`` draws: the reliability before and after, of each branch."""
        titles = [f"{b.name or 'all classes'}, {b.judged_on['split']} split" for b in self.branches]
        return {t: {"before": b.before, "after": b.after} for t, b in zip(titles, self.branches, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            **{k: v for k, v in vars(self).items() if k != "branches"},
            "branches": [b.to_dict() for b in self.branches],
            "refusals": self.refusals,
        }

    def to_json(self) -> str:
        """Return the report as JSON; what is not a number there is null."""
        return as_json(self.to_dict())

    def table(self) -> str:
        """Return the report as text, in Markdown."""
        return "\n\n".join(self._branch(b) for b in self.branches)

    def _branch(self, b: BranchReport) -> str:
        title = f"{self.model}{f', {b.name}' if b.name else ''}"
        fitted, judged = b.fitted_on, b.judged_on
        samples, others = f"{fitted['images']} images", f"{judged['images']} images"
        if b.detections:
            samples = f"{fitted['samples']} detections with a score of at least {LEAST_SCORE:g} in {samples}"
            others = f"{b.before.samples} in {others}"
        lines = [
            f"{title}: fitted on {samples} of the {fitted['split']} split, judged on {others} of the "
            f"{judged['split']} split."
        ]
        if judged["crossed"]:
            rest = "thresholds and mAP are" if b.detections else "the accuracy is"
            lines.append(
                "There is no test split. The errors after it are of two maps, each fitted on half of the images and "
                f"judged on the other; {rest} of the written map on images that it was fitted on, and "
                f"{'flatter' if b.detections else 'flatters'} it."
            )
        errors = {k: (v, b.after.errors()[k]) for k, v in b.before.errors().items() if not math.isnan(v)}
        rows = [[k, f"{v:.4f}", f"{w:.4f}"] for k, (v, w) in {**errors, **b.accuracies()}.items()]
        lines += ["", markdown_table([["error", "before", "after"], *rows]).rstrip()]
        return "\n".join([*lines, "", *self._maps(b)])

    def _maps(self, b: BranchReport) -> list[str]:
        """Return the map, where it is one for all, and a table of what differs by class."""
        m = b.mapping
        scale, shift = (
            [f"{value:.3f} ± {error:.3f}" for value, error in zip(*columns, strict=True)]
            for columns in ((m.scale.tolist(), m.scale_error.tolist()), (m.shift.tolist(), m.shift_error.tolist()))
        )
        head, rows = ["class"], [[name] for name in self.classes]
        if OWN_MAP in m.status:
            others = [(name, why) for name, why in zip(self.classes, m.status, strict=True) if why != OWN_MAP]
            shared = [f"{name} ({_reason(why)})" for name, why in others]
            lines = [f"The map of all classes serves {', '.join(shared)}."] if shared else []
            head += ["a", "b"]
            rows = [[*row, *ab] for row, *ab in zip(rows, scale, shift, strict=True)]
        else:
            lines = [f"One map for all classes: z → a·z + b, a = {scale[0]}, b = {shift[0]}."]
            if self.settings["per_class"]:
                lines.append(f"No class has one of its own, such as {self.classes[0]} ({_reason(m.status[0])}).")
        if b.thresholds_before:
            of = f"for precision {self.settings['precision']:g}"
            head += ["best F1 at", "after", "F1", "after", of, "after", "recall", "after"]
            for row, *both in zip(rows, b.thresholds_before, b.thresholds_after, strict=True):
                row += [_number(t[k]) for k in ("best_f1", "f1", "precision", "recall") for t in both]
        return lines if len(head) == 1 else [*lines, "", markdown_table([head, *rows]).rstrip()]


def _reason(status: str) -> str:
    """Return why a class shares the map of all, see ``AffineMap.status``."""
    return status.partition(": ")[2]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
