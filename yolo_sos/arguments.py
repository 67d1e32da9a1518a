# yolo-sos, AGPL-3.0
"""The arguments of a training: the host's and ours, by name, and the ``cfg=`` files that hold them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from yolo_sos.config import SOSConfig, resolve_cfg

# Keys that the host takes beside those of its defaults: deprecated ones, which it translates or drops with a warning.
ALSO_TAKEN = (
    *("save_dir", "half", "int8", "end2end", "boxes", "hide_labels", "hide_conf", "line_thickness"),
    *("label_smoothing", "save_hybrid", "crop_fraction", "keras"),
)


def host_keys() -> list[str]:
    """Return the arguments of 'yolo', read from its file of defaults: importing the host takes a second."""
    spec = find_spec("ultralytics")
    if spec is None or spec.origin is None:
        raise ValueError("ultralytics is not installed. Install it with: pip install ultralytics")
    return list(yaml.safe_load((Path(spec.origin).parent / "cfg/default.yaml").read_text(encoding="utf-8")))


def training_keys() -> list[str]:
    """Return every argument that a training takes."""
    return [*SOSConfig.keys(), *host_keys(), *ALSO_TAKEN]


def check_keys(keys: Iterable[str], valid: Iterable[str], source: str = "") -> None:
    """Raise a ``ValueError`` that names the first key that is not valid, and the nearest one that is.

    Args:
        keys (Iterable[str]): What was given.
        valid (Iterable[str]): What can be given.
        source (str): The file that the keys stand in, if they do.
    """
    valid = list(valid)
    for key in keys:
        if key not in valid:
            near = get_close_matches(str(key), valid, n=1, cutoff=0.0)[0]
            raise ValueError(f"{source}{': ' if source else ''}'{key}' is not a valid argument. Did you mean '{near}'?")


def find_cfg(name: str) -> Path:
    """Return the path of a ``cfg=`` file: one of ours, such as ``cifar/rows.yaml``, or one that the host finds.

    Raises:
        FileNotFoundError: If there is none.
    """
    from ultralytics.utils.checks import check_yaml

    return Path(check_yaml(resolve_cfg(name))).resolve()


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
    content.pop("arms", None)  # of an experiment's default.yaml: where its arms lie
    check_keys(content, [*training_keys(), "cfg"], str(path))
    base = content.pop("cfg", None)
    if not base:
        return content
    below = default if default and base == "default.yaml" else (path.parent / base).resolve()
    return {**read_cfg(below, default, (*above, path)), **content}
