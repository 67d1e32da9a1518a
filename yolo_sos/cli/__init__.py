# yolo-sos, AGPL-3.0
"""The command ``yolo-sos``, in Ultralytics' ``key=value`` grammar: one module per mode."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from yolo_sos import __version__
from yolo_sos.builtin import CFG_DIR
from yolo_sos.cli import analyze, calibrate, convert, evaluate, experiment, fit, shift, stock, table, train
from yolo_sos.cli.grammar import read, refusing

__all__ = ["main"]

OURS = [module.MODE for module in (convert, fit, train, shift, calibrate, evaluate, analyze, experiment, table)]
MODES = {mode.name: mode for mode in (*OURS, *stock.MODES)}
HELP = f"""\
yolo-sos: fit, calibrate and shift the final layers of Ultralytics YOLO models

    yolo-sos [TASK] MODE key=value ...

{chr(10).join(f"  {mode.name:<12}{mode.summary}" for mode in OURS)}
  cfg         print the settings of SOS with their defaults

  {", ".join((*stock.SUMMARIES, *stock.COMMANDS[:1]))},
  {", ".join(stock.COMMANDS[1:])}: as with 'yolo'; help, version, checks

    yolo-sos convert voc=VOCdevkit/VOC2007 out=datasets/voc test=test
    yolo-sos train data=digits.yaml model=yolov5n.yaml imgsz=160 sos=true
    yolo-sos fit model=yolov8n.pt data=mydata.yaml

yolo-sos MODE --help explains a mode and lists its arguments."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``yolo-sos``.

    Args:
        argv (Sequence[str], optional): Arguments without the program's name. None: those of the process.
    """
    try:
        status = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    if status:
        raise SystemExit(status)


def run(args: Sequence[str]) -> int | None:
    """Run a command and return its exit status."""
    first = args[0].lstrip("-").lower() if args else "help"
    first = {"h": "help", "v": "version"}.get(first, first)
    if first == "help" or not {"-h", "--help"}.isdisjoint(args):
        named = next((MODES[arg] for arg in args if arg in MODES), None)
        print(named.help() if named else HELP)
    elif first in {"cfg", "version", "checks"} and len(args) > 1:
        with refusing():
            raise ValueError(f"'{args[1]}': {first} takes no arguments.")
    elif first == "cfg":
        print((CFG_DIR / "sos.yaml").read_text(encoding="utf-8"), end="")
    elif first in {"version", "checks"}:
        if first == "checks":
            from ultralytics.utils.checks import collect_system_info

            collect_system_info()
        print(f"yolo-sos {__version__} (ultralytics {version('ultralytics')})")
    elif first in stock.COMMANDS:
        stock.hand_over(args)
    else:
        with refusing():
            mode, given = read(args, MODES)
        return mode.run(given)
    return None
