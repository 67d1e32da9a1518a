# yolo-sos, AGPL-3.0
"""What a record keeps of a model on one split, against Ultralytics' own val and ``yolo-sos eval``."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import ClassificationModel
from ultralytics.utils import LOGGER

from yolo_sos.data.image_folder import build_image_folder
from yolo_sos.evaluate import command
from yolo_sos.experiment.judge import check_judgement, judge, judged_settings

SETTINGS = {"imgsz": 64, "batch": 8, "device": "cpu"}
SETTINGS_BUT_DEVICE = {"imgsz": 64, "batch": 8}
ULTRALYTICS = {"metrics/precision(B)", "metrics/recall(B)", "metrics/mAP50(B)", "metrics/mAP50-95(B)", "fitness"}
DEVKIT = {"devkit/AP50-07", "devkit/AP50-10"}


@pytest.mark.parametrize("split", ["train", "val"])
def test_detection_is_judged_as_by_ultralytics_and_by_the_devkit(split, weights, digits, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    level = LOGGER.level
    metrics = judge(weights, str(digits), split, **SETTINGS, task="detect")
    assert not list(tmp_path.iterdir()) and LOGGER.level == level
    assert "".join(capfd.readouterr()) == ""
    assert metrics == judge(weights, str(digits), split, **SETTINGS, task="detect")

    stock = YOLO(weights).val(data=str(digits), split=split, plots=False, project=str(tmp_path), **SETTINGS)
    assert {k: metrics[k] for k in ULTRALYTICS} == stock.results_dict
    report = command.run(weights=weights, data=digits, split=split, **SETTINGS)
    assert metrics["devkit/AP50-07"] == report["mean"]["VOC07"]
    assert metrics["devkit/AP50-10"] == report["mean"]["VOC10+"]
    assert metrics.keys() == ULTRALYTICS | DEVKIT
    # Counted by other code from the detections in pixels
    assert report["mean"]["Ultralytics AP50"] == pytest.approx(metrics["metrics/mAP50(B)"], abs=2e-3)
    assert split == "val" or metrics["metrics/mAP50(B)"] > 0.3  # there was something to compare


def test_without_annotations_there_is_no_devkit_metric(weights, digits):
    labels = digits.with_name("labels.yaml")
    labels.write_text(re.sub("^voc:.*\n", "", digits.read_text(), flags=re.MULTILINE))
    metrics = judge(weights, str(labels), "train", **SETTINGS, task="detect")
    whole = judge(weights, str(digits), "train", **SETTINGS, task="detect")
    assert metrics == {k: whole[k] for k in ULTRALYTICS}


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
    metrics = judge(weights, str(data), "test", **settings, task="classify")
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
            judge(path, str(digits), split, **SETTINGS, task="detect")
    assert LOGGER.level == level


def test_a_model_is_judged_with_the_settings_of_its_training(weights, digits, tmp_path):
    config = vars(get_cfg(overrides={**SETTINGS, "task": "detect", "classes": [3, 4, 5], "max_det": 1, "iou": 0.4}))
    settings = judged_settings(config)
    assert (settings["classes"], settings["max_det"], settings["iou"]) == ([3, 4, 5], 1, 0.4) and "conf" not in settings
    metrics = judge(weights, str(digits), "train", device="cpu", **settings)
    given = {k: v for k, v in settings.items() if k != "task"}
    stock = YOLO(weights).val(
        data=str(digits), split="train", plots=False, project=str(tmp_path), device="cpu", **given
    )
    assert {k: metrics[k] for k in ULTRALYTICS} == stock.results_dict
    some = judge(weights, str(digits), "train", **SETTINGS, task="detect", classes=[3, 4, 5])
    assert metrics["devkit/AP50-10"] < some["devkit/AP50-10"] - 0.05  # one detection an image finds less
    report = command.run(weights=weights, data=digits, split="train", **SETTINGS)["runs"][0]["per_class"]
    assert some["devkit/AP50-10"] == pytest.approx(np.mean([report[str(k)]["VOC10+"] for k in (3, 4, 5)]), abs=1e-12)


@pytest.mark.slow
def test_a_model_of_one_class_is_judged_as_such(digits, tiny, tmp_path):
    size = {"imgsz": 64, "batch": 8, "device": "cpu", "workers": 0, "plots": False, "verbose": False}
    stay = {"mosaic": 0.0, "scale": 0.0, "translate": 0.0, "hsv_s": 0.0, "hsv_v": 0.0, "fliplr": 0.0}
    one = {"single_cls": True, "epochs": 40, "optimizer": "AdamW", "lr0": 0.005, "warmup_epochs": 0, "nbs": 8, **stay}
    YOLO(tiny).train(data=str(digits), project=str(tmp_path), name="run", val=False, **size, **one)
    weights = tmp_path / "run/weights/last.pt"
    metrics = judge(weights, str(digits), "train", **SETTINGS, task="detect", single_cls=True)
    assert metrics["metrics/mAP50(B)"] > 0.1
    assert metrics["devkit/AP50-10"] == pytest.approx(metrics["metrics/mAP50(B)"], abs=0.05)  # difficult ones differ


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"mosaic": 1.0}, "'mosaic=1.0': a judgement takes task, imgsz, "), ({"save": True}, "'save=True'")],
)
def test_settings_that_are_none_of_a_judgement_are_named(weights, digits, settings, message):
    with pytest.raises(ValueError, match=message):
        judge(weights, str(digits), "val", **SETTINGS, task="detect", **settings)


def test_a_training_that_validated_on_a_part_is_refused():
    with pytest.raises(ValueError, match=r"fraction=\[1.0, 0.5\]: a record judges whole splits"):
        judged_settings({"fraction": [1.0, 0.5]})
    assert judged_settings({"fraction": 0.5, "lr0": 1.0, "conf": None, "imgsz": 64}) == {"imgsz": 64}
    assert judged_settings({"batch": -1, "imgsz": 64}) == judged_settings({"batch": 0.7, "imgsz": 64}) == {"imgsz": 64}


@pytest.mark.parametrize("voc", [True, False])
def test_what_stops_a_judgement_can_be_found_before_the_training(weights, digits, tmp_path, voc):
    root = shutil.copytree(digits.parent, tmp_path / "set")
    data = root / "data.yaml"
    if not voc:
        data.write_text(re.sub("^voc:.*\n", "", data.read_text(), flags=re.MULTILINE))
    truth = check_judgement(str(data), "val", task="detect", **SETTINGS_BUT_DEVICE)
    assert (truth is not None) == voc and (not voc or len(truth.images) == 8)
    image = sorted((root / "images/val").iterdir())[0]
    content = image.read_bytes()
    image.unlink()  # it may be a link
    image.write_bytes(content[: len(content) // 2])
    message = rf"data\.yaml, split 'val': Ultralytics would leave 1 of 8 images out .*{image.name}: not a readable"
    for look in (
        lambda: check_judgement(str(data), "val", task="detect"),
        lambda: judge(weights, str(data), "val", **SETTINGS, task="detect"),
    ):
        with pytest.raises(ValueError, match=message):
            look()


def test_images_of_a_class_are_not_left_out_in_silence(classifier, tmp_path):
    data = shutil.copytree(classifier[0], tmp_path / "set")
    check_judgement(str(data), "test", task="classify")
    image = sorted((data / "test/a").iterdir())[0]
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(
        ValueError, match=rf"test: Ultralytics would leave 1 of 16 images out .*{image.name}: not a read"
    ):
        judge(classifier[1], str(data), "test", imgsz=32, batch=8, device="cpu", task="classify")
    image.unlink()
    (data / "test/a").rename(data / "test/e")
    with pytest.raises(ValueError, match="class 'e' is none of the training's"):
        check_judgement(str(data), "test", task="classify")
