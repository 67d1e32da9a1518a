# yolo-sos, AGPL-3.0
"""Whatever comes in: a result, or an error that names its source. YOLO_SOS_FUZZ=10000 tries ten thousand cases."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from yolo_sos import cli
from yolo_sos.config import KEYS, SOSConfig
from yolo_sos.data.voc import VOCAnnotation, VOCObject, read_annotation, write_annotation
from yolo_sos.evaluate.coco_files import read_coco_detections, read_coco_truth
from yolo_sos.evaluate.voc_files import read_voc_detections, voc_truth

CASES = int(os.environ.get("YOLO_SOS_FUZZ", "100"))
FUZZ = settings(
    derandomize=True,
    max_examples=CASES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NUMBERS = st.one_of(
    st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([10**400, -(10**400), 1e308, 5e-324])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8))
VALUES = st.recursive(
    SCALARS,
    lambda v: st.one_of(st.lists(v, max_size=4), st.dictionaries(st.text(max_size=4), v, max_size=3)),
    max_leaves=8,
)
SETTINGS = st.sampled_from(KEYS)


@pytest.mark.fault("any value for any setting", "an error that names the setting")
@FUZZ
@given(st.dictionaries(SETTINGS, VALUES, min_size=1, max_size=2))
def test_settings(given):
    try:
        config = SOSConfig.from_dict(given)
    except ValueError as e:
        assert any(key in str(e) for key in given)
    else:
        assert SOSConfig.from_dict(config.to_dict()) == config


WORDS = st.sampled_from(
    ["train", "val", "shift", "analyze", "sos", "detect", "exist_ok", "-", "--", "=", ",", "", "[", "{"]
)
NAMES = st.sampled_from(
    [
        *KEYS,
        "model",
        "data",
        "epochs",
        "imgsz",
        "cfg",
        "resume",
        "draws",
        "runs",
        "probes",
        "images",
        "sweep",
    ]
)
TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=6),
    st.sampled_from(
        ["none", "True", "[", "[1", "(1,", "{}", "1e999", "9" * 5000, "[" * 300, "\0", "a" * 5000, "-1", "."]
    ),
    st.integers().map(str),
)
PAIRS = st.builds("{}{}{}".format, NAMES, st.sampled_from(["=", " =", "= ", "==", ""]), TEXTS)


@pytest.mark.fault("any command line", "one line that says what is wrong, exit status 2, no traceback")
@FUZZ
@given(args=st.lists(st.one_of(WORDS, PAIRS, TEXTS), max_size=5))
def test_command_lines(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = ("ultralytics.YOLO.train", "yolo_sos.yolo.CheckpointShift.run", "yolo_sos.yolo.CheckpointSweep.run")
    work += ("yolo_sos.analyze.Comparison.run", "yolo_sos.analyze.Curves.run", "ultralytics.cfg.entrypoint")
    with ExitStack() as stack:
        for name in work:
            stack.enter_context(mock.patch(name, return_value=None))
        try:
            cli.main(args)
        except SystemExit as e:
            assert e.code == 2
            assert capsys.readouterr().err.startswith("yolo-sos: ")


ANNOTATION = VOCAnnotation("a", "a.jpg", 60, 40, (VOCObject("cat", (1.0, 2.0, 30.0, 20.0), difficult=True),))
PIECES = ["<", ">", "/", "&", "<object>", "</object>", "<name/>", "nan", "1e999", "-", "\0", "<!DOCTYPE a>", "9" * 5000]


@pytest.mark.fault("any damage to a VOC annotation", "an error that names the file")
@FUZZ
@given(at=st.integers(0, 600), cut=st.integers(0, 40), piece=st.one_of(st.sampled_from(PIECES), st.text(max_size=5)))
def test_annotations(tmp_path, at, cut, piece):
    path = tmp_path / "a.xml"
    write_annotation(path, ANNOTATION)
    text = path.read_text()
    path.write_bytes((text[:at] + piece + text[at + cut :]).encode("utf-8", "surrogatepass"))
    try:
        assert read_annotation(path).image_id == "a"
    except ValueError as e:
        assert str(path) in str(e)


TRUTH = voc_truth([ANNOTATION])


@pytest.mark.fault("any line in the devkit's detections", "an error that names file and line")
@FUZZ
@given(
    st.lists(
        st.one_of(
            st.lists(st.one_of(st.just("a"), NUMBERS.map(str)), min_size=5, max_size=7).map(" ".join),
            st.lists(NUMBERS.map(str), min_size=5, max_size=5).map(lambda numbers: " ".join(["a", *numbers])),
            st.text(max_size=9),
        ),
        max_size=3,
    )
)
def test_devkit_detections(tmp_path, lines):
    path = tmp_path / "comp4_det_test_cat.txt"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    try:
        read_voc_detections(tmp_path, TRUTH)
    except ValueError as e:
        assert str(path) in str(e)


ENTRIES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "image_id": st.one_of(st.just("a"), VALUES),
            "category_id": st.one_of(st.just(1), VALUES),
            "bbox": st.one_of(st.lists(NUMBERS, min_size=4, max_size=4), VALUES),
            "score": st.one_of(st.just(0.5), VALUES),
            "id": VALUES,
            "name": VALUES,
            "area": VALUES,
            "iscrowd": VALUES,
        },
    ),
    max_size=3,
)


@pytest.mark.fault("any JSON as COCO's detections or annotations", "an error that names the file")
@FUZZ
@given(
    st.one_of(
        VALUES, ENTRIES, st.fixed_dictionaries({"images": ENTRIES, "categories": ENTRIES, "annotations": ENTRIES})
    )
)
def test_coco_files(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    for read in (lambda: read_coco_detections(path, TRUTH), lambda: read_coco_truth(path)):
        try:
            read()
        except ValueError as e:
            assert str(path) in str(e)
