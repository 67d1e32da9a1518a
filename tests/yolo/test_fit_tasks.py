# yolo-sos, AGPL-3.0
"""Fitted checkpoints of every task and head: their files are used as Ultralytics' own are, exports included."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from renamed import NAMES, renamed_data
from ultralytics import YOLO

from yolo_sos.core import affine_matrix
from yolo_sos.yolo import fit_checkpoint, shift_checkpoint
from yolo_sos.yolo.classes import class_layers, in_order

SETTINGS = {"imgsz": 64, "batch": 8, "device": "cpu", "workers": 0, "plots": False}
PLAIN = {k: 0.0 for k in ("mosaic", "translate", "scale", "hsv_h", "hsv_s", "hsv_v", "fliplr", "warmup_epochs")}


@pytest.fixture
def trained(tiny, able, data_of, tmp_path):
    """``trained(task, head, **options)`` trains a tiny model and returns its checkpoint and its data."""

    def trained(task: str, head: str, end2end: bool) -> tuple[Path, Path]:
        cfg = {**yaml.safe_load(tiny.read_text()), "kpt_shape": [2, 3]}
        if end2end:
            cfg |= {"end2end": True, "reg_max": 1}
        name, *args = yaml.safe_load(f"[{head}]")
        cfg["head"] = [[[2, 3, 4], 1, name, args]]
        model = tmp_path / f"tiny-{task}.yaml"
        model.write_text(yaml.safe_dump(cfg))
        data = data_of(task, able["data"].parent / "set/data.yaml")
        yolo = YOLO(model, task=task)
        more = {"epochs": 30, "val": False, "optimizer": "AdamW", "lr0": 0.005, "close_mosaic": 0}
        more |= {"overlap_mask": False}  # not the default: masks of another shape, on which the loss insists
        yolo.train(data=str(data), project=str(tmp_path / "runs"), **SETTINGS, **PLAIN, **more)
        return Path(shutil.copy(yolo.trainer.last, tmp_path / "model.pt")), data

    return trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "head", "end2end"),
    [
        ("detect", "Detect, nc", True),
        ("segment", "Segment, nc, 16, 32", False),
        ("segment", "Segment26, nc, 16, 32", True),
        ("pose", "Pose, nc, [2, 3]", False),
        ("pose", "Pose26, nc, [2, 3]", True),
        ("obb", "OBB, nc, 1", False),
        ("obb", "OBB26, nc, 1", True),
    ],
)
def test_the_file_of_every_head_is_scored_used_and_trained_on(trained, tmp_path, task, head, end2end):
    path, data = trained(task, head, end2end)
    renamed = renamed_data(data, tmp_path)
    report = fit_checkpoint(path, renamed, batch=8)
    assert not report.refusal, report.refusal
    assert report.heldout_after < report.heldout_before and 0.05 < report.explained < 1
    old, new = YOLO(path).model, YOLO(report.output).model
    branches = class_layers(old)
    assert set(branches) == ({"one2many", "one2one"} if end2end else {"one2many"})
    fitted = {layer.name for layer in report.layers}
    for of in branches.values():
        assert fitted & {layer.name for layer in of}  # a level of each branch shows a class
    names = {layer.name for of in branches.values() for layer in of}
    assert set(report.unfitted) == names - fitted
    states = [model.state_dict() for model in (old, new)]
    changed = {k for k in states[0] if not torch.equal(states[0][k].half(), states[1][k].half())}
    semantic = {k for k in changed if "semseg" in k}  # YOLO26's masks, in training
    assert changed - semantic == {f"{name}.{p}" for name in names for p in ("weight", "bias")}

    shift = shift_checkpoint(report.output, renamed, batch=8, method="loss", rank=0.5, guard=None, val=False)
    assert shift.status == "ok"
    for layer in shift.layers:  # objects of all sizes, so that every kind of layer has curvature
        assert 0 < layer.rank < layer.d and layer.norm_after <= layer.norm_before

    stock = YOLO(report.output)
    metrics = stock.val(data=str(renamed), **SETTINGS)
    assert stock.names == NAMES
    assert report.metrics_after == pytest.approx(dict(metrics.results_dict), abs=1e-6)
    assert report.metrics_after["metrics/mAP50(B)"] > 0.1  # of random rows: 0
    image = np.zeros((64, 64, 3), np.uint8)
    (found,) = YOLO(report.output).predict(image, conf=1e-6, imgsz=64, device="cpu", verbose=False)
    kinds = {"detect": found.boxes, "segment": found.masks, "pose": found.keypoints, "obb": found.obb}
    assert len(kinds[task]) > 0

    rows, started = [affine_matrix(layer.module).float() for layer in in_order(new)], []
    again = YOLO(report.output)
    again.add_callback("on_train_start", lambda t: started.extend(affine_matrix(x.module) for x in in_order(t.model)))
    again.train(data=str(renamed), project=str(tmp_path / "runs"), epochs=1, **SETTINGS)
    assert all(map(torch.equal, rows, started)) and again.trainer.best.exists()


@pytest.fixture(scope="module")
def fitted(able, tmp_path_factory) -> Path:
    """A fitted checkpoint."""
    folder = tmp_path_factory.mktemp("fitted")
    path = shutil.copy(able["best"], folder / "model.pt")
    data = renamed_data(able["data"].parent / "set/data.yaml", folder)
    return Path(fit_checkpoint(path, data, batch=8, val=False).output)


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
def test_an_export_gives_the_same_scores(fitted, tmp_path, format):
    if format == "onnx":
        pytest.importorskip("onnx")
        runtime = pytest.importorskip("onnxruntime")
    path = shutil.copy(fitted, tmp_path / "model.pt")
    torch.manual_seed(0)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        own = YOLO(path).model.fuse(verbose=False).eval()(x)[0].numpy()
    options = {"simplify": False} if format == "onnx" else {}
    file = YOLO(path).export(format=format, imgsz=64, device="cpu", **options)
    if format == "onnx":
        session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (exported,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    else:
        with torch.no_grad():
            exported = torch.jit.load(file)(x).numpy()
    assert exported.shape == own.shape == (1, 4 + 10, 84)
    np.testing.assert_allclose(exported, own, rtol=1e-3, atol=1e-4)
    assert own[:, 4:].max() > 0.01  # scores that say something
    assert YOLO(file, task="detect").predict(np.zeros((64, 64, 3), np.uint8), verbose=False)[0].names[3] == "digit 3"
