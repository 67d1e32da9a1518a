# yolo-sos, AGPL-3.0
"""``yolo-sos calibrate``: make the scores of a checkpoint probabilities."""

from __future__ import annotations

from typing import Any

from yolo_sos.arguments import Argument
from yolo_sos.cli.grammar import Mode, refusing, run_arguments

OWN = (
    Argument("model", None, "str", "a checkpoint of Ultralytics"),
    Argument("data", None, "str", "data set; that of the training if not given"),
    Argument("per_class", False, "bool", "a map for each class that has enough detections, instead of one for all"),
    Argument("split", "val", "str", "what the map is fitted on: val, or train where val has few objects"),
    Argument("iou", 0.5, "float | str", "least IoU of a hit, or soft: the mean over 0.5 to 0.95"),
    Argument("precision", 0.9, "float", "precision that a threshold is reported for, by class"),
    Argument("images", "all", "int | str", "images of the split to fit on, drawn at random, or all"),
    *run_arguments("chooses the images"),
)


def run(arguments: dict[str, Any]) -> int:
    """Calibrate; the exit status is 3 if the guard refused the map, so that nothing was written."""
    with refusing():
        from yolo_sos.yolo import CheckpointCalibration

        if not arguments.get("model"):
            raise ValueError("calibrate needs a checkpoint: model=path/to/best.pt")
        job = CheckpointCalibration(**arguments)
    with refusing(ValueError, OSError):  # no map to fit, an image that cannot be read after all, a disk that is full
        return 3 if job.run().output is None else 0


MODE = Mode(
    "calibrate",
    "make the scores of a trained checkpoint probabilities",
    ["calibrate model=best.pt data=VOC.yaml", "calibrate model=best.pt per_class=true split=train images=1000"],
    lambda: {"Arguments:": OWN},
    run,
    result="Writes best-calibrated.pt, best-calibrated.json and best-reliability.png beside best.pt. It is judged on "
    "the test split where the data have one, else on val. The exit status is 3, and nothing is written, where the "
    "negative log-likelihood does not fall or mAP50-95 falls by more than 0.001.",
)
