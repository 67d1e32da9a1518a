# yolo-sos, AGPL-3.0
"""What the benchmarks compute from their measurements, and what their records do not tell."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import pytest
import torch
from ultralytics.nn.tasks import DetectionModel

from yolo_sos.yolo.heads import final_layers

TOOLS = Path(__file__).resolve().parents[2] / "tools"
pytestmark = pytest.mark.skipif(not TOOLS.is_dir(), reason="no checkout")


@pytest.fixture
def tool(monkeypatch):
    """``tool(name)`` imports a tool, as running it does."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return lambda name: __import__(name)


def test_spread(tool):
    common = tool("bench_common")
    assert common.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}
    assert common.told([1.0, 2.0, 4.0]) == "2 (1–4)"
    assert common.table(["a", "b"], [[1, 2]]) == "| a   |   b |\n| --- | --: |\n| 1   |   2 |"


def test_a_record_tells_the_machine_and_no_names(tool, tmp_path, monkeypatch, capsys):
    common = tool("bench_common")
    monkeypatch.setattr(common, "BENCH", tmp_path)
    monkeypatch.setattr(sys, "argv", ["/some/where/tools/bench_x.py"])
    common.save("x", "Title", "body", {"value": 1}, ["--data=/home/me/sets/digits/data.yaml", "--repeats", "3"])
    text = (tmp_path / "x.md").read_text() + (tmp_path / "x.json").read_text()
    assert json.loads((tmp_path / "x.json").read_text())["value"] == 1
    assert "python tools/bench_x.py --data=digits/data.yaml --repeats 3" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert "/home" not in text
    assert "/some" not in text
    assert platform.node() not in text or len(platform.node()) < 4
    assert "body" in capsys.readouterr().out


def test_the_heads_are_those_of_the_models(tool):
    heads = tool("bench_solver").HEADS
    for size in "ns":
        layers = final_layers(DetectionModel(f"yolov5{size}.yaml", nc=80, verbose=False))
        found = {layer.kind: (layer.module.in_channels, layer.module.out_channels) for layer in layers}
        assert found == {"box": heads["yolov5 box"], "cls": heads[f"yolov5{size} cls"]}


def test_every_contender_solves_the_same_problem(tool):
    measured = tool("bench_solver").measure(d=12, out=3, n=6, repeats=1, device=torch.device("cpu"))
    for name in "svd", "gauss", "pinv", "lstsq", "naive":
        assert measured[name]["error"] < 1e-8
        assert measured[name]["norm"] == pytest.approx(1, abs=1e-8)
    assert measured["principal"]["norm"] < 1.5


def test_what_is_hard_breaks_nothing_of_ours(tool):
    for errors in tool("bench_solver").hard(d=40, out=3).values():
        assert all(float(errors[name]) < 1e-12 for name in ("svd", "gauss"))


def test_the_share_of_shifts(tool):
    def epoch(seconds, shift=None):
        record = {"seconds": seconds, "step_mb": 5.0}
        ms = dict.fromkeys(("sample", "forward", "rows", "solve", "guard", "write"), 100.0)
        return record if shift is None else {**record, "shift_s": shift, "shift_mb": 4.0, "ms": ms}

    records = {
        "stock": [epoch(10.0) for _ in range(6)],
        "sos": [epoch(10.0), epoch(11.0, 1.0), epoch(10.0), epoch(11.0, 1.0), epoch(10.0), epoch(11.0, 1.0)],
        "sos-every": [epoch(11.0, 1.0) for _ in range(6)],
    }
    text, data = tool("bench_train").summarize(records, interval=2)
    assert data["active_epochs"] == [2, 3, 4, 5]  # two whole intervals
    assert data["sos"]["ratio_of_sums"] == pytest.approx(1.05)
    assert data["sos"]["direct"] == pytest.approx(1.05)
    assert data["sos"]["default"] == pytest.approx(1 + 1 / 60)  # one shift in all of the six epochs
    assert data["sos-every"]["direct"] == pytest.approx(1.1)
    parts = data["breakdown"]
    assert sum(parts[p]["median"] for p in parts if p != "wall") == pytest.approx(parts["wall"]["median"])
    assert "| sos " in text
