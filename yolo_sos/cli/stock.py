# yolo-sos, AGPL-3.0
"""Modes and commands of Ultralytics, passed on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from yolo_sos.arguments import DEPRECATED, ultralytics_arguments, with_file
from yolo_sos.builtin import resolve_data, resolve_model
from yolo_sos.cli.grammar import Mode, refusing
from yolo_sos.config import KEYS, is_sos_key

COMMANDS = ("settings", "solutions", "login", "logout", "copy-cfg")  # they have a grammar of their own
SUMMARIES = {
    "val": "validate a model",
    "predict": "predict on images or videos",
    "export": "export a model to another format",
    "track": "track objects in videos",
    "benchmark": "time a model in all formats",
}
EXAMPLES = {
    "val": "val model=best.pt data=VOC.yaml",
    "predict": "predict model=best.pt source=image.jpg",
    "export": "export model=best.pt format=onnx",
    "track": "track model=best.pt source=video.mp4",
    "benchmark": "benchmark model=best.pt imgsz=640",
}


def run(arguments: dict[str, Any]) -> None:
    """Run 'yolo' with these arguments, and with our data sets and models by name."""
    with refusing():
        arguments = with_file(arguments)
        if given := ", ".join(f"{key}={value}" for key, value in arguments.items() if is_sos_key(key)):
            raise ValueError(f"{given}: settings of SOS belong to 'yolo-sos train'.")
        for key, resolve in (("data", resolve_data), ("model", resolve_model)):
            if key in arguments:
                arguments[key] = resolve(arguments[key])
    hand_over([f"{key}={value}" for key, value in arguments.items()])


def hand_over(args: Sequence[str]) -> None:
    """Run 'yolo' with a command line."""
    with refusing(SyntaxError, FileNotFoundError, ImportError):  # a wrong argument, a missing file, an extra
        # Ultralytics reads sys.argv through a name of its own that it binds once: the same list, so it is filled.
        sys.argv[:] = ["yolo", *args]
        from ultralytics.cfg import entrypoint

        entrypoint()


MODES = [
    Mode(
        name,
        f"{summary}, as 'yolo {name}' does",
        [EXAMPLES[name]],
        lambda: {"Arguments of Ultralytics, for all of its modes:": ultralytics_arguments()},
        run,
        also=(*DEPRECATED, *KEYS),  # ours are refused with the reason
    )
    for name, summary in SUMMARIES.items()
]
