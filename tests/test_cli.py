# yolo-sos, AGPL-3.0
"""The command: what it prints, what it refuses, and what it hands to whom."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import yolo_sos
from yolo_sos import cli
from yolo_sos.config import CFG_DIR, SOS_YAML, SOSConfig


def planned(*args):
    """Return what ``yolo-sos args`` would run; nothing runs."""
    return cli.plan(*cli.parse(list(args)))


@pytest.fixture
def refused(capsys, monkeypatch):
    """``refused(*args)`` returns what ``yolo-sos args`` says on refusing; nothing may have run."""
    monkeypatch.setattr(cli, "run_host", lambda *_: pytest.fail("the host was run"))

    def refused(*args):
        with pytest.raises(SystemExit) as e:
            cli.main(list(args))
        assert e.value.code == 2
        out, err = capsys.readouterr()
        assert err.startswith("yolo-sos: ") and "Traceback" not in out + err
        return err

    return refused


@pytest.fixture
def trained(monkeypatch):
    """``trained(*args)`` returns trainer and arguments of the training that ``yolo-sos args`` runs; none runs."""
    from ultralytics import YOLO

    calls = []
    monkeypatch.setattr(YOLO, "train", lambda self, trainer=None, **kwargs: calls.append((trainer, kwargs)))

    def trained(*args):
        planned(*args)()
        return calls.pop()

    return trained


@pytest.fixture
def handed(monkeypatch):
    """``handed(*args)`` returns the words and arguments that ``yolo-sos args`` hands to 'yolo'."""
    calls = []
    monkeypatch.setattr(cli, "run_host", lambda words, overrides: calls.append((words, overrides)))

    def handed(*args):
        planned(*args)()
        return calls.pop()

    return handed


# What it prints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["help"], ["--help"], ["-h"]])
def test_help(args, capsys):
    cli.main(args)
    out = capsys.readouterr().out
    assert "yolo-sos [TASK] MODE ARGS" in out and "sos=true" in out


@pytest.mark.parametrize("args", [["version"], ["--version"], ["-v"]])
def test_version(args, capsys):
    import ultralytics

    capsys.readouterr()  # what the host says when it is imported
    cli.main(args)
    expected = f"yolo-sos {yolo_sos.__version__} (ultralytics {ultralytics.__version__})"
    assert capsys.readouterr().out.strip() == expected


def test_cfg_prints_the_settings_with_their_comments(capsys):
    cli.main(["cfg"])
    out = capsys.readouterr().out
    assert out.strip() == SOS_YAML.read_text(encoding="utf-8").strip()
    assert yaml.safe_load(out) == SOSConfig.from_dict({}).to_dict()
    assert out.count(" # (") == len(SOSConfig.keys())


def test_every_setting_in_the_help_is_one(capsys):
    cli.main(["help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    settings = [word.split("=")[0] for word in words if word.startswith("sos") and "=" in word]
    assert len(settings) > 5 and set(settings) <= set(SOSConfig.keys())


LIGHT = """
import contextlib, io, json, sys
from yolo_sos.cli import main

told = {}
for args in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(args)
        except SystemExit as e:
            code = e.code
    told[" ".join(args)] = [code, out.getvalue() + err.getvalue()]
print(json.dumps([told, [name for name in ("ultralytics", "torch", "numpy", "cv2") if name in sys.modules]]))
"""


def test_what_needs_no_host_does_not_load_it(tmp_path):
    """Help, version, settings, and a wrong key: the answer must not take the seconds that the host's import does."""
    commands = [
        *([], ["version"], ["cfg"]),
        *(["train", "sos=true", "sos_rnk=8"], ["train", "imgs=64"], ["val", "--dta=x"], ["train", "sos_guards=1"]),
    ]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps(commands)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    told, loaded = json.loads(done.stdout)
    assert loaded == []
    assert [code for code, _ in told.values()] == [0, 0, 0, 2, 2, 2, 2]
    for command, key, nearest in [
        ("train sos=true sos_rnk=8", "sos_rnk", "sos_rank"),
        ("train imgs=64", "imgs", "imgsz"),
        ("val --dta=x", "dta", "data"),
        ("train sos_guards=1", "sos_guards", "sos_guard"),
    ]:
        assert told[command][1].strip() == f"yolo-sos: '{key}' is not a valid argument. Did you mean '{nearest}'?"


def test_as_a_module_without_arguments(tmp_path):
    done = subprocess.run([sys.executable, "-m", "yolo_sos.cli"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == cli.HELP.strip()


# What it refuses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["train", "sos=maybe"], "'sos=maybe' is invalid: sos must be true or false"),
        (["train", "sos=true", "sos_rank=1.5"], "'sos_rank=1.5' is invalid: sos_rank must be an integer"),
        (["train", "sos=true", "sos_method=pca"], "sos_method must be one of principal"),
        (["train", "sos=true", "sos_layers=boxes"], "sos_layers must be 'all' or a list of box, cls"),
        (["train", "sos_rank=0.25"], "sos_rank=0.25 without sos=true would train without SOS. Add sos=true."),
        (["train", "sos_rank=8", "sos_start=0"], "sos_rank=8, sos_start=0 without sos=true"),
        (["val", "sos=true"], "sos=True: settings of SOS belong to 'yolo-sos train'"),
        (["predict", "sos_rank=8"], "sos_rank=8: settings of SOS belong to 'yolo-sos train'"),
        (["sos=true"], "settings of SOS belong to 'yolo-sos train'"),
        (["train", "nonsense"], "'nonsense' is not a task, a mode or a switch"),
        (["train", "epochs"], "'epochs' is not a task, a mode or a switch"),  # a number, not a switch
        (["train", "resume", "sos"], "resume needs the checkpoint"),
        (["train", "cfg=none-of-that-name.yaml"], "none-of-that-name.yaml"),
        (["train", "model=none-of-that-name.yaml", "sos=true"], "none-of-that-name.yaml"),
        (["train", "sos_rnk", "=", "8"], "Did you mean 'sos_rank'"),
        (["train", "imgs", "=64"], "Did you mean 'imgsz'"),
    ],
)
def test_wrong_commands(refused, tmp_path, monkeypatch, args, told):
    monkeypatch.chdir(tmp_path)
    assert told in refused(*args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["rtdetr-l.yaml", "yolov8-rtdetr.yaml", "yoloe-11s.yaml", "yolo26n-sem.yaml"])
def test_models_that_sos_cannot_shift(refused, model):
    told = refused("train", f"model={model}", "sos=true", "data=digits.yaml")
    assert "no final linear layers that SOS can shift" in told


def test_kinds_that_the_model_does_not_have(refused, tiny):
    told = refused("train", f"model={tiny}", "data=digits.yaml", "sos=true", "sos_layers=mask")
    assert "sos_layers=mask chooses no layer of this model. It has: box, cls." in told


def test_a_wrong_key_in_a_file_is_named_too(refused, tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 3\nsos: true\nsos_ranks: 8\n")
    assert "'sos_ranks' is not a valid argument. Did you mean 'sos_rank'" in refused(
        "train", f"cfg={tmp_path}/mine.yaml"
    )


# What it hands to whom ----------------------------------------------------------------------------------------------


def test_training_goes_to_the_trainer_of_ours(trained, tiny):
    from yolo_sos.train import SOSDetectionTrainer

    command = ["data=coco8.yaml", "epochs=3", "sos=true", "sos_rank=0.25", "sos_layers=box,cls", "sos_guard=none"]
    trainer, arguments = trained("train", f"model={tiny}", *command, "cos_lr")
    assert trainer is SOSDetectionTrainer
    settings = {"sos": True, "sos_rank": 0.25, "sos_layers": "box,cls", "sos_guard": None}
    assert arguments == {"model": str(tiny), "data": "coco8.yaml", "epochs": 3, "cos_lr": True, **settings}
    assert SOSConfig.from_dict(settings).sos_layers == ["box", "cls"]


def test_so_does_training_without_sos_which_is_stock_there(trained, tiny):
    from yolo_sos.train import SOSDetectionTrainer

    assert trained("detect", "train", f"model={tiny}", "data=x.yaml") == (
        SOSDetectionTrainer,
        {"model": str(tiny), "data": "x.yaml"},
    )


@pytest.mark.parametrize(
    "words", [["train", "sos"], ["sos", "train"], ["train", "sos=True"], ["mode=train", "--sos=true"]]
)
def test_sos_is_a_switch_like_others(trained, tiny, words):
    assert trained(*words, f"model={tiny}", "data=x.yaml")[1]["sos"] is True


@pytest.mark.parametrize(
    "args",
    [
        ["imgsz=64", "batch=8"],
        ["imgsz", "=", "64", "batch", "=", "8"],
        ["imgsz=", "64", "batch", "=8"],
        ["--imgsz=64,", "--batch=8"],
    ],
)
def test_arguments_are_written_as_in_the_host(args):
    assert cli.parse(["train", *args]) == (["train"], {"imgsz": 64, "batch": 8})


def test_values_are_read_as_in_the_host():
    given = ["classes=[0,1]", "sos_guard=none", "sos_guard=None", "sos=TRUE", "lr0=1e-3", "sos_rank=1", "name=a=b"]
    assert cli.parse(given)[1] == {
        **{"classes": [0, 1], "sos_guard": None, "sos": True, "lr0": 0.001, "sos_rank": 1, "name": "a=b"},
    }
    assert type(cli.parse(["sos_rank=1.0"])[1]["sos_rank"]) is float  # all dimensions, not one


@pytest.mark.parametrize("value", ["box,cls", "[box,cls]", "['box','cls']", "[box, cls]", '("box", "cls")'])
def test_lists_are_written_as_in_the_host_or_shorter(value):
    settings = cli.parse(["train", f"sos_layers={value}"])[1]
    assert SOSConfig.from_dict(settings).sos_layers == ["box", "cls"]


def test_a_file_brings_settings_of_both_kinds_and_the_command_line_wins(trained, tiny, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"mode: train\nmodel: {tiny}\ndata: x.yaml\nepochs: 3\ncfg:\nsos: true\nsos_rank: 8\nsos_start: 0.8\n"
    )
    for args in (["epochs=5", "sos_rank=4", f"cfg={file}"], [f"cfg={file}", "epochs=5", "sos_rank=4"]):
        arguments = trained("train", *args)[1]
        assert arguments == {
            **{"model": str(tiny), "data": "x.yaml", "epochs": 5, "sos": True, "sos_rank": 4, "sos_start": 0.8}
        }


def test_a_file_can_build_on_another(trained, tiny, tmp_path):
    (tmp_path / "base.yaml").write_text(f"model: {tiny}\ndata: x.yaml\nepochs: 3\nsos: true\nsos_rank: 8\n")
    (tmp_path / "mine.yaml").write_text("cfg: base.yaml\nsos_rank: 4\n")
    arguments = trained("train", f"cfg={tmp_path}/mine.yaml", "epochs=9")[1]
    assert arguments == {"model": str(tiny), "data": "x.yaml", "epochs": 9, "sos": True, "sos_rank": 4}


def test_a_run_is_resumed_from_its_checkpoint(trained, tiny, tmp_path):
    from ultralytics import YOLO

    from yolo_sos.train import SOSDetectionTrainer

    last = str(tmp_path / "last.pt")
    YOLO(tiny).save(last)
    assert trained("train", f"resume={last}") == (SOSDetectionTrainer, {"resume": last, "model": last})
    assert trained("train", "resume", f"model={last}") == (SOSDetectionTrainer, {"resume": True, "model": last})


def test_packaged_data_is_found_in_every_mode(trained, handed, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = str(CFG_DIR / "datasets/digits.yaml")
    assert trained("train", f"model={tiny}", "data=digits.yaml", "sos")[1]["data"] == packaged
    assert handed("val", f"model={tiny}", "data=digits.yaml")[1]["data"] == packaged
    assert handed("val", f"model={tiny}", "data=coco8.yaml")[1]["data"] == "coco8.yaml"


def test_other_modes_and_models_go_to_the_host(handed, tiny):
    assert handed("export", "model=a.pt", "format=onnx") == (["export"], {"model": "a.pt", "format": "onnx"})
    assert handed("train", "model=rtdetr-l.yaml", "data=x.yaml") == (
        ["train"],
        {"model": "rtdetr-l.yaml", "data": "x.yaml"},
    )
    assert handed("train", "model=yolo26n-sem.yaml", "epochs=2")[1] == {"model": "yolo26n-sem.yaml", "epochs": 2}
    assert handed("copy-cfg") == (["copy-cfg"], {})


def test_the_host_reads_the_command_that_it_is_handed(monkeypatch):
    from ultralytics import cfg

    seen = []
    monkeypatch.setattr(cfg, "entrypoint", lambda: seen.append(list(cfg.ARGV)))
    before = list(sys.argv)
    try:
        cli.run_host(["val"], {"model": "a b.pt", "classes": [0, 1], "conf": None, "half": True})
    finally:
        sys.argv[:] = before
    (argv,) = seen
    assert argv[1:] == ["val", "model=a b.pt", "classes=[0, 1]", "conf=None", "half=True"]
    assert cli.parse(argv[1:]) == (["val"], {"model": "a b.pt", "classes": [0, 1], "conf": None, "half": True})


def test_without_data_the_hosts_default_is_taken_and_said(trained, tiny, caplog):
    assert trained("train", f"model={tiny}", "sos")[1]["data"] == "coco8.yaml"
    assert "'data' argument is missing. Using default 'data=coco8.yaml'" in caplog.text


# From end to end ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def end_to_end(digits, tiny, host_home, tmp_path_factory):
    """A training by a file of both kinds of settings, with TensorBoard on; its folder, and what it printed."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("command")
    (folder / "mine.yaml").write_text(
        f"model: {tiny}\ndata: {digits}\nimgsz: 64\nbatch: 8\nworkers: 0\ndevice: cpu\nplots: false\nepochs: 9\n"
        f"project: {folder}\nname: run\nsos: true\nsos_start: 1.0\nsos_images: 8\nsos_guard: none\nsos_rank: 0.25\n"
    )
    env = {**os.environ, "YOLO_CONFIG_DIR": str(host_home(folder / "home", tensorboard=True))}
    env.pop("PYTEST_CURRENT_TEST", None)  # the host logs nothing to TensorBoard in tests
    command = [sys.executable, "-m", "yolo_sos.cli", "train", "cfg=mine.yaml", "epochs=2", "sos_rank=12"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", done.stdout + done.stderr


def test_a_training_from_end_to_end(end_to_end):
    folder, told = end_to_end
    settings = yaml.safe_load((folder / "sos.yaml").read_text())
    assert settings == {
        **SOSConfig.from_dict({}).to_dict(),
        **{"sos": True, "sos_start": 1.0, "sos_images": 8, "sos_guard": None, "sos_rank": 12},
    }
    assert yaml.safe_load((folder / "args.yaml").read_text())["epochs"] == 2
    assert (folder / "weights/best.pt").is_file() and (folder / "sos.csv").is_file()
    assert told.count("norm² ×") == 1


def test_tensorboard_sees_every_column_in_every_epoch(end_to_end):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from yolo_sos.train.record import COLUMNS

    events = EventAccumulator(str(end_to_end[0]))
    events.Reload()
    for name in COLUMNS:
        values = {event.step: event.value for event in events.Scalars(f"sos/{name}")}
        assert math.isnan(values[1])
        assert math.isnan(values[2]) == name.startswith("heldout")  # no guard
    assert events.Scalars("sos/rank")[1].value == pytest.approx(12)
    assert Path(end_to_end[0] / "results.csv").read_text().splitlines()[0].count("sos/") == len(COLUMNS)
