# yolo-sos, AGPL-3.0
"""Tiny runs, and the table of what goes wrong: each test says by a mark which fault it injects and what must follow."""

from __future__ import annotations

import csv
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from faults_table import collected
from ultralytics import YOLO
from ultralytics.utils import LOGGER

from yolo_sos.trainers import SOSDetectionTrainer


def pytest_configure(config):
    """Declare the marks that the table is made of."""
    config.addinivalue_line("markers", "feature(what, outcome): a feature of Ultralytics, together with SOS")
    config.addinivalue_line("markers", "fault(what, outcome): a fault or bad input, and what must follow")


def pytest_collection_modifyitems(config, items):
    """Note what the suite declares, before anything is deselected."""
    config.stash[collected] = list(items)


@dataclass
class Run:
    """A training that is over."""

    trainer: Any = None
    log: list[str] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def save_dir(self) -> Path:
        return self.trainer.save_dir

    def rows(self, name: str) -> list[dict[str, str]]:
        """Return the lines of a CSV file of the run."""
        with open(self.save_dir / name, encoding="utf-8", newline="") as f:
            return list(csv.DictReader(f))

    def said(self, text: str) -> bool:
        return any(text in line for line in self.log)


@pytest.fixture
def defaults(digits, tiny, tmp_path) -> dict[str, Any]:
    """Two epochs, each with a shift that no guard stops, and images left to choose from."""
    return {
        **{"model": str(tiny), "data": str(digits), "epochs": 2, "imgsz": 64, "batch": 8, "device": "cpu"},
        **{"workers": 0, "plots": False, "project": str(tmp_path / "runs"), "optimizer": "SGD", "lr0": 0.02},
        **{"sos": True, "sos_start": 0.01, "sos_interval": 1, "sos_rank": 0.5, "sos_images": 8, "sos_guard": 1.0},
    }


@pytest.fixture
def train(defaults):
    """``train(**settings)`` trains and returns the ``Run``; ``error`` is the exception that must end it."""

    def train(*, callbacks=None, error=None, **settings) -> Run:
        run, settings = Run(), {**defaults, **settings}
        if settings.get("resume"):
            settings = {"model": settings["model"], "resume": True}
        yolo = YOLO(settings["model"])
        yolo.add_callback("on_pretrain_routine_start", lambda trainer: setattr(run, "trainer", trainer))
        for event, callback in (callbacks or {}).items():
            yolo.add_callback(event, callback)
        handler = logging.Handler()
        handler.emit = lambda record: run.log.append(record.getMessage())  # type: ignore[method-assign]
        LOGGER.addHandler(handler)
        try:
            if error is None:
                yolo.train(trainer=SOSDetectionTrainer, **settings)
            else:
                with pytest.raises(error) as caught:
                    yolo.train(trainer=SOSDetectionTrainer, **settings)
                run.error = caught.value
        finally:
            LOGGER.removeHandler(handler)
        return run

    return train
