# yolo-sos, AGPL-3.0
"""``fit_head=true`` in two processes, in Ultralytics' own loop: torch.distributed.run on the CPU, by gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from ultralytics import YOLO

from yolo_sos.core import affine_matrix
from yolo_sos.yolo.classes import in_order

# Ultralytics knows DDP on GPUs alone: what it says of a device is left out, everything else is its own code.
WORKER = """
import json, os, sys, traceback
from pathlib import Path
import torch
from torch import distributed as dist, nn
from ultralytics.utils.torch_utils import unwrap_model
from yolo_sos.core import affine_matrix
from yolo_sos.trainers import SOSDetectionTrainer
from yolo_sos.yolo.classes import in_order

class DDP(nn.parallel.DistributedDataParallel):
    def __init__(self, module, device_ids, **options):
        super().__init__(module, **options)

nn.parallel.DistributedDataParallel = DDP
folder, how, rank = Path(sys.argv[2]), sys.argv[3], int(os.environ["RANK"])
told = {"fits": 0}

class Trainer(SOSDetectionTrainer):
    def __init__(self, overrides):
        super().__init__(overrides=overrides)
        self.world_size, self.ddp = 2, False

    def _setup_ddp(self):
        dist.init_process_group("gloo")

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
try:
    trainer._do_train()
except (Exception, KeyboardInterrupt) as e:
    traceback.print_exc()
    told["error"] = f"{type(e).__name__}: {e}"
(folder / f"{rank}.json").write_text(json.dumps(told))
dist.barrier()  # a rank that leaves early breaks the connections of the other
dist.destroy_process_group()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)  # torch's background threads now and then abort an interpreter that shuts down after an exception
"""


@pytest.fixture
def launch(able, tmp_path):
    """``launch(how)`` returns what two workers noted; the run is in ``tmp_path / "run"``."""
    content = {**yaml.safe_load(able["data"].read_text()), "names": {k: f"digit {k}" for k in range(10)}}
    data = tmp_path / "renamed.yaml"
    data.write_text(yaml.safe_dump(content))

    def launch(how: str) -> list[dict]:
        script = tmp_path / "worker.py"
        script.write_text(WORKER)
        place = ["--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2"]
        settings = {
            **{"model": str(able["best"]), "data": str(data), "epochs": 2, "imgsz": 64, "batch": 16, "device": "cpu"},
            **{"workers": 0, "plots": False, "amp": False, "fit_head": True, "project": str(tmp_path), "name": "run"},
        }
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                *place,
                str(script),
                json.dumps(settings),
                str(tmp_path),
                how,
            ],
            **{"capture_output": True, "text": True, "timeout": 180, "env": {**os.environ, "OMP_NUM_THREADS": "1"}},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]

    return launch


def test_rank_0_fits_and_every_rank_starts_with_its_rows(launch, able, tmp_path):
    first, second = launch("train")
    assert (first["error"], second["error"]) == ("KeyboardInterrupt: ", "KeyboardInterrupt: ")
    assert (first["fits"], second["fits"]) == (1, 0)
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
