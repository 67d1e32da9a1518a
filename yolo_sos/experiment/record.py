# yolo-sos, AGPL-3.0
"""What a run leaves: one JSON that says what was run, with what, where, and what came out."""

from __future__ import annotations

import csv
import json
import math
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2

from yolo_sos import __version__
from yolo_sos.config import RECIPE, SOSConfig
from yolo_sos.files import finite, read_json, write_text

PACKAGES = ("ultralytics", "torch", "torchvision", "numpy")
KEYS = (
    *("experiment", "arm", "seed", "metrics", "config", "differences", "versions", "git_commit", "device"),
    "wall_time",
)


def record_path(results: str | Path, experiment: str, arm: str, seed: int) -> Path:
    """Return where the record of a run lies: ``results/<experiment>/records/<arm>-<seed>.json``."""
    return Path(results) / experiment / "records" / f"{arm}-{seed}.json"


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record, atomically; a metric that is not a number becomes null, as JSON knows no other."""
    write_text(path, json.dumps(finite(record), indent=1, allow_nan=False) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: If the file is no record; names the first key that is missing.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise ValueError(f"{path}: not a record of a run, which is a JSON object.")
    for key in KEYS:
        if key not in record:
            raise ValueError(f"{path}: not a record of a run: it has no '{key}'.")
    return record


def difference(one: dict[str, Any], other: dict[str, Any], besides: tuple[str, ...] = ()) -> str | None:
    """Return the first key, in order, in which two configs differ; None if they agree.

    A setting of ours that one of them does not have yet, from an older release, counts as its default. How to shift
    does not count where one of them does not shift.

    Args:
        one (dict): A config, as records keep it.
        other (dict): Another.
        besides (tuple[str, ...]): Keys that may differ.
    """
    defaults = SOSConfig.from_dict({}).to_dict()
    one, other = finite({**defaults, **one}), finite({**defaults, **other})
    keys = {*one, *other} - {*besides}
    if not (one["sos"] and other["sos"]):
        keys -= {key for key in keys if key.startswith("sos_") and key not in RECIPE}
    return next((key for key in sorted(keys) if one.get(key) != other.get(key)), None)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    ours = {"yolo-sos": __version__, "python": platform.python_version()}
    # Any of OpenCV's distributions will do, the one without windows too: ask the module.
    return {**ours, **{name: version(name) for name in PACKAGES}, "opencv": cv2.__version__}


def git_commit() -> str | None:
    """Return the commit of the checkout that this package runs from, with ``-dirty`` after it if files were changed.

    None where it is installed without a checkout.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def wall_time(results_csv: Path) -> float:
    """Return the seconds that a training took by its ``results.csv``, validation included.

    The host counts ``time`` from the start of a process: after an interruption it starts again, so each stretch counts
    with its last line.
    """
    with open(results_csv, encoding="utf-8", newline="") as f:
        times = [float(row["time"]) for row in csv.DictReader(f, skipinitialspace=True)]
    return sum(now for now, later in zip(times, [*times[1:], -math.inf], strict=True) if later < now)


def shifts(sos_csv: Path) -> list[dict[str, str]]:
    """Return the lines of ``sos.csv``; none if the run did not shift."""
    if not sos_csv.exists():
        return []
    with open(sos_csv, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))
