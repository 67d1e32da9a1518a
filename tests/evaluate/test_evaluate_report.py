"""The table, the JSON, the notes and the picture."""

from __future__ import annotations

import json

import numpy as np
import pytest

from yolo_sos.evaluate import Detections, GroundTruth, Scores, plot_curves, report_json, table, voc_ap
from yolo_sos.evaluate.report import notes


@pytest.fixture
def truth():
    boxes = [[0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 5, 5]]
    return GroundTruth.build(["cat", "dog", "cow"], ["i"], [0, 0, 0], [0, 0, 1], boxes, [False, True, False])


def run(name, cat, dog):
    return Scores(name, {"VOC10+": np.array([cat, dog, np.nan])}, {"detections": 3})


def test_table_of_one_run(truth):
    assert table(truth, [run("a.pt", 0.5, 0.25)]) == (
        "| class    | objects | difficult | VOC10+ |\n"
        "| -------- | ------: | --------: | -----: |\n"
        "| cat      |       1 |         1 | 0.5000 |\n"
        "| dog      |       1 |         0 | 0.2500 |\n"
        "| cow      |       0 |         0 |      – |\n"
        "| **mean** |       2 |         1 | 0.3750 |\n"
    )


def test_table_of_several_runs(truth):
    text = table(truth, [run("a.pt", 0.5, 0.25), run("b.pt", 0.7, 0.25)])
    assert "| cat      |       1 |         1 | 0.6000 ± 0.1414 |" in text
    assert "| **mean** |       2 |         1 | 0.4250 ± 0.0707 |" in text
    assert "| a.pt | 0.3750 |\n| b.pt | 0.4750 |\n" in text


def test_json_holds_everything_and_no_nan(truth):
    report = report_json(truth, [run("a.pt", 0.5, 0.25), run("b.pt", 0.7, 0.25)], command="c")
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["command"] == "c"
    assert report["mean"] == {"VOC10+": pytest.approx(0.425)}
    assert report["std"] == {"VOC10+": pytest.approx(0.1 / 2**0.5)}
    assert report["ground_truth"]["difficult"] == {"cat": 1, "dog": 0, "cow": 0}
    assert report["runs"][1] == {
        "name": "b.pt",
        "mean": {"VOC10+": pytest.approx(0.475)},
        "per_class": {"cat": {"VOC10+": 0.7}, "dog": {"VOC10+": 0.25}, "cow": {"VOC10+": None}},
        "detections": 3,
    }
    assert report_json(truth, [run("a.pt", 0.5, 0.25)])["std"] == {"VOC10+": None}


def test_notes_name_what_is_undefined_or_unknown(truth):
    text = "\n".join(notes(truth, 0.5))
    assert "not in the mean: cow." in text and "unknown" not in text
    labels = GroundTruth.build(["cat"], ["i"], [0], [0], [[0, 0, 1, 1]])
    text = "\n".join(notes(labels, 0.5))
    assert "Difficult flags are unknown" in text
    assert "| cat      |       1 |         ? |" in table(labels, [Scores("a", {"AP": np.array([1.0])})])


@pytest.mark.parametrize("runs", [1, 2])
def test_picture(tmp_path, truth, runs):
    found = Detections.build(truth, [0, 0], [0, 2], [0.5, 0.4], [[0, 0, 10, 10], [0, 0, 1, 1]])
    results = [voc_ap(truth, found)] * runs
    plot_curves(tmp_path / "curves.png", truth.classes, results, ["a", "b"][:runs])
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
