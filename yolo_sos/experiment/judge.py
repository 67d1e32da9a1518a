# yolo-sos, AGPL-3.0
"""Judge a model on one split for the record of a run, by Ultralytics' metrics and by the VOC devkit's."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ultralytics import YOLO
from ultralytics.utils import LOGGER, YAML
from ultralytics.utils.checks import check_file

from yolo_sos.evaluate import mean_ap, voc_ap
from yolo_sos.experiment.detections import detect, read_data_set

# Settings of a training that its own validation goes by, too
SETTINGS = ("imgsz", "batch", "classes", "single_cls", "conf", "iou", "max_det", "agnostic_nms", "augment")


def judge(weights: str | Path, data: str, split: str, *, config: dict[str, Any], device: Any) -> dict[str, float]:
    """Validate a model on one split, in one pass and without a sound.

    Args:
        weights (str | Path): The checkpoint.
        data (str): The data YAML, or the folder or name of a classification set.
        split (str): ``train``, ``val`` or ``test``.
        config (dict[str, Any]): The settings of the training, as a record holds them: ``task`` and those of `SETTINGS`
            count, as in the training's own validation. Ultralytics' default stands for one that is missing.
        device (Any): As Ultralytics takes it: ``"cpu"``, 0, …; None for what Ultralytics picks.

    Returns:
        (dict[str, float]): Ultralytics' metrics by its own names, such as ``metrics/mAP50-95(B)`` or
            ``metrics/accuracy_top1``, and its ``fitness``. For detection on a data set with VOC annotations also
            ``devkit/AP50-07`` and ``devkit/AP50-10``: the devkit's AP at IoU 0.5, as VOC2007 and as VOC2010 and later
            have it, mean over the classes, difficult objects neutral (see `yolo_sos.evaluate.voc`); not where
            ``classes`` or ``single_cls`` make other objects of those that are annotated.

    Raises:
        FileNotFoundError: If the checkpoint, the data set or the split is missing.
        ValueError: If the checkpoint cannot be judged on this data set; says why.
        RuntimeError: If the validation fails.
    """
    weights = Path(weights)
    if not weights.is_file():  # Ultralytics would look for it online
        raise FileNotFoundError(f"{weights}: no such checkpoint")
    settings = {key: config[key] for key in SETTINGS if key in config}
    if settings.get("batch", 1) < 1:  # a training chooses by the memory that it needs itself
        del settings["batch"]
    settings |= {"data": data, "split": split, "device": device, "verbose": False}
    task, all_classes = config["task"], config.get("classes") is None and not config.get("single_cls")
    with quiet():
        if task == "detect" and all_classes and YAML.load(check_file(data)).get("voc"):
            truth = read_data_set(data, split).truth()
            validation = detect(weights, truth, **settings)
            result = voc_ap(truth, validation.found)
            devkit = {"devkit/AP50-07": mean_ap(result.ap07), "devkit/AP50-10": mean_ap(result.ap)}
            return {**validation.metrics, **devkit}
        with TemporaryDirectory() as folder:  # Ultralytics makes one for plots, which are not made
            metrics = YOLO(weights, task=task).val(plots=False, project=folder, **settings)
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
