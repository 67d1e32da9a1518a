# yolo-sos, AGPL-3.0
"""Curves of a training: columns, figures, and that measuring changes nothing."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils.patches import torch_load

from yolo_sos.analyze import watch
from yolo_sos.analyze.curves import columns, read_curve
from yolo_sos.trainers import SOSDetectionTrainer


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watch, "CURVATURE", 2)
    monkeypatch.setattr(watch, "FEATURES", 8)
    monkeypatch.setattr(watch.measure, "__kwdefaults__", {"probes": 2, "seed": 0})


def train(tiny, digits, folder, **settings):
    yolo = YOLO(tiny)
    defaults = {"data": str(digits), "epochs": 3, "imgsz": 64, "batch": 8, "device": "cpu", "workers": 0, "seed": 0}
    defaults |= {"plots": False, "project": str(folder), "name": "run", "optimizer": "SGD"}
    yolo.train(trainer=SOSDetectionTrainer, **{**defaults, **settings})
    return yolo.trainer


def rows(trainer):
    with open(trainer.csv, newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("sos", [False, True])
def test_curves_while_training(tiny, digits, tmp_path, sos):
    shift = {"sos": True, "sos_start": 0.01, "sos_interval": 1, "sos_images": 4, "sos_guard": None} if sos else {}
    watched = train(tiny, digits, tmp_path / "a", epochs=4, sos_analyze=2, plots=not sos, **shift)
    found = rows(watched)
    ours = list(columns())
    assert [row["epoch"] for row in found] == ["1", "2", "3", "4"]
    assert [key for key in found[0] if key in ours] == ours and len({tuple(row) for row in found}) == 1
    for row in found:
        assert math.isfinite(float(row["sos/trace"])) == (row["epoch"] in "24")
    assert ("sos/squared_norm_ratio" in found[0]) == sos
    assert (watched.save_dir / "analyze.png").exists() == (not sos)  # as plots=
    point, last = read_curve(watched.save_dir)
    assert (point["epoch"], last["epoch"]) == (2, 4) and point["trace_stderr"] > 0
    plain = train(tiny, digits, tmp_path / "b", epochs=4, **shift)
    a, b = (torch_load(t.last, map_location="cpu")["model"].state_dict() for t in (watched, plain))
    assert all(torch.equal(a[k], b[k]) for k in a)  # no random number and no weight was touched
    assert not any("sos/trace" in row for row in rows(plain))


def test_more_epochs_apart_than_there_are(tiny, digits, tmp_path):
    with pytest.raises(ValueError, match=r"sos_analyze=4 is more than epochs=3"):
        train(tiny, digits, tmp_path, sos_analyze=4)
