# yolo-sos, AGPL-3.0
"""What records hold, and in what two configs differ."""

from __future__ import annotations

import json

import pytest

from yolo_sos.experiment.record import FIELDS, difference, read_record, read_rows, wall_time, write_record

RECORD = {key: types[0]() for key, types in FIELDS.items()}


def test_a_record_comes_back(tmp_path):
    path = tmp_path / "records" / "a-0.json"
    record = {**RECORD, "metrics": {"val": {"top1": 0.5, "worst": float("nan")}}, "config": {"classes": (1, 2)}}
    write_record(path, record)
    back = read_record(path)
    assert back["metrics"] == {"val": {"top1": 0.5, "worst": None}} and back["config"] == {"classes": [1, 2]}
    assert difference(back["config"], record["config"]) is None
    assert [p.name for p in path.parent.iterdir()] == ["a-0.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a record"),
        ("{", "not JSON"),
        (json.dumps({k: v for k, v in RECORD.items() if k != "device"}), "it has no 'device'"),
        (json.dumps({**RECORD, "seed": True}), "'seed' must be of type int, not bool"),
        (json.dumps({**RECORD, "git_commit": 1}), "'git_commit' must be of type str or NoneType, not int"),
    ],
)
def test_what_is_no_record_is_named(tmp_path, text, message):
    path = tmp_path / "b-0.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"b-0.json.*{message}"):
        read_record(path)


def test_configs_differ_in_the_first_key_that_differs():
    assert difference({"a": 1, "b": [1]}, {"b": (1,), "a": 1}) is None
    assert difference({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3, "c": 4}) == "b"
    assert difference({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3, "c": 4}, besides=("b",)) == "c"
    assert difference({"a": None}, {}) is None


def test_a_setting_that_an_older_release_did_not_have_counts_as_its_default():
    assert difference({"sos": True}, {"sos": True, "sos_step": 1.0}) is None
    assert difference({"sos": True}, {"sos": True, "sos_step": 0.5}) == "sos_step"
    assert difference({"sos": True, "sos_solver": "qr"}, {"sos": True, "sos_solver": "svd"}) is None
    assert difference({"sos": True, "sos_solver": "qr"}, {"sos": True, "sos_solver": "gauss"}) == "sos_solver"


def test_wall_time_counts_every_stretch(tmp_path):
    csv = tmp_path / "results.csv"
    csv.write_text("epoch,  time,loss\n1, 10,3\n2, 20,2\n3, 8,1\n4, 16,1\n5, 24,1\n")
    assert wall_time(csv) == 20 + 24
    assert read_rows(csv)[-1] == {"epoch": "5", "time": "24", "loss": "1"}
    assert read_rows(tmp_path / "sos.csv") == []


def test_how_to_shift_does_not_count_where_nothing_is_shifted():
    assert difference({"sos": False, "sos_start": 0.5}, {"sos": False, "sos_start": 1.0}) is None
    assert difference({"sos": False, "sos_start": 0.5}, {"sos": True, "sos_start": 1.0}, besides=("sos",)) is None
    assert difference({"sos": True, "sos_start": 0.5}, {"sos": True, "sos_start": 1.0}) == "sos_start"
    assert difference({"sos": False, "sos_analyze": 5}, {"sos": False}) == "sos_analyze"
