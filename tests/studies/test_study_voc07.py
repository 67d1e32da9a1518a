# yolo-sos, AGPL-3.0
"""The study of strength, on a tiny checkpoint."""

from __future__ import annotations

import json
from itertools import product

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
    found = [row for row in record["shifts"] if row["found"]]
    assert [(row["method"], row["guard"]) for row in found] == list(product(tool.METHODS, tool.GUARDS))
    ranks = [(row["method"], row["rank"]) for row in record["shifts"] if not row["found"]]
    assert ranks == [("loss", rank) for rank in tool.RANKS]
    for row in record["shifts"]:
        assert row["heldout_after"] <= (1 + row["guard"]) * row["heldout_before"]


def test_floor(load_study, weights, digits, tmp_path, monkeypatch):
    tool = load_study("voc07", "floor")
    monkeypatch.setattr(tool, "LARGE", 2.0)  # all objects are small
    tool.main([*given(weights, digits, tmp_path), "--images", "8"])
    record = read(tmp_path, "floor")
    assert record["images"]["fit"] == 8 and record["images"]["heldout"] == 4
    floors = {row["floor"]: row["squared_norm_ratio"] for row in record["shifts"] if row["method"] == "loss"}
    assert tuple(floors) == tool.FLOORS and len(set(floors.values())) == len(floors)
