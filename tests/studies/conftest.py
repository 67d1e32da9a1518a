# yolo-sos, AGPL-3.0
"""How a study's script is loaded, and the fixtures that tests of experiments and of studies share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from little_experiment import experiment, weights, workplace  # noqa: F401

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture(scope="session")
def load_study():
    """``load_study(name, script)`` imports ``studies/<name>/<script>.py``, by default ``<name>.py``, as a module."""

    def load(name: str, script: str | None = None):
        path = STUDIES / name / f"{script or name}.py"
        spec = importlib.util.spec_from_file_location(f"study_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load
