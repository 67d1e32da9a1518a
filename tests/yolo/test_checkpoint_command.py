# yolo-sos, AGPL-3.0
"""``yolo-sos shift``: arguments, exit codes, and what is printed."""

from __future__ import annotations

import json

import pytest

from yolo_sos import cli
from yolo_sos.cli import shift
from yolo_sos.config import SHIFT_SETTINGS
from yolo_sos.yolo.job import ShiftJob


def run(*args):
    """Run the command in this process; return its exit code."""
    try:
        cli.main([str(a) for a in args])
    except SystemExit as e:
        return e.code
    return 0


def test_a_shift(weights, seen, capfd):
    path = weights()
    assert run("shift", f"model={path}", f"data={seen}", "rank=0.75", "guard=none", "images=all", "val=false") == 0
    assert {p.name for p in path.parent.iterdir()} == {"best.pt", "best-sos.pt", "best-sos.json"}
    report = json.loads(path.with_name("best-sos.json").read_text())
    assert (report["settings"]["rank"], report["settings"]["guard"]) == (0.75, None)
    assert "fit images: 100%" in capfd.readouterr().out


def test_a_sweep(weights, seen):
    path = weights()
    assert run("detect", "shift", "sweep", f"model={path}", f"data={seen}", "draws=1", "val=False") == 0
    assert {p.name for p in path.parent.iterdir()} == {"best.pt", "best-sweep.csv", "best-sweep.png"}


def test_the_guard_exits_with_3(weights, seen, contents):
    path = weights()
    before = contents(path.parent)
    assert run("shift", f"model={path}", f"data={seen}", "rank=1", "sos_guard=0.0") == 3
    assert contents(path.parent) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "shift needs a checkpoint: model=path/to/best.pt"),
        (["model=none.pt"], "none.pt: there is no such checkpoint."),
        (["model=best.onnx"], "best.onnx is not a checkpoint, a .pt that a training wrote"),
        (["model={model}", "methd=rows"], "'methd' is not a valid argument. Did you mean 'method'?"),
        (["model={model}", "epochs=3"], "'epochs' is not a valid argument."),
        (["model={model}", "sos_start=0.5"], "'sos_start' is not a valid argument."),
        (["model={model}", "rank=2.5"], "'sos_rank=2.5' is invalid"),
        (["model={model}", "sweep=3"], "'sweep=3' is invalid: sweep must be true or false."),
        (["model={model}", "sweep=true", "rank=3"], "'rank' has no effect with sweep=true"),
        (["model={model}", "force"], "'force' is not a switch of shift."),
        (["model={model}", "data=none.yaml"], "none.yaml"),
        (["model={model}", "imgsz=[64]"], "'imgsz=[64]' is invalid"),
        (["model={model}", "seed=-1"], "'seed=-1' is invalid: seed must be an integer of at least 0 and below 2^32."),
        (["model={model}", f"seed={2**32}"], "'seed=4294967296' is invalid"),
        (["model={model}", "seed=none"], "'seed=None' is invalid"),
    ],
)
def test_bad_input_exits_with_2(weights, contents, capsys, args, message):
    path = weights()
    before = contents(path.parent)
    assert run("shift", *(a.format(model=path) for a in args)) == 2
    assert message in capsys.readouterr().err
    assert contents(path.parent) == before


def test_an_image_that_breaks_on_the_way_exits_with_2(weights, seen, contents, capsys, monkeypatch):
    path = weights()
    before = contents(path.parent)

    def broken(*_):
        raise FileNotFoundError("Image Not Found 7.jpg")

    monkeypatch.setattr("yolo_sos.yolo.job.ShiftJob.fitted", broken)
    assert run("shift", f"model={path}", f"data={seen}") == 2
    assert "Image Not Found 7.jpg" in capsys.readouterr().err
    assert contents(path.parent) == before


def test_the_keys_are_those_of_the_job():
    options = set(ShiftJob.__init__.__annotations__) - {"return", "settings"}
    assert {argument.name for argument in shift.OWN} == options | set(SHIFT_SETTINGS) | {"sweep", "calibrate"}
    assert set(shift.MODE.also) == {f"sos_{name}" for name in SHIFT_SETTINGS}


def test_the_help_names_everything():
    for key in (*SHIFT_SETTINGS, "draws", "sweep", "imgsz", "batch", "device", "seed", "val", "exist_ok"):
        assert f"  {key}=" in shift.MODE.help()
