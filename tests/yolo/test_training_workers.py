# yolo-sos, AGPL-3.0
"""Distributed runs, as far as they can be had without a GPU: what workers are given, and what rank 0 sends them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ultralytics.utils.callbacks import get_default_callbacks
from ultralytics.utils.dist import ddp_cleanup, generate_ddp_file

from yolo_sos.trainers import SOSDetectionTrainer

pytest.importorskip("cloudpickle")


@pytest.fixture
def overrides(digits, tiny, tmp_path):
    return {
        **{"model": str(tiny), "data": str(digits), "epochs": 3, "imgsz": 64, "batch": 8, "device": "cpu"},
        **{"plots": False, "project": str(tmp_path), "sos": True, "sos_rank": 12, "sos_layers": "box"},
    }


# Ultralytics' script for a worker, but for the training
REBUILD = """
import json, sys
from pathlib import Path
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.patches import torch_load

state = torch_load(sys.argv[1], map_location="cpu")
cfg = DEFAULT_CFG_DICT.copy()
cfg.update(save_dir="")
trainer = state["trainer"](cfg=cfg, overrides=state["args"], _callbacks=state["callbacks"])
written = (Path(trainer.save_dir) / "sos.yaml").exists()
ours = [k for k in vars(trainer.args) if k.startswith("sos")]
print(json.dumps([type(trainer).__name__, trainer.sos.to_dict(), ours, written]))
"""


def rebuild(trainer, rank: int) -> list:
    """Return what a worker of that rank makes of the trainer: class, settings, stray arguments, a file of settings."""
    file = generate_ddp_file(trainer)
    try:
        done = subprocess.run(
            [sys.executable, "-c", REBUILD, str(Path(file).with_suffix(".pt"))],
            **{"capture_output": True, "text": True, "env": {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}},
        )
    finally:
        ddp_cleanup(trainer, file)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_settings_reach_a_worker_which_writes_no_file(overrides):
    trainer = SOSDetectionTrainer(overrides=overrides)
    assert (trainer.save_dir / "sos.yaml").exists()
    (trainer.save_dir / "sos.yaml").unlink()  # Ultralytics removes the folder before it starts the workers
    settings = trainer.sos.to_dict()
    assert (settings["sos"], settings["sos_rank"], settings["sos_layers"]) == (True, 12, ["box"])
    assert rebuild(trainer, rank=1) == ["SOSDetectionTrainer", settings, [], False]


@pytest.mark.slow
def test_carried_settings_are_those_of_the_run_alone(overrides):
    """In one process, they reach neither the next trainer nor the callbacks that it was given."""
    callbacks = get_default_callbacks()
    events = list(callbacks)
    first = SOSDetectionTrainer(overrides=overrides, _callbacks=callbacks)
    assert list(callbacks) == events
    again = SOSDetectionTrainer(overrides={**overrides, "sos": False}, _callbacks=callbacks)
    assert first.sos.sos and not again.sos.sos


# Two processes, without Ultralytics' loop: the trainer's own shift, on models that differ from rank to rank
SHIFT = """
import os, sys
from types import SimpleNamespace
import torch
from torch import distributed as dist, nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG_DICT, IterableSimpleNamespace
from yolo_sos.config import SOSConfig
from yolo_sos.yolo.heads import final_layers
from yolo_sos.trainers import SOSDetectionTrainer

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(rank)
models = {name: DetectionModel(sys.argv[1], verbose=False) for name in ("ema", "model")}
layers = {name: final_layers(model) for name, model in models.items()}
trainer = object.__new__(SOSDetectionTrainer)
trainer.world_size, trainer.model, trainer.ema = 2, models["model"], SimpleNamespace(ema=models["ema"])
trainer.sos = SOSConfig.from_dict({"sos_momentum": True, "sos_layers": "cls"})
trainer.args = SimpleNamespace(task="detect")
trainer.optimizer = torch.optim.SGD(models["model"].parameters(), momentum=0.9)
momentum = {layer: torch.rand_like(layer.module.weight) for layer in layers["model"]}
for layer, x in momentum.items():
    trainer.optimizer.state[layer.module.weight]["momentum_buffer"] = x
kept = {layer: x.clone() for layer, x in momentum.items()}
for model in models.values():
    model.args = IterableSimpleNamespace(**DEFAULT_CFG_DICT)  # criteria read them
state = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}

def shift(_):
    assert rank == 0, "only rank 0 shifts"
    for name in models:
        for layer in layers[name]:
            if layer.kind == "cls":
                nn.init.constant_(layer.module.weight, 0.5 if name == "ema" else 0.25)
                if name == "model":
                    nn.init.constant_(momentum[layer], 0.75)
    return {"ema": "report"}

def fail(_):
    assert rank == 0, "only rank 0 shifts"
    raise ZeroDivisionError("of rank 0")

trainer._shift_models = fail
try:
    trainer._shift_everywhere(models)
    raise SystemExit("nothing was raised")
except ZeroDivisionError as e:
    assert rank == 0, e
except RuntimeError as e:
    assert rank == 1 and "rank 0: ZeroDivisionError: of rank 0" in str(e), e
trainer._shift_models = shift
assert trainer._shift_everywhere(models) == ({"ema": "report"} if rank == 0 else {})
for name, value in (("ema", 0.5), ("model", 0.25)):
    chosen = {f"{layer.name}.weight" for layer in layers[name] if layer.kind == "cls"}
    for key, now in models[name].state_dict().items():
        same = torch.equal(now, torch.full_like(now, value) if key in chosen else state[name][key])
        assert same, f"{name} {key} on rank {rank}"
for layer, x in momentum.items():
    assert torch.equal(x, torch.full_like(x, 0.75) if layer.kind == "cls" else kept[layer]), f"momentum on rank {rank}"
for layer in layers["model"]:  # as a callback can do while training goes on
    layer.module.weight.requires_grad = False
trainer._shift_models = lambda _: {}
assert trainer._shift_everywhere(models) == {}
dist.barrier()  # a rank that leaves early breaks the connections of the other
dist.destroy_process_group()
print("done")
"""


def test_every_rank_gets_the_weights_and_the_errors_of_rank_0(tiny, tmp_path):
    env = {**os.environ, "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", SHIFT, str(tiny), str(tmp_path / "rendezvous")],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": {**env, "RANK": str(rank)}},
        )
        for rank in range(2)
    ]
    try:
        told = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    errors = "\n".join(err for _, err in told)
    for worker, (out, _) in zip(workers, told, strict=True):
        assert worker.returncode == 0 and out.splitlines()[-1] == "done", errors
