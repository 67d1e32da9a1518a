# yolo-sos, AGPL-3.0
"""Faults in the middle of a training: it goes on, or stops with a clear error, and the last checkpoint is whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from ultralytics.utils.patches import torch_load

from yolo_sos.core import SOS
from yolo_sos.yolo.heads import YoloTask
from yolo_sos.yolo.images import ImageSample

fault = pytest.mark.fault


def assert_whole(run, epoch):
    """Assert that last.pt can be read, and is that of an epoch, counted from 1."""
    assert torch_load(run.save_dir / "weights/last.pt", map_location="cpu")["epoch"] == epoch - 1


# Killed -------------------------------------------------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
from pathlib import Path
from ultralytics import YOLO
from yolo_sos.core import engine
from yolo_sos.trainers import SOSDetectionTrainer

where, settings = sys.argv[1], json.loads(sys.argv[2])
calls = []

def kill_at(owner, name, number, condition=lambda *_: True):
    real = getattr(owner, name)
    def stand_in(*args, **kwargs):
        if condition(*args):
            calls.append(name)
        if len(calls) == number and condition(*args):
            if name.startswith("write_") and isinstance(args[0], Path):
                real(args[0], args[1][: len(args[1]) // 2])  # half of it is on the disk
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, stand_in)

if where == "shift":  # six layers of the EMA and six of the model in each epoch: amid those of the second epoch's EMA
    kill_at(engine, "write_weight", 16)
elif where == "checkpoint":  # last and best in each epoch
    kill_at(Path, "write_bytes", 3, lambda path, *_: path.suffix == ".pt")
else:
    kill_at(Path, "write_text", 2, lambda path, *_: path.suffix == ".csv")
YOLO(settings.pop("model")).train(trainer=SOSDetectionTrainer, **settings)
"""


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("shift", marks=fault("kill -9 in the middle of a shift", "last.pt is whole; resume works")),
        pytest.param("checkpoint", marks=fault("kill -9 in the middle of a save", "last.pt is whole; resume works")),
        pytest.param("report", marks=fault("kill -9 while sos.csv is written", "sos.csv is whole; resume works")),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed(defaults, train, where):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, where, json.dumps(defaults)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    (folder,) = Path(defaults["project"]).iterdir()
    last = folder / "weights/last.pt"
    assert torch_load(last, map_location="cpu")["epoch"] == 0
    run = train(model=str(last), resume=True)
    assert run.save_dir == folder
    assert [row["epoch"] for row in run.rows("results.csv")] == ["1", "2"]
    told = [(row["epoch"], row["model"], row["name"]) for row in run.rows("sos.csv")]
    assert len(told) == len(set(told)) == 2 * 2 * 6


# A full disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 9 MB: two checkpoints of 2.7 MB and a third under its temporary names fit, and no more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted; test_a_disk_that_is_full_half_way_leaves_a_whole_checkpoint stands in")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@fault("disk full, a tmpfs", "stops with 'No space left on device'; last.pt is whole; resume works with more space")
def test_a_full_disk(train, small_disk):
    def fill(trainer):
        if trainer.epoch == 0:  # it is saved
            free = shutil.disk_usage(small_disk).free
            (small_disk / "filler").write_bytes(bytes(free - 1_000_000))

    run = train(project=str(small_disk), callbacks={"on_model_save": fill}, error=(OSError, RuntimeError))
    assert_whole(run, epoch=1)
    assert not list(run.save_dir.glob(".*")) and not list((run.save_dir / "weights").glob(".*"))
    (small_disk / "filler").unlink()
    resumed = train(model=str(run.save_dir / "weights/last.pt"), resume=True)
    assert [row["epoch"] for row in resumed.rows("results.csv")] == ["1", "2"]


@fault("disk full while sos.csv is written", "stops with that error; last.pt and sos.csv of the epoch before are whole")
def test_no_space_for_the_log(train, monkeypatch):
    write = Path.write_text

    def full(path, text, **kwargs):
        if path.suffix == ".csv" and "\n2,ema" in text:
            raise OSError(28, "No space left on device", str(path))
        return write(path, text, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    run = train(error=OSError)
    assert "No space left" in str(run.error)
    assert_whole(run, epoch=1)
    assert {row["epoch"] for row in run.rows("sos.csv")} == {"1"}


# Numbers that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("model.5.cv2.0.2.weight", torch.nan, marks=fault("NaN in a final layer", "not shifted; reported")),
        pytest.param("model.5.cv2.0.2.weight", torch.inf, marks=fault("Inf in a final layer", "not shifted; reported")),
        pytest.param("model.0.conv.weight", torch.nan, marks=fault("NaN in all features", "not shifted; reported")),
        pytest.param(
            "model.0.conv.weight", torch.inf, marks=fault("Inf in a backbone's weight", "not shifted; reported")
        ),
    ],
)
def test_weights_that_are_not_finite(train, monkeypatch, name, value):
    shift, seen = SOS.shift, []

    def spoilt(sos, *args, **kwargs):
        model, layers = sos.model, sos.layers
        with torch.no_grad():
            weight = model.get_parameter(name).view(-1)
            kept = weight[0].clone()
            weight[0] = value
            before = [layer.module.weight.clone() for layer in layers]
            report = shift(sos, *args, **kwargs)
            for layer, old in zip(layers, before, strict=True):
                torch.testing.assert_close(layer.module.weight, old, rtol=0, atol=0, equal_nan=True)
            weight[0] = kept
        seen.append(report.status)
        return report

    monkeypatch.setattr(SOS, "shift", spoilt)
    run = train()
    assert len(seen) == 4 and not {"ok", "guarded"} & set(seen)
    assert {row["t"] for row in run.rows("sos.csv")} == {"0.0"}
    assert run.said(seen[0])
    assert_whole_after_the_end(run)


def assert_whole_after_the_end(run):
    assert [row["epoch"] for row in run.rows("results.csv")] == ["1", "2"]
    state = torch_load(run.save_dir / "weights/last.pt", map_location="cpu")["model"].state_dict()
    assert all(v.isfinite().all() for v in state.values())


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(torch.nan, marks=fault("NaN as held-out loss", "the guard lets nothing pass; training goes on")),
        pytest.param(torch.inf, marks=fault("Inf as held-out loss", "the guard lets nothing pass; training goes on")),
    ],
)
def test_a_heldout_loss_that_is_not_finite(train, monkeypatch, value):
    monkeypatch.setattr(YoloTask, "loss", lambda *_: torch.tensor(value))
    run = train()
    rows = run.rows("sos.csv")
    assert {row["t"] for row in rows} == {"0.0"}
    assert all(row["norm_before"] == row["norm_after"] for row in rows)
    assert run.said("guarded")
    assert_whole_after_the_end(run)


# Images -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoil(monkeypatch):
    """``spoil(bad)`` makes images unreadable, for shifts alone, of which ``bad(n)`` is true; n counts them."""

    def spoil(bad, error):
        count = iter(range(10**6))

        class View:
            def __init__(self, view):
                self.view = view

            def __getitem__(self, index):
                if bad(next(count)):
                    raise error
                return self.view[index]

            def __getattr__(self, name):
                return getattr(self.view, name)

            def __len__(self):
                return len(self.view)

        init = ImageSample.__init__
        monkeypatch.setattr(
            ImageSample, "__init__", lambda self, view, *args, **kwargs: init(self, View(view), *args, **kwargs)
        )

    return spoil


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(
            FileNotFoundError("Image Not Found x.jpg"),
            marks=fault("a sampled image is corrupt or gone", "another one, with a warning"),
        ),
        pytest.param(
            ValueError("bad .npy"),
            marks=fault("a sampled image's cache on disk is damaged", "another one, with a warning"),
        ),
        pytest.param(
            cv2.error("cvtColor"), marks=fault("a sampled image cannot be decoded", "another one, with a warning")
        ),
        pytest.param(
            PermissionError(13, "Permission denied"),
            marks=fault("a sampled image may not be read", "another one, with a warning"),
        ),
    ],
)
def test_a_sampled_image_cannot_be_read(train, spoil, error):
    spoil(lambda n: n == 2, error)
    run = train()
    assert run.said(f"another one takes its place if there is one: {error}")
    assert {row["status"] for row in run.rows("sos.csv")} == {"ok"}


@fault("no sampled image can be read", "stops with an error that names the last one; last.pt is whole")
def test_no_sampled_image_can_be_read(train, spoil):
    spoil(lambda n: n >= 12, FileNotFoundError("Image Not Found x.jpg"))  # 8 + 4 are read in the first epoch
    run = train(error=OSError)
    assert "None of the images" in str(run.error) and "x.jpg" in str(run.error)
    assert_whole(run, epoch=1)


# Memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(MemoryError(), marks=fault("Python is out of memory in a shift", "fewer images, with a warning")),
        pytest.param(
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
            marks=fault("a GPU is out of memory in a shift", "fewer images, with a warning"),
        ),
        pytest.param(
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            marks=fault("the CPU is out of memory in a shift", "fewer images, with a warning"),
        ),
    ],
)
def test_out_of_memory(train, monkeypatch, error):
    """With 4 images or fewer there is enough: of each epoch's 8, half; and no model is shifted twice."""
    shift, sizes, shifted = SOS.shift, [], []

    def hungry(sos, batches, *args, **kwargs):
        batches = list(batches)
        sizes.append(sum(len(batch["img"]) for batch in batches))
        if sizes[-1] > 4:
            raise error
        shifted.append(id(sos.model))
        return shift(sos, batches, *args, **kwargs)

    monkeypatch.setattr(SOS, "shift", hungry)
    run = train()
    assert sizes == 2 * [8, 4, 4]
    assert len(shifted) == 4 and len(set(shifted)) == 2
    assert run.said("Out of memory with 8 images for the shift: trying 4.")
    assert {row["status"] for row in run.rows("sos.csv")} == {"ok"}


@fault("out of memory with a single image", "stops with that error, after halving; the weights stay")
def test_out_of_memory_with_one_image(train, monkeypatch):
    def hungry(*_, **__):
        raise MemoryError("of a shift")

    monkeypatch.setattr(SOS, "shift", hungry)
    run = train(error=MemoryError)
    assert str(run.error) == "of a shift"
    tried = [line.split("trying ")[1] for line in run.log if "Out of memory" in line]
    assert tried == ["4.", "2.", "1."]


@fault("a RuntimeError of another kind in a shift", "stops with that error at once")
def test_another_error_is_not_retried(train, monkeypatch):
    calls = []

    def fail(*_, **__):
        calls.append(1)
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(SOS, "shift", fail)
    assert str(train(error=RuntimeError).error) == "shapes do not fit"
    assert len(calls) == 1


# Data with little information ---------------------------------------------------------------------------------------


@pytest.fixture
def edited(digits, tmp_path):
    """``edited(image, labels)`` copies the data set with other pixels and lines of labels; both may be None."""

    def edited(image=None, labels=None):
        data = yaml.safe_load(digits.read_text())
        root = shutil.copytree(digits.parent, tmp_path / "edited", ignore=shutil.ignore_patterns("*.cache"))
        (root / digits.name).write_text(yaml.safe_dump({**data, "path": str(root)}))
        for path in (p for p in (root / "images").rglob("*") if p.is_file()) if image is not None else ():
            cv2.imwrite(str(path), np.full_like(cv2.imread(str(path)), image))
        for path in (root / "labels").rglob("*.txt") if labels is not None else ():
            path.write_text("".join(f"{line}\n" for line in labels(path.read_text().splitlines())))
        return str(root / digits.name)

    return edited


@pytest.mark.parametrize(
    ("image", "labels", "settings"),
    [
        pytest.param(
            0,
            None,
            {},
            marks=fault("all images equal: all rows alike but for borders", "trains and shifts"),
            id="black",
        ),
        pytest.param(
            None,
            lambda lines: [f"0 {line.split(maxsplit=1)[1]}" for line in lines],
            {},
            marks=fault("nine of ten classes without any object", "trains and shifts"),
            id="one class",
        ),
        pytest.param(
            None, lambda lines: [], {}, marks=fault("no object at all", "trains and shifts"), id="backgrounds"
        ),
        pytest.param(
            None,
            None,
            {"sos_method": "rows", "sos_rank": 100_000},
            marks=fault("more rows asked for than there are, and than d", "trains; outputs kept"),
            id="rows",
        ),
        pytest.param(
            None,
            None,
            {"sos_method": "principal", "sos_rank": 10**6},
            marks=fault("rank above d", "trains; all dimensions kept"),
            id="rank",
        ),
        pytest.param(
            None,
            None,
            {"sos_images": 10**9},
            marks=fault("more images asked for than there are", "trains; two thirds are fitted on"),
            id="images",
        ),
    ],
)
def test_data_with_little_information(train, edited, image, labels, settings):
    run = train(data=edited(image, labels), **settings)
    rows = run.rows("sos.csv")
    assert len(rows) == 2 * 2 * 6
    assert {row["status"] for row in rows} == {"ok"}
    assert all(float(row["norm_after"]) <= float(row["norm_before"]) * (1 + 1e-6) for row in rows)
    assert_whole_after_the_end(run)
