# yolo-sos, AGPL-3.0
"""Validation of many weights at once is Ultralytics' validation of each."""

from __future__ import annotations

import pytest
import torch
from ultralytics import YOLO

from yolo_sos.core import InputCapture, evaluation, layer_outputs, weight_matrix, write_weight
from yolo_sos.yolo import CheckpointShift
from yolo_sos.yolo.heads import YoloTask, final_layers
from yolo_sos.yolo.score import headline

HEADS = [
    *("yolov5n", "yolov10n", "yolo26n", "yolov8n-seg", "yolo26n-seg", "yolov8n-pose", "yolo26n-pose"),
    *("yolov8n-obb", "yolo26n-obb", "yolov8n-cls"),
]


def flat(output):
    """Return the tensors of a model's output."""
    if isinstance(output, dict):
        return [t for key in sorted(output) if key != "feats" for t in flat(output[key])]
    return [t for item in output for t in flat(item)] if isinstance(output, (list, tuple)) else [output]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_decoded_replays_are_what_the_model_returns_with_those_weights(name, fuse):
    torch.manual_seed(0)
    model = YOLO(f"{name}.yaml").model
    model = model.fuse(verbose=False) if fuse else model
    layers, image = final_layers(model), torch.rand(2, 3, 64, 96)
    task = YoloTask(model, criterion=lambda *_: None)
    weights = {layer.name: torch.randn_like(weight_matrix(layer.module)) for layer in layers}
    with evaluation(model), InputCapture(layers) as capture:
        output = model(image)
        inputs = capture.take()
        replayed = [task.replay(output[1], layer_outputs(layers, w, inputs)) for w in ({}, weights)]
        same, other = (flat(task.decode(output, raw)) for raw in replayed)
        assert all(torch.equal(a, b) for a, b in zip(same, flat(output), strict=True))
        for layer in layers:
            write_weight(layer.module, weights[layer.name])
        expected = flat(model(image))
    assert not torch.equal(other[0], same[0])
    for a, b in zip(other, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def stock(model, data):
    """Return what Ultralytics' own validation says of a checkpoint or a model."""
    yolo = model if isinstance(model, YOLO) else YOLO(model)
    return dict(yolo.val(data=str(data), imgsz=64, batch=8, device="cpu", plots=False, workers=0).results_dict)


@pytest.fixture
def job(trained, seen):
    return CheckpointShift(trained["best"], seen)


def test_every_set_of_weights_gets_the_metrics_of_a_validation_of_its_own(job, trained, seen, contents, tmp_path):
    torch.manual_seed(0)
    layers = job.checkpoint.layers
    own = {layer.name: weight_matrix(layer.module).clone() for layer in layers}
    noisy = [{k: w + s * torch.randn_like(w) for k, w in own.items()} for s in (0.002, 0.02)]
    partly = {layers[0].name: torch.zeros_like(own[layers[0].name])}
    sets = [*noisy, partly, {}]
    before = contents(trained["best"].parent)
    scored = job.score(sets, "val")
    found, seconds = scored.metrics, scored.seconds
    assert contents(trained["best"].parent) == before
    assert all(not m._forward_pre_hooks for m in job.model.modules())
    assert found[0]["metrics/mAP50-95(B)"] > 0.05
    assert len({f["fitness"] for f in found}) == 4  # or the comparison would say little
    assert found[0] == found[-1] == stock(trained["best"], seen)
    for metrics, weights in zip(found[1:], sets, strict=True):
        yolo = YOLO(trained["best"])
        for layer in final_layers(yolo.model):
            write_weight(layer.module, weights.get(layer.name, own[layer.name]).half().float())
        assert metrics == pytest.approx(stock(yolo, seen), abs=1e-6)
    assert set(seconds) == {"validation", "points"}
    assert min(seconds.values()) > 0


def test_the_model_runs_once_per_batch_however_many_sets_there_are(job, monkeypatch):
    calls = []
    forward = type(job.model)._predict_once

    def counted(self, x, *args, **kwargs):
        calls.append(len(x))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(type(job.model), "_predict_once", counted)
    own = {layer.name: weight_matrix(layer.module) for layer in job.layers}
    job.score([own] * 7, "val")
    assert [c for c in calls if c > 1] == [8, 8, 8]  # one image is what Ultralytics counts operations with


def test_an_error_half_way_removes_the_hooks_and_leaves_no_folder(job, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("yolo_sos.yolo.score.layer_outputs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job.score([{}], "val")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "main"),
    [
        (["metrics/mAP50(B)", "metrics/mAP50-95(B)", "fitness"], "metrics/mAP50-95(B)"),
        (["metrics/mAP50-95(B)", "metrics/mAP50(M)", "metrics/mAP50-95(M)", "fitness"], "metrics/mAP50-95(M)"),
        (["metrics/accuracy_top1", "metrics/accuracy_top5", "fitness"], "metrics/accuracy_top1"),
    ],
)
def test_the_main_metric(names, main):
    assert headline(dict.fromkeys(names, 0.5)) == main
