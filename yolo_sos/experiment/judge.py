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
from ultralytics.utils import LOGGER, YAML
from ultralytics.utils.checks import check_file

from yolo_sos.evaluate import GroundTruth, mean_ap, voc_ap
from yolo_sos.experiment.detections import detect, read_data_set

# Ultralytics' settings of a training that its own validation goes by, too
SETTINGS = ("task", "imgsz", "batch", "conf", "iou", "max_det", "classes", "single_cls", "agnostic_nms", "augment")


def judged_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `judge` and `check_judgement` take of the config of a run, without settings that are None."""
    settings = {key: config[key] for key in SETTINGS if config.get(key) is not None}
    if settings.get("batch", 1) < 1:  # a training chooses its batch by the memory that it needs itself
        del settings["batch"]
    return settings


def check_judgement(data: str, split: str, *, task: str, **settings: Any) -> GroundTruth | None:
    """Check that a split can be judged; to be called before a run trains its first epoch.

    Args:
        data (str): The data YAML, or the folder or name of a classification set; it is downloaded if it is not there.
        split (str): ``train``, ``val`` or ``test``.
        task (str): Ultralytics' task, such as ``detect`` or ``classify``.
        **settings (Any): The rest of what `judged_settings` returns.

    Returns:
        (GroundTruth | None): What the VOC devkit's metric goes by: for detection on a data set with VOC annotations,
            unless ``classes`` or ``single_cls`` make other objects of those that are annotated.

    Raises:
        FileNotFoundError: If the data set, the split, an image or an annotation is missing.
        ValueError: If an annotation is wrong; names the file.
    """
    if task != "detect" or settings.get("classes") or settings.get("single_cls"):
        return None
    with quiet():
        return read_data_set(data, split).truth() if YAML.load(check_file(data)).get("voc") else None


def judge(
    weights: str | Path, data: str, split: str, *, task: str, device: Any = None, **settings: Any
) -> dict[str, float]:
    """Validate a model on one split, in one pass and without a sound.

    Args:
        weights (str | Path): The checkpoint.
        data (str): The data YAML, or the folder or name of a classification set.
        split (str): ``train``, ``val`` or ``test``.
        task (str): Ultralytics' task, such as ``detect`` or ``classify``.
        device (Any): As Ultralytics takes it: ``"cpu"``, 0, …; None for what Ultralytics picks.
        **settings (Any): The rest of what `judged_settings` returns for the training: imgsz, batch, max_det, …

    Returns:
        (dict[str, float]): Ultralytics' metrics by its own names, such as ``metrics/mAP50-95(B)`` or
            ``metrics/accuracy_top1``, and its ``fitness``. Where `check_judgement` returns a ground truth also
            ``devkit/AP50-07`` and ``devkit/AP50-10``: the devkit's AP at IoU 0.5, as VOC2007 and as VOC2010 and later
            have it, mean over the classes, difficult objects neutral (see `yolo_sos.evaluate.voc`).

    Raises:
        FileNotFoundError: If the checkpoint, the data set or the split is missing.
        ValueError: If the checkpoint cannot be judged on this data set; says why.
        RuntimeError: If the validation fails.
    """
    weights = Path(weights)
    if not weights.is_file():  # Ultralytics would look for it online
        raise FileNotFoundError(f"{weights}: no such checkpoint")
    truth = check_judgement(data, split, task=task, **settings)
    val = {"data": data, "split": split, "device": device, "verbose": False, **settings}
    with quiet():
        if truth is not None:
            validation = detect(weights, truth, **val)
            result = voc_ap(truth, validation.found)
            devkit = {"devkit/AP50-07": mean_ap(result.ap07), "devkit/AP50-10": mean_ap(result.ap)}
            return {**validation.metrics, **devkit}
        with TemporaryDirectory() as folder:  # Ultralytics makes one for plots, which are not made
            metrics = YOLO(weights, task=task).val(plots=False, project=folder, **val)
    return {key: float(value) for key, value in metrics.results_dict.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Let Ultralytics print nothing but warnings; its progress bars go by the level of its logger."""
    level = LOGGER.level
    LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
