# yolo-sos, AGPL-3.0
"""What a model finds in a split of a data set, with several weights of its final layers, in one validation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.utils.metrics import batch_probiou

from yolo_sos.evaluate.boxes import Detections, GroundTruth, snap
from yolo_sos.evaluate.detections import as_trained, in_image, read_data_set
from yolo_sos.evaluate.voc import Matches
from yolo_sos.yolo.images import draw
from yolo_sos.yolo.score import ManyWeights, run_many

if TYPE_CHECKING:
    from ultralytics.engine.validator import BaseValidator
else:
    BaseValidator = object  # a mixin, as ManyWeights


class Recording(BaseValidator):
    """Keeps what one of Ultralytics' validators counts. Stands between ``ManyWeights`` and the validator.

    Attributes:
        records (list): One entry per image: of a detector its file's stem and rows of score, class and four columns,
            the box in pixels of the image or, for oriented boxes, the object of its class that it overlaps most (-1 for
            none), the overlap and two columns of zeros. One entry per batch of a classifier: logits and labels.
        images (int, optional): How many images of the split to run on, drawn at random. None: all.
        seed (int): Chooses them.
    """

    records: list[tuple[Any, Any]]
    images: int | None = None
    seed = 0

    def build_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """Build the data set as Ultralytics does, and keep some of its images."""
        dataset = super().build_dataset(*args, **kwargs)
        if self.images is not None and self.images < len(dataset):
            keep_images(dataset, sorted(draw(len(dataset), None, self.seed)[: self.images]))
        return dataset

    def update_metrics(self, preds: Any, batch: dict[str, Any]) -> None:
        """Keep the predictions, and count them as Ultralytics does."""
        if self.args.task == "classify":
            self.records.append((self._output[1].float().cpu(), batch["cls"].cpu().long()))  # type: ignore[attr-defined]
        else:
            for i, pred in enumerate(preds):
                image = self._prepare_batch(i, batch)  # type: ignore[attr-defined]
                classes = pred["cls"] * (not self.args.single_cls)
                columns = self._overlaps(pred["bboxes"], classes, image) if self.args.task == "obb" else None
                columns = in_image(pred["bboxes"], image) if columns is None else columns
                rows = torch.column_stack([pred["conf"].cpu().double(), classes.cpu().double(), columns])
                self.records.append((Path(image["im_file"]).stem, rows.numpy()))
        super().update_metrics(preds, batch)

    @staticmethod
    def _overlaps(boxes: Tensor, classes: Tensor, image: dict[str, Any]) -> Tensor:
        """Return owner, overlap and two zeros for each oriented box, ``(n, 4)``."""
        columns = torch.zeros(len(boxes), 4, dtype=torch.float64)
        columns[:, 0] = -1
        if len(boxes) and len(image["cls"]):
            same = image["cls"][:, None] == classes[None]
            best, owner = torch.where(same, batch_probiou(image["bboxes"], boxes), -1.0).max(0)
            columns[:, 0] = torch.where(best >= 0, owner, -1).cpu().double()
            columns[:, 1] = best.clamp_min(0).cpu().double()
        return columns


def keep_images(dataset: Any, chosen: Sequence[int]) -> None:
    """Keep some of the images of an Ultralytics data set with validation transforms, in place, in their order."""
    if hasattr(dataset, "samples"):  # of images in folders by class
        dataset.samples = [dataset.samples[i] for i in chosen]
        return
    if dataset.rect:  # each batch has the shape that the largest of its images asks for
        shapes = dataset.batch_shapes[dataset.batch[list(chosen)]]
        dataset.batch = np.arange(len(chosen)) // dataset.batch_size
        dataset.batch_shapes = np.array([shapes[dataset.batch == i].max(0) for i in range(dataset.batch[-1] + 1)])
    for name in ("im_files", "labels", "npy_files", "ims", "im_hw0", "im_hw"):
        setattr(dataset, name, [getattr(dataset, name)[i] for i in chosen])
    dataset.ni = len(chosen)


@dataclass(frozen=True)
class Pass:
    """What one validation gave, for a model's own weights and for others.

    Attributes:
        metrics (list[dict[str, float]]): Ultralytics' metrics: the model's own, then those of each set of weights.
        records (list): The records of each, see ``Recording``; empty if nothing was recorded.
        seconds (dict[str, float]): Time of a plain ``validation``, and of the ``points`` on top of it.
        conf (float): Least confidence of a detection.
        max_det (int): Most detections in an image.
    """

    metrics: list[dict[str, float]]
    records: list[list[tuple[Any, Any]]]
    seconds: dict[str, float]
    conf: float
    max_det: int

    def of(self, which: int) -> Pass:
        """Return what it gave for one set of weights, as if the model had them."""
        return replace(self, metrics=[self.metrics[which]], records=[self.records[which]])


def record(
    validator: type[Any],
    args: dict[str, Any],
    model: nn.Module,
    weights: Sequence[dict[str, Tensor]] = (),
    images: int | None = None,
    seed: int = 0,
    keep: bool = True,
) -> Pass:
    """Validate a model once, for its own weights and for other ones of its final layers.

    Args:
        validator (type): Ultralytics' validator for the task.
        args (dict): Its arguments.
        model (nn.Module): The model, which stays as it is.
        weights (Sequence[dict[str, Tensor]]): Sets of weights, as ``write_weight`` takes them.
        images (int, optional): How many images of the split, drawn by ``seed``. None: all.
        seed (int): Chooses the images.
        keep (bool): Whether to keep what the model finds, by each set of weights.
    """
    start = time.perf_counter()
    attributes = {"weights": list(weights), "records": [], "images": images, "seed": seed}
    mixins = (ManyWeights, Recording) if keep else (ManyWeights,)
    many, own = run_many(mixins, validator, args, model, **attributes)
    seconds = {"validation": time.perf_counter() - start - many.seconds, "points": many.seconds}
    records = [run.records for run in (many, *many._counters)] if keep else []
    return Pass([own, *many.results], records, seconds, many.args.conf, many.args.max_det)


def branch_arguments(one2one: bool) -> dict[str, Any]:
    """Return the argument of a validation that chooses between the two branches of a head that has both."""
    return {"end2end": one2one} if "end2end" in DEFAULT_CFG_DICT else {"nms": False if one2one else None}


def read_truth(args: dict[str, Any], split: str) -> GroundTruth:
    """Return the objects of a split of a detector's data set: those of its VOC XML, which has boxes, or of its labels.

    Args:
        args (dict): Arguments of a validation: data, task and single_cls.
        split (str): The split.
    """
    data_set = read_data_set(args["data"], split, args["task"])
    if args["task"] != "detect":
        data_set = replace(data_set, xml=[])
    return as_trained(data_set.truth(), None, bool(args["single_cls"]))


def matches_of(truth: GroundTruth, records: list[tuple[str, np.ndarray]], task: str) -> Matches:
    """Return the detections of a record, matched to the objects of a ground truth."""
    index = {stem: i for i, stem in enumerate(truth.stems)}
    image = np.repeat([index[stem] for stem, _ in records], [len(rows) for _, rows in records]).astype(int)
    rows = np.concatenate([rows for _, rows in records])
    score, label, columns = rows[:, 0], rows[:, 1].astype(int), rows[:, 2:]
    if task != "obb":
        columns[:, 2:] = np.maximum(columns[:, 2:], columns[:, :2])  # a head without DFL can turn a box inside out
        return Matches.of(truth, Detections.build(truth, image, label, score, snap(columns)))
    order = np.argsort(truth.image, kind="stable")  # labels of an image come in the order of its objects
    first = np.searchsorted(truth.image[order], np.arange(len(truth.images)))
    owner = np.where(columns[:, 0] >= 0, first[image] + columns[:, 0], -1).astype(int)
    owner[owner >= 0] = order[owner[owner >= 0]]
    return Matches(truth, image, label, score, owner, columns[:, 1])
