# yolo-sos, AGPL-3.0
"""What a run leaves: one JSON file that says what was run, with what, where, and what came out."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import NoneType
from typing import Any

from yolo_sos.config import RECIPE, SOSConfig
from yolo_sos.files import finite, read_json, write_text

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
    write_text(path, json.dumps(finite(record), indent=1, allow_nan=False) + "\n")


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


def difference(one: dict[str, Any], other: dict[str, Any], besides: tuple[str, ...] = ()) -> str | None:
    """Return the first key, in alphabetical order, in which two configs differ; None if they agree.

    A setting that a record of an older release lacks counts as its default, and its ``sos_solver=qr`` as ``svd``, which
    computes the same weights. The settings of a shift do not count where one of the two does not shift.

    Args:
        one (dict): A config, as records hold it.
        other (dict): Another.
        besides (tuple[str, ...]): Keys that may differ.
    """
    defaults = SOSConfig.from_dict({}).to_dict()
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
