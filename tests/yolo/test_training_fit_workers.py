# yolo-sos, AGPL-3.0
"""``fit_head=true`` in two processes, in Ultralytics' own loop: torch.distributed.run on the CPU, by gloo."""

from __future__ import annotations

import json

import pytest
import torch
from renamed import renamed_data
from two_processes import run_two
from ultralytics import YOLO

from yolo_sos.core import affine_matrix
from yolo_sos.yolo.classes import in_order

WORKER = """
from yolo_sos.core import affine_matrix
from yolo_sos.yolo.classes import in_order

told = {"fits": 0}

class Trainer(TwoProcesses):
    def _fit(self):
        told["fits"] += 1
        if how == "fail":
            raise ZeroDivisionError("of the fit")
        return super()._fit()

def note(trainer):
    for name, model in ("model", unwrap_model(trainer.model)), ("ema", trainer.ema.ema):
        torch.save([affine_matrix(layer.module).detach() for layer in in_order(model)], folder / f"{name}{rank}.pt")
    raise KeyboardInterrupt  # the epoch has not begun

trainer = Trainer(json.loads(sys.argv[1]))
trainer.add_callback("on_train_epoch_start", note)
"""


@pytest.fixture
def launch(able, tmp_path):
    """``launch(how)`` returns what two workers noted; the run is in ``tmp_path / "run"``."""
    data = renamed_data(able["data"], tmp_path)
    settings = {
        **{"model": str(able["best"]), "data": str(data), "epochs": 2, "imgsz": 64, "batch": 16, "device": "cpu"},
        **{"workers": 0, "plots": False, "amp": False, "fit_head": True, "project": str(tmp_path), "name": "run"},
    }
    return lambda how: run_two(WORKER, settings, tmp_path, how)


def test_rank_0_fits_and_every_rank_starts_with_its_rows(launch, able, tmp_path):
    first, second = launch("train")
    assert (first["error"], second["error"]) == ("KeyboardInterrupt: ", "KeyboardInterrupt: ")
    assert (first["told"], second["told"]) == ({"fits": 1}, {"fits": 0})
    held = {name: torch.load(tmp_path / f"{name}.pt") for name in ("model0", "model1", "ema0", "ema1")}
    for layers in held.values():
        assert all(map(torch.equal, layers, held["model0"]))
    told = json.loads((tmp_path / "run/fit.json").read_text())
    assert told["heldout_after"] < told["heldout_before"] and not told["refusal"]
    before = [affine_matrix(layer.module) for layer in in_order(YOLO(able["best"]).model)]
    assert not any(map(torch.equal, held["model0"], before))
    best = [affine_matrix(layer.module) for layer in in_order(YOLO(tmp_path / "run/weights/best.pt").model)]
    assert all(torch.equal(a, b.half().float()) for a, b in zip(best, held["ema0"], strict=True))


def test_every_rank_stops_with_the_error_of_rank_0(launch):
    first, second = launch("fail")
    assert first["error"] == "ZeroDivisionError: of the fit"
    assert second["error"] == "RuntimeError: The fit failed on rank 0: ZeroDivisionError: of the fit"
