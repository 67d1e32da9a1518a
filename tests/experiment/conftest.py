# yolo-sos, AGPL-3.0
"""A small experiment: two arms that train in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

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
SHIFT = "cfg: default.yaml\nsos: true\nsos_start: 0.5\nsos_guard: 1.0\n"


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
    (folder / "baseline.yaml").write_text("cfg: default.yaml\nsos: false\n")
    (folder / "shift.yaml").write_text(SHIFT)
    return folder
