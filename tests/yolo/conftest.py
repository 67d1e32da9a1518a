# yolo-sos, AGPL-3.0
"""Checkpoints to shift."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from ultralytics import YOLO


@pytest.fixture(scope="session")
def seen(digits, tmp_path_factory) -> Path:
    """A data YAML whose val split is the training split: a tiny model finds something there, and mAP can change."""
    data = yaml.safe_load(digits.read_text())
    path = tmp_path_factory.mktemp("data") / "seen.yaml"
    path.write_text(yaml.safe_dump({**data, "path": str(digits.parent), "val": data["train"]}))
    return path


@pytest.fixture(scope="session")
def trained(seen, tiny, tmp_path_factory) -> dict[str, Path]:
    """A finished and an unfinished checkpoint of one stock training."""
    folder, kept = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("trained")

    def keep(trainer):
        if trainer.epoch == 40:
            shutil.copy(trainer.last, kept)

    yolo = YOLO(tiny)
    yolo.add_callback("on_model_save", keep)
    plain = {k: 0.0 for k in ("mosaic", "translate", "scale", "hsv_h", "hsv_s", "hsv_v", "fliplr", "warmup_epochs")}
    yolo.train(
        data=str(seen),
        **{"epochs": 60, "imgsz": 64, "batch": 8, "device": "cpu", "workers": 0, "plots": False, "val": False},
        **{"optimizer": "AdamW", "lr0": 0.005, "close_mosaic": 0, "project": str(folder), "name": "run"},
        **plain,
    )
    shutil.copy(folder / "run/weights/best.pt", kept)  # a run that is resumed would write over it
    return {"best": kept / "best.pt", "last": kept / "last.pt"}


@pytest.fixture
def weights(trained, tmp_path):
    """``weights(name)`` copies a checkpoint, ``best`` or ``last``, into a fresh folder."""

    def copy(name: str = "best") -> Path:
        (tmp_path / "weights").mkdir(exist_ok=True)
        return Path(shutil.copy(trained[name], tmp_path / "weights"))

    return copy


@pytest.fixture
def contents():
    """``contents(folder)`` returns the files of a folder, hidden ones included, with what they hold."""
    return lambda folder: {p.name: p.read_bytes() for p in folder.iterdir()}
