# yolo-sos, AGPL-3.0
"""Judge a model on one split for the record of a run, by Ultralytics' metrics and by the VOC devkit's."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ultralytics import YOLO
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.data import ClassificationDataset
from ultralytics.data.utils import check_cls_dataset
from ultralytics.utils import LOGGER

from yolo_sos.data.images import check_complete
from yolo_sos.evaluate import GroundTruth, mean_ap, voc_ap
from yolo_sos.evaluate.detections import as_trained, detect, read_data_set

# Ultralytics' settings of a training that decide what its validation measures
SETTINGS = (
    *("task", "imgsz", "batch", "conf", "iou", "max_det", "classes", "single_cls", "agnostic_nms", "augment", "nms"),
)


def judged_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a training that its validation depends on, of those that are not None.

    Raises:
        ValueError: If the training validated on a part of a split, which a record does not.
    """
    if isinstance(config.get("fraction"), (list, tuple)):
        raise ValueError(f"fraction={config['fraction']}: a record judges whole splits; give one number, for training")
    settings = {k: config[k] for k in SETTINGS if k in DEFAULT_CFG_DICT and config.get(k) is not None}
    if settings.get("batch", 1) < 1:  # a training chooses its batch by the memory that it needs itself
        del settings["batch"]
    return settings


def check_judgement(data: str, split: str, *, task: str, **settings: Any) -> GroundTruth | None:
    """Check that a split of a data set can be judged, before a run trains its first epoch.

    The data set is downloaded if it is not there; task and settings are what `judged_settings` returns.

    Returns:
        (GroundTruth | None): The objects of a detection data set with VOC annotations; None for all others.

    Raises:
        FileNotFoundError: If the data set, the split, an image or an annotation is missing.
        ValueError: If an annotation is wrong, or Ultralytics would leave images out of the judgement; names the file.
    """
    if unknown := [key for key in settings if key not in SETTINGS]:
        raise ValueError(f"'{unknown[0]}={settings[unknown[0]]}': a judgement takes {', '.join(SETTINGS)}")
    with quiet():
        if task == "classify":
            _check_images(data, split)
        elif task in {"detect", "segment", "pose", "obb"}:
            data_set = read_data_set(data, split, task)
            if task == "detect" and data_set.xml:
                return as_trained(data_set.truth(), settings.get("classes"), settings.get("single_cls", False))
    return None


def judge(
    weights: str | Path, data: str, split: str, *, task: str, device: Any = None, **settings: Any
) -> dict[str, float]:
    """Validate a model on one split in one pass, logging nothing but warnings.

    The arguments are those of `check_judgement`, and ``device`` as Ultralytics takes it.

    Returns:
        (dict[str, float]): Ultralytics' metrics by its own names, such as ``metrics/mAP50-95(B)`` or
            ``metrics/accuracy_top1``, and its ``fitness``. For detection on a data set with VOC annotations also
            ``devkit/AP50-07`` and ``devkit/AP50-10``: the devkit's AP at IoU 0.5, as VOC2007 and as VOC2010 and later
            have it, mean over the classes, difficult objects neutral (see `yolo_sos.evaluate.voc`).

    Raises:
        FileNotFoundError: If the checkpoint, the data set or the split is missing.
        ValueError: If the checkpoint cannot be judged on this data set, as `check_judgement`; says why.
        RuntimeError: If the validation fails.
    """
    if not Path(weights).is_file():  # Ultralytics would look for it online
        raise FileNotFoundError(f"{weights}: no such checkpoint")
    truth = check_judgement(data, split, task=task, **settings)
    val = {"data": data, "split": split, "device": device, "verbose": False, **settings}
    with quiet():
        if truth is not None:
            validation = detect(Path(weights), truth, **val)
            result = voc_ap(truth, validation.found)
            devkit = {"devkit/AP50-07": mean_ap(result.ap07), "devkit/AP50-10": mean_ap(result.ap)}
            return {**validation.metrics, **devkit}
        with TemporaryDirectory() as folder:  # Ultralytics makes one for plots, which are not made
            metrics = YOLO(weights, task=task).val(plots=False, project=folder, **val)
    return {key: float(value) for key, value in metrics.results_dict.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Let Ultralytics log nothing but warnings; its progress bars go by the level of its logger."""
    level = LOGGER.level
    LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOGGER.setLevel(level)


def _check_images(data: str, split: str) -> None:
    """Raise a ``ValueError`` if Ultralytics leaves out images of a classification set."""
    found = check_cls_dataset(data, split=split)
    if not (root := found.get(split)):
        raise FileNotFoundError(f"{data}: has no split '{split}'")
    images = ClassificationDataset(root, get_cfg(overrides={"task": "classify"}), prefix=split)
    if unknown := {*images.base.classes} - {path.name for path in Path(found["train"]).iterdir()}:
        raise ValueError(f"{root}: class '{min(unknown)}' is none of the training's, so its images would be left out")
    check_complete([file for file, _ in images.base.samples], [sample[0] for sample in images.samples], root)
