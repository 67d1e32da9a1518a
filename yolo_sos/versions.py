# yolo-sos, AGPL-3.0
"""What software a result was made with, for the records of experiments, analyses and studies."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import cv2

from yolo_sos import __version__

PACKAGES = ("ultralytics", "torch", "torchvision", "numpy")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    ours = {"yolo-sos": __version__, "python": platform.python_version()}
    # Any distribution of OpenCV will do, such as the headless one, so the module is asked.
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
