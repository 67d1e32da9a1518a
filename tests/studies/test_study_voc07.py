# yolo-sos, AGPL-3.0
"""The studies of strength and of a shift that keeps the loss, on a tiny checkpoint."""

from __future__ import annotations

import json

import pytest


def given(weights, digits, folder):
    return ["--weights", str(weights), "--data", str(digits), "--split", "val", "--name", "tiny", "--out", str(folder)]


def read(folder, study):
    record = json.loads((folder / f"{study}-tiny.json").read_text())
    assert (record["name"], record["split"], record["data"]) == ("tiny", "val", "data.yaml")
    for row in record["shifts"]:
        assert row["squared_norm_ratio"] <= 1 and row["metrics"].keys() == record["metrics"].keys()
        key = "metrics/mAP50-95(B)"
        assert row["change"] == pytest.approx(row["metrics"][key] - record["metrics"][key])
    return record


def test_strength(load_study, weights, digits, tmp_path):
    tool = load_study("voc07", "strength")
    tool.main([*given(weights, digits, tmp_path), "--images", "8"])
    record = read(tmp_path, "strength")
    assert record["images"] == {"heldout": 4, "selection": 0, "fit": 8}
    assert [(row["method"], row["guard"]) for row in record["shifts"]] == [
        (method, guard) for guard in tool.GUARDS for method in tool.METHODS
    ]
    for row in record["shifts"]:
        assert row["heldout_after"] <= (1 + row["guard"]) * row["heldout_before"]
