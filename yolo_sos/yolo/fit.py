# yolo-sos, AGPL-3.0
"""Fit the class layers of a checkpoint to a data set, and write a stock checkpoint for its classes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from ultralytics import __version__ as ultralytics_version
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import DEFAULT_CFG_KEYS, LOGGER, YAML, colorstr

from yolo_sos.config import CHECKPOINT_KEY
from yolo_sos.core import write_weights
from yolo_sos.core.checks import boolean, number, optional
from yolo_sos.files import atomic_path, write_text
from yolo_sos.yolo.calibrate import CheckpointCalibration
from yolo_sos.yolo.calibrate_report import CalibrationReport
from yolo_sos.yolo.checkpoint import UNTRAINED, Checkpoint, write_checkpoint
from yolo_sos.yolo.checkpoint_data import CheckpointData
from yolo_sos.yolo.class_fit import LEAST, ClassFit, default_images, fit_classes, fit_sizes
from yolo_sos.yolo.classes import append_classes, known_classes, listed, resized
from yolo_sos.yolo.fit_report import CheckpointFitReport, class_records
from yolo_sos.yolo.heads import CLASS_KINDS, YoloTask, head_of
from yolo_sos.yolo.images import covering_order, object_classes
from yolo_sos.yolo.job import CheckpointJob
from yolo_sos.yolo.score import class_scores

PREFIX = colorstr("fit: ")


class FitData(CheckpointData):
    """A data set whose classes may be others than the checkpoint's."""

    def __init__(self, checkpoint: Checkpoint, *args: Any, **kwargs: Any):
        """Open it with its own classes, also where the checkpoint was trained with ``single_cls``."""
        checkpoint.args["single_cls"] = False
        super().__init__(checkpoint, *args, **kwargs)
        self.shown = object_classes(self.dataset)
        self.names: dict[int, str] = dict(self.content["names"])
        # Ultralytics checks labels as it reads them, but not those of its cache, which another YAML may have filled.
        if wrong := [c for of in self.shown for c in of if c not in self.names]:
            raise ValueError(
                f"{self.args['data']} names {len(self.names)} classes; labels have class {max(wrong)}, too."
            )

    def check_classes(self, checkpoint: Checkpoint) -> None:
        """Take any classes, but refuse images and keypoints of a form that the model does not have."""
        channels = self.content.get("channels", 3)
        for what, ours, theirs in (
            ("channels", checkpoint.model.yaml.get("channels", channels), channels),  # type: ignore[union-attr, operator]
            ("kpt_shape", getattr(head_of(checkpoint.model), "kpt_shape", None), self.content.get("kpt_shape")),
        ):
            if ours is not None and list(_items(ours)) != list(_items(theirs)):
                raise ValueError(
                    f"{self.args['data']} has {what} {theirs}, the model {ours}: more than class layers would be new."
                )

    def order(self, seed: int) -> list[int]:
        """Return a random order in which each class is seen early, if that can be."""
        return covering_order(self.shown, LEAST, seed)


class CheckpointFit(CheckpointJob):
    """A fit of a checkpoint, checked and ready to ``run``. See ``fit_checkpoint``."""

    names = ("{}-fit.pt", "{}-fit.json", "{}-fit.png")
    opens = FitData
    data: FitData
    calibration: CalibrationReport | None = None  # of the fitted checkpoint, after ``run``

    def __init__(
        self,
        model: str | Path,
        data: str | Path | None = None,
        *,
        images: int | str | None = None,
        ridge: float | None = None,
        add: bool = False,
        old: str | Path | None = None,
        calibrate: bool = False,
        **options: Any,
    ):
        """Check the options, then everything else as ``CheckpointJob``, then the classes."""
        if images != "all":
            optional(number("an integer of at least 3, or all", lambda x: x >= 3, integer=True))("images", images)
        self.ridge = optional(number("a number above 0, or none", lambda x: x > 0))("ridge", ridge)
        self.add, self.old = boolean("add", add), old
        if old is not None and not self.add:
            raise ValueError(f"'old={old}' needs add=true: without it the model's own classes do not stay.")
        self.calibrate = boolean("calibrate", calibrate)
        if self.calibrate and self.add:
            raise ValueError(
                f"'calibrate=true' does not work together with add=true: {data or 'the data set'} does not label the "
                "model's own classes, so that their detections there would count as misses. Calibrate "
                "the fitted checkpoint on images with labels of all classes: yolo-sos calibrate data=…"
            )

        def sizes(available: int) -> dict[str, int]:
            return fit_sizes(available, None if images == "all" else images or default_images(len(self.data.names)))  # type: ignore[arg-type]

        super().__init__(model, data, kinds=CLASS_KINDS, sizes=sizes, **options)
        if self.calibrate:
            CheckpointCalibration.check_after(self, options.get("exist_ok", False))
        self._check_classes()
        if old is not None:
            self.old_data = CheckpointData(
                *(self.checkpoint, old),
                **{"imgsz": self.data.args["imgsz"], "batch": self.data.batch, "device": self.device},
                splits=("val",),
            )
        self.known = known_classes(self.data.names, self.checkpoint.model.names)  # type: ignore[arg-type]
        self.model = resized(self.checkpoint.model, self.data.names, self.seed).to(self.device)
        self.model.args = self.checkpoint.model.args
        self.task = YoloTask(self.model)

    def _check_classes(self) -> None:
        names, checkpoint = self.data.names, self.checkpoint
        seen = {c for of in self.data.shown for c in of}
        if missing := [name for k, name in names.items() if k not in seen]:
            raise ValueError(
                f"{self.data.args['data']}: no training image shows {listed(missing)}. Label some, or leave such "
                "classes out of 'names'."
            )
        if not self.add:
            return
        if checkpoint.task == "classify":
            raise ValueError(
                "add=true is for detectors, whose classes are scored one by one: a classifier's new classes would take "
                "probability from its old ones. Fit it to all classes."
            )
        if known := known_classes(names, checkpoint.model.names):  # type: ignore[arg-type]
            raise ValueError(
                f"add=true: the model has {listed([names[k] for k in known])} already. Leave out add, or these classes."
            )

    def run(self) -> CheckpointFitReport:
        """Fit, and write the result unless there is nothing to gain.

        Returns:
            (CheckpointFitReport): What happened.
        """
        fit = fit_classes(self.model, self.images, self.known, self.ridge, self.seed, progress=True)
        names = self.data.names
        report = CheckpointFitReport(
            **vars(fit.report),
            model=str(self.checkpoint.path),
            data=self.data.args["data"],
            output=None,
            images={name: len(of) for name, of in self.images.sets.items()},
            unfitted=tuple(fit.unfitted),
            settings={"ridge": self.ridge, "add": self.add, "imgsz": self.data.args["imgsz"], "seed": self.seed},
            classes=class_records(names, self.known, self.data.shown, fit.shown, {}, {}),
            metrics_before={},
            metrics_after={},
            old_before={},
            old_after={},
        )
        if report.refusal:
            LOGGER.warning(f"{PREFIX}Nothing was written: {report.refusal}.")
            return report
        if missing := [names[k] for k, targets in enumerate(fit.shown) if targets < 1]:
            raise ValueError(
                f"Hardly any anchor point of the {report.images['fit'] + report.images['selection']} images fitted on "
                f"is assigned to {listed(missing)}: the boxes that the model predicts do not meet its objects. Take "
                "more images (images=all), or larger ones (imgsz)."
            )
        output, json, picture = self.outputs
        with atomic_path(output) as temporary:
            report = self._written(temporary, fit, report)
            report = replace(report, output=str(output))
            picture.unlink(missing_ok=True)  # of an earlier fit
            if report.metrics_after:
                report.plot(picture)
            write_text(json, report.to_json())
        wrote = [str(output), *(path.name for path in (json, picture) if path.exists())]
        LOGGER.info(f"\n{report.table()}\n\n{PREFIX}wrote {', '.join(wrote)}")
        if self.calibrate:
            self.calibration = CheckpointCalibration.after(self)
        return report

    def _written(self, path: Path, fit: ClassFit, report: CheckpointFitReport) -> CheckpointFitReport:
        """Write the checkpoint and return the report of it as Ultralytics reads it again: in half precision."""
        before, scores_before = self._scores(self.model) if self.splits and self.known else ({}, {})
        write_weights(self.model, fit.weights)
        note = {"images": report.images, "settings": report.settings, "ridges": [x.ridge for x in report.layers]}
        self._save(path, self.model, note)
        written = self.read_back(path)
        if not written.before < report.heldout_before:
            raise ValueError(
                f"Rounded to half precision, the model has a held-out loss of {written.before:.5g}, not below the "
                f"{report.heldout_before:.5g} before the fit. Nothing was written."
            )
        metrics, scores = self._scores(written.model) if self.splits else ({}, {})
        classes = class_records(self.data.names, self.known, self.data.shown, fit.shown, scores_before, scores)
        old: list[dict[str, float]] = [{}, {}]
        if self.add:
            whole = append_classes(self.checkpoint.model.to(self.device), self.model)
            self._save(path, whole, note)
            if self.old is not None:
                old = [self._old(m) for m in (self.checkpoint.model, load_checkpoint(path, device=self.device)[0])]
        return replace(  # type: ignore[call-arg]
            report,
            heldout_after=written.before,
            classes=classes,
            metrics_before=before,
            metrics_after=metrics,
            old_before=old[0],
            old_after=old[1],
        )

    def _scores(self, model: nn.Module) -> tuple[dict[str, float], dict[int, float]]:
        return class_scores(self.checkpoint.validator, self.data.validation("val"), model)

    def _old(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics of the old classes on their own val split, with whatever classes the model has."""
        content = {k: v for k, v in self.old_data.content.items() if k in ("train", "val", "kpt_shape", "flip_idx")}
        with TemporaryDirectory() as folder:
            path = Path(folder) / "old.yaml"
            YAML.save(path, {**content, "names": dict(model.names)})  # type: ignore[arg-type]
            args = self.old_data.validation("val", data=str(path))
            return class_scores(self.checkpoint.validator, args, model)[0]

    def _save(self, path: Path, model: nn.Module, note: dict[str, Any]) -> None:
        """Write a model as Ultralytics writes one at the end of a training, with a note in plain values."""
        args = {k: v for k, v in self.checkpoint.args.items() if k in DEFAULT_CFG_KEYS}
        own = {"data": self.data.args["data"], "imgsz": self.data.args["imgsz"], "model": str(self.checkpoint.path)}
        saved = deepcopy(model).half().cpu().requires_grad_(False)
        saved.args = {k: v for k, v in vars(model.args).items() if k in DEFAULT_CFG_KEYS}
        ckpt = {
            **{"epoch": -1, "best_fitness": None, "model": saved, "ema": None, "updates": None, "optimizer": None},
            **{"scaler": None, "train_args": {**args, **own, "resume": False}, "train_metrics": {}},
            **{"train_results": {}, "date": datetime.now().astimezone().isoformat(), "version": ultralytics_version},
            **{"license": "AGPL-3.0 (https://ultralytics.com/license)", "docs": "https://docs.ultralytics.com"},
            CHECKPOINT_KEY: {**UNTRAINED, "fit": note},
        }
        write_checkpoint(path, ckpt)


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def fit_checkpoint(model: str | Path, data: str | Path | None = None, **options: Any) -> CheckpointFitReport:
    """Fit the class layers of a trained checkpoint to a data set, without training.

    Writes ``{stem}-fit.pt``, a stock checkpoint for the data set's classes, ``{stem}-fit.json`` and, with ``val``, the
    picture ``{stem}-fit.png`` beside the checkpoint.

    Args:
        model (str | Path): A pretrained checkpoint of Ultralytics.
        data (str | Path, optional): The data set, as Ultralytics names it. None: that of the training.
        **options (Any): ``images`` (int | str): training images to fit on, or ``all``, 300 by default, 10 per class if
            that is more; ``ridge`` (float): the strength of the pull towards zero, or towards the row of a class that
            the model knows by name, found for each layer by default; ``add`` (bool): append the classes to the model's,
            whose rows stay as they are; ``old`` (str): with ``add``, a data set of the model's classes to score them
            on; ``imgsz``, ``batch`` (int): those of the training by default; ``device`` (str); ``seed`` (int): 0 by
            default; ``val`` (bool): whether to score the val split, on by default; ``calibrate`` (bool): whether to
            calibrate the fitted checkpoint, too, into ``{stem}-fit-calibrated.pt``, off by default; not with ``add``;
            ``exist_ok`` (bool): whether to replace existing files.

    Returns:
        (CheckpointFitReport): What happened. Its ``output`` is None if nothing was written, and ``refusal`` says why.

    Raises:
        FileNotFoundError: If the checkpoint, the data set or its images are missing.
        FileExistsError: If a result exists already.
        PermissionError: If the checkpoint's folder cannot be written to.
        TypeError: If the file is no checkpoint, or of a model without class layers.
        ValueError: If an option is wrong, the model is fused or not finite, or a class cannot be fitted.

    Examples:
        >>> report = fit_checkpoint("yolov8n.pt", "mydata.yaml")
        >>> print(report.table())
    """
    return CheckpointFit(model, data, **options).run()
