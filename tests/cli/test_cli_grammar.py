# yolo-sos, AGPL-3.0
"""How a command is read: as Ultralytics reads it, by what each mode declares."""

from __future__ import annotations

import inspect

import pytest

from yolo_sos.arguments import DEPRECATED, ultralytics_arguments, with_file
from yolo_sos.cli import MODES
from yolo_sos.cli.grammar import BARE, TASKS, read, refusing
from yolo_sos.config import SCHEMA, SHIFT_SETTINGS, SOSConfig


def given(*args):
    """Return the arguments that a command gives, without its mode."""
    return {key: value for key, value in read(args, MODES)[1].items() if key != "mode"}


@pytest.mark.parametrize(
    "args",
    [
        ["imgsz=64", "batch=8"],
        ["imgsz", "=", "64", "batch", "=", "8"],
        ["imgsz=", "64", "batch", "=8"],
        ["--imgsz=64,", "--batch=8"],
    ],
)
def test_arguments_are_written_as_in_ultralytics(args):
    mode, arguments = read(["train", *args], MODES)
    assert mode is MODES["train"]
    assert arguments == {"mode": "train", "imgsz": 64, "batch": 8}


VALUES = ["[0,1]", "none", "None", "TRUE", "false", "1e-3", "1", "1.0", "a=b", "0,1,2", "box,cls", "'x'", "007", "1_0"]
VALUES += ["('a', 'b')", "{1: 2}", "[" * 3 + "]" * 3, "9" * 5000, "\\", "é", "-1", "best.pt,last.pt", "lambda: 0"]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", ["classes", "name", "project"])
def test_values_are_read_as_in_ultralytics(key, value):
    from ultralytics.cfg import merge_equals_args, parse_key_value_pair

    (merged,) = merge_equals_args([f"{key}={value}"])
    expected = parse_key_value_pair(merged)[1]
    found = given("train", f"{key}={value}")[key]
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "args", [["classes=[0,", "1]"], ["classes=[", "0", ",", "1", "]"], ["classes", "=", "[0,", "1]"]]
)
def test_a_list_that_the_shell_has_split(args):
    assert given("train", *args) == {"classes": [0, 1]}


@pytest.mark.parametrize("value", ["box,cls", "[box,cls]", "['box','cls']", "[box, cls]", '("box", "cls")'])
def test_layers_are_written_as_a_list_or_shorter(value):
    assert SOSConfig.from_dict(given("train", f"sos_layers={value}")).sos_layers == ["box", "cls"]


@pytest.mark.parametrize(
    "args", [["train", "sos"], ["sos", "train"], ["train", "sos=True"], ["mode=train", "--sos=true"]]
)
def test_an_argument_whose_default_is_a_bool_is_a_switch(args):
    mode, arguments = read(args, MODES)
    assert mode.name == "train" and arguments["sos"] is True


def test_words():
    assert given("detect", "train", "cos_lr", "half") == {"task": "detect", "cos_lr": True, "half": True}
    assert given("segment", "shift", "sweep", "model=a.pt") == {"sweep": True, "model": "a.pt"}
    assert given("experiment", "plan", "voc/yolov5s", "cos_lr") == {"plan": True, "name": "voc/yolov5s", "cos_lr": True}
    assert given("table", "classify") == {"experiment": "classify"}
    assert read(["sos=true"], MODES) == (MODES["train"], {"sos": True})  # train, if nothing is said
    assert read(["mode=val"], MODES)[0] is MODES["val"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["foo"], "'foo' is not a mode, a task or a switch"),
        (
            ["train", "foo"],
            "'foo' is not a switch of train. Arguments are written key=value. See: yolo-sos train --help",
        ),
        (["train", "epochs"], "'epochs' needs a value: epochs=100"),
        (["train", "epochs="], "'epochs=' needs a value"),
        (["=", "3"], "no key before '='"),
        (["train", "sos_rnk=8"], "'sos_rnk' is not a valid argument. Did you mean 'sos_rank'?"),
        (["train", "imgs", "=64"], "Did you mean 'imgsz'?"),
        (["shift", "images=all", "epochs=3"], "'epochs' is not a valid argument"),
        (["shift", "cfg=a.yaml"], "'cfg' is not a valid argument"),
        (["experiment"], "experiment takes one name, such as: yolo-sos experiment voc/yolov5s"),
        (["experiment", "a", "b"], "'b' is not a switch of experiment"),
        (["experiment", "a", "resume=b"], "'resume' is not a valid argument"),
        (["mode=foo"], "'mode=foo' is invalid: mode must be one of convert, fit, train, shift"),
    ],
)
def test_what_is_refused(args, told):
    with pytest.raises(ValueError) as e:
        read(args, MODES)
    assert told in str(e.value)


def test_names_of_ultralytics():
    """They are written here, too, since importing Ultralytics takes seconds."""
    from ultralytics import cfg
    from ultralytics.utils import DEFAULT_CFG_DICT

    assert set(cfg.TASKS) <= set(TASKS)
    assert set(cfg.MODES) <= set(MODES)
    assert {a.name: a.default for a in ultralytics_arguments()} == DEFAULT_CFG_DICT
    assert all(a.type and a.help for a in ultralytics_arguments())
    assert set(BARE) <= {*DEPRECATED, *DEFAULT_CFG_DICT}
    cfg.get_cfg(overrides=dict.fromkeys(set(DEPRECATED) - {"end2end"}, False))  # raises for a key that it does not take


# What each mode declares is what it calls ---------------------------------------------------------------------------


def declared(mode):
    """Return the defaults that a mode declares, by key."""
    return {a.name: a.default for section in MODES[mode].arguments().values() for a in section}


def parameters(function):
    """Return the defaults of a function's named parameters; None where there is none."""
    empty, several = inspect.Parameter.empty, inspect.Parameter.VAR_KEYWORD
    found = {
        p.name: p for p in inspect.signature(function).parameters.values() if p.kind != several and p.name != "self"
    }
    return {name: None if p.default is empty else p.default for name, p in found.items()}


def test_shift_declares_what_a_checkpoint_job_takes():
    from yolo_sos.yolo.images import IMAGES
    from yolo_sos.yolo.job import ShiftJob

    settings = {key: SCHEMA[f"sos_{key}"].default for key in SHIFT_SETTINGS}
    own = {"images": IMAGES, "sweep": False, "calibrate": False}
    assert declared("shift") == {**parameters(ShiftJob), **settings, **own}
    assert set(MODES["shift"].also) == {f"sos_{key}" for key in SHIFT_SETTINGS}


def test_experiment_and_table_declare_what_they_call():
    from yolo_sos.experiment.grid import Experiment
    from yolo_sos.experiment.table import ResultTable

    own = parameters(Experiment)
    assert {k: v for k, v in declared("experiment").items() if k in own} == own
    rest = declared("experiment").keys() - own.keys()
    assert rest < declared("train").keys() and {"epochs", "sos", "lr_steps"} < rest
    assert rest.isdisjoint({"seed", "resume", "cfg", "exist_ok", "mode"})
    assert declared("table") == parameters(ResultTable)


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_command_goes_before_a_file_and_a_file_before_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("epochs: 1\nbatch: 2\nlr0: 0.3\n")
    (tmp_path / "mine.yaml").write_text("cfg: base.yaml\nbatch: 4\nlr0: 0.4\n")
    arguments = {"cfg": str(tmp_path / "mine.yaml"), "lr0": 0.5}
    assert with_file(arguments) == {"epochs": 1, "batch": 4, "lr0": 0.5}
    assert with_file({"cfg": None, "lr0": 0.5}) == {"lr0": 0.5}
    (tmp_path / "base.yaml").write_text("epoch: 1\n")
    with pytest.raises(ValueError, match=r"base\.yaml: 'epoch' is not a valid argument\. Did you mean 'epochs'"):
        with_file(arguments)
    (tmp_path / "base.yaml").write_text("cfg: mine.yaml\n")
    with pytest.raises(ValueError, match="leads back to itself"):
        with_file(arguments)


# Errors --------------------------------------------------------------------------------------------------------------


def test_an_error_is_told_in_one_line(capsys):
    with pytest.raises(SystemExit) as e, refusing():
        raise ValueError("two\n  lines")
    assert e.value.code == 2 and capsys.readouterr().err == "yolo-sos: two lines\n"
    with pytest.raises(SystemExit), refusing():
        raise AssertionError
    assert capsys.readouterr().err == "yolo-sos: AssertionError\n"
    with pytest.raises(KeyError), refusing():
        raise KeyError("a bug")
    with pytest.raises(ValueError), refusing(unless=lambda: True):
        raise ValueError
    with pytest.raises(TypeError), refusing(OSError):
        raise TypeError
    with pytest.raises(BrokenPipeError), refusing():
        raise BrokenPipeError
