# yolo-sos, AGPL-3.0
"""Read an experiment from its YAML files: what all arms share, and what each arm changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ultralytics.cfg import get_cfg
from ultralytics.utils import YAML

from yolo_sos.arguments import OF_ONE_RUN, read_cfg
from yolo_sos.builtin import CFG_DIR
from yolo_sos.config import SOSConfig, is_sos_key

DEFAULT = "default.yaml"


@dataclass(frozen=True)
class Arm:
    """One arm of an experiment.

    Attributes:
        name (str): Its file's name, without the suffix.
        settings (dict[str, Any]): The settings given, those of the experiment's default included.
        config (dict[str, Any]): Every setting that a result depends on; those that were not given have their defaults.
        differences (tuple[str, ...]): The keys of ``config`` in which it differs from the experiment's default.
    """

    name: str
    settings: dict[str, Any]
    config: dict[str, Any]
    differences: tuple[str, ...]


def resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """Return every setting of Ultralytics and of yolo-sos by name, sorted, as JSON reads them back."""
    theirs = {k: v for k, v in settings.items() if not is_sos_key(k)}
    ours = {k: v for k, v in settings.items() if is_sos_key(k)}
    whole = {**vars(get_cfg(overrides=theirs)), **SOSConfig.from_dict(ours).to_dict()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(whole.items()) if k not in OF_ONE_RUN}


def find_experiment(name: str) -> Path:
    """Return the folder of an experiment: the user's, or one of yolo-sos by its name, such as ``voc/yolov5s``.

    Raises:
        FileNotFoundError: If there is none; names the nearest one.
    """
    for folder in (Path(name), CFG_DIR / "experiments" / name):
        if (folder / DEFAULT).is_file():
            return folder.resolve()
    ours = sorted(str(p.parent.relative_to(CFG_DIR / "experiments")) for p in CFG_DIR.glob(f"experiments/**/{DEFAULT}"))
    near = get_close_matches(name, ours, n=1, cutoff=0.0)
    raise FileNotFoundError(
        f"'{name}' is not an experiment: there is no {Path(name) / DEFAULT}. "
        f"Did you mean '{near[0] if near else ''}'? yolo-sos has {', '.join(ours)}."
    )


def read_arms(
    folder: Path, chosen: Sequence[str] | None = None, overrides: dict[str, Any] | None = None
) -> dict[str, Arm]:
    """Return the arms of an experiment by name, ``baseline`` first.

    Args:
        folder (Path): The experiment's folder, which holds ``default.yaml``. The arms are the YAML files beside it, or
            in the folder that its key ``arms`` names.
        chosen (Sequence[str], optional): The arms to return. None: all.
        overrides (dict, optional): Settings for all arms, which replace those of ``default.yaml``.

    Raises:
        ValueError: If an arm does not exist, if a setting is wrong, or if an arm changes what ``overrides`` sets for
            all arms.
    """
    default = folder / DEFAULT
    stock, overrides = read_cfg(default), overrides or {}
    shared = {**stock, **overrides}
    place = (folder / (YAML.load(default).get("arms") or ".")).resolve()
    files = {path.stem: path for path in sorted(place.glob("*.yaml")) if path.name != DEFAULT}
    if not files:
        raise ValueError(f"{place}: there is no arm, a YAML file beside {DEFAULT}.")
    for key in "data", "model":
        if not shared.get(key):
            raise ValueError(f"{default}: it names no {key}. Give one for all arms: {key}=…")
    arms = {}
    for name in sorted(set(files if chosen is None else chosen), key=lambda name: (name != "baseline", name)):
        if name not in files:
            near = get_close_matches(name, files, n=1, cutoff=0.0)[0]
            raise ValueError(f"'{name}' is not an arm of {folder.name}. Did you mean '{near}'? {', '.join(files)}.")
        # With or without `cfg: default.yaml`, an arm builds on its experiment's default.
        given = read_cfg(files[name], default)
        changed = {k: v for k, v in given.items() if k not in stock or stock[k] != v}
        if clash := sorted(changed.keys() & overrides.keys()):
            raise ValueError(f"{clash[0]}={overrides[clash[0]]} for all arms: {files[name]} sets {clash[0]} itself.")
        try:
            config, common = resolved({**shared, **changed}), resolved(shared)
        except (ValueError, TypeError, SyntaxError) as e:
            raise ValueError(f"{files[name]}: {e}") from e
        differences = tuple(key for key in config if config[key] != common[key])
        arms[name] = Arm(name, {**shared, **changed}, config, differences)
    return arms
