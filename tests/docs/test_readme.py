# yolo-sos, AGPL-3.0
"""README's commands, copied from it and run in their order: each does, prints and leaves what README says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from ultralytics.utils.patches import torch_load

from yolo_sos import cli
from yolo_sos.data.digits import build
from yolo_sos.data.voc import read_annotation, read_image_set, write_annotation

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = ("Platelets", "RBC", "WBC")  # the classes of README's samples

# What a command gets beside what README has. The training learns its images by heart: the scores of a fitted model that
# hardly trains need no calibration.
PLAIN = " ".join(f"{k}=0" for k in ("mosaic", "translate", "scale", "fliplr", "hsv_s", "hsv_v", "warmup_epochs"))
SMALL = {
    "fit": "imgsz=64 device=cpu",
    "train": f"imgsz=64 epochs=30 batch=8 optimizer=AdamW lr0=0.005 {PLAIN} device=cpu workers=0 plots=false",
    "calibrate": "device=cpu",
    "shift": "device=cpu",
    "eval": "device=cpu",
    "python": "imgsz=64, epochs=2, batch=8, device='cpu', workers=0, plots=False",
}
NOT_RUN = {
    "make demo": "installs 7 GB; tests/tools/test_demo.py runs the demo",
    "make test": "installs 7 GB, and runs this test",
    "make docs": "installs MkDocs; test_docs.py builds the site",
    "pip install -e .": "tests/test_wheel.py installs the package",
    "yolo-sos train data=VOC.yaml model=yolov5s.pt sos=true": "downloads 2.8 GB; the Python snippet is the same",
    "yolo-sos MODE --help": "tests/cli/test_cli_help.py asks every mode",
}
PROGRAM = re.compile(r"(?:yolo-sos|yolo|make|pip|python) ")


@dataclass
class Command:
    """A command of README: its line, the comment behind it, and the lines of output that are shown below it."""

    line: str
    comment: str = ""
    shows: list[str] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line)


def commands() -> list[Command]:
    """Return the commands in their order, from indented blocks and from between backticks.

    Between backticks, `yolo-sos fit` alone is the name of a mode.
    """
    modes = {f"yolo-sos {mode.name}" for mode in cli.OURS}
    found: list[Command] = []
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for line, span in re.findall(r"^ {4}(.+)$|`([^`]+)`", text, re.MULTILINE):
        command, _, comment = (" ".join(span.split()) or line).partition(" #")
        if PROGRAM.match(command) and command not in modes:
            found.append(Command(command.strip(), comment))
        elif line:
            found[-1].shows.append(line)
    return found


def shape(text: str) -> str:
    """Return a text without its numbers, its spaces and the star of a table: what two runs have in common."""
    return " ".join(re.sub(r"[-+]?\d*\.?\d+", "#", text).replace("*", "").split())


COMMANDS = commands()
RUN = [command for command in COMMANDS if command.line not in NOT_RUN]


def cells(folder: Path) -> None:
    """Make a Pascal VOC tree of digits that are called cells: three classes that no model knows by name."""
    build(folder / "digits", train=120, val=40, test=1, imgsz=64, digits=(1, 3), seed=1)
    tree = (folder / "digits/voc").rename(folder / "cells")
    for path in (tree / "Annotations").iterdir():
        digits = read_annotation(path)
        cells = tuple(replace(digit, name=NAMES[int(digit.name) % 3]) for digit in digits.objects)
        write_annotation(path, replace(digits, objects=cells))
    ids = [i for split in ("train", "val") for i in read_image_set(tree, split)]
    (tree / "ImageSets/Main/trainval.txt").write_text("\n".join(ids))


@pytest.fixture(scope="module")
def run(able, tmp_path_factory, ultralytics_home):
    """``run(*args)`` runs Python in a folder with a tree, a checkpoint and a data set, and returns what it prints."""
    folder = tmp_path_factory.mktemp("readme")
    cells(folder)
    for name in "yolov8n.pt", "yolov5su.pt":  # what Ultralytics makes of yolov5s.pt
        shutil.copy(able["best"], folder / name)
    shutil.copy(able["data"], folder / "VOC.yaml")
    home = ultralytics_home(tmp_path_factory.mktemp("home"), runs_dir="runs")  # relative, as Ultralytics' default is
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}  # with it, runs go elsewhere
    env = {**inherited, "PYTHONPATH": str(ROOT), "YOLO_CONFIG_DIR": str(home)}

    def run(*args: str) -> str:
        done = subprocess.run([sys.executable, *args], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{args}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def printed(run) -> dict[str, str]:
    """What the commands have printed, by their lines."""
    return {
        command.line: run("-m", "yolo_sos.cli", *command.words[1:], *SMALL.get(command.words[1], "").split())
        for command in RUN
    }


def test_every_command_is_run_or_listed():
    """What README gains has to be put in its place here."""
    assert not {*NOT_RUN} - {command.line for command in COMMANDS}, "no longer in README"
    assert [" ".join(command.words[:2]) for command in RUN] == [
        *("yolo-sos convert", "yolo-sos fit", "yolo-sos train", "yolo-sos calibrate", "yolo-sos shift"),
        *("yolo-sos eval", "yolo-sos cfg"),
    ]


@pytest.mark.slow
def test_commands_print_what_readme_shows(printed):
    assert sum(len(command.shows) for command in RUN) > 10
    for command in RUN:
        for line in command.shows:
            assert shape(line) in shape(printed[command.line]), f"{command.line}\n{line}\n{printed[command.line]}"


@pytest.mark.slow
def test_commands_leave_the_files_that_readme_names(run, printed):
    """Beside the model: `# yolov8n-fit.pt, .json` are two, of one stem."""
    named = 0
    for command in RUN:
        stem = ""
        for file in re.findall(r"[\w-]*\.(?:pt|json|png|csv)\b", command.comment):
            stem = Path(file).stem if not file.startswith(".") else stem
            name = file if not file.startswith(".") else stem + file
            model = next(word.removeprefix("model=") for word in command.words if word.startswith("model="))
            assert (run.folder / model).with_name(name).is_file(), f"{command.line}: {name}"
            named += 1
    assert named == 8


@pytest.mark.slow
def test_the_python_trains_and_shifts(run):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    before = set(run.folder.rglob("sos.csv"))
    run("-c", snippet.replace("sos=True", f"sos=True, {SMALL['python']}"))
    (shifts,) = set(run.folder.rglob("sos.csv")) - before
    ckpt = torch_load(shifts.with_name("weights") / "best.pt", map_location="cpu")
    assert ckpt["sos"]["settings"]["sos"] is True and shifts.read_text().count("\n") > 1
