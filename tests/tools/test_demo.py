# yolo-sos, AGPL-3.0
"""The demo: its page needs no other file, tells what happened, and opens in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from ultralytics import YOLO

from yolo_sos.core import NoMapError, affine_matrix
from yolo_sos.data.digits import build
from yolo_sos.yolo.classes import in_order

TOOL = Path(__file__).parents[2] / "tools/demo.py"
pytestmark = pytest.mark.skipif(not TOOL.is_file(), reason="no checkout")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def demo():
    """The tool as a module."""
    spec = spec_from_file_location("demo", TOOL)
    module = sys.modules["demo"] = module_from_spec(spec)  # where dataclasses look for the types that they name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(demo, tiny, tmp_path_factory) -> Path:
    """The page of a tiny model, which is validated on what it is trained on, so that it finds something."""
    folder = tmp_path_factory.mktemp("demo")
    # With fewer images, or after more epochs, it knows them by heart, and its features say nothing of other digits.
    data = yaml.safe_load(build(folder / "set", train=120, val=1, test=1, imgsz=64, digits=(1, 3)).read_text())
    data["path"] = str(folder / "set")
    (folder / "data.yaml").write_text(yaml.safe_dump({**data, "val": data["train"], "test": data["train"]}))
    plain = dict.fromkeys(("mosaic", "translate", "scale", "hsv_h", "hsv_s", "hsv_v", "fliplr", "warmup_epochs"), 0.0)
    little = {"epochs": 14, "imgsz": 64, "batch": 8, "lr0": 0.005, "close_mosaic": 0}
    training = {**demo.TRAINING, **plain, **little}
    return demo.run(demo.Demo(folder, str(folder / "data.yaml"), str(tiny), training))


def test_the_page_has_every_panel_and_needs_no_other_file(page):
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == [
        *("A detector of five digits", "Five digits more, without training", "Scores as probabilities"),
        *("A shift", "The trade-off"),
    ]
    assert set(re.findall(r'(?:src|href)="([^":]*)[:"]', text)) == {"data"}
    words = re.sub(r"<[^>]+>", " ", re.sub(r'src="data:[^"]*"', "", text))
    assert not re.search(r"\b(nan|inf|None)\b", words)
    for found in re.findall(r"base64,([^\"]+)", text):
        image = cv2.imdecode(np.frombuffer(b64decode(found), np.uint8), cv2.IMREAD_COLOR)
        assert image.shape[1] > 500 and image.std() > 5
    assert text.count("<figure>") >= 3


def test_before_and_after_are_of_the_same_weights(page):
    """The table's rows add up, and the norm is that of the sentence."""
    text = page.read_text(encoding="utf-8")
    rows = re.findall(r"<tr><td>([^<]*)</td><td>([-\d.]+)</td><td>([-\d.]+)</td><td>([-+\d.]+)</td></tr>", text)
    if not rows:
        assert "Nothing was written" in text
        pytest.skip("the guard let no shift of this tiny model pass")
    assert [row[0] for row in rows][:2] == ["squared norm of the final layers", "loss per held-out training image"]
    for _, before, after, change in rows:
        assert float(after) - float(before) == pytest.approx(float(change), abs=2e-4)
    share = float(re.search(r"(\d+)% of their squared norm is left", text)[1]) / 100
    assert float(rows[0][2]) / float(rows[0][1]) == pytest.approx(share, abs=0.006)
    assert float(rows[1][2]) <= float(rows[1][1]) * 1.0051


def test_five_classes_are_trained_and_the_others_are_fitted(page):
    """AP by digit is what Ultralytics finds; of the trained ones neither it nor a row of weights has changed."""
    best, fitted = (YOLO(page.parent / "train/weights" / name) for name in ("best.pt", "best-fit.pt"))
    assert list(best.names.values()) == list("01234") and list(fitted.names.values()) == list("0123456789")
    for old, new in zip(*(in_order(yolo.model) for yolo in (best, fitted)), strict=True):
        assert torch.equal(affine_matrix(old.module).half(), affine_matrix(new.module)[:5].half())
    text = page.read_text(encoding="utf-8")
    rows = re.findall(r"<tr><td>(\d)</td><td>([.\d]+|cannot name it)</td><td>([.\d]+)</td></tr>", text)
    assert [int(digit) for digit, _, _ in rows] == list(range(10))
    assert all(before == (after if int(digit) < 5 else "cannot name it") for digit, before, after in rows)
    own = {"imgsz": 64, "batch": 8, "device": "cpu", "workers": 0, "max_det": 1000, "plots": False}
    found = fitted.val(data=str(page.parent / "data.yaml"), split="test", **own).box.maps
    assert [after for _, _, after in rows] == [f"{ap:.3f}" for ap in found]
    assert found[5:].mean() > 0.005
    report = json.loads((page.parent / "train/weights/best-fit.json").read_text())
    assert report["explained"] > 0.1 and report["heldout_after"] < 0.95 * report["heldout_before"]
    told = re.search(r"is ([.\d]+) on average for these five, .* against ([.\d]+)", text).groups()
    assert told == (f"{found[5:].mean():.3f}", f"{found[:5].mean():.3f}")
    assert "largest change of their AP: 0.0000" in text


def test_only_some_classes_are_labelled(demo, digits, tmp_path):
    data = demo.Demo(tmp_path, str(digits)).labelled(range(5, 10))
    content = yaml.safe_load(Path(data).read_text(encoding="utf-8"))
    assert content["names"] == {k: str(k + 5) for k in range(5)}
    for split in "train", "val", "test":
        labels = sorted((digits.parent / "labels" / split).glob("*.txt"))
        assert len(list((tmp_path / "labels-5-9/images" / split).glob("*.jpg"))) == len(labels)
        for label in labels:
            lines = [line.split() for line in label.read_text().splitlines()]
            kept = (tmp_path / "labels-5-9/labels" / split / label.name).read_text().splitlines()
            assert [line.split() for line in kept] == [[str(int(c) - 5), *b] for c, *b in lines if int(c) >= 5]


def test_where_the_fit_is_refused_the_other_panels_show_the_trained_detector(demo, digits, monkeypatch, tmp_path):
    refused = SimpleNamespace(output=None, refusal="nothing to fit")
    monkeypatch.setattr(demo, "fit_checkpoint", lambda *_, **__: refused)
    made = demo.Demo(tmp_path, str(digits))
    assert demo.taught(made).sentence == "Nothing was written: nothing to fit."
    assert made.detector == (made.best, None)


def test_errors_before_and_after_a_calibration(page):
    """The sentence tells what the report beside the checkpoint holds."""
    text = page.read_text(encoding="utf-8")
    (branch,) = json.loads((page.parent / "train/weights/best-fit-calibrated.json").read_text())["branches"]
    before, after = re.search(r"are right by ([\d.]+) on average .* differ by ([\d.]+), and mAP50-95", text).groups()
    assert (before, after) == (f"{branch['before']['ECE']:.4f}", f"{branch['after']['ECE']:.4f}")
    assert branch["after"]["NLL"] < branch["before"]["NLL"]


def test_where_no_map_is_found_the_panel_says_why(demo, monkeypatch, tmp_path):
    def none(*_, **__):
        raise NoMapError("all detections are misses")

    monkeypatch.setattr(demo, "calibrate_checkpoint", none)
    panel = demo.calibrated(demo.Demo(tmp_path))
    assert panel.sentence == "No map of the scores makes them probabilities: all detections are misses."


def test_a_panel_escapes_what_it_is_given(demo):
    panel = demo.Panel("a < b", "c & d", [["x", "y"], ["<i>", "1"]], [('"q"', b"png")])
    assert "a &lt; b" in panel.html() and "&lt;i&gt;" in panel.html() and 'alt="&quot;q&quot;"' in panel.html()
    assert "| <i> |   1 |" in panel.text()


@pytest.mark.skipif(BROWSER is None, reason="no chromium was found to open the page in")
def test_a_browser_shows_it(page, tmp_path):
    shot = tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-sync"]
    command = [BROWSER, *flags, "--window-size=1100,2400", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=120)
    image = cv2.imread(str(shot))
    white = (image.min(2) > 250).mean()
    assert image.shape[:2] == (2400, 1100) and 0.3 < white < 0.98 and len(np.unique(image.reshape(-1, 3), axis=0)) > 200
