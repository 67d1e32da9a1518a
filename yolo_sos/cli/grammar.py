# yolo-sos, AGPL-3.0
"""The grammar of ``yolo-sos [TASK] MODE key=value ...``: what a mode declares, how a command is read, and its help."""

from __future__ import annotations

import ast
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from yolo_sos.arguments import Argument
from yolo_sos.config import check_keys

TASKS = ("detect", "segment", "semantic", "depth", "classify", "pose", "obb")
BARE = ("half", "int8", "end2end", "nms")  # Ultralytics takes these without a value although no default is a bool
# What a wrong argument, or a file that an argument names, can raise in Ultralytics and here
BAD_INPUT = (
    *(ValueError, TypeError, SyntaxError, AssertionError, OSError, OverflowError, RecursionError, ImportError),
)


@dataclass(frozen=True)
class Mode:
    """What a mode takes and does.

    Attributes:
        name (str): Its name.
        summary (str): What it does, in few words.
        examples (Sequence[str]): Commands, without the program's name.
        arguments (Callable[[], Mapping[str, Sequence[Argument]]]): Returns its arguments by section.
        run (Callable[[dict[str, Any]], int | None]): Does it; takes the arguments given, returns the exit status.
        word (str): The argument that stands without a key, such as the name of an experiment; empty if there is none.
        also (Sequence[str]): Other keys that it takes.
        result (str): What it leaves, and how it ends.
    """

    name: str
    summary: str
    examples: Sequence[str]
    arguments: Callable[[], Mapping[str, Sequence[Argument]]]
    run: Callable[[dict[str, Any]], int | None]
    word: str = ""
    also: Sequence[str] = ()
    result: str = ""

    def help(self) -> str:
        """Return the help: every argument with its default, its type and what it does."""
        width = max(shutil.get_terminal_size().columns, 80)
        lines = [f"yolo-sos {self.name}: {self.summary}", "", *(f"    yolo-sos {example}" for example in self.examples)]
        lines += ["", *textwrap.wrap(self.result, width)] if self.result else []
        for section, arguments in self.arguments().items():
            lines += ["", section, ""]
            for a in arguments:
                given = f"{a.name}={'' if a.default is None else a.default}" if a.name != self.word else a.name.upper()
                lines += textwrap.wrap(f"  {given:<24} ({a.type}) {a.help}", width, subsequent_indent=" " * 27)
        return "\n".join(lines)


def run_arguments(seed: str) -> tuple[Argument, ...]:
    """Return the arguments of every command that runs a checkpoint on a data set; ``seed`` says what the seed does."""
    return (
        Argument("imgsz", None, "int", "image size in pixels; that of the training if not given"),
        Argument("batch", None, "int", "images at a time; that of the training if not given"),
        Argument("device", None, "int | str", "such as cpu or 0; what Ultralytics picks if not given"),
        Argument("seed", 0, "int", seed),
        Argument("exist_ok", False, "bool", "replace results that exist"),
    )


@contextmanager
def refusing(*errors: type[Exception], unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Tell an error in one line, without a traceback, and exit with status 2.

    Args:
        *errors (type[Exception]): The errors; without any, what bad input raises.
        unless (Callable[[], bool]): Whether the error is none of the input after all, and keeps its traceback.
    """
    told = errors or BAD_INPUT
    try:
        yield
    except told as e:
        if isinstance(e, BrokenPipeError) or unless():
            raise
        print(f"yolo-sos: {' '.join(str(e).split()) or type(e).__name__}", file=sys.stderr)
        raise SystemExit(2) from None


def read(args: Sequence[str], modes: Mapping[str, Mode]) -> tuple[Mode, dict[str, Any]]:
    """Read a command.

    Args:
        args (Sequence[str]): The command without the program's name.
        modes (Mapping[str, Mode]): The modes by name.

    Returns:
        mode (Mode): The mode; without any it is train, as in Ultralytics.
        given (dict[str, Any]): The arguments given, by key. Holds ``mode`` only if the command names it.

    Raises:
        ValueError: If a word or a key is unknown, or an argument has no value.
    """
    words: list[str] = []
    given: dict[str, Any] = {}
    for arg in _joined(args):
        key, equals, value = (part.strip() for part in arg.lstrip("-").rstrip(",").partition("="))
        if not equals:
            words.append(key)
        elif key and value:
            given[key] = value if key in {"name", "project"} and value.lower() != "none" else _value(value)
        else:
            raise ValueError(f"'{key}=' needs a value." if key else "There is no key before '='. Write key=value.")
    if named := next((word for word in words if word in modes), None):
        words.remove(named)
        given["mode"] = named
    mode = modes.get(str(given.get("mode", "train")))
    if mode is None:
        raise ValueError(f"'mode={given['mode']}' is invalid: mode must be one of {', '.join(modes)}.")
    arguments = {a.name: a for section in mode.arguments().values() for a in section}
    for word in words:
        switch = word in arguments and isinstance(arguments[word].default, bool)
        if switch or (word in BARE and word in (*arguments, *mode.also)):
            given[word] = True
        elif mode.word and mode.word not in given:
            given[mode.word] = word
        elif word in TASKS and not mode.word:
            given |= {"task": word} if "task" in arguments else {}  # else the checkpoint has it
        elif word in arguments:
            raise ValueError(f"'{word}' needs a value: {word}={arguments[word].default}")
        else:
            what, see = (f"switch of {named}", f"{named} ") if named else ("mode, a task or a switch", "")
            raise ValueError(f"'{word}' is not a {what}. Arguments are written key=value. See: yolo-sos {see}--help")
    if mode.word and mode.word not in given:
        raise ValueError(f"{mode.name} takes one name, such as: yolo-sos {mode.examples[0]}")
    if "mode" not in arguments:
        given.pop("mode", None)
    check_keys(given, [*arguments, *mode.also])
    return mode, given


def _joined(args: Sequence[str]) -> list[str]:
    """Put together what a shell has split: ``key = value``, ``[0, 1]``."""
    joined: list[str] = []
    for arg in args:
        open_bracket = joined and joined[-1].count("[") > joined[-1].count("]")
        if joined and (open_bracket or arg.startswith("=") or (joined[-1].endswith("=") and "=" not in arg)):
            joined[-1] += arg
        else:
            joined.append(arg)
    return joined


def _value(text: str) -> Any:
    """Return what a text stands for: a literal of Python, ``true``, ``false`` or ``none`` in any case, or itself."""
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except Exception:  # whatever a text can break in a parser: it is a text, then
        return text
