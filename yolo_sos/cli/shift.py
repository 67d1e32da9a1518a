# yolo-sos, AGPL-3.0
"""``yolo-sos shift``: shift the final layers of a checkpoint, or trace every method over its range."""

from __future__ import annotations

from typing import Any

from yolo_sos.arguments import Argument, sos_arguments
from yolo_sos.cli.grammar import Mode, refusing, run_arguments
from yolo_sos.config import SHIFT_SETTINGS

SETTINGS = {a.name.removeprefix("sos_"): a for a in sos_arguments()}
OWN = (
    Argument("model", None, "str", "a checkpoint of Ultralytics, trained with or without SOS"),
    Argument("data", None, "str", "data set; that of the training if not given"),
    *(Argument(k, SETTINGS[k].default, SETTINGS[k].type, SETTINGS[k].help) for k in SHIFT_SETTINGS if k != "images"),
    Argument("images", 512, "int | str", "training images to fit on, or all; others are held out for the guard"),
    Argument("draws", None, "int", "for method rows: how many draws to try, 10 if not given, and one in a sweep"),
    Argument("val", True, "bool", "score the val split before and after"),
    Argument("calibrate", False, "bool", "make the scores of the shifted checkpoint probabilities, in a second file"),
    Argument("sweep", False, "bool", "trace every method over its range instead"),
    *run_arguments("chooses the images and the first draw"),
)


def run(arguments: dict[str, Any]) -> int:
    """Shift or sweep; the exit status is 3 if a guard refused every step, or the calibration."""
    with refusing():
        from yolo_sos.core.checks import boolean
        from yolo_sos.yolo import CheckpointShift, CheckpointSweep

        if not arguments.get("model"):
            raise ValueError("shift needs a checkpoint: model=path/to/best.pt")
        sweep = boolean("sweep", arguments.pop("sweep", False))
        if sweep and boolean("calibrate", arguments.pop("calibrate", False)):
            raise ValueError("calibrate=true has no effect with sweep=true, which writes no checkpoint.")
        job = (CheckpointSweep if sweep else CheckpointShift)(**arguments)
    with refusing(ValueError, OSError):  # an image that cannot be read after all, a disk that is full
        done = job.run()
    calibration = getattr(job, "calibration", None)
    return 3 if None in (getattr(done, "output", ""), getattr(calibration, "output", "")) else 0


MODE = Mode(
    "shift",
    "shift the final layers of a trained checkpoint",
    [
        "shift model=best.pt data=VOC.yaml",
        "shift model=best.pt method=rows rank=0.5 images=all",
        "shift model=best.pt sweep",
    ],
    lambda: {"Arguments; those of SOS also with sos_ before them:": OWN},
    run,
    also=[f"sos_{key}" for key in SHIFT_SETTINGS],
    result="Writes best-sos.pt and best-sos.json beside best.pt. The exit status is 3, and nothing is written, where "
    "every step raises the held-out loss by more than guard. calibrate also writes best-sos-calibrated.pt, as yolo-sos "
    "calibrate does. sweep writes best-sweep.csv and best-sweep.png, and recommends a setting.",
)
