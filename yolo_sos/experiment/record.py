# yolo-sos, AGPL-3.0
"""What a run leaves: one JSON file that says what was run, with what, where, and what came out."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from yolo_sos.config import RECIPE, SOSConfig
from yolo_sos.files import as_json, finite, read_json, write_text

FIELDS: dict[str, tuple[type, ...]] = {  # what every record holds
    "experiment": (str,),
    "arm": (str,),
    "seed": (int,),
    "metrics": (dict,),
    "config": (dict,),
    "differences": (list,),
    "versions": (dict,),
    "git_commit": (str, NoneType),
    "device": (str,),
    "wall_time": (int, float),
}


def record_path(results: str | Path, experiment: str, arm: str, seed: int) -> Path:
    """Return where the record of a run lies: ``results/<experiment>/records/<arm>-<seed>.json``."""
    return Path(results) / experiment / "records" / f"{arm}-{seed}.json"


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record, atomically; a metric that is not finite becomes null, as JSON has no such number."""
    write_text(path, as_json(record))


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: If the file is not a record; names the first key that is missing or of a wrong type.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise ValueError(f"{path}: not a record of a run, which is a JSON object.")
    for key, types in FIELDS.items():
        if key not in record:
            raise ValueError(f"{path}: not a record of a run: it has no '{key}'.")
        if not isinstance(record[key], types) or isinstance(record[key], bool):
            names = " or ".join(kind.__name__ for kind in types)
            raise ValueError(f"{path}: '{key}' must be of type {names}, not {type(record[key]).__name__}.")
    return record


@dataclass(frozen=True)
class Record:
    """What the table needs of the record of a run.

    Attributes:
        path (Path): The file.
        arm (str): Name of the arm.
        seed (int): Seed of the run.
        metrics (dict[str, dict[str, float]]): Split → metric → value; nan where the value was not finite.
        config (dict[str, Any]): The whole config, without the seed.
        differences (tuple[str, ...]): Keys of the config that the arm sets.
        origin (dict[str, str]): Versions, device and commit of the run.
        wall_time (float): Seconds of training.
        norm2 (float | None): Squared norm of the final layers; None in records of older releases, and of models without
            such layers.
        shifted (bool | None): Whether a shift reached the model judged; None in records of older releases, and of arms
            that do not shift.
    """

    path: Path
    arm: str
    seed: int
    metrics: dict[str, dict[str, float]]
    config: dict[str, Any]
    differences: tuple[str, ...]
    origin: dict[str, str]
    wall_time: float
    norm2: float | None
    shifted: bool | None = None

    @property
    def comparable(self) -> bool:
        """Whether the model judged is what the arm asks for."""
        return self.shifted is not False

    @classmethod
    def read(cls, path: Path, experiment: str) -> Record:
        """Read a record and check what the table needs of it.

        Raises:
            ValueError: If the file is not a record of a run of this experiment; names the file and the key.
        """
        content = read_record(path)
        arm, seed, config, seconds = (content[key] for key in ("arm", "seed", "config", "wall_time"))
        if content["experiment"] != experiment:
            raise ValueError(f"{path}: 'experiment' is '{content['experiment']}', not '{experiment}'.")
        name = record_path("", experiment, arm, seed).name
        if path.name != name:  # a copy of a record would count twice
            raise ValueError(f"{path}: 'arm' and 'seed' are {arm} and {seed}; the record of that run is {name}.")
        if "val" not in content["metrics"]:
            raise ValueError(f"{path}: 'metrics.val' is missing.")
        for key in content["differences"]:
            if key not in config:
                raise ValueError(f"{path}: 'config' lacks {json.dumps(key)}, which 'differences' names.")
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"{path}: 'wall_time' must be a number of seconds above 0, not {seconds}.")
        norm2, shifted = content.get("norm2"), content.get("shifted")
        if shifted not in (True, False, None):
            raise ValueError(f"{path}: 'shifted' must be true, false or null, not {json.dumps(shifted)}.")
        if norm2 is not None and not (isinstance(norm2, (int, float)) and norm2 > 0):
            raise ValueError(f"{path}: 'norm2' must be a number above 0, or null, not {json.dumps(norm2)}.")
        metrics = {split: _numbers(values, f"{path}: 'metrics.{split}") for split, values in content["metrics"].items()}
        origin = {**content["versions"], "device": content["device"], "commit": content["git_commit"] or "unknown"}
        return cls(path, arm, seed, metrics, config, tuple(content["differences"]), origin, seconds, norm2, shifted)


def difference(one: dict[str, Any], other: dict[str, Any], besides: tuple[str, ...] = ()) -> str | None:
    """Return the first key, in alphabetical order, in which two configs differ, ``besides`` apart; None if they agree.

    A setting that a record of an older release lacks counts as its default, and its ``sos_solver=qr`` as ``svd``, which
    computes the same weights. The settings of a shift do not count where one of the two does not shift.
    """
    defaults = SOSConfig().to_dict()
    one, other = (finite({**defaults, **config}) for config in (one, other))
    for config in one, other:
        config["sos_solver"] = config["sos_solver"].replace("qr", "svd")
    keys = {*one, *other} - {*besides}
    if not (one["sos"] and other["sos"]):
        keys -= {key for key in keys if key.startswith("sos_") and key not in RECIPE}
    return next((key for key in sorted(keys) if one.get(key) != other.get(key)), None)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of ``results.csv`` or ``sos.csv``; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f, skipinitialspace=True))


def wall_time(results_csv: Path) -> float:
    """Return the seconds that a training took by its ``results.csv``, validation included.

    Ultralytics counts ``time`` from the start of a process, so it starts again after an interruption: the last row of
    each stretch counts.
    """
    times = [float(row["time"]) for row in read_rows(results_csv)]
    return sum(now for now, later in zip(times, [*times[1:], -math.inf], strict=True) if later < now)


def _numbers(values: Any, place: str) -> dict[str, float]:
    if not isinstance(values, dict):
        raise ValueError(f"{place}' must hold a value per metric, not {json.dumps(values)}.")
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{place}.{name}' must be a number or null, not {json.dumps(value)}.")
    return {k: math.nan if v is None or not math.isfinite(v) else float(v) for k, v in values.items()}
