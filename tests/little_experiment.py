# yolo-sos, AGPL-3.0
"""A small experiment, two arms that train in seconds, and a detector with something to score."""

from __future__ import annotations

from pathlib import Path

import pytest
from ultralytics import YOLO

DEFAULT = """\
data: {data}
model: {model}
epochs: 2
imgsz: 64
batch: 8
optimizer: SGD
lr0: 0.02
val: false
workers: 0
device: cpu
"""
SHIFT = "sos: true\nsos_start: 0.5\nsos_guard: 1.0\n"


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def experiment(workplace, digits, tiny) -> Path:
    """The folder ``little`` in the working directory: ``baseline`` and ``shift``, two epochs each."""
    folder = workplace / "little"
    folder.mkdir()
    (folder / "default.yaml").write_text(DEFAULT.format(data=digits, model=tiny))
    (folder / "baseline.yaml").write_text("sos: false\n")
    (folder / "shift.yaml").write_text(SHIFT)
    return folder


@pytest.fixture(scope="session")
def weights(digits, tiny, tmp_path_factory) -> Path:
    """The checkpoint of a detector that has been fitted to its 24 images, so that there is something to score."""
    stay = {"mosaic": 0.0, "scale": 0.0, "translate": 0.0, "hsv_s": 0.0, "hsv_v": 0.0, "fliplr": 0.0}
    quick = {"optimizer": "AdamW", "lr0": 0.005, "warmup_epochs": 0, "nbs": 8, "epochs": 55, "val": False}
    size = {"imgsz": 64, "batch": 8, "device": "cpu", "workers": 0}
    folder = tmp_path_factory.mktemp("learned")
    off = {"plots": False, "project": str(folder), "name": "run", "verbose": False}
    YOLO(tiny).train(data=str(digits), **size, **stay, **quick, **off)
    return folder / "run" / "weights" / "last.pt"
