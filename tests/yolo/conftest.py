# yolo-sos, AGPL-3.0
"""Checkpoints to shift."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from ultralytics import YOLO

from yolo_sos.core import weight_matrix
from yolo_sos.yolo.heads import final_layers


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


def corners(x, y, w, h):
    left, right, top, bottom = x - w / 2, x + w / 2, y - h / 2, y + h / 2
    return [left, top, right, top, right, bottom, left, bottom]


LABELS = {  # box (cx, cy, w, h) -> what a task's label holds
    "segment": corners,
    "obb": corners,
    "pose": lambda x, y, w, h: [x, y, w, h, x, y, 2, x + w / 4, y, 2],
}


@pytest.fixture
def data_of(digits, tmp_path):
    """``data_of(task)`` returns a data set of that task, made from the digits, or from another set of boxes."""

    def make(task: str, source: Path = digits) -> Path:
        root = tmp_path / "set"
        if task == "classify":
            rng = np.random.default_rng(0)
            for split, count in ("train", 8), ("val", 4):
                for c in range(10):
                    (root / split / str(c)).mkdir(parents=True)
                    for i in range(count):
                        image = rng.integers(0, 25 * (c + 1), (32, 32, 3)).astype(np.uint8)
                        assert cv2.imwrite(str(root / split / str(c) / f"{i}.png"), image)
            return root
        if task == "detect":
            return source
        shutil.copytree(source.parent / "images", root / "images")
        for file in (source.parent / "labels").rglob("*.txt"):
            target = root / "labels" / file.relative_to(source.parent / "labels")
            target.parent.mkdir(parents=True, exist_ok=True)
            lines = [line.split() for line in file.read_text().splitlines()]
            text = [" ".join([c, *map(str, LABELS[task](*map(float, box)))]) for c, *box in lines]
            target.write_text("\n".join(text))
        data = yaml.safe_load(source.read_text())
        (root / "data.yaml").write_text(yaml.safe_dump({**data, "path": str(root), "kpt_shape": [2, 3]}))
        return root / "data.yaml"

    return make


@pytest.fixture
def model_of(tmp_path):
    """``model_of(yaml)`` returns an untrained checkpoint that finds something: its last layers are made up."""

    def make(name: str, data: Path) -> Path:
        torch.manual_seed(0)
        yolo = YOLO(name)
        cfg = {**yolo.model.yaml, "nc": 10, "kpt_shape": [2, 3]}
        model = type(yolo.model)(cfg, nc=10, verbose=False)
        model.names, model.task = {i: str(i) for i in range(10)}, yolo.task
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for m in norms:
            m.momentum = None  # the mean over all batches; the initial statistics let features fade to nothing
        with torch.no_grad():
            model.train()(torch.rand(16, 3, 64, 64))
        for m in norms:
            m.momentum = 0.03
        for layer in final_layers(model):
            weight_matrix(layer.module).normal_(std=0.1)
            if layer.kind == "cls":
                layer.module.bias.data.fill_(-5.0)  # some boxes are confident enough to be counted
        path = tmp_path / "best.pt"
        args = {"task": yolo.task, "imgsz": 64, "batch": 8, "data": str(data), "model": name}
        torch.save({"model": model.half(), "ema": None, "train_args": args, "epoch": -1, "optimizer": None}, path)
        return path

    return make
