# yolo-sos, AGPL-3.0
"""Runs that several tests look at."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import LOGGER
from watched import EPOCHS, REAL_SHIFT, Run

from yolo_sos.train import SOSDetectionTrainer, mixin

# Whatever the defaults are: three shifts that no guard stops, with images left to choose from
SHIFTS = {"sos_start": 0.5, "sos_interval": 1, "sos_rank": 0.5, "sos_images": 8, "sos_guard": 1.0}


@pytest.fixture(scope="session")
def train(digits, tiny, tmp_path_factory):
    """``train(**settings)`` runs four tiny epochs and returns the ``Run``.

    ``model`` starts from another model, ``trainer`` is another class, ``callbacks`` maps events to functions, and
    ``error`` is the exception that must end the run.
    """

    def train(*, trainer=SOSDetectionTrainer, model=tiny, callbacks=None, error=None, **settings) -> Run:
        run = Run()
        yolo = YOLO(model)
        run.watch(yolo)
        for event, callback in (callbacks or {}).items():
            yolo.add_callback(event, callback)
        defaults = {
            **{"data": str(digits), "epochs": EPOCHS, "imgsz": 64, "batch": 8, "device": "cpu", "workers": 0},
            **{"plots": False, "project": str(tmp_path_factory.mktemp("runs")), "optimizer": "SGD", "lr0": 0.02},
            **(SHIFTS if settings.get("sos") else {}),
        }
        if settings.get("resume"):
            defaults = {}
        handler = logging.Handler()
        handler.emit = lambda record: run.log.append(record.getMessage())  # type: ignore[method-assign]
        LOGGER.addHandler(handler)
        try:
            with pytest.MonkeyPatch.context() as patch:
                if mixin.shift_layers is REAL_SHIFT:  # a test may have put something else in its place
                    patch.setattr(mixin, "shift_layers", run.shift_layers)
                if error is None:
                    yolo.train(trainer=trainer, **{**defaults, **settings})
                else:
                    with pytest.raises(error) as caught:
                        yolo.train(trainer=trainer, **{**defaults, **settings})
                    run.error = caught.value
        finally:
            LOGGER.removeHandler(handler)
        return run

    return train


@pytest.fixture(scope="session")
def stock(train) -> Run:
    """A run of the host's own trainer."""
    return train(trainer=DetectionTrainer)


@pytest.fixture(scope="session")
def shifted(train) -> Run:
    """The same run with SOS, shifts after epochs 2, 3 and 4."""
    return train(sos=True, save_period=1, plots=True)


@pytest.fixture(scope="session")
def interrupt():
    """``interrupt(event, epoch)`` returns a callback that stops a run at an event of that epoch, counted from 1."""

    def interrupt(event: str, epoch: int) -> dict[str, Callable[[Any], None]]:
        def callback(trainer) -> None:
            if trainer.epoch + 1 == epoch:
                raise KeyboardInterrupt

        return {event: callback}

    return interrupt
