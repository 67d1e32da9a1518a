# yolo-sos, AGPL-3.0
"""The study of neural collapse: its measures against other ways to compute them, and a run on a few images."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from yolo_sos.core import HeldOut


@pytest.fixture(scope="module")
def tool(load_study):
    return load_study("collapse")


def logits_and_labels(n=400, scale=3.0):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (n,), generator=g)
    logits = torch.randn(n, 10, generator=g, dtype=torch.float64)
    logits[torch.arange(n), labels] += 1.5
    return scale * logits, labels


def test_calibration_error_by_hand(tool):
    logits, labels = logits_and_labels()
    p = logits.softmax(1).numpy()
    confidence, correct = p.max(1), p.argmax(1) == labels.numpy()
    total = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    assert tool.calibration_error(logits, labels) == pytest.approx(total, rel=1e-9)
    sure = torch.full((4, 10), -50.0, dtype=torch.float64)
    sure[:, 0] = 50
    assert tool.calibration_error(sure, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.25)


@pytest.mark.parametrize("scale", [0.01, 0.5, 3.0, 50.0])
def test_the_temperature_minimises_the_loss(tool, scale):
    logits, labels = logits_and_labels(scale=scale)
    t = tool.fit_temperature(logits, labels)
    best = tool.nll(logits / t, labels)
    assert all(best <= tool.nll(logits / (t * factor), labels) for factor in (0.5, 0.99, 1.01, 2.0))
    assert t / scale == pytest.approx(tool.fit_temperature(logits / scale, labels), rel=1e-6)


def test_collapsed_features_measure_as_collapsed(tool):
    g = torch.Generator().manual_seed(0)
    means = torch.randn(10, 32, generator=g, dtype=torch.float64)
    labels = torch.arange(200) % 10
    noise = torch.randn(200, 32, generator=g, dtype=torch.float64)
    head = torch.nn.Linear(32, 10)
    found = [tool.collapse(head, means[labels] + s * noise, labels) for s in (1e-6, 0.1, 1.0)]
    assert found[0]["nc1"] < 1e-9 and found[0]["top"] == pytest.approx(1)
    assert found[0]["nc1"] < found[1]["nc1"] < found[2]["nc1"]
    # NC1 depends neither on the basis nor on the features' scale
    a = means[labels] + 0.1 * noise
    q, _ = torch.linalg.qr(torch.randn(32, 32, generator=g, dtype=torch.float64))
    assert tool.collapse(head, 7 * a @ q, labels)["nc1"] == pytest.approx(found[1]["nc1"], rel=1e-6)


@pytest.fixture
def source(tmp_path) -> Path:
    """IDX files of images whose class shows in their rows."""
    rng = np.random.default_rng(0)
    for name, n in (("train", 200), ("t10k", 80)):
        labels = np.arange(n) % 10
        images = rng.integers(0, 60, (n, 28, 28))
        images[np.arange(n)[:, None], 2 * labels[:, None] + np.arange(4), :] += 150
        for what, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(k.to_bytes(4, "big") for k in array.shape)
            path = tmp_path / f"{name}-{what}-ubyte.gz"
            path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))
    return tmp_path


def test_a_small_study(tool, source, tmp_path):
    config = tool.Config(
        data=str(source),
        train=120,
        val=60,
        test=80,
        seeds=(0, 1),
        widths=(4, 8, 16),
        epochs=4,
        early_epochs=2,
        rows=(5, 20),
        draws=2,
        fit_images=60,
        heldout_images=30,
        threads=torch.get_num_threads(),
    )
    out = tmp_path / "out"
    (out).mkdir()
    (out / "collapse.md").write_text(f"# Mine\n\n{tool.MARKERS[0]}\nold\n{tool.MARKERS[1]}\n\nand this\n")
    record = tool.run_study(config, out)
    text = (out / "collapse.md").read_text()
    assert text.startswith("# Mine\n") and text.endswith("and this\n") and "old" not in text
    assert json.loads((out / "collapse.json").read_text())["config"]["train"] == 120
    assert (out / "collapse.png").stat().st_size and len((out / "collapse.csv").read_text().splitlines()) == 1 + len(
        record["posthoc"]
    )
    # 2 seeds × 2 regimes × (unshifted + 2 n × 2 weightings × 2 draws + principal and expected at n = 5)
    assert len(record["posthoc"]) == 2 * 2 * (1 + 8 + 2)
    for line in record["posthoc"]:
        assert 0 < line["norm_ratio"] < 1 + 1e-9 and 0 <= line["ece"] <= 1
        assert line["test_loss_scaled"] > 0 and line["deviation"] >= 0
    arms = {(line["arm"], line["seed"]): line for line in record["training"]}
    assert {arm for arm, _ in arms} == {"baseline", "principal 30", "expected 30", "rows 30", "rows 30, no guard"}
    for (arm, seed), line in arms.items():
        curve = record["curves"][str(seed)][arm]
        assert [c["epoch"] for c in curve] == [1, 2, 3, 4]
        assert [("t" in c) for c in curve] == [False, arm != "baseline", arm != "baseline", arm != "baseline"]
        assert line["shifts"] == (0 if arm == "baseline" else 3)
        # Until the first shift, at the end of epoch 2, an arm is its baseline.
        base = record["curves"][str(seed)]["baseline"]
        assert [(c["loss"], c["error"]) for c in curve[:2]] == [(c["loss"], c["error"]) for c in base[:2]]


def test_an_arm_whose_shifts_are_all_refused_is_its_baseline(tool, source, monkeypatch):
    config = tool.Config(
        data=str(source), train=120, val=60, test=80, widths=(4, 8, 16), epochs=3, fit_images=60, heldout_images=30
    )
    data = tool.read_data(config)
    monkeypatch.setattr(HeldOut, "loss", lambda *_: math.inf)  # of all weights but the model's own
    runs = [tool.train(tool.start(config, 0, 3), 3, config, data, 0, arm) for arm in (None, tool.ARMS[0])]
    assert [c["t"] for c in runs[1].curve] == [0, 0, 0]
    states = [run.model.state_dict() for run in runs]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
