# yolo-sos, AGPL-3.0
"""Ultralytics, kept off the network and out of the user's settings, and the tiny trainings of several tests."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

# Ultralytics reads these when it is first imported, here and in the processes that tests start: set before any module.
HOME = Path(tempfile.mkdtemp(prefix="yolo-sos-tests-"))
os.environ["YOLO_OFFLINE"] = "true"
os.environ["YOLO_CONFIG_DIR"] = str(HOME)

TINY = """\
# 325 000 parameters, strides 8, 16 and 32: an epoch of 24 images takes a tenth of a second
nc: 10
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, Conv, [48, 3, 2]]
  - [-1, 1, Conv, [64, 3, 2]]
head:
  - [[2, 3, 4], 1, Detect, [nc]]
"""


def configure_ultralytics(home: Path, **settings) -> Path:
    """Write Ultralytics' settings, and a font under the name of the one that it would download, into a folder.

    Returns:
        (Path): The folder, which YOLO_CONFIG_DIR is to name.
    """
    folder = home / "Ultralytics"
    folder.mkdir(parents=True)
    places = {f"{name}_dir": str(home / name) for name in ("datasets", "weights", "runs")}
    (folder / "settings.json").write_text(json.dumps({**places, "sync": False, **settings}))
    matplotlib = find_spec("matplotlib")
    assert matplotlib is not None and matplotlib.origin is not None
    for name in "Arial.ttf", "Arial.Unicode.ttf":
        shutil.copy(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", folder / name)
    return home


configure_ultralytics(HOME)


def pytest_unconfigure():
    """Leave nothing behind."""
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def activation():
    """The activation of convolutions whose model's YAML asks for none."""
    from ultralytics.nn.modules import Conv

    return Conv.default_act


@pytest.fixture(autouse=True)
def default_activation(activation):
    """Restore it: older releases of Ultralytics leave what one model's YAML asks for (YOLOv6: ReLU) to later models."""
    from ultralytics.nn.modules import Conv

    yield
    Conv.default_act = activation


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The data YAML of 24 + 8 + 8 images of 64 x 64 pixels."""
    from yolo_sos.data.digits import build

    return build(tmp_path_factory.mktemp("digits") / "set", train=24, val=8, test=8, imgsz=64, digits=(1, 3))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The YAML of a detector that trains in no time."""
    path = tmp_path_factory.mktemp("models") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def ultralytics_home():
    """``ultralytics_home(folder, **settings)`` makes a folder for YOLO_CONFIG_DIR with Ultralytics' settings in it."""
    return configure_ultralytics


# Tiny trainings -------------------------------------------------------------------------------------------------------
# Whatever the defaults are: three shifts that no guard stops, with images left to choose from
SHIFTS = {
    **{"sos_method": "principal", "sos_rank": 0.5, "sos_guard": 1.0},
    **{"sos_start": 0.5, "sos_interval": 1, "sos_images": 8},
}


@pytest.fixture(scope="session")
def train(digits, tiny, tmp_path_factory):
    """``train(**settings)`` runs four tiny epochs and returns the ``Run``.

    ``model`` starts from another model, ``trainer`` is another class, ``callbacks`` maps events to functions, and
    ``error`` is the exception that must end the run.
    """
    from ultralytics import YOLO
    from ultralytics.utils import LOGGER
    from watched import EPOCHS, REAL_SHIFT, Run

    from yolo_sos.core import SOS
    from yolo_sos.trainers import SOSDetectionTrainer

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
                if SOS.shift is REAL_SHIFT:  # a test may have put something else in its place
                    patch.setattr(SOS, "shift", lambda sos, *args, **kwargs: run.shift(sos, *args, **kwargs))
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
def able(tiny, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint whose features are of use for images that it has not seen, and its ``data``: 120 + 24 images."""
    from ultralytics import YOLO

    from yolo_sos.data.digits import build

    folder = tmp_path_factory.mktemp("able")
    data = build(folder / "set", train=120, val=24, test=8, imgsz=64, digits=(1, 3))
    content = {**yaml.safe_load(data.read_text()), "path": str(data.parent)}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    plain = {k: 0.0 for k in ("mosaic", "translate", "scale", "hsv_h", "hsv_s", "hsv_v", "fliplr", "warmup_epochs")}
    yolo = YOLO(tiny)
    yolo.train(
        data=str(folder / "data.yaml"),
        **{"epochs": 30, "imgsz": 64, "batch": 8, "device": "cpu", "workers": 0, "plots": False, "val": False},
        **{"optimizer": "AdamW", "lr0": 0.005, "close_mosaic": 0, "project": str(folder), "name": "run"},
        **plain,
    )
    return {"best": folder / "run/weights/best.pt", "data": folder / "data.yaml"}


@pytest.fixture(scope="session")
def stock(train):
    """A run of Ultralytics' own trainer."""
    from ultralytics.models.yolo.detect import DetectionTrainer

    return train(trainer=DetectionTrainer)


@pytest.fixture(scope="session")
def shifted(train):
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


TINY_CLASSIFIER = """\
# 65 000 parameters: an epoch of 60 images takes no time
nc: 10
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [-1, 1, Classify, [nc]]
"""


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory) -> Path:
    """60 + 20 + 20 handwritten digits as an image folder, 32 × 32 pixels; classes of different size in train."""
    from yolo_sos.data.digits import source_digits
    from yolo_sos.data.image_folder import build_image_folder

    images, labels = source_digits()
    large = (255 * np.kron(images, np.ones((4, 4)))).astype(np.uint8)
    waiting = {c: list(np.flatnonzero(labels == c)) for c in range(10)}

    def take(counts):
        index = np.array([waiting[c].pop() for c, n in enumerate(counts) for _ in range(n)])
        return large[index], labels[index]

    splits = {"train": take([12, 4, *[6] * 6, 5, 3]), "val": take([2] * 10), "test": take([2] * 10)}
    path = tmp_path_factory.mktemp("sets") / "few"
    return build_image_folder(path, {}, lambda: splits, [str(c) for c in range(10)])


@pytest.fixture(scope="session")
def classifier_settings(few_digits, tmp_path_factory):
    """``classifier_settings(**settings)`` returns what the trainer of a classifier takes, for two tiny epochs."""
    model = tmp_path_factory.mktemp("models") / "tiny-cls.yaml"
    model.write_text(TINY_CLASSIFIER)

    def classifier_settings(**settings):
        return {
            **{"data": str(few_digits), "model": str(model), "imgsz": 32, "epochs": 2, "batch": 20},
            **{"device": "cpu", "workers": 0, "plots": False, "project": str(tmp_path_factory.mktemp("runs"))},
            **{"optimizer": "SGD", "lr0": 0.02, "warmup_epochs": 0},
            **settings,
        }

    return classifier_settings
