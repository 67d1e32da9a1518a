# yolo-sos, AGPL-3.0
"""The options of ``yolo-sos eval``. Without torch and NumPy, so that help is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_sos.arguments import Options, option, several
from yolo_sos.builtin import resolve_data
from yolo_sos.core.checks import at_least, boolean, invalid, number, optional, up_to_1

PICTURES = (".pdf", ".png", ".svg")
SECTIONS = SOURCES, METRICS, MODEL, OUTPUT = "What to judge:", "Metrics:", "To run a model:", "Output:"
_paths = optional(several("paths"))
_share = number("a number from 0 to 1", lambda x: 0 <= x <= 1)


def _text(key: str, value: Any) -> str | None:
    return None if value is None else str(value)


def _path(key: str, value: Any) -> Path | None:
    return None if value is None else Path(value)


def _data(key: str, value: Any) -> str | None:
    return resolve_data(_text(key, value))


def _picture(key: str, value: Any) -> Path | None:
    if value is not None and Path(value).suffix not in PICTURES:
        raise invalid(key, value, f"a file that ends in {', '.join(PICTURES)}")
    return _path(key, value)


@dataclass(frozen=True)
class EvalOptions(Options):
    """The options, checked as far as they can be without the files."""

    model: str | list | None = option(
        None,
        "checkpoints to run, also weights=; with commas between them, or a pattern",
        _paths,
        SOURCES,
    )
    detections: str | list | None = option(
        None, "instead: COCO results (.json), or a folder of the devkit's files", _paths, SOURCES
    )
    data: str | None = option(None, "data set: class names, images, ground truth", _data, SOURCES)
    annotations: str | None = option(
        None, "ground truth: a VOC tree or COCO annotations; that of the data if not given", _text, SOURCES
    )
    split: str = option("test", "split of the data set, or image set of the VOC tree", _text, SOURCES)
    iou: float = option(0.5, "IoU threshold of the devkit's metric", up_to_1, METRICS)
    precision: float = option(
        0.9, "precision that a threshold on the score is reported for, by class", up_to_1, METRICS
    )
    coco_backend: str = option("pycocotools", "pycocotools, or a faster one of the extra eval", _text, METRICS)
    conf: float = option(0.001, "least confidence of a detection", _share, MODEL)
    nms_iou: float = option(0.7, "IoU above which NMS drops the less confident detection", _share, MODEL)
    max_det: int = option(300, "most detections per image", at_least(1), MODEL)
    clip: bool = option(False, "cut boxes off at the image's border, which val does not do", boolean, MODEL)
    imgsz: int | None = option(
        None, "image size in pixels; that of the training if not given", optional(at_least(1)), MODEL
    )
    batch: int = option(16, "images at a time", at_least(1), MODEL)
    device: str | int | None = option(None, "such as cpu or 0; what Ultralytics picks if not given", None, MODEL)
    json: Path | None = option(None, "file for all numbers, with settings and versions", _path, OUTPUT)
    markdown: Path | None = option(None, "file for the command, the table and its notes", _path, OUTPUT)
    plot: Path | None = option(None, f"file for precision-recall curves: {', '.join(PICTURES)}", _picture, OUTPUT)
    reliability: Path | None = option(None, f"file for reliability curves: {', '.join(PICTURES)}", _picture, OUTPUT)
    save_coco: Path | None = option(None, "folder for detections.json and annotations.json", _path, OUTPUT)
    save_voc: Path | None = option(None, "folder for comp4_det_{split}_{class}.txt", _path, OUTPUT)

    def __post_init__(self):
        """Check every value, and that there is something to judge, and something to judge it by."""
        super().__post_init__()
        if bool(self.model) == bool(self.detections):
            raise ValueError("eval needs either model, checkpoints to run, or detections, files to read.")
        if self.model and not self.data:
            raise ValueError("eval of a model needs data, which says where the images are.")
        if not (self.annotations or self.data):
            raise ValueError("eval of detections needs a ground truth: annotations, or data with one.")
