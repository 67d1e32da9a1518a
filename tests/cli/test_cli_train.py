# yolo-sos, AGPL-3.0
"""``yolo-sos train`` and the modes that are passed on: what is refused before any work, and what is handed to whom."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys

import pytest
import yaml

from yolo_sos import cli
from yolo_sos.builtin import CFG_DIR
from yolo_sos.cli import stock
from yolo_sos.config import SOSConfig


@pytest.fixture
def refused(capsys, monkeypatch):
    """``refused(*args)`` returns the line with which ``yolo-sos args`` exits with status 2; nothing may have run."""
    monkeypatch.setattr(stock, "hand_over", lambda *_: pytest.fail("Ultralytics was run"))

    def refused(*args):
        with pytest.raises(SystemExit) as e:
            cli.main(args)
        assert e.value.code == 2
        out, err = capsys.readouterr()
        (line,) = (line for line in err.splitlines() if line.startswith("yolo-sos: "))
        assert "Traceback" not in out + err
        return line

    return refused


@pytest.fixture
def trained(monkeypatch):
    """``trained(*args)`` returns trainer and arguments of the training that ``yolo-sos args`` runs; none runs."""
    from ultralytics import YOLO

    calls = []
    monkeypatch.setattr(YOLO, "train", lambda self, trainer=None, **kwargs: calls.append((trainer, kwargs)))

    def trained(*args):
        cli.main(args)
        return calls.pop()

    return trained


@pytest.fixture
def handed(monkeypatch):
    """``handed(*args)`` returns the arguments of the command that ``yolo-sos args`` hands to 'yolo'."""
    calls = []
    monkeypatch.setattr(stock, "hand_over", lambda args: calls.append(list(args)))

    def handed(*args):
        cli.main(args)
        return calls.pop()

    return handed


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["train", "sos=maybe"], "'sos=maybe' is invalid: sos must be true or false"),
        (["train", "sos=true", "sos_rank=1.5"], "'sos_rank=1.5' is invalid: sos_rank must be an integer"),
        (["train", "sos=true", "sos_method=pca"], "sos_method must be one of loss"),
        (["train", "sos=true", "sos_layers=boxes"], "sos_layers must be 'all' or a list of box, cls"),
        (["train", "sos_rank=0.25"], "sos_rank=0.25 without sos=true would train without SOS. Add sos=true."),
        (["train", "sos_rank=8", "sos_start=0"], "sos_rank=8, sos_start=0 without sos=true"),
        (["train", "rho=0.1"], "'rho=0.1' needs sharpness_aware"),
        (["train", "sos=true", "epochs=many"], "'epochs=many' is of invalid type str"),
        (["train", "sos=true", "lr0=7"], "'lr0=7' is an invalid value"),
        (["train", "sos=true", "task=fly"], "'task=fly' is invalid: task must be one of detect"),
        (["train", "resume", "sos"], "resume needs the checkpoint"),
        (["train", "cfg=none-of-that-name.yaml"], "none-of-that-name.yaml"),
        (["val", "sos=true"], "sos=True: settings of SOS belong to 'yolo-sos train'"),
        (["predict", "sos_rank=8"], "sos_rank=8: settings of SOS belong to 'yolo-sos train'"),
    ],
)
def test_wrong_commands_are_refused_before_a_model_is_loaded(refused, tmp_path, monkeypatch, args, told):
    from ultralytics import YOLO

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(YOLO, "__init__", lambda *_, **__: pytest.fail("a model was loaded"))
    assert told in refused(*args)
    assert not list(tmp_path.iterdir())


def test_a_model_that_there_is_not(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "none-of-that-name.yaml" in refused("train", "model=none-of-that-name.yaml", "sos=true")


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("rtdetr-l.yaml", "is not a YOLO model"),
        ("yoloe-11s.yaml", "no final linear layers that SOS can shift"),
        ("yolo26n-sem.yaml", "no final linear layers that SOS can shift"),
    ],
)
def test_models_that_sos_cannot_shift(refused, model, told):
    assert told in refused("train", f"model={model}", "sos=true", "data=digits.yaml")


def test_other_settings_for_a_model_of_another_kind(refused):
    told = refused("train", "model=yolo26n-sem.yaml", "swa=0.5", "data=digits.yaml")
    assert "swa=0.5 does not support task=semantic yet. It does: detect, segment" in told


def test_kinds_that_the_model_does_not_have(refused, tiny):
    told = refused("train", f"model={tiny}", "data=digits.yaml", "sos=true", "sos_layers=mask")
    assert "sos_layers=mask chooses no layer of this model. It has: box, cls." in told


def test_a_wrong_key_in_a_file_is_named_too(refused, tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 3\nsos: true\nsos_ranks: 8\n")
    assert "mine.yaml: 'sos_ranks' is not a valid argument. Did you mean 'sos_rank'" in refused(
        "train", f"cfg={tmp_path}/mine.yaml"
    )


def test_the_trainer_refuses_what_the_command_refuses(refused, tiny):
    from yolo_sos import SOSDetectionTrainer

    told = refused("train", f"model={tiny}", "data=digits.yaml", "sos_rank=0.3")
    with pytest.raises(ValueError) as e:
        SOSDetectionTrainer(overrides={"model": str(tiny), "data": "digits.yaml", "sos_rank": 0.3})
    assert (
        told
        == f"yolo-sos: {e.value}"
        == "yolo-sos: sos_rank=0.3 without sos=true would train without SOS. Add sos=true."
    )


# What is handed to whom ----------------------------------------------------------------------------------------------


def test_training_goes_to_our_trainer(trained, tiny):
    from yolo_sos.trainers import SOSDetectionTrainer

    command = ["data=coco8.yaml", "epochs=3", "sos=true", "sos_rank=0.25", "sos_layers=box,cls", "sos_guard=none"]
    trainer, arguments = trained("train", f"model={tiny}", *command, "cos_lr")
    assert trainer is SOSDetectionTrainer
    settings = {"sos": True, "sos_rank": 0.25, "sos_layers": "box,cls", "sos_guard": None}
    own = {"mode": "train", "model": str(tiny), "data": "coco8.yaml", "epochs": 3, "cos_lr": True}
    assert arguments == own | settings


def test_so_does_training_without_sos_which_is_stock_there(trained, tiny):
    from yolo_sos.trainers import SOSDetectionTrainer

    trainer, arguments = trained("detect", "train", f"model={tiny}", "data=x.yaml")
    assert trainer is SOSDetectionTrainer
    assert arguments == {"mode": "train", "model": str(tiny), "data": "x.yaml"}
    assert trained("train", "model=yolo26n-sem.yaml", "epochs=2")[0] is None  # Ultralytics' own: SOS has none for it


def test_a_model_is_built_once(trained, tiny, monkeypatch):
    from ultralytics import YOLO

    built, init = [], YOLO.__init__
    monkeypatch.setattr(YOLO, "__init__", lambda self, *a, **k: (built.append(a), init(self, *a, **k))[1])
    trained("train", f"model={tiny}", "data=x.yaml", "sos")
    trained("train", "model=yolo26n-sem.yaml", "data=x.yaml")
    assert len(built) == 2


def test_a_file_brings_settings_of_both_kinds_and_the_command_goes_first(trained, handed, tiny, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"mode: train\nmodel: {tiny}\ndata: x.yaml\nepochs: 3\ncfg:\nsos: true\nsos_rank: 8\nsos_start: 0.8\n"
    )
    for words in (["train"], []):  # the file says it, too
        arguments = trained(*words, "epochs=5", "sos_rank=4", f"cfg={file}")[1]
        own = {"mode": "train", "model": str(tiny), "data": "x.yaml", "epochs": 5}
        assert arguments == own | {"sos": True, "sos_rank": 4, "sos_start": 0.8}
    file.write_text("mode: val\nmodel: a.pt\n")
    assert handed(f"cfg={file}") == ["mode=val", "model=a.pt"]


def test_a_run_is_resumed_from_its_checkpoint(trained, tiny, tmp_path):
    from ultralytics import YOLO

    from yolo_sos.trainers import SOSDetectionTrainer

    last = str(tmp_path / "last.pt")
    YOLO(tiny).save(last)
    own = {"mode": "train", "model": last}
    assert trained("train", f"resume={last}") == (SOSDetectionTrainer, {**own, "resume": last})
    assert trained("train", "resume", f"model={last}") == (SOSDetectionTrainer, {**own, "resume": True})
    # The run's own settings go first: the trainer says so.
    assert trained("train", f"resume={last}", "sos_rank=8")[1]["sos_rank"] == 8


def test_our_data_sets_and_models_are_found_in_every_mode(trained, handed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, model = str(CFG_DIR / "datasets/digits.yaml"), str(CFG_DIR / "models/resnet18-cifar.yaml")
    arguments = trained("train", "model=resnet18-cifar.yaml", "data=digits.yaml", "imgsz=32")[1]
    assert (arguments["model"], arguments["data"]) == (model, "digits.yaml")  # the trainer finds its data by name
    assert handed("val", "model=resnet18-cifar", "data=digits.yaml") == ["model=" + model, f"data={data}", "mode=val"]
    assert handed("val", "model=a.pt", "data=coco8.yaml") == ["model=a.pt", "data=coco8.yaml", "mode=val"]


@pytest.mark.parametrize(
    "args",
    [["settings", "runs_dir=a"], ["settings"], ["solutions", "count", "show_in=True"], ["login", "key"], ["copy-cfg"]],
)
def test_commands_of_ultralytics_are_passed_on_as_they_are(handed, args):
    assert handed(*args) == args


def test_other_modes_and_models_go_to_ultralytics(handed):
    assert handed("export", "model=a.pt", "format=onnx", "half") == [
        "model=a.pt",
        "format=onnx",
        "mode=export",
        "half=True",
    ]
    assert handed("train", "model=rtdetr-l.yaml", "data=x.yaml") == ["mode=train", "model=rtdetr-l.yaml", "data=x.yaml"]


def test_ultralytics_reads_the_command_that_it_is_handed(monkeypatch):
    from ultralytics import cfg

    seen = []
    monkeypatch.setattr(cfg, "entrypoint", lambda: seen.append(list(cfg.ARGV)))
    before = list(sys.argv)
    try:
        cli.main(["val", "model=a b.pt", "classes=[0, 1]", "conf=none", "half=true"])
    finally:
        sys.argv[:] = before
    assert seen == [["yolo", "model=a b.pt", "classes=[0, 1]", "conf=None", "half=True", "mode=val"]]


def test_without_data_the_default_of_ultralytics_is_taken_and_said(trained, tiny, caplog):
    assert trained("train", f"model={tiny}", "sos")[1]["data"] == "coco8.yaml"
    assert "'data' argument is missing. Using default 'data=coco8.yaml'" in caplog.text


# From end to end -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def end_to_end(digits, tiny, ultralytics_home, tmp_path_factory):
    """A training by a file of both kinds of settings, with TensorBoard on; its folder."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("command")
    (folder / "mine.yaml").write_text(
        f"model: {tiny}\ndata: {digits}\nimgsz: 64\nbatch: 8\nworkers: 0\ndevice: cpu\nplots: false\nepochs: 9\n"
        f"project: {folder}\nname: run\nsos: true\nsos_start: 1.0\nsos_images: 8\nsos_guard: none\nsos_rank: 0.25\n"
    )
    env = {**os.environ, "YOLO_CONFIG_DIR": str(ultralytics_home(folder / "home", tensorboard=True))}
    env.pop("PYTEST_CURRENT_TEST", None)  # Ultralytics logs nothing to TensorBoard in tests
    command = [sys.executable, "-m", "yolo_sos.cli", "train", "cfg=mine.yaml", "epochs=2", "sos_rank=12"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_a_training_from_end_to_end(end_to_end):
    folder = end_to_end
    given = {"sos": True, "sos_start": 1.0, "sos_images": 8, "sos_guard": None, "sos_rank": 12}
    assert yaml.safe_load((folder / "sos.yaml").read_text()) == {**SOSConfig().to_dict(), **given}
    assert yaml.safe_load((folder / "args.yaml").read_text())["epochs"] == 2
    assert (folder / "weights/best.pt").is_file() and (folder / "sos.csv").is_file()
    with open(folder / "sos.csv", newline="") as f:
        assert {(row["epoch"], row["model"]) for row in csv.DictReader(f)} == {("2", "ema"), ("2", "model")}


def test_tensorboard_sees_every_column_in_every_epoch(end_to_end):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open(end_to_end / "results.csv", newline="") as f:
        columns = [name for name in next(csv.reader(f)) if name.startswith("sos/")]
    assert "sos/squared_norm_ratio" in columns and len(columns) == 7
    events = EventAccumulator(str(end_to_end))
    events.Reload()
    for name in columns:
        values = {event.step: event.value for event in events.Scalars(name)}
        assert math.isnan(values[1])
        assert math.isfinite(values[2])
    with open(end_to_end / "sos.csv", newline="") as f:
        ranks = [float(row["rank"]) for row in csv.DictReader(f) if row["model"] == "ema"]
    assert events.Scalars("sos/rank")[1].value == pytest.approx(sum(ranks) / len(ranks), rel=1e-5)
