# yolo-sos, AGPL-3.0
"""The study of single shifts: every method on a tiny checkpoint, and what is refused before anything runs."""

from __future__ import annotations

import csv

import pytest


@pytest.fixture(scope="module")
def tool(load_study):
    return load_study("shift")


def test_it_writes_its_files(tool, weights, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "RANKS", (0.25, 0.5))
    tool.main([f"{weights}={digits}", "--draws", "2", "--images", "8", "--out", str(tmp_path)])
    with open(tmp_path / "shift.csv", newline="") as file:
        baseline, *rows = list(csv.DictReader(file))
    # loss at 2 ranks, 3 weightings × (full, principal and expected at 2 ranks, 6 budgets, 2 draws of rows at 2 ranks)
    assert baseline["method"] == "baseline" and len(rows) == 2 + 3 * (1 + 4 + 6 + 4)
    assert {row["weighting"] for row in rows} == {"balanced", "confidence", "uniform"}
    assert float(baseline["val/metrics/mAP50-95(B)"]) >= 0 and float(baseline["test/metrics/mAP50-95(B)"]) >= 0
    ratios = {(r["method"], r["weighting"], r["setting"]): float(r["squared_norm_ratio"]) for r in rows}
    for weighting in "balanced", "uniform":
        assert 0 < ratios["principal", weighting, "0.25"] < ratios["principal", weighting, "0.5"] < 1
    text = (tmp_path / "shift.md").read_text()
    assert f"## {weights} on {digits}" in text and "8 training images to fit on and 4 others held out" in text
    assert text.split("## ", 1)[1].strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pair", "error", "said"),
    [
        ("best.pt", SystemExit, "'best.pt' is not MODEL=DATA"),
        ("nowhere.pt=digits.yaml", FileNotFoundError, "nowhere.pt: there is no such checkpoint"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(pair, error, said, tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, "trace", None)
    with pytest.raises(error) as raised:
        tool.main([pair])
    assert said in capsys.readouterr().err + str(raised.value)
