#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""Run ``yolo-sos eval`` with flags: ``--weights a.pt b.pt --nms-iou 0.6`` is ``weights=a.pt,b.pt nms_iou=0.6``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from yolo_sos.cli import main


def as_keys(argv: Sequence[str]) -> list[str]:
    """Return flags and their values as the arguments of ``yolo-sos eval``."""
    flags: list[list[str]] = []
    for arg in argv:
        if arg.startswith("--"):
            flag, *value = arg[2:].split("=", maxsplit=1)
            flags.append([flag.replace("-", "_"), *value])
        elif flags:
            flags[-1].append(arg)
        else:
            sys.exit(f"'{arg}' comes before any flag, such as --weights or --detections")
    return [f"{key}={','.join(values)}" if values else key for key, *values in flags]


if __name__ == "__main__":
    asked = {"-h", "--help"} & {*sys.argv}
    main(["eval", *(asked or as_keys(sys.argv[1:]))])
