# yolo-sos, AGPL-3.0
"""Calibrate a trained checkpoint: fit a map of its scores, fold it into the last layers, judge, write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from ultralytics.utils import LOGGER, colorstr

from yolo_sos.core import FinalLayer, affine_matrix, fold
from yolo_sos.core.checks import boolean, choice, number, up_to_1
from yolo_sos.evaluate.boxes import GroundTruth
from yolo_sos.evaluate.calibration import LEAST_SCORE
from yolo_sos.evaluate.plot import plot_reliability
from yolo_sos.files import atomic_path, write_text
from yolo_sos.yolo.calibrate_report import BranchReport, CalibrationReport
from yolo_sos.yolo.classes import class_layers
from yolo_sos.yolo.evidence import evidence
from yolo_sos.yolo.heads import CLASS_KINDS
from yolo_sos.yolo.job import CheckpointJob, check_free
from yolo_sos.yolo.recording import Pass, branch_arguments, read_truth, record

PREFIX = colorstr("calibrate: ")


class CheckpointCalibration(CheckpointJob):
    """A calibration of a checkpoint, checked and ready to ``run``. See ``calibrate_checkpoint``.

    Attributes:
        split (str): The split that the map is fitted on.
        judge (str): The split that it is judged on.
    """

    names = ("{}-calibrated.pt", "{}-calibrated.json", "{}-reliability.png")

    def __init__(
        self,
        model: str | Path,
        data: str | Path | None = None,
        *,
        per_class: bool = False,
        split: str = "val",
        iou: float | str = 0.5,
        precision: float = 0.9,
        images: int | str = "all",
        **options: Any,
    ):
        """Check the options, then everything else as ``CheckpointJob``."""
        self.per_class = boolean("per_class", per_class)
        self.split = choice("val", "train")("split", split)
        valid_iou = number("a number above 0 and up to 1, or soft", lambda x: 0 < x <= 1)
        self.iou = iou if iou == "soft" else valid_iou("iou", iou)
        self.precision = up_to_1("precision", precision)
        valid_images = number("an integer of at least 2, or all", lambda x: x >= 2, integer=True)
        self.count: int | None = None if images == "all" else valid_images("images", images)
        super().__init__(model, data, kinds=CLASS_KINDS, sizes=lambda available: {}, val=False, **options)
        self.classes = [str(name) for name in self.model.names.values()]  # type: ignore[operator, union-attr]
        self.truths = {self.split: _truth_of(self, self.split)}
        self.judge = self._judge()

    @classmethod
    def check_after(cls, job: CheckpointJob, exist_ok: bool) -> None:
        """Raise unless ``after`` can calibrate the checkpoint that another job is to write, the first of its outputs.

        Raises:
            ValueError: If the job leaves out the val split, or this has no objects to calibrate on.
            FileExistsError: If a result of the calibration exists already and may not be replaced.
        """
        if not job.splits:
            raise ValueError("calibrate=true is fitted on what val=true finds in the val split: leave val on.")
        path = job.outputs[0]
        check_free([path.with_name(name.format(path.stem)) for name in cls.names], exist_ok)
        _truth_of(job, "val")

    @classmethod
    def after(cls, job: CheckpointJob, seen: Pass | None = None) -> CalibrationReport:
        """Calibrate the checkpoint that another job has written, with that job's data, and with the defaults.

        Args:
            job (CheckpointJob): The job, which has called ``check_after`` before its work.
            seen (Pass, optional): What the checkpoint finds in the images of the val split. None: they are run again.
        """
        args = job.data.args
        options = {k: args[k] for k in ("imgsz", "batch", "device")}
        return cls(job.outputs[0], args["data"], **options, seed=job.seed, exist_ok=True).run(seen)

    def run(self, seen: Pass | None = None) -> CalibrationReport:
        """Calibrate, and write the result unless the guard forbids it.

        Args:
            seen (Pass, optional): What the model finds in the images of ``split``, if that is known already.

        Returns:
            (CalibrationReport): What happened.
        """
        branches, weights = [], {}
        layers_of = class_layers(self.model)
        for name, layers in layers_of.items():
            one2one = name == "one2one" if len(layers_of) > 1 else None
            branch, folded = self._branch(one2one, layers, seen if one2one is None else None)
            branches.append(branch)
            weights.update(folded)
        output, json, picture = self.outputs
        report = CalibrationReport(
            model=str(self.checkpoint.path),
            data=self.data.args["data"],
            output=None,
            settings={
                **{"per_class": self.per_class, "split": self.split, "iou": self.iou, "precision": self.precision},
                **{"images": self.count or "all", "seed": self.seed, "imgsz": self.data.args["imgsz"]},
                "least_score": LEAST_SCORE,
            },
            classes=self.classes,
            branches=tuple(branches),
        )
        if report.refusals:
            LOGGER.warning(f"{report.table()}\n\n{PREFIX}{report.refusal()}")
            return report
        with atomic_path(output) as temporary:
            self.checkpoint.save(temporary, weights, report.note(), "calibrations")
            report = replace(report, output=str(output))
            with atomic_path(picture) as drawn:
                plot_reliability(drawn, report.curves(), "share of hits" if self.truths[self.split] else "accuracy")
                write_text(json, report.to_json())
        LOGGER.info(f"\n{report.table()}\n\n{PREFIX}wrote {output}, {json} and {picture}")
        return report

    def _branch(
        self, one2one: bool | None, layers: list[FinalLayer], seen: Pass | None
    ) -> tuple[BranchReport, dict[str, Tensor]]:
        """Fit, fold and judge one branch of the head; return its report, and its weights by layer name."""
        branch_args = {} if one2one is None else branch_arguments(one2one)

        def run(split: str, images: int | None, weights: Sequence[dict[str, Tensor]] = ()) -> Pass:
            args = self.data.validation(split, **branch_args)
            return record(self.checkpoint.validator, args, self.model, weights, images, self.seed)

        seen = seen or run(self.split, self.count)
        task, truth = self.checkpoint.task, self.truths[self.split]
        fitted_on = evidence(seen, 0, truth, task, self.iou)
        mapping = fitted_on.fit(self.per_class)
        weights = {layer.name: self._folded(layer, mapping.scale, mapping.shift) for layer in layers}
        crossed = self.judge == self.split
        # Where it is one split, each half of the images that were fitted on judges the map of the other.
        judged = run(self.judge, self.count if crossed else None, [weights])
        truth = self.truths[self.judge]
        before = evidence(judged, 0, truth, task, self.iou)
        after = evidence(judged, 1, truth, task, self.iou)
        if crossed:
            errors = fitted_on.cross_fitted(self.per_class, self.seed)
        else:
            errors = after.after(before, mapping, judged.conf)
        branch = BranchReport(
            name={None: "", True: "one-to-one branch", False: "one-to-many branch"}[one2one],
            mapping=mapping,
            fitted_on={"split": self.split, "images": fitted_on.images, "samples": len(fitted_on)},
            judged_on={"split": self.judge, "images": before.images, "crossed": crossed},
            before=before.reliability(),
            after=errors,
            metrics_before=judged.metrics[0],
            metrics_after=judged.metrics[1],
            thresholds_before=before.thresholds(self.precision),
            thresholds_after=after.thresholds(self.precision),
            detections=() if truth is None else _detections(judged),
        )
        return branch, weights

    def _folded(self, layer: FinalLayer, scale: Tensor, shift: Tensor) -> Tensor:
        """Return a layer's ``[V b]`` with the map in it, rounded to half precision, as a checkpoint holds it."""
        weight = affine_matrix(layer.module)
        if layer.module.bias is None:
            raise TypeError(f"{layer.name} has no bias: a calibration shifts scores, and needs one.")
        rounded = fold(weight, scale, shift).half()
        if not rounded.isfinite().all():
            raise ValueError(f"{layer.name}: half precision cannot hold its calibrated weights.")
        return rounded.to(weight.dtype)

    def _judge(self) -> str:
        """Return the split to judge on: test if there is one with objects, else val."""
        if self.data.content.get("test"):
            try:
                self.truths["test"] = _truth_of(self, "test")
                return "test"
            except (OSError, ValueError) as e:  # images or labels that are not published
                LOGGER.warning(f"{PREFIX}the test split cannot be judged on, val takes its place: {e}")
        if self.split != "val":
            self.truths["val"] = _truth_of(self, "val")
        return "val"


def _detections(judged: Pass) -> tuple[int, ...]:
    """Return ``BranchReport.detections``."""
    counts = [[len(rows) for _, rows in records] for records in judged.records]
    return *map(sum, counts), *(sum(n >= judged.max_det for n in of) for of in counts)


def _truth_of(job: CheckpointJob, split: str) -> GroundTruth | None:
    """Open a split of a job's data, and return its objects; None for a classifier.

    Raises:
        ValueError: If there is no object in it, or the annotations do not fit the data set.
    """
    job.data.open(split)
    if job.checkpoint.task == "classify":
        return None
    truth = read_truth(job.data.args, split)
    if not truth.positives().any():
        raise ValueError(f"{job.data.args['data']}, split '{split}': no image has an object to calibrate on.")
    return truth


def calibrate_checkpoint(model: str | Path, data: str | Path | None = None, **options: Any) -> CalibrationReport:
    """Calibrate a trained checkpoint; write ``{stem}-calibrated.pt``, its ``.json`` and ``{stem}-reliability.png``.

    Args:
        model (str | Path): A checkpoint of Ultralytics, trained with or without SOS.
        data (str | Path, optional): The data set, as Ultralytics names it. None: that of the training.
        **options (Any): ``per_class`` (bool): a map for each class, off by default; ``split`` (str): what it is fitted
            on, ``val`` by default, or ``train``; ``iou`` (float | str): least IoU of a hit, 0.5 by default, or ``soft``
            for the mean over 0.5 to 0.95; ``precision`` (float): the precision that thresholds are reported for, 0.9
            by default; ``images`` (int | str): how many images of the split, ``all`` by default; ``imgsz``, ``batch``
            (int): those of the training by default; ``device`` (str); ``seed`` (int): 0 by default; ``exist_ok``
            (bool): whether to replace existing files.

    Returns:
        (CalibrationReport): What happened. Its ``output`` is None if the guard refused the map.

    Raises:
        FileNotFoundError: If the checkpoint, the data set or its images are missing.
        FileExistsError: If a result exists already.
        PermissionError: If the checkpoint's folder cannot be written to.
        TypeError: If the file is no checkpoint, or of a model without class layers.
        ValueError: If a setting is wrong, the data do not fit the model, or there is no map to fit: no detections, only
            hits or only misses, or scores that do not rise with the share of hits.

    Examples:
        >>> report = calibrate_checkpoint("runs/detect/train/weights/best.pt", "VOC.yaml")
        >>> print(report.branches[0].before.ece, report.branches[0].after.ece)
    """
    return CheckpointCalibration(model, data, **options).run()
