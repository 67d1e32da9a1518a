# yolo-sos, AGPL-3.0
"""Segmentation, pose and oriented boxes: short runs on sets of a few drawn rectangles."""

from __future__ import annotations

import csv

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils.patches import torch_load

from yolo_sos.core import SOS
from yolo_sos.trainers import TRAINERS

HEADS = {
    "segment": ("Segment, [nc, 16, 32]", "names: {0: box, 1: bar}", {"box", "cls", "mask"}),
    "pose": (
        "Pose, [nc, [4, 3]]",
        "names: {0: box, 1: bar}\nkpt_shape: [4, 3]\nflip_idx: [1, 0, 3, 2]",
        {"box", "cls", "kpt"},
    ),
    "obb": ("OBB, [nc, 1]", "names: {0: box, 1: bar}", {"box", "cls", "angle"}),
}
MODEL = """\
nc: 2
kpt_shape: [4, 3]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, Conv, [48, 3, 2]]
  - [-1, 1, Conv, [64, 3, 2]]
head:
  - [[2, 3, 4], 1, {head}]
"""


def numbers(values) -> str:
    return " ".join(f"{v:.6f}" for v in np.ravel(values))


def label(task: str, corners: np.ndarray, cls: int) -> str:
    """Return a line of a label file; ``corners`` ``(4, 2)`` in [0, 1], clockwise."""
    if task != "pose":
        return f"{cls} {numbers(corners)}"
    low, high = corners.min(0), corners.max(0)
    visible = np.hstack([corners, np.full((4, 1), 2)])
    return f"{cls} {numbers([(low + high) / 2, high - low])} {numbers(visible)}"


@pytest.fixture
def tiny_set(tmp_path):
    """``tiny_set(task)`` makes 12 + 4 images of 64 × 64 pixels with one or two turned rectangles each."""

    def tiny_set(task: str):
        rng = np.random.default_rng(0)
        root = tmp_path / task
        for split, n in (("train", 12), ("val", 4)):
            (root / "images" / split).mkdir(parents=True)
            (root / "labels" / split).mkdir(parents=True)
            for i in range(n):
                image = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
                lines = []
                for cls in range(1 + i % 2):
                    size = (20.0, 20.0) if cls == 0 else (30.0, 8.0)
                    centre = rng.uniform(20, 44, 2).tolist()
                    corners = np.clip(cv2.boxPoints((centre, size, float(rng.uniform(0, 90)))), 0, 63)
                    cv2.fillPoly(image, [corners.round().astype(np.int32)], (200, 200 * cls, 60))
                    lines.append(label(task, corners / 64, cls))
                cv2.imwrite(str(root / "images" / split / f"{i}.png"), image)
                (root / "labels" / split / f"{i}.txt").write_text("\n".join(lines) + "\n")
        data = root / "data.yaml"
        data.write_text(f"path: {root}\ntrain: images/train\nval: images/val\n{HEADS[task][1]}\n")
        return data

    return tiny_set


@pytest.mark.parametrize("task", HEADS)
def test_a_short_run_shifts_every_kind_of_layer(task, tiny_set, tmp_path, monkeypatch):
    model = tmp_path / f"tiny-{task}.yaml"
    model.write_text(MODEL.format(head=HEADS[task][0]))
    losses = []

    def shift(sos, batches, heldout=(), **kwargs):
        """Shift as ever, and compute the loss before and after it anew, with the whole model."""
        held, model, task = list(heldout), sos.model, sos._task

        def loss():
            model.eval()
            with torch.no_grad():
                total = sum(task.size(b) * float(task.loss(task.run(model, b), b)) for b in held)
            return total / sum(task.size(b) for b in held)

        before = loss()
        report = real(sos, batches, held, **kwargs)
        losses.append((report.heldout_before, before))
        losses.append((report.heldout_after, loss()))
        return report

    real = SOS.shift
    monkeypatch.setattr(SOS, "shift", shift)
    yolo = YOLO(model, task=task)
    yolo.train(
        trainer=TRAINERS[task],
        **{"data": str(tiny_set(task)), "epochs": 2, "imgsz": 64, "batch": 4, "device": "cpu", "workers": 0},
        **{"plots": False, "project": str(tmp_path / "runs"), "optimizer": "SGD", "lr0": 0.02, "mosaic": 0.0},
        **{
            "sos": True,
            "sos_start": 0.5,
            "sos_interval": 1,
            "sos_images": 6,
            "sos_guard": 0.5,
            "sos_rank": 0.5,
            "sos_method": "principal",
        },
    )
    with open(yolo.trainer.save_dir / "sos.csv", encoding="utf-8", newline="") as f:
        lines = list(csv.DictReader(f))
    assert {line["kind"] for line in lines} == HEADS[task][2]
    assert len(lines) == 2 * 2 * 3 * len(HEADS[task][2])  # epochs, models, levels, branches
    for line in lines:
        assert line["status"] == "ok" and float(line["t"]) > 0
        assert float(line["norm_after"]) <= float(line["norm_before"]) * (1 + 1e-6)
        assert 1 <= float(line["rank"]) <= min(round(0.5 * int(line["d"])), int(line["rows"]))
    assert sum(float(line["norm_after"]) for line in lines) < sum(float(line["norm_before"]) for line in lines)
    assert len(losses) == 8
    for told, found in losses:
        assert told == pytest.approx(found, rel=1e-4)
    best = YOLO(yolo.trainer.best)
    assert best.task == task
    assert best.val(data=str(tmp_path / task / "data.yaml"), imgsz=64, device="cpu", plots=False).fitness >= 0


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.slow
def test_the_peers_train_every_task(task, tiny_set, tmp_path):
    model = tmp_path / f"tiny-{task}.yaml"
    model.write_text(MODEL.format(head=HEADS[task][0]))
    yolo = YOLO(model, task=task)
    yolo.train(
        trainer=TRAINERS[task],
        **{"data": str(tiny_set(task)), "epochs": 1, "imgsz": 64, "batch": 4, "device": "cpu", "workers": 0},
        **{"plots": False, "project": str(tmp_path / "runs"), "optimizer": "SGD", "lr0": 0.02, "nbs": 4},
        **{"sharpness_aware": "sam", "swa": 0.0, "sos": True, "sos_images": 6, "sos_guard": 0.5},
    )
    assert all(bool(p.isfinite().all()) for p in yolo.trainer.model.parameters())
    saved = torch_load(yolo.trainer.last, map_location="cpu")
    assert saved["sos"]["averaged"] == 1
    assert (yolo.trainer.save_dir / "sos.csv").stat().st_size
