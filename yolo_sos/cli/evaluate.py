# yolo-sos, AGPL-3.0
"""``yolo-sos eval``: the VOC devkit's metric, COCO's and Ultralytics', side by side."""

from __future__ import annotations

from typing import Any

from yolo_sos.arguments import Argument
from yolo_sos.cli.grammar import Mode, refusing

SOURCES = (
    Argument("model", None, "str | list", "checkpoints to run, also weights=; with commas between them, or a pattern"),
    Argument("detections", None, "str | list", "instead: COCO results (.json), or a folder of the devkit's files"),
    Argument("data", None, "str", "data set: class names, images, ground truth"),
    Argument("annotations", None, "str", "ground truth: a VOC tree or COCO annotations; that of the data if not given"),
    Argument("split", "test", "str", "split of the data set, or image set of the VOC tree"),
)
METRICS = (
    Argument("iou", 0.5, "float", "IoU threshold of the devkit's metric"),
    Argument("precision", 0.9, "float", "precision that a threshold on the score is reported for, by class"),
    Argument("coco_backend", "pycocotools", "str", "pycocotools, or a faster one of the extra eval"),
)
MODEL = (
    Argument("conf", 0.001, "float", "least confidence of a detection"),
    Argument("nms_iou", 0.7, "float", "IoU above which NMS drops the less confident detection"),
    Argument("max_det", 300, "int", "most detections per image"),
    Argument("clip", False, "bool", "cut boxes off at the image's border, which val does not do"),
    Argument("imgsz", None, "int", "image size in pixels; that of the training if not given"),
    Argument("batch", 16, "int", "images at a time"),
    Argument("device", None, "int | str", "such as cpu or 0; what Ultralytics picks if not given"),
)
OUTPUT = (
    Argument("json", None, "str", "file for all numbers, with settings and versions"),
    Argument("markdown", None, "str", "file for the command, the table and its notes"),
    Argument("plot", None, "str", "file for precision-recall curves: .pdf, .png or .svg"),
    Argument("reliability", None, "str", "file for reliability curves: .pdf, .png or .svg"),
    Argument("save_coco", None, "str", "folder for detections.json and annotations.json"),
    Argument("save_voc", None, "str", "folder for comp4_det_{split}_{class}.txt"),
)


def run(arguments: dict[str, Any]) -> None:
    """Evaluate, and print the table."""
    with refusing(ValueError, OSError, ImportError):
        from yolo_sos.evaluate.command import run

        run(**arguments)


MODE = Mode(
    "eval",
    "judge by the metrics of the VOC devkit, COCO and Ultralytics",
    ["eval model=best.pt data=VOC.yaml split=test", "eval detections=results.json annotations=VOCdevkit/VOC2007"],
    lambda: {"What to judge:": SOURCES, "Metrics:": METRICS, "To run a model:": MODEL, "Output:": OUTPUT},
    run,
    also=["weights"],
)
