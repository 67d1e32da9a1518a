# yolo-sos, AGPL-3.0
"""What goes wrong stops a run at once or not at all, and what was saved before stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ultralytics import RTDETR, YOLO
from ultralytics.utils.patches import torch_load
from watched import REAL_SHIFT, same

from yolo_sos.core import SOS
from yolo_sos.trainers import SOSDetectionTrainer


def assert_intact(run, epoch):
    """Assert that last.pt is whole, holds the EMA of that epoch, counted from 1, and that nothing else lies about."""
    last = run.save_dir / "weights/last.pt"
    ckpt = torch_load(last, map_location="cpu")
    assert ckpt["epoch"] == epoch - 1
    expected = {k: v.half() if v.is_floating_point() else v for k, v in run.ended[epoch]["ema"].items()}
    assert same(ckpt["ema"].state_dict(), expected)
    assert len(YOLO(last).predict(torch.zeros(1, 3, 64, 64), verbose=False, save=False, device="cpu")) == 1
    assert sorted(p.name for p in last.parent.iterdir()) == ["best.pt", "last.pt"]
    assert not list(run.save_dir.glob(".*"))


# A shift that fails -------------------------------------------------------------------------------------------------


def test_a_shift_that_fails_stops_the_run_with_its_own_error(train, monkeypatch):
    calls = []

    def fail(sos, *args, **kwargs):
        calls.append(sos)
        if len(calls) == 3:  # EMA and live model after epoch 2, then the EMA after epoch 3
            raise ZeroDivisionError("of the shift")
        return REAL_SHIFT(sos, *args, **kwargs)

    monkeypatch.setattr(SOS, "shift", fail)
    run = train(sos=True, error=ZeroDivisionError)
    assert str(run.error) == "of the shift"
    assert sorted(run.ended) == [1, 2]
    assert_intact(run, epoch=2)
    assert {row["epoch"] for row in run.shifts} == {"2"}
    assert [row["epoch"] for row in run.results] == ["1", "2"]
    for name, model in (("ema", run.trainer.ema.ema), ("model", run.trainer.model)):  # as they were before
        assert same(model.state_dict(), run.trained[3][name])


def test_a_live_model_that_is_not_finite_is_left_alone_and_does_not_stop_the_run(train):
    """The EMA, which is what is saved, is shifted all the same."""

    def poison(trainer):  # after the last batch, so that the loss was still a number
        if trainer.epoch + 1 == 2 and trainer.tloss is not None:
            poison.batches += 1
            if poison.batches == 3:
                with torch.no_grad():
                    trainer.model.model[0].conv.weight.mul_(torch.nan)

    poison.batches = 0
    run = train(sos=True, callbacks={"on_train_batch_end": poison}, epochs=3)
    status = {(row["epoch"], row["model"]): row["status"] for row in run.shifts}
    assert status[("2", "ema")] == "ok"
    assert status[("2", "model")] != "ok"
    assert status[("3", "model")] == status[("3", "ema")] == "ok"  # Ultralytics has recovered from last.pt


# A checkpoint that cannot be written --------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_serialised_leaves_the_one_before(train, monkeypatch):
    save, calls = torch.save, []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:  # one in each epoch
            raise OSError("of torch.save")
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", fail)
    run = train(sos=True, error=OSError)
    assert str(run.error) == "of torch.save"
    assert_intact(run, epoch=1)


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_disk_that_is_full_half_way_leaves_a_whole_checkpoint(train, monkeypatch, name):
    write, written = Path.write_bytes, []

    def fail(path, data):
        if path.parent.name.startswith(".weights") and name in path.name:
            written.append(path)
            if len(written) == 2:  # once in each epoch
                write(path, bytes(data)[: len(data) // 2])
                raise OSError("disk full")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fail)
    run = train(sos=True, error=OSError)
    assert str(run.error) == "disk full" and len(written) == 2
    assert torch_load(run.save_dir / f"weights/{name}.pt", map_location="cpu")["epoch"] == 0
    other = {"last": "best", "best": "last"}[name]  # which may have been replaced already
    assert torch_load(run.save_dir / f"weights/{other}.pt", map_location="cpu")["epoch"] in {0, 1}
    assert sorted(p.name for p in (run.save_dir / "weights").iterdir()) == ["best.pt", "last.pt"]
    assert not list(run.save_dir.glob(".*"))


# What cannot be trained ---------------------------------------------------------------------------------------------


def refuse(overrides, error, match):
    """Assert that a trainer refuses before it trains."""
    trainer = SOSDetectionTrainer(overrides=overrides)
    with pytest.raises(error, match=match):
        trainer.train()
    assert not (trainer.save_dir / "results.csv").exists()
    assert not list((trainer.save_dir / "weights").iterdir())
    return trainer


@pytest.fixture
def overrides(digits, tiny, tmp_path):
    return {
        **{"model": str(tiny), "data": str(digits), "epochs": 2, "imgsz": 64, "batch": 8, "device": "cpu"},
        **{"plots": False, "project": str(tmp_path), "sos": True, "sos_images": 8},
    }


@pytest.fixture
def tiny_rtdetr(tmp_path):
    path = tmp_path / "tiny-rtdetr.yaml"
    path.write_text(
        "nc: 10\nbackbone:\n  - [-1, 1, Conv, [8, 3, 2]]\n  - [-1, 1, Conv, [16, 3, 2]]\n"
        "head:\n  - [[0, 1], 1, RTDETRDecoder, [nc, 32, 5, 2, 2, 1, 32]]\n"
    )
    return str(path)


def test_rtdetr_is_refused_before_training(overrides, tiny_rtdetr):
    refuse({**overrides, "model": tiny_rtdetr}, TypeError, r"RTDETRDecoder.*no final linear layers.*It looks for")


def test_rtdetr_is_refused_by_the_class_of_its_own_too(overrides, tiny_rtdetr):
    model = RTDETR(tiny_rtdetr)
    with pytest.raises(TypeError, match=r"RTDETRDecoder.*no final linear layers"):
        model.train(trainer=SOSDetectionTrainer, **{**overrides, "model": tiny_rtdetr})
    assert not (model.trainer.save_dir / "results.csv").exists()


def test_kinds_that_the_model_does_not_have_are_refused(overrides):
    refuse({**overrides, "sos_layers": "mask"}, ValueError, "sos_layers=mask chooses no layer.*It has: box, cls")


def test_frozen_final_layers_are_refused(overrides):
    refuse({**overrides, "freeze": [5]}, ValueError, "nothing to shift: all final layers are frozen")
    refuse({**overrides, "freeze": ["5.cv2", "5.cv3"]}, ValueError, "nothing to shift: all final layers are frozen")


def test_some_frozen_layers_stay_and_are_named(train):
    run = train(sos=True, epochs=2, freeze=["5.cv3"])  # Ultralytics freezes what contains "model.5.cv3."
    assert [line for line in run.log if "frozen layers are not shifted: model.5.cv3.0.2, model.5.cv3.1.2" in line]
    assert {row["kind"] for row in run.shifts} == {"box"}
    for name in "model", "ema":
        for level in range(3):
            key = f"model.5.cv3.{level}.2.weight"
            assert torch.equal(run.ended[2][name][key], run.trained[1][name][key])


def test_distillation_is_refused(overrides):
    refuse({**overrides, "distill_model": "other.pt"}, ValueError, "distill_model")


def test_a_training_set_of_one_image_is_refused(overrides):
    refuse({**overrides, "fraction": 0.01}, ValueError, "at least 2 training images")


@pytest.mark.parametrize(
    ("wrong", "match"), [({"sos_rank": 1.5}, "sos_rank=1.5"), ({"sos_rnk": 8}, "Did you mean 'sos_rank'")]
)
def test_wrong_settings_are_refused_before_a_folder_is_made(overrides, tmp_path, wrong, match):
    with pytest.raises(ValueError, match=match):
        SOSDetectionTrainer(overrides={**overrides, **wrong})
    assert not list(tmp_path.iterdir())
