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

import cv2
import numpy as np
import pytest
import yaml

from yolo_sos.core import NoMapError

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
def page(demo, digits, tiny, tmp_path_factory) -> Path:
    """The page of a tiny model, which is validated on what it is trained on, so that it finds something."""
    data = {**yaml.safe_load(digits.read_text()), "path": str(digits.parent)}
    folder = tmp_path_factory.mktemp("demo")
    (folder / "data.yaml").write_text(yaml.safe_dump({**data, "val": data["train"], "test": data["train"]}))
    plain = dict.fromkeys(("mosaic", "translate", "scale", "hsv_h", "hsv_s", "hsv_v", "fliplr", "warmup_epochs"), 0.0)
    little = {"epochs": 100, "imgsz": 64, "batch": 8, "optimizer": "AdamW", "lr0": 0.01, "close_mosaic": 0}
    training = {**demo.TRAINING, **plain, **little}
    return demo.run(demo.Demo(folder, str(folder / "data.yaml"), str(tiny), training))


def test_the_page_has_every_panel_and_needs_no_other_file(page):
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == ["A detector", "A shift", "The trade-off", "Scores as probabilities"]
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


def test_errors_before_and_after_a_calibration(page):
    """The sentence tells what the report beside the checkpoint holds."""
    text = page.read_text(encoding="utf-8")
    (branch,) = json.loads((page.parent / "train/weights/best-calibrated.json").read_text())["branches"]
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
