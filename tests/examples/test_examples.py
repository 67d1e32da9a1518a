# yolo-sos, AGPL-3.0
"""Each script in examples/ runs as its docstring says, and what it returns is right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}


def example(name: str):
    """Return an example as a module."""
    spec = spec_from_file_location(f"example_{name}", EXAMPLES[name])
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_says_how_it_is_run_and_is_tested_here(name):
    text = EXAMPLES[name].read_text(encoding="utf-8")
    assert f"    python examples/{name}.py\n" in text and len(text.splitlines()) <= 170
    assert not re.search(r"\btests?\b[./]|conftest", text)
    assert f'example("{name}")' in Path(__file__).read_text(encoding="utf-8")


def test_a_detection_loop(capsys):
    done = example("detection_loop").main()
    assert done["before"] > 0.6  # it has learned to detect; chance is below .05
    assert done["after"] == pytest.approx(done["before"], abs=0.03) and 0.5 < done["squared_norm_ratio"] < 0.99
    assert "mAP50 on new scenes" in capsys.readouterr().out


@pytest.mark.slow
def test_a_classifier():
    pytest.importorskip("sklearn", reason="needs scikit-learn's digits: the extra 'digits'")
    done = example("classifier").main()
    assert done["before"] > 0.5  # chance is .1
    assert done["after"] == pytest.approx(done["before"], abs=0.02) and done["squared_norm_ratio"] < 0.99


def test_a_fit_of_a_classifier(capsys):
    pytest.importorskip("sklearn", reason="needs scikit-learn's digits: the extra 'digits'")
    done = example("fit_classifier").main()
    (old, new), (old_after, new_after) = done["before"], done["after"]
    assert old > 0.95 and new < 0.1  # 8 and 9 have zero rows and no bias: they are chosen where all others are below
    assert new_after > 0.9 and old_after > 0.95
    assert "1 layers fitted; held-out loss" in capsys.readouterr().out


def test_lightning():
    pytest.importorskip("sklearn", reason="needs scikit-learn's digits: the extra 'digits'")
    pytest.importorskip("lightning", reason="needs the extra 'lightning'")
    ratios = example("lightning_callback").main()
    assert list(ratios) == [3, 5, 7]  # 8 epochs from 0 on: from half of them on, every second
    assert all(0.3 < ratio <= 1 for ratio in ratios.values()) and min(ratios.values()) < 1


def test_detections_of_others():
    """By hand: the cat is found at rank 2 (AP ½), the dog at rank 1; IoU .897 and .846."""
    means = example("evaluate_detections").main()
    assert means["VOC10+"] == pytest.approx(0.75)
    common = (60 - 12) * (79 - 20)
    cat = common / (50 * 60 + 49 * 61 - common)
    dog = 90 * 55 / (90 * 65)
    thresholds = [0.5 + 0.05 * k for k in range(10)]
    expected = (sum(cat >= t for t in thresholds) * 0.5 + sum(dog >= t for t in thresholds)) / 20
    assert means["COCO AP"] == pytest.approx(expected, abs=0.003)  # COCO samples recall at 101 points


def test_judging_detections_loads_no_torch(tmp_path):
    code = (
        f"import runpy, sys; runpy.run_path({str(EXAMPLES['evaluate_detections'])!r}, run_name='__main__'); "
        "assert 'torch' not in sys.modules and 'ultralytics' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "| **mean** |" in done.stdout
