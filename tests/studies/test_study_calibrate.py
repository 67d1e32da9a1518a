# yolo-sos, AGPL-3.0
"""The study of calibrations: its arms on made-up detections, and what its text says of the records."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from yolo_sos.evaluate.boxes import GroundTruth
from yolo_sos.evaluate.calibration import samples_of
from yolo_sos.evaluate.voc import Matches

pytest.importorskip("sklearn")
RECORDS = sorted((Path(__file__).parents[2] / "studies/calibrate").glob("*.json"))


@pytest.fixture(scope="module")
def tool(load_study):
    return load_study("calibrate")


def matches(seed: int, n: int = 3000) -> Matches:
    """Return detections of two classes whose hits are less frequent than their scores."""
    rng = np.random.default_rng(seed)
    z = 2 * rng.standard_normal(n) - 1
    hit = rng.random(n) < 1 / (1 + np.exp(0.8 - 0.6 * z))
    boxes = np.tile([0.0, 0.0, 10.0, 10.0], (hit.sum(), 1))
    label, image = rng.integers(0, 2, n), rng.integers(0, 50, n)
    truth = GroundTruth.build("ab", [str(i) for i in range(50)], image[hit], label[hit], boxes)
    owner = np.where(hit, np.cumsum(hit) - 1, -1)
    return Matches(truth, image, label, 1 / (1 + np.exp(-z)), owner, np.where(hit, rng.uniform(0.5, 1, n), 0.0))


def test_one_temperature_is_the_likeliest(tool):
    optimize = pytest.importorskip("scipy.optimize")
    s = samples_of(matches(0))
    z = tool.logit(s.score).numpy()
    best = optimize.minimize_scalar(lambda a: np.mean(np.logaddexp(0, a * z) - s.target * a * z), bounds=(0.01, 3))
    assert tool.temperature(z, s.target) == pytest.approx(best.x, abs=1e-4)


def test_arms_from_a_cache(tool, tmp_path, monkeypatch, capsys):
    for seed in range(2):
        for i, split in enumerate(("val", "test", "train")):
            m = matches(10 * seed + i)
            columns = {k: getattr(m, k) for k in ("image", "label", "score", "owner", "overlap")}
            objects = {f"t_{k}": getattr(m.truth, k) for k in ("image", "label", "difficult", "boxes")}
            names = {"classes": np.array(m.truth.classes), "images": np.array(m.truth.images)}
            np.savez(tmp_path / f"little-{seed}-{split}.npz", **columns, **objects, **names)
    monkeypatch.setattr(tool, "FOLDER", tmp_path)
    command = ["calibrate.py", "little", "--data", "d.yaml", "--imgsz", "64", "--seeds", "2", "--cache", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    tool.main()
    runs = json.loads((tmp_path / "little.json").read_text())["runs"]
    assert len(runs) == 2 * (1 + 2 * len(tool.ARMS))
    figures = {(r["fitted_on"], r["arm"], r["seed"]): r for r in runs}
    for seed in range(2):
        none, shared = figures["–", "none", seed], figures["val", "shared", seed]
        assert shared["ECE"] < 0.3 * none["ECE"] and shared["NLL"] < figures["val", "temperature", seed]["NLL"]
        assert shared["mAP50-95"] == pytest.approx(none["mAP50-95"], abs=1e-3)
        assert figures["val", "shared, soft", seed]["LaECE"] < shared["LaECE"]
        assert shared["map"]["a"] == pytest.approx(0.6, abs=4 * shared["map"]["a_error"])
    assert "±" in capsys.readouterr().out


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_what_the_text_says(path):
    text = path.read_text()
    record = json.loads(text)
    assert "/work" not in text and "/tmp" not in text and "/home" not in text

    def mean(arm: str, column: str, fitted_on: str) -> float:
        values = [r[column] for r in record["runs"] if (r["arm"], r["fitted_on"]) == (arm, fitted_on)]
        assert len(values) >= 3
        return fmean(values)

    for split in ("val", "train"):
        for column in ("ECE", "ECE from 0.1", "NLL", "Brier"):
            assert mean("shared", column, split) < mean("none", column, "–")
        assert mean("shared", "ECE", split) < mean("temperature", "ECE", split)
        assert mean("shared, soft", "LaECE", split) < mean("none", "LaECE", "–")
        assert abs(mean("shared", "mAP50-95", split) - mean("none", "mAP50-95", "–")) < 0.001
    first = next(r for r in record["runs"] if (r["arm"], r["fitted_on"], r["seed"]) == ("shared", "val", 0))
    for column in ("ECE", "NLL", "Brier", "LaECE"):  # of the written file, against the map on arrays
        assert record["file"]["after"][column] == pytest.approx(first[column], abs=5e-4)
    assert record["file"]["written"]


def test_there_are_three_sets():
    assert [path.stem for path in RECORDS] == ["bccd", "digits", "voc07"]
