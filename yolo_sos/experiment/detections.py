# yolo-sos, AGPL-3.0
"""What a model detects in a split of a data set, taken from the host's own validation, and what is there to detect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from ultralytics import YOLO
from ultralytics.data import YOLODataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils import ops

from yolo_sos.data.voc import read_annotation
from yolo_sos.evaluate import Detections, GroundTruth, snap, voc_truth
from yolo_sos.evaluate.boxes import first_duplicate


@dataclass(frozen=True)
class DataSet:
    """A split of a data set: its images with their YOLO labels, as the host reads them, and its VOC XML, if any.

    Attributes:
        names (tuple[str, ...]): Class names by class index.
        labels (list[dict]): The host's label of each image.
        xml (list[Path]): The VOC annotation of each image; empty if the data YAML has no key `voc`.
    """

    names: tuple[str, ...]
    labels: list[dict[str, Any]]
    xml: list[Path]

    def stems(self) -> list[str]:
        """Return the names of the images without folder and suffix."""
        return [Path(d["im_file"]).stem for d in self.labels]

    def truth(self) -> GroundTruth:
        """Return the best ground truth there is: the VOC XML, or the labels, which do not know difficult objects.

        Raises:
            FileNotFoundError: If an image has no annotation.
            ValueError: If an annotation is malformed, or one of its classes is unknown.
        """
        return xml_truth(self.xml, self.names) if self.xml else _label_truth(self)


@dataclass(frozen=True)
class Validation:
    """What the host's validation of one model gave.

    Attributes:
        found (Detections): Its detections, in pixels of the original images, class indices of the ground truth.
        metrics (dict[str, float]): The host's metrics, such as ``metrics/mAP50(B)``, and ``fitness``.
        settings (dict): What it ran with: imgsz, rect, batch, conf, iou and max_det, which the host may raise.
        names (tuple[str, ...]): The classes of the model. The host goes by their number: where they are not those of
            the data set, its metrics measure nothing.
    """

    found: Detections
    metrics: dict[str, float]
    settings: dict[str, Any]
    names: tuple[str, ...]


def read_data_set(path: str, split: str) -> DataSet:
    """Read one split of a detection data set; the key `voc` of the data YAML names the folder of its XML.

    Args:
        path (str): The data YAML. A data set that is not there is downloaded, as the host does.
        split (str): ``train``, ``val`` or ``test``.

    Returns:
        (DataSet): Its images, in the host's order.

    Raises:
        FileNotFoundError: If there is no such file, split or image.
        ValueError: If the data YAML is malformed, or two images have one id; names the file.
    """
    try:
        data = check_det_dataset(path, split=split)
        labels = YOLODataset(img_path=data[split], data=data, task="detect", augment=False).labels
    except (SyntaxError, TypeError, AssertionError) as e:  # how Ultralytics refuses a data YAML
        raise ValueError(f"{path}: {e}") from e
    files = [Path(d["im_file"]) for d in labels]
    if (twice := first_duplicate(f.stem for f in files)) is not None:
        raise ValueError(
            f"{path}: two images of split '{split}' are called '{twice}'; an id must say which one is meant"
        )
    names = tuple(data["names"].values())
    if not (folder := data.get("voc")):
        return DataSet(names, labels, [])
    root = Path(data["path"]).resolve() / "images"
    if outside := [f for f in files if not f.is_relative_to(root)]:
        raise ValueError(f"{path}: 'voc: {folder}' is to be laid out like {root}, but {outside[0]} is not in there")
    return DataSet(names, labels, [root.parent / folder / f.relative_to(root).with_suffix(".xml") for f in files])


def xml_truth(paths: Sequence[Path], names: Sequence[str] | None) -> GroundTruth:
    """Read VOC annotations.

    Args:
        paths (Sequence[Path]): The XML files, one per image.
        names (Sequence[str] | None): Class names in the order of their indices; None for those that occur, sorted.

    Returns:
        (GroundTruth): The objects.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is malformed, or one of its classes is unknown; names file and object.
    """
    if missing := [p for p in paths if not p.is_file()]:
        raise FileNotFoundError(f"{missing[0]}: no such file; {len(missing)} of {len(paths)} annotations are missing")
    return voc_truth([read_annotation(p) for p in paths], names, str(paths[0].parent))


def load_detector(path: Path, truth: GroundTruth) -> YOLO:
    """Load a checkpoint, and check that it detects classes of the ground truth.

    Args:
        path (Path): The checkpoint.
        truth (GroundTruth): What it is to be judged by.

    Returns:
        (YOLO): The model.

    Raises:
        ValueError: If it cannot be loaded, is no detector, or predicts a class that the ground truth does not know.
    """
    try:
        model = YOLO(path)
    except Exception as e:  # torch and Ultralytics raise whatever they stumble over
        raise ValueError(f"{path}: not a checkpoint that Ultralytics can load: {type(e).__name__}: {e}") from e
    if model.task != "detect":
        raise ValueError(f"{path}: a model for '{model.task}'; to be evaluated here it must be one for 'detect'")
    if unknown := [name for name in model.names.values() if name not in truth.classes]:
        raise ValueError(f"{path}: predicts an unknown class '{unknown[0]}'; there are {', '.join(truth.classes)}")
    return model


def detect(path: Path, truth: GroundTruth, *, clip: bool = False, **settings: Any) -> Validation:
    """Run the host's validation of a detector, and take its detections on the way: one pass for both.

    Args:
        path (Path): The checkpoint.
        truth (GroundTruth): Images and classes of the split that is validated on (see `DataSet.truth`).
        clip (bool): Cut boxes off at the image's border, as predict does; val judges them uncut.
        **settings (Any): The host's arguments of val: data, split, imgsz, …

    Returns:
        (Validation): Detections and metrics. No file is left behind.

    Raises:
        ValueError: As `load_detector`.
        RuntimeError: If the validation fails.
    """
    model = load_detector(path, truth)
    images = {stem: i for i, stem in enumerate(truth.stems)}
    names = tuple(model.names[c] for c in range(len(model.names)))
    labels = np.array([truth.classes.index(name) for name in names])
    found: list[tuple[int, np.ndarray]] = []  # image and rows of score, class, x1, y1, x2, y2
    used: dict[str, Any] = {}

    class Collector(DetectionValidator):
        def update_metrics(self, preds: list[dict[str, Any]], batch: dict[str, Any]) -> None:
            for i, pred in enumerate(preds):
                image = self._prepare_batch(i, batch)
                boxes = ops.xyxy2xywh(pred["bboxes"].cpu().double())  # as xyxy, scale_boxes would clip them too
                boxes = ops.scale_boxes(image["imgsz"], boxes, image["ori_shape"], image["ratio_pad"], xywh=True)
                boxes = ops.xywh2xyxy(boxes)
                if clip:
                    ops.clip_boxes(boxes, image["ori_shape"])
                rows = torch.column_stack([pred["conf"].cpu().double(), pred["cls"].cpu().double(), boxes])
                found.append((images[Path(image["im_file"]).stem], rows.numpy()))
            super().update_metrics(preds, batch)

        def finalize_metrics(self) -> None:
            used.update({k: getattr(self.args, k) for k in ("imgsz", "rect", "batch", "conf", "iou", "max_det")})
            super().finalize_metrics()

    try:
        with TemporaryDirectory() as folder:
            metrics = model.val(validator=Collector, plots=False, project=folder, **settings)
    except Exception as e:  # the inputs were checked, so this is none of theirs
        raise RuntimeError(f"{path}: Ultralytics' val failed") from e
    table = np.concatenate([rows for _, rows in found])
    detections = Detections.build(
        truth,
        image=np.repeat([i for i, _ in found], [len(rows) for _, rows in found]),
        label=labels[table[:, 1].astype(int)],
        score=table[:, 0],
        boxes=snap(table[:, 2:]),
        where=f"{path}, detection {{}}".format,
    )
    return Validation(detections, metrics.results_dict, used, names)


def _label_truth(data: DataSet) -> GroundTruth:
    """Make a ground truth of YOLO labels, which are fractions of the image's size."""
    labels = sorted(data.labels, key=lambda d: Path(d["im_file"]).stem)
    boxes = []
    for d in labels:
        (height, width), (centre, size) = d["shape"], np.hsplit(np.asarray(d["bboxes"], np.float64).reshape(-1, 4), 2)
        boxes.append(np.hstack([centre - size / 2, centre + size / 2]) * [width, height, width, height])
    counts = [len(b) for b in boxes]
    return GroundTruth.build(
        classes=data.names,
        images=[Path(d["im_file"]).stem for d in labels],
        image=np.repeat(np.arange(len(labels)), counts),
        label=np.concatenate([d["cls"].reshape(-1) for d in labels]).astype(int),
        boxes=snap(np.concatenate(boxes)),
    )
