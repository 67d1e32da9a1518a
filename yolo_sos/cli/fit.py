# yolo-sos, AGPL-3.0
"""``yolo-sos fit``: fit the class layers of a checkpoint to a data set, without training."""

from __future__ import annotations

from typing import Any

from yolo_sos.arguments import Argument
from yolo_sos.cli.grammar import Mode, refusing, run_arguments

OWN = (
    Argument("model", None, "str", "a pretrained checkpoint of Ultralytics"),
    Argument("data", None, "str", "data set; that of the training if not given"),
    Argument("images", None, "int | str", "training images to fit on, or all; 300, or 10 per class, if not given"),
    Argument("ridge", None, "float", "pull towards zero, or the known row of a class; found if not given"),
    Argument("add", False, "bool", "append the classes to the model's, whose scores stay as they are"),
    Argument("old", None, "str", "with add: data set to score the model's own classes on"),
    Argument("val", True, "bool", "score the val split"),
    Argument("calibrate", False, "bool", "make the scores of the fitted checkpoint probabilities, in a second file"),
    *run_arguments("chooses the images and the background"),
)


def run(arguments: dict[str, Any]) -> int:
    """Fit; the exit status is 3 if there is nothing to gain, so that nothing was written, or no calibration was."""
    with refusing():
        from yolo_sos.yolo import CheckpointFit

        if not arguments.get("model"):
            raise ValueError("fit needs a checkpoint: model=yolov8n.pt")
        job = CheckpointFit(**arguments)
    with refusing(ValueError, OSError):  # an image that cannot be read after all, a disk that is full
        report = job.run()
    return 3 if None in (report.output, getattr(job.calibration, "output", "")) else 0


MODE = Mode(
    "fit",
    "fit a detector to new classes, without training",
    [
        "fit model=yolov8n.pt data=mydata.yaml",
        "fit model=yolov8n.pt data=mydata.yaml add=true old=coco.yaml",
    ],
    lambda: {"Arguments:": OWN},
    run,
    result="Writes yolov8n-fit.pt, yolov8n-fit.json and, with val, yolov8n-fit.png beside the checkpoint. 'yolo train "
    "model=yolov8n-fit.pt' goes on from it. The exit status is 3, and nothing is written, where the features say "
    "nothing of the classes or the held-out loss does not fall. calibrate also writes yolov8n-fit-calibrated.pt, as "
    "yolo-sos calibrate does.",
)
