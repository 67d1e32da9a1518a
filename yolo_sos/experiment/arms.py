# yolo-sos, AGPL-3.0
"""An experiment as its YAML files say it: what all arms share, and what each arm changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ultralytics.cfg import get_cfg
from ultralytics.utils import YAML

from yolo_sos.arguments import read_cfg
from yolo_sos.config import CFG_DIR, SOSConfig, is_sos_key

DEFAULT = "default.yaml"
# What does not change a result, or is told apart in a record; `cfg` and `mode` are the command's own.
LEFT_OUT = ("cfg", "device", "exist_ok", "mode", "name", "plots", "project", "resume", "save_dir", "seed", "verbose")


@dataclass(frozen=True)
class Arm:
    """One arm of an experiment.

    Attributes:
        name (str): Its file's name, without the suffix.
        settings (dict[str, Any]): What a training is given, the experiment's default included.
        config (dict[str, Any]): Every setting that a result depends on, those that were not given at their defaults.
        differences (tuple[str, ...]): The keys of ``config`` in which it differs from the experiment's default.
    """

    name: str
    settings: dict[str, Any]
    config: dict[str, Any]
    differences: tuple[str, ...]


def resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """Return every setting of the host and of ours by name, sorted, as JSON gives them back."""
    host = {k: v for k, v in settings.items() if not is_sos_key(k)}
    ours = {k: v for k, v in settings.items() if is_sos_key(k)}
    whole = {**vars(get_cfg(overrides=host)), **SOSConfig.from_dict(ours).to_dict()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(whole.items()) if k not in LEFT_OUT}


def find_experiment(name: str) -> Path:
    """Return the folder of an experiment: one of ours by its name, such as ``voc/yolov5s``, or a folder of the user's.

    Raises:
        FileNotFoundError: If there is none; names the nearest.
    """
    for folder in (Path(name), CFG_DIR / "experiments" / name):
        if (folder / DEFAULT).is_file():
            return folder.resolve()
    ours = sorted(str(p.parent.relative_to(CFG_DIR / "experiments")) for p in CFG_DIR.glob(f"experiments/**/{DEFAULT}"))
    near = get_close_matches(name, ours, n=1, cutoff=0.0)
    raise FileNotFoundError(
        f"'{name}' is not an experiment: there is no {Path(name) / DEFAULT}. "
        f"Did you mean '{near[0] if near else ''}'? Those that come along: {', '.join(ours)}."
    )


def read_arms(
    folder: Path, chosen: Sequence[str] | None = None, overrides: dict[str, Any] | None = None
) -> dict[str, Arm]:
    """Return the arms of an experiment by name, ``baseline`` first.

    Args:
        folder (Path): The experiment's folder, which holds ``default.yaml``. The arms are the YAML files beside it, or
            in the folder that its key ``arms`` names.
        chosen (Sequence[str], optional): The arms to return. None: all.
        overrides (dict, optional): Settings for all arms, in the place of the default's.

    Raises:
        ValueError: If an arm does not exist or does not build on ``default.yaml``, if a setting is wrong, or if an arm
            changes what ``overrides`` sets for all.
    """
    default = folder / DEFAULT
    stock = read_cfg(default)
    shared = {**stock, **(overrides or {})}
    place = (folder / (YAML.load(default).get("arms") or ".")).resolve()
    files = {path.stem: path for path in sorted(place.glob("*.yaml")) if path.name != DEFAULT}
    if not files:
        raise ValueError(f"{place}: there is no arm, a YAML file beside {DEFAULT}.")
    for key in "data", "model":
        if not shared.get(key):
            raise ValueError(f"{default}: it names no {key}. Give one for all arms: {key}=…")
    arms = {}
    for name in _ordered(files if chosen is None else chosen):
        if name not in files:
            near = get_close_matches(name, files, n=1, cutoff=0.0)[0]
            raise ValueError(f"'{name}' is not an arm of {folder.name}. Did you mean '{near}'? {', '.join(files)}.")
        arms[name] = _read_arm(name, files[name], default, stock, overrides or {})
    return arms


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(dict.fromkeys(names), key=lambda name: (name != "baseline", name))


def _read_arm(name: str, path: Path, default: Path, stock: dict[str, Any], overrides: dict[str, Any]) -> Arm:
    if "cfg" not in YAML.load(path):
        raise ValueError(f"{path}: an arm builds on the default of its experiment. Add 'cfg: {DEFAULT}'.")
    shared = {**stock, **overrides}
    settings = read_cfg(path, default)
    changed = {k: v for k, v in settings.items() if k not in stock or stock[k] != v}
    if clash := sorted(changed.keys() & overrides.keys()):
        raise ValueError(f"{clash[0]}={overrides[clash[0]]} for all arms: {path} sets {clash[0]} itself.")
    try:
        config, common = resolved({**shared, **changed}), resolved(shared)
    except (ValueError, TypeError, SyntaxError) as e:
        raise ValueError(f"{path}: {e}") from e
    return Arm(name, {**shared, **changed}, config, tuple(key for key in config if config[key] != common[key]))
