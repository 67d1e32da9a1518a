# yolo-sos, AGPL-3.0
"""``yolo-sos eval``: the VOC devkit's metric, COCO's and Ultralytics', side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from yolo_sos.arguments import Argument
from yolo_sos.cli.grammar import Mode, refusing


def arguments() -> Mapping[str, Sequence[Argument]]:
    """Return the arguments by section."""
    from yolo_sos.evaluate.options import SECTIONS, EvalOptions

    return {section: EvalOptions.arguments(section) for section in SECTIONS}


def run(given: dict[str, Any]) -> None:
    """Evaluate, and print the table."""
    with refusing(ValueError, OSError, ImportError):
        from yolo_sos.evaluate.command import run

        run(**given)


MODE = Mode(
    "eval",
    "judge by the metrics of the VOC devkit, COCO and Ultralytics",
    ["eval model=best.pt data=VOC.yaml split=test", "eval detections=results.json annotations=VOCdevkit/VOC2007"],
    arguments,
    run,
    also=["weights"],
    result="Checkpoints of one training with several seeds give mean ± std, others a table each. Without annotations, "
    "the ground truth is the VOC XML that the data set's key voc names, or else its YOLO labels, which know no "
    "difficult objects.",
)
