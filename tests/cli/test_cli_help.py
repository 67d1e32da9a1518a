# yolo-sos, AGPL-3.0
"""What the command prints, and that it prints it fast."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import yaml

import yolo_sos
from yolo_sos import cli
from yolo_sos.builtin import CFG_DIR
from yolo_sos.config import KEYS, SOSConfig


def printed(capsys, *args):
    cli.main(args)
    return capsys.readouterr().out


@pytest.mark.parametrize("args", [[], ["help"], ["--help"], ["-h"]])
def test_the_help_is_a_screen(args, capsys):
    lines = printed(capsys, *args).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    for mode in cli.MODES:
        assert any(mode in line for line in lines), mode
    examples = [
        line.split() for line in lines if line.startswith("    yolo-sos ") and "=" in line and "..." not in line
    ]
    assert len(examples) == 3
    for _, *command in examples:
        cli.read(command, cli.MODES)  # raises if it is wrong


@pytest.mark.parametrize("mode", cli.MODES)
@pytest.mark.parametrize("form", ["{} --help", "{} -h", "help {}", "{} model=a.pt --help"])
def test_each_mode_explains_its_arguments(mode, form, capsys):
    out = printed(capsys, *form.format(mode).split())
    assert out.startswith(f"yolo-sos {mode}: ")
    words = {word.split("=")[0] for word in out.split()}
    for section, arguments in cli.MODES[mode].arguments().items():
        assert section in out
        for a in arguments:
            assert a.help and a.type and {a.name, a.name.upper()} & words, a.name
    for example in cli.MODES[mode].examples:
        assert f"    yolo-sos {example}\n" in out
        assert cli.read(example.split(), cli.MODES)[0] is cli.MODES[mode]


def test_the_help_of_train_has_our_settings_first(capsys):
    out = printed(capsys, "train", "--help")
    found = [
        line[2:].split("=")[0] for line in out.splitlines() if line[:2] == "  " and line[2:3].strip() and "=" in line
    ]
    assert found[: len(KEYS)] == list(KEYS) and found[len(KEYS)] == "task" and "lr0" in found


@pytest.mark.parametrize("args", [["version"], ["--version"], ["-v"]])
def test_version(args, capsys):
    assert printed(capsys, *args) == f"yolo-sos {yolo_sos.__version__} (ultralytics {version('ultralytics')})\n"


def test_cfg_prints_the_settings_with_their_comments(capsys):
    out = printed(capsys, "cfg")
    assert out == (CFG_DIR / "sos.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(out) == SOSConfig().to_dict() and out.count(" # (") == len(KEYS)


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


def test_help_and_wrong_keys_load_neither_torch_nor_ultralytics(tmp_path):
    fine = [[], ["version"], ["cfg"], *([mode, "--help"] for mode in cli.MODES)]
    wrong = {
        "train sos=true sos_rnk=8": ("sos_rnk", "sos_rank"),
        "train imgs=64": ("imgs", "imgsz"),
        "val --dta=x": ("dta", "data"),
        "shift sos_guards=1": ("sos_guards", "sos_guard"),
        "experiment voc seds=1": ("seds", "seeds"),
    }
    commands = [*fine, *(command.split() for command in wrong), ["foo"]]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps(commands)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    told, loaded = json.loads(done.stdout)
    assert loaded == []
    assert [code for code, _ in told.values()] == [0] * len(fine) + [2] * (len(wrong) + 1)
    for command, (key, nearest) in wrong.items():
        assert told[command][1] == f"yolo-sos: '{key}' is not a valid argument. Did you mean '{nearest}'?\n"


def test_a_reader_that_stops_early(tmp_path):
    """As in ``yolo-sos train --help | head``: no traceback."""
    command = [sys.executable, "-m", "yolo_sos.cli", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


def test_as_a_module_without_arguments(tmp_path):
    done = subprocess.run([sys.executable, "-m", "yolo_sos.cli"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == cli.HELP.strip()
