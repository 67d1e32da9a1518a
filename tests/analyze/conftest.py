# yolo-sos, AGPL-3.0
"""Models whose curvature is known, and checkpoints to compare."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.utils import DEFAULT_CFG

from yolo_sos.analyze.hessian import Subject
from yolo_sos.core import FinalLayer, ModelTask, weight_matrix
from yolo_sos.yolo.heads import YoloTask, final_layers


@pytest.fixture
def small():
    """A subject in float64 with in-place activations, BatchNorm and dropout, and two batches of different size."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.SiLU(inplace=True), nn.Flatten(), nn.Dropout(0.5), nn.Linear(27, 4)
    ).double()
    net[1].running_mean.normal_()
    batches = [(torch.randn(n, 2, 5, 5).double(), torch.randint(4, (n,))) for n in (5, 3)]
    return Subject("small", net.train(), ModelTask(), [FinalLayer("5", net[5])]), batches


@pytest.fixture
def ultralytics_model():
    """``ultralytics_model(yaml, nc)`` returns a model whose features do not fade, with final layers of some size."""

    def make(name: str, nc: int = 10, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        yolo = YOLO(name)
        model = type(yolo.model)({**yolo.model.yaml, "nc": nc, "kpt_shape": [2, 3]}, nc=nc, verbose=False)
        model.names, model.task, model.args = {i: str(i) for i in range(nc)}, yolo.task, DEFAULT_CFG
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for m in norms:
            m.momentum = None
        with torch.no_grad():
            model.train()(torch.rand(8, 3, 64, 64))
        for m in norms:
            m.momentum = 0.03
        for layer in final_layers(model):
            weight_matrix(layer.module).normal_(std=0.1)
        return model.eval()

    return make


@pytest.fixture
def subject(ultralytics_model):
    """``subject(yaml)`` returns a model of Ultralytics as a subject."""

    def make(name: str, nc: int = 10) -> Subject:
        model = ultralytics_model(name, nc)
        return Subject(name, model, YoloTask(model), final_layers(model))

    return make


@pytest.fixture
def checkpoint(ultralytics_model, digits, tmp_path):
    """``checkpoint(file, yaml)`` writes a checkpoint as Ultralytics does."""

    def make(file: str, name: str, nc: int = 10, seed: int = 0, data: Path = digits) -> Path:
        model = ultralytics_model(str(name), nc, seed)
        args = {"task": model.task, "imgsz": 64, "batch": 4, "data": str(data), "model": str(name)}
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        model.args = args
        torch.save({"model": model.half(), "ema": None, "train_args": args, "epoch": -1, "optimizer": None}, path)
        return path

    return make
