# yolo-sos, AGPL-3.0
"""The arguments of commands: how they are declared, those of a training, and the ``cfg=`` files that hold them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from yolo_sos.builtin import resolve_cfg
from yolo_sos.config import KEYS, SCHEMA, check_keys, setting_type
from yolo_sos.core.checks import Check, invalid

# Keys that Ultralytics takes beside those of its defaults: it translates them, or drops them with a warning.
DEPRECATED = (
    *("save_dir", "half", "int8", "end2end", "boxes", "hide_labels", "hide_conf", "line_thickness"),
    *("label_smoothing", "save_hybrid", "crop_fraction", "keras"),
)
# Keys that do not change what a training gives, or that tell its repetitions apart
OF_ONE_RUN = ("cfg", "device", "exist_ok", "mode", "name", "plots", "project", "resume", "save_dir", "seed", "verbose")


@dataclass(frozen=True)
class Argument:
    """An argument of a command; one whose default is a bool may stand without a value: ``exist_ok``.

    Attributes:
        name (str): Its key.
        default (Any): Its default.
        type (str): Its type in words.
        help (str): What it does.
    """

    name: str
    default: Any
    type: str
    help: str


def several(what: str) -> Check:
    """Return a check that accepts ``what``: one, or several in a list or with commas between them."""

    def check(key: str, value: Any) -> list[str]:
        given = value.removeprefix("[").removesuffix("]").split(",") if isinstance(value, str) else value
        found = [str(item).strip() for item in (given if isinstance(given, (list, tuple)) else [given])]
        if not found or not all(found):
            raise invalid(key, value, f"{what} with commas between them")
        return found

    return check


def option(default: Any, text: str, check: Check | None = None, section: str = "") -> Any:
    """Return a field of ``Options``: its default, what it does, its check and its section of the help."""
    return field(default=default, metadata={"help": text, "check": check, "section": section})


@dataclass(frozen=True)
class Options:
    """The options of a command, each declared once by a subclass, and checked.

    Raises:
        ValueError: If a value is wrong; names the key, the value and what would be right.
    """

    def __post_init__(self):
        """Check every value."""
        for f in fields(self):
            if check := f.metadata["check"]:
                object.__setattr__(self, f.name, check(f.name, getattr(self, f.name)))

    @classmethod
    def arguments(cls, section: str = "") -> list[Argument]:
        """Return the arguments of a section."""
        return [
            Argument(f.name, f.default, str(f.type).removesuffix(" | None").replace("Path", "str"), f.metadata["help"])
            for f in fields(cls)
            if f.metadata["section"] == section
        ]


def sos_arguments() -> list[Argument]:
    """Return the settings of SOS."""
    return [Argument(key, f.default, setting_type(key), f.metadata["help"]) for key, f in SCHEMA.items()]


@cache
def ultralytics_arguments() -> tuple[Argument, ...]:
    """Return the arguments of 'yolo', read from its file of defaults: importing Ultralytics takes a second."""
    spec = find_spec("ultralytics")
    if spec is None or spec.origin is None:
        raise ImportError("ultralytics is not installed: pip install ultralytics")
    text = (Path(spec.origin).parent / "cfg/default.yaml").read_text(encoding="utf-8")
    comments = {key: about for key, *about in re.findall(r"^(\w+):.*?# \(([^)]*)\) (.*)$", text, re.MULTILINE)}
    return tuple(Argument(key, default, *comments.get(key, ("", ""))) for key, default in yaml.safe_load(text).items())


def training_keys() -> list[str]:
    """Return the key of every argument that a training takes."""
    return [*KEYS, *(argument.name for argument in ultralytics_arguments()), *DEPRECATED]


def with_file(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments with those of their ``cfg=`` file, if they name one; its values give way to theirs.

    The file is one of ours, such as ``cifar/rows.yaml``, or one that Ultralytics finds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is wrong.
    """
    own = {key: value for key, value in arguments.items() if key != "cfg"}
    if arguments.get("cfg") is None:
        return own
    from ultralytics.utils.checks import check_yaml

    return {**read_cfg(Path(check_yaml(resolve_cfg(arguments["cfg"]))).resolve()), **own}


def read_cfg(path: Path, default: Path | None = None, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the settings of a ``cfg=`` file. Its own ``cfg`` names another one beside it that it builds on.

    Args:
        path (Path): The file.
        default (Path, optional): What the ``default.yaml`` that a file builds on stands for. None: the one beside it.
        above (tuple[Path, ...]): The files that led here.

    Raises:
        ValueError: If a key is unknown, or files build on each other in a circle.
    """
    from ultralytics.utils import YAML

    if path in above:
        raise ValueError(f"{path}: its 'cfg' leads back to itself.")
    content = YAML.load(path)
    content.pop("arms", None)  # of an experiment's default.yaml: the folder of its arms
    check_keys(content, training_keys(), source=str(path))
    base = content.pop("cfg", None)
    if not base:
        return content
    below = default if default and base == "default.yaml" else (path.parent / base).resolve()
    return {**read_cfg(below, default, (*above, path)), **content}
