# yolo-sos, AGPL-3.0
"""Where an analysis writes to, what it ran with, and checks of options."""

from __future__ import annotations

import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import ultralytics
from ultralytics.cfg import get_save_dir

from yolo_sos import __version__


def versions(device: torch.device | None = None) -> dict[str, str]:
    """Return the versions that figures depend on."""
    found = {"yolo_sos": __version__, "ultralytics": ultralytics.__version__, "torch": torch.__version__}
    return {**found, "python": platform.python_version(), **({"device": str(device)} if device else {})}


def save_dir(task: str, project: str | None, name: str | None, exist_ok: bool) -> Path:
    """Return the folder to write into, as the host chooses it: ``project/name``, ``runs/{task}/analyze`` by default."""
    return get_save_dir(SimpleNamespace(project=project, name=name, task=task, mode="analyze", exist_ok=exist_ok))


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise a ``ValueError`` that names the key unless the value is None or an integer of at least ``least``."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"'{name}={value}' is invalid: {name} must be an integer of at least {least}.")
