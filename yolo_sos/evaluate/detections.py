# yolo-sos, AGPL-3.0
"""What Ultralytics is needed for: data sets, the detections of a model, and Ultralytics' own metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from ultralytics import YOLO
from ultralytics.data import YOLODataset
from ultralytics.data.utils import check_class_names, check_det_dataset
from ultralytics.engine.validator import BaseValidator
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils import YAML, ops
from ultralytics.utils.checks import check_file
from ultralytics.utils.metrics import ap_per_class, box_iou
from yaml import YAMLError

from yolo_sos.data.images import check_complete
from yolo_sos.data.voc import read_annotation
from yolo_sos.evaluate.boxes import Detections, GroundTruth, first_duplicate, snap
from yolo_sos.evaluate.voc_files import voc_truth

# What Ultralytics raises at a data YAML, and at data that do not fit it
BAD_DATA = (SyntaxError, TypeError, AssertionError, KeyError, AttributeError, ValueError, RuntimeError, YAMLError)


@dataclass(frozen=True)
class DataSet:
    """A split of a data set: its images with their YOLO labels, as Ultralytics reads them, and its VOC XML, if any.

    Attributes:
        path (str): The data YAML.
        labels (list[dict]): Ultralytics' label of each image.
        xml (list[Path]): The VOC annotation of each image; empty if the data YAML has no key `voc`.
    """

    path: str
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
        if self.xml:
            sizes = {s: d["shape"] for s, d in zip(self.stems(), self.labels, strict=True)}
            try:
                return xml_truth(self.xml, self.path, sizes)
            except ValueError as e:
                raise ValueError(
                    f"{e}. Make the annotations fit {self.path}, or leave out its key 'voc': then the YOLO labels are "
                    "the truth, which do not know difficult objects."
                ) from e
        labels = sorted(self.labels, key=lambda d: Path(d["im_file"]).stem)
        boxes = []
        for d in labels:  # fractions of the image's size
            height, width = d["shape"]
            centre, size = np.hsplit(np.asarray(d["bboxes"], np.float64).reshape(-1, 4), 2)
            boxes.append(np.hstack([centre - size / 2, centre + size / 2]) * [width, height, width, height])
        return GroundTruth.build(
            classes=class_names(self.path)[1],
            images=[Path(d["im_file"]).stem for d in labels],
            image=np.repeat(np.arange(len(labels)), [len(b) for b in boxes]),
            label=np.concatenate([d["cls"].reshape(-1) for d in labels]).astype(int),
            boxes=snap(np.concatenate(boxes)),
        )


@dataclass(frozen=True)
class Validation:
    """What Ultralytics' validation of one model gave.

    Attributes:
        found (Detections): Its detections, in pixels of the original images, class indices of the ground truth.
        metrics (dict[str, float]): Ultralytics' metrics, such as ``metrics/mAP50(B)``, and ``fitness``.
        settings (dict): What it ran with: imgsz, rect, batch, conf, iou and max_det, which Ultralytics may raise.
        names (tuple[str, ...]): The classes of the model. Ultralytics goes by their number: where they are not those of
            the data set, its metrics measure nothing.
    """

    found: Detections
    metrics: dict[str, float]
    settings: dict[str, Any]
    names: tuple[str, ...]


class _ListedDataset(YOLODataset):
    """Remembers which images it was given: Ultralytics drops those that fail its checks without an error."""

    listed: list[str]

    def get_img_files(self, img_path: str | list[str]) -> list[str]:
        self.listed = super().get_img_files(img_path)
        return self.listed


def read_data_set(path: str, split: str, task: str = "detect") -> DataSet:
    """Read one split of a data set; the key `voc` of the data YAML names the folder of its XML, beside `images`.

    Args:
        path (str): The data YAML. A data set that is not there is downloaded, as by Ultralytics.
        split (str): ``train``, ``val`` or ``test``.
        task (str): Ultralytics' task, which says what labels hold: ``detect``, ``segment``, ``pose`` or ``obb``.

    Raises:
        FileNotFoundError: If there is no such file, split or image.
        ValueError: If the data YAML is malformed, two images have one id, Ultralytics would leave out an image, or an
            annotation has no image, so that its objects would not be evaluated; names the file.
    """
    try:
        data = check_det_dataset(path, split=split)
        data_set = _ListedDataset(img_path=data[split], data=data, task=task, augment=False)
    except BAD_DATA as e:
        raise ValueError(f"{path}: {type(e).__name__}: {e}") from e
    files = [Path(d["im_file"]) for d in data_set.labels]
    check_complete(data_set.listed, files, f"{path}, split '{split}'")
    if (twice := first_duplicate(f.stem for f in files)) is not None:
        raise ValueError(f"{path}: two images of split '{split}' are called '{twice}'; ids must differ")
    source = str(data.get("yaml_file", path))
    if not (folder := data.get("voc")):
        return DataSet(source, data_set.labels, [])
    xml = [_xml_of(f, folder, path) for f in files]
    parts = [Path(p) for p in ([data[split]] if isinstance(data[split], str) else data[split])]
    found = {x for p in parts if p.is_dir() for x in _xml_of(p / "any.jpg", folder, path).parent.rglob("*.xml")}
    if alone := sorted(found - {*xml}):
        raise ValueError(
            f"{path}, split '{split}': annotations have no image that Ultralytics reads ({len(alone)}), such as "
            f"{alone[0]}; their objects would not be evaluated: add the images, or remove the annotations"
        )
    return DataSet(source, data_set.labels, xml)


def class_names(path: str) -> tuple[list[str], list[str]]:
    """Read the class names of a data YAML, in the order of their indices.

    Returns:
        written (list[str]): As the YAML has them, which is what annotations call them.
        used (list[str]): As Ultralytics and its models call them: ImageNet's n01440764 becomes tench.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has no class names, or two classes get the same name.
    """
    try:
        content = YAML.load(check_file(path if Path(path).suffix else f"{path}.yaml"))  # as check_det_dataset
        names = content["names"] if "names" in content else [f"class_{i}" for i in range(content["nc"])]
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        by_index = {int(k): str(name) for k, name in pairs}
        written, used = ([d[i] for i in range(len(d))] for d in (by_index, check_class_names(names)))
    except BAD_DATA as e:
        raise ValueError(f"{path}: must be YAML with the class names under 'names': {type(e).__name__}: {e}") from e
    if (twice := first_duplicate(used)) is not None:
        raise ValueError(f"{path}: two classes are called '{twice}' by Ultralytics, of {', '.join(written[:5])}, ...")
    return written, used


def xml_truth(paths: Sequence[Path], data: str | None, shapes: dict[str, tuple[int, int]] | None = None) -> GroundTruth:
    """Read VOC annotations, one per image, with height and width by image id, if known.

    The data YAML names the classes in the order of their indices; without it they are those that occur, sorted.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is malformed, or one of its classes is unknown; names file and object.
    """
    if missing := [p for p in paths if not p.is_file()]:
        raise FileNotFoundError(f"{missing[0]}: no such file; {len(missing)} of {len(paths)} annotations are missing")
    written, used = class_names(data) if data else (None, None)
    truth = voc_truth(
        [read_annotation(p) for p in paths], written, (lambda i: shapes[i][::-1]) if shapes is not None else None
    )
    return replace(truth, classes=tuple(used)) if used else truth


def as_trained(truth: GroundTruth, classes: int | Sequence[int] | None, single_cls: bool) -> GroundTruth:
    """Return the objects that a training with Ultralytics' settings ``classes`` and ``single_cls`` was asked for.

    Args:
        truth (GroundTruth): All objects.
        classes (int | Sequence[int] | None): Indices of the classes that count; None for all.
        single_cls (bool): Take all objects for one class, which Ultralytics calls ``item``.
    """
    if classes is not None:
        counts = np.isin(truth.label, classes)
        columns = ("image", "label", "boxes", "difficult", "area")
        truth = replace(truth, **{column: getattr(truth, column)[counts] for column in columns})
    if single_cls:
        truth = replace(truth, classes=("item",), label=np.zeros_like(truth.label), category_ids=(1,))
    return truth


def load_detector(path: Path, truth: GroundTruth) -> YOLO:
    """Load a checkpoint, and check that it detects classes of the ground truth.

    Raises:
        ValueError: If it cannot be loaded, is no detector, or predicts a class that the ground truth does not know.
    """
    try:
        model = YOLO(path)
    except Exception as e:  # torch and Ultralytics raise errors of any kind
        raise ValueError(f"{path}: not a checkpoint that Ultralytics can load: {type(e).__name__}: {e}") from e
    if model.task != "detect":
        raise ValueError(f"{path}: a model for '{model.task}'; to be evaluated here it must be one for 'detect'")
    if unknown := [name for name in model.names.values() if name not in truth.classes]:
        raise ValueError(f"{path}: predicts an unknown class '{unknown[0]}'; there are {', '.join(truth.classes)}")
    return model


def in_image(boxes: torch.Tensor, image: dict[str, Any]) -> torch.Tensor:
    """Return detected boxes in pixels of the original image, uncut, float64 on the CPU.

    Args:
        boxes (torch.Tensor): x1, y1, x2, y2 in pixels of the model's input, ``(n, 4)``.
        image (dict): What a validator of Ultralytics prepares of the image.
    """
    boxes = ops.xyxy2xywh(boxes.cpu().double())  # as xyxy, scale_boxes would clip them
    return ops.xywh2xyxy(ops.scale_boxes(image["imgsz"], boxes, image["ori_shape"], image["ratio_pad"], xywh=True))


def detect(path: Path, truth: GroundTruth, *, clip: bool = False, **settings: Any) -> Validation:
    """Run Ultralytics' validation of a detector, and take its detections on the way: one pass for both.

    Args:
        path (Path): The checkpoint.
        truth (GroundTruth): Images and classes of the split that is validated on (see `DataSet.truth`).
        clip (bool): Cut boxes off at the image's border, as predict does; val judges them uncut.
        **settings (Any): Ultralytics' arguments of val: data, split, imgsz, …

    Returns:
        (Validation): Detections and metrics. No file is left behind.

    Raises:
        ValueError: As `load_detector`, or if two images of the ground truth have one file name.
        RuntimeError: If the validation fails.
    """
    model = load_detector(path, truth)
    if (twice := first_duplicate(truth.stems)) is not None:
        raise ValueError(f"two images of the annotations are called '{twice}'; file names must differ")
    images = {stem: i for i, stem in enumerate(truth.stems)}
    names = tuple(model.names[c] for c in range(len(model.names)))
    labels = np.array([truth.classes.index(name) for name in names])
    found: list[tuple[int, np.ndarray]] = []  # image and rows of score, class, x1, y1, x2, y2
    used: dict[str, Any] = {}

    class Recorder(DetectionValidator):
        """Records the detections that the validator counts."""

        def update_metrics(self, preds: list[dict[str, Any]], batch: dict[str, Any]) -> None:
            for i, pred in enumerate(preds):
                image = self._prepare_batch(i, batch)
                boxes = in_image(pred["bboxes"], image)
                if clip:
                    ops.clip_boxes(boxes, image["ori_shape"])
                rows = torch.column_stack([pred["conf"].cpu().double(), pred["cls"].cpu().double(), boxes])
                found.append((images[Path(image["im_file"]).stem], rows.numpy()))
            used.update({k: getattr(self.args, k) for k in ("imgsz", "rect", "batch", "conf", "iou", "max_det")})
            super().update_metrics(preds, batch)

    try:
        with TemporaryDirectory() as folder:
            metrics = model.val(validator=Recorder, plots=False, project=folder, **settings)
    except Exception as e:  # the inputs were checked before
        raise RuntimeError(f"{path}: Ultralytics' val failed: {type(e).__name__}: {e}") from e
    table = np.concatenate([rows for _, rows in found])
    image = np.repeat([i for i, _ in found], [len(rows) for _, rows in found])
    label, boxes = labels[table[:, 1].astype(int)], snap(table[:, 2:])
    detections = Detections.build(truth, image, label, table[:, 0], boxes, f"{path}, detection {{}}".format)
    return Validation(detections, metrics.results_dict, used, names)


def ultralytics_ap(truth: GroundTruth, found: Detections) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate detections by Ultralytics' own code, against the objects that its labels would hold.

    These are neither difficult nor repeated.

    Returns:
        ap50 (np.ndarray): AP at an IoU of 0.5, shape (K,); NaN without objects.
        ap (np.ndarray): Mean AP over IoU 0.5 to 0.95, shape (K,); NaN without objects.
    """
    matcher = SimpleNamespace(iouv=torch.linspace(0.5, 0.95, 10))  # all that match_predictions asks of a validator
    objects = np.flatnonzero(~truth.difficult & ~truth.repeated())
    objects = objects[np.argsort(truth.image[objects], kind="stable")]
    order = np.lexsort((found.label, -found.score, found.image))  # the same for detections from files of any format
    every = np.arange(len(truth.images) + 1)
    starts, object_starts = (np.searchsorted(i, every) for i in (found.image[order], truth.image[objects]))
    true = np.zeros((len(found), 10), bool)
    for i in range(len(truth.images)):
        d, o = order[starts[i] : starts[i + 1]], objects[object_starts[i] : object_starts[i + 1]]
        if len(d) and len(o):
            overlap = box_iou(torch.from_numpy(truth.boxes[o]), torch.from_numpy(found.boxes[d]))
            classes = torch.from_numpy(found.label[d]), torch.from_numpy(truth.label[o])
            true[d] = BaseValidator.match_predictions(matcher, *classes, overlap).numpy()
    result = ap_per_class(true[order], found.score[order], found.label[order], truth.label[objects])
    per_threshold = np.full((len(truth.classes), 10), np.nan)
    per_threshold[result[6]] = result[5]  # classes that have objects, and their AP
    return per_threshold[:, 0], per_threshold.mean(1)


def _xml_of(image: Path, folder: str, data: str) -> Path:
    """Return the annotation of an image, in `folder` instead of its last folder `images`, as Ultralytics does it."""
    before, _, after = image.as_posix().rpartition("/images/")
    if not before:
        raise ValueError(f"{data}: {image} is in no folder 'images' that 'voc: {folder}' could stand beside")
    return Path(before, folder, after).with_suffix(".xml")
