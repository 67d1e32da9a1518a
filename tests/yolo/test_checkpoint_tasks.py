# yolo-sos, AGPL-3.0
"""Checkpoints of every task, shifted and scored."""

from __future__ import annotations

import pytest
from ultralytics import YOLO

from yolo_sos.yolo import shift_checkpoint


@pytest.mark.parametrize(
    ("name", "task", "kinds", "method"),
    [
        ("yolo26n.yaml", "detect", {"box", "cls"}, "expected"),  # two branches, of which a validation keeps one
        ("yolov8n-seg.yaml", "segment", {"box", "cls", "mask"}, "principal"),
        ("yolo26n-pose.yaml", "pose", {"box", "cls", "kpt"}, "rows"),
        ("yolov8n-obb.yaml", "obb", {"box", "cls", "angle"}, "principal"),
        ("yolov8n-cls.yaml", "classify", {"linear"}, "principal"),
        ("yolov8n-cls.yaml", "classify", {"linear"}, "rows"),
    ],
)
def test_a_checkpoint_of_any_task(model_of, data_of, name, task, kinds, method):
    data = data_of(task)
    report = shift_checkpoint(model_of(name, data), method=method, rank=8, draws=2, guard=None)
    assert report.output is not None
    assert report.data == str(data)
    assert {r.kind for r in report.layers} == kinds
    assert all(r.status == "ok" and r.rank < 8.001 and r.rounding < 1e-2 for r in report.layers)
    assert report.squared_norm_ratio < 1
    assert report.heldout_after != report.heldout_before
    for file, found in (report.model, report.metrics_before), (report.output, report.metrics_after):
        stock = YOLO(file).val(data=str(data), imgsz=64, batch=8, device="cpu", plots=False, workers=0)
        assert found == pytest.approx(dict(stock.results_dict), abs=1e-3)


@pytest.mark.parametrize("version", ["yolov8", "yolo26"])
@pytest.mark.parametrize(
    ("task", "kinds"),
    [
        ("", {"box", "cls"}),
        ("-seg", {"box", "cls", "mask"}),
        ("-pose", {"box", "cls", "kpt"}),
        ("-obb", {"box", "cls", "angle"}),
        ("-cls", {"linear"}),
    ],
)
def test_the_loss_of_any_task_has_second_derivatives(model_of, data_of, version, task, kinds):
    data = data_of({"": "detect", "-seg": "segment", "-cls": "classify"}.get(task, task[1:]))
    model = model_of(f"{version}n{task}.yaml", data)
    report = shift_checkpoint(model, method="loss", rank=0.5, val=False, guard=None)
    assert {r.kind for r in report.layers} == kinds
    assert report.status == "ok" and report.squared_norm_ratio < 1
    assert all(0 < r.rank <= r.d and r.norm_after <= r.norm_before * (1 + 1e-6) for r in report.layers)
