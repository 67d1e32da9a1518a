# yolo-sos, AGPL-3.0
"""What a record holds of a model on one split, against Ultralytics' own val and the evaluation tool."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import ClassificationModel
from ultralytics.utils import LOGGER

from yolo_sos.data.image_folder import build_image_folder
from yolo_sos.experiment.judge import check_judgement, judge, judged_settings

TOOL = Path(__file__).parents[2] / "tools" / "eval_voc.py"
SETTINGS = {"imgsz": 64, "batch": 8, "device": "cpu"}
CONFIG = {"task": "detect", "imgsz": 64, "batch": 8, "classes": None, "single_cls": False, "max_det": 300}
ULTRALYTICS = {"metrics/precision(B)", "metrics/recall(B)", "metrics/mAP50(B)", "metrics/mAP50-95(B)", "fitness"}
DEVKIT = {"devkit/AP50-07", "devkit/AP50-10"}


def tool_report(weights, data, split, folder) -> dict:
    """Return what tools/eval_voc.py says of the same weights."""
    argv = ["--weights", weights, "--data", data, "--split", split, "--json", folder / "eval.json"]
    argv += ["--imgsz", SETTINGS["imgsz"], "--batch", SETTINGS["batch"], "--device", SETTINGS["device"]]
    assert runpy.run_path(str(TOOL))["main"]([str(a) for a in argv]) == 0
    return json.loads((folder / "eval.json").read_text())


@pytest.mark.parametrize("split", ["train", "val"])
def test_detection_is_judged_as_by_ultralytics_and_by_the_devkit(split, weights, digits, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    level = LOGGER.level
    metrics = judge(weights, str(digits), split, **judged_settings(CONFIG), device="cpu")
    assert not list(tmp_path.iterdir()) and LOGGER.level == level
    assert "".join(capfd.readouterr()) == ""
    assert metrics == judge(weights, str(digits), split, **judged_settings(CONFIG), device="cpu")

    stock = YOLO(weights).val(data=str(digits), split=split, plots=False, project=str(tmp_path), **SETTINGS)
    assert {k: metrics[k] for k in ULTRALYTICS} == stock.results_dict
    report = tool_report(weights, digits, split, tmp_path)
    assert metrics["devkit/AP50-07"] == report["mean"]["VOC07"]
    assert metrics["devkit/AP50-10"] == report["mean"]["VOC10+"]
    assert metrics.keys() == ULTRALYTICS | DEVKIT
    # Counted by other code from the detections in pixels
    assert report["mean"]["Ultralytics AP50"] == pytest.approx(metrics["metrics/mAP50(B)"], abs=2e-3)
    assert split == "val" or metrics["metrics/mAP50(B)"] > 0.3  # there was something to compare


def test_without_annotations_there_is_no_devkit_metric(weights, digits):
    labels = digits.with_name("labels.yaml")
    labels.write_text(re.sub("^voc:.*\n", "", digits.read_text(), flags=re.MULTILINE))
    metrics = judge(weights, str(labels), "train", **judged_settings(CONFIG), device="cpu")
    whole = judge(weights, str(digits), "train", **judged_settings(CONFIG), device="cpu")
    assert metrics == {k: whole[k] for k in ULTRALYTICS}


@pytest.mark.parametrize("asked", [{"max_det": 2}, {"classes": [1]}, {"iou": 0.1}])
def test_the_settings_of_the_training_count(asked, weights, digits, tmp_path):
    metrics = judge(weights, str(digits), "train", **judged_settings({**CONFIG, **asked}), device="cpu")
    stock = YOLO(weights).val(data=str(digits), split="train", plots=False, project=str(tmp_path), **SETTINGS, **asked)
    assert {k: metrics[k] for k in ULTRALYTICS} == stock.results_dict
    truth = check_judgement(str(digits), "train", **judged_settings({**CONFIG, **asked}))
    assert DEVKIT.isdisjoint(metrics) == (truth is None)
    plain = judge(weights, str(digits), "train", **judged_settings(CONFIG), device="cpu")
    assert plain["metrics/mAP50-95(B)"] != metrics["metrics/mAP50-95(B)"]


def test_a_batch_that_training_chooses_by_its_memory_is_none_for_judging(weights, digits):
    for batch in -1, 0.7:
        metrics = judge(weights, str(digits), "val", **judged_settings({**CONFIG, "batch": batch}), device="cpu")
        whole = judge(weights, str(digits), "val", **judged_settings({**CONFIG, "batch": 16}), device="cpu")
        assert metrics == whole


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A data set of noise in four classes, and a classifier of random weights."""
    folder, rng = tmp_path_factory.mktemp("classifier"), np.random.default_rng(0)
    noise = rng.integers(0, 256, (16, 32, 32), np.uint8), np.arange(16) % 4
    data = build_image_folder(folder / "set", {}, lambda: dict.fromkeys(("train", "val", "test"), noise), [*"abcd"])
    torch.manual_seed(0)
    model = YOLO("yolov8n-cls.yaml")
    model.model = ClassificationModel("yolov8n-cls.yaml", nc=4, verbose=False)
    model.model.names, model.model.task = dict(enumerate("abcd")), "classify"
    model.save(folder / "random.pt")
    return data, folder / "random.pt"


def test_classification_is_judged_as_by_ultralytics(classifier, tmp_path, monkeypatch):
    data, weights = classifier
    monkeypatch.chdir(tmp_path)
    settings = {"imgsz": 32, "batch": 8, "device": "cpu"}
    config = {"task": "classify", "imgsz": 32, "batch": 8}
    metrics = judge(weights, str(data), "test", **judged_settings(config), device="cpu")
    assert not list(tmp_path.iterdir())
    stock = YOLO(weights).val(data=str(data), split="test", plots=False, project=str(tmp_path), **settings)
    assert metrics == stock.results_dict and 0 < metrics["metrics/accuracy_top1"] < 1


def test_what_cannot_be_judged_is_refused(weights, classifier, digits, tmp_path):
    level = LOGGER.level
    for path, split, error, message in [
        (tmp_path / "no.pt", "val", FileNotFoundError, r"no\.pt: no such checkpoint"),
        (classifier[1], "val", ValueError, r"random\.pt: a model for 'classify'"),
        (weights, "other", FileNotFoundError, r"data\.yaml 'other:'"),
    ]:
        with pytest.raises(error, match=message):
            judge(path, str(digits), split, **judged_settings(CONFIG), device="cpu")
    assert LOGGER.level == level
