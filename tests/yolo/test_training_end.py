# yolo-sos, AGPL-3.0
"""Whatever ends a run, last.pt and best.pt are shifted: at its end, where no shift has reached them."""

from __future__ import annotations

import math

import pytest
import torch
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.patches import torch_load
from watched import same

from yolo_sos.core import evaluation
from yolo_sos.trainers import SOSDetectionTrainer
from yolo_sos.yolo.heads import YoloTask, final_layers


class Fading(SOSDetectionTrainer):
    """Finds the first epoch the best."""

    def validate(self):
        metrics, _ = super().validate()
        self.best_fitness = 1.0
        return metrics, 1 / (self.epoch + 1)


def state(path):
    ckpt = torch_load(path, map_location="cpu")
    return (ckpt["ema"] or ckpt["model"]).state_dict()


@pytest.fixture(scope="module")
def late(train):
    """A run whose one shift is at the end of epoch 4."""
    return train(trainer=Fading, sos=True, sos_start=1.0, save_period=1)


def test_best_is_shifted_and_nothing_else_of_it(late):
    weights = late.save_dir / "weights"
    before, after = state(weights / "epoch0.pt"), state(weights / "best.pt")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    rows = [row for row in late.shifts if row["model"] == "best"]
    assert changed == {f"{row['name']}.weight" for row in rows} and len(rows) == 6
    for row in rows:
        name = f"{row['name']}.weight"
        assert row["epoch"] == "1" and row["status"] == "ok"
        assert float(after[name].float().norm()) == pytest.approx(float(row["norm_after"]), rel=1e-2)  # half precision
        assert float(row["norm_after"]) < float(row["norm_before"])
    assert [line for line in late.log if "best.pt, of epoch 1: 6 layers: squared norm" in line]


def test_what_a_shift_has_reached_stays(late, shifted):
    assert same(state(late.save_dir / "weights/last.pt"), state(late.save_dir / "weights/epoch3.pt"))
    assert [(row["epoch"], row["model"]) for row in late.shifts][:12] == 6 * [("4", "ema")] + 6 * [("4", "model")]
    assert not [row for row in shifted.shifts if row["model"] in {"best", "last"}]


def test_a_run_that_patience_ends_leaves_no_checkpoint_without_a_shift(train):
    run = train(trainer=Fading, sos=True, sos_start=1.0, patience=1)
    assert {(row["epoch"], row["model"]) for row in run.shifts} == {("1", "best"), ("2", "last")}


def test_what_the_guard_refuses_stays_as_it_was(train):
    run = train(trainer=Fading, sos=True, sos_start=1.0, save_period=1, sos_rank=1, sos_guard=0.0)
    rows = [row for row in run.shifts if row["model"] == "best"]
    before, after = (state(run.save_dir / "weights" / name) for name in ("epoch0.pt", "best.pt"))
    assert (float(rows[0]["t"]) == 0) == same(before, after)
    assert [line for line in run.log if "best.pt, of epoch 1" in line]


def test_without_sos_nothing_is_shifted(train):
    run = train(trainer=Fading, save_period=1)
    assert same(state(run.save_dir / "weights/best.pt"), state(run.save_dir / "weights/epoch0.pt"))


# Whatever ends a run --------------------------------------------------------------------------------------------------
class Plateau(SOSDetectionTrainer):
    """Finds every epoch as good as the best: each is saved as best.pt again."""

    def validate(self):
        metrics, _ = super().validate()
        self.best_fitness = 1.0
        return metrics, 1.0


def stop_after(epoch, event):
    return {event: lambda trainer: setattr(trainer, "stop", trainer.epoch + 1 >= epoch)}


@pytest.mark.parametrize(
    "ending",
    [
        {"epochs": 9, "patience": 1},
        {"epochs": 9, "callbacks": stop_after(2, "on_fit_epoch_end")},
        {"epochs": 9, "callbacks": stop_after(2, "on_train_batch_end")},
        {"epochs": 9, "callbacks": stop_after(1, "on_train_epoch_end")},
        {"epochs": 1000, "time": 1 / 3600, "sos_interval": 1000},
    ],
    ids=["patience", "stop after an epoch", "stop amid an epoch", "stop before validation", "time"],
)
def test_both_files_are_shifted_whatever_ends_a_run(train, ending):
    """At half of the dimensions, each final weight has at most that rank, in half precision."""
    run = train(trainer=Plateau, sos=True, **{"sos_start": 1.0, **ending})
    for name in "last", "best":
        ckpt = torch_load(run.save_dir / f"weights/{name}.pt", map_location="cpu")
        assert ckpt["sos"]["shifts"] and ckpt["sos"]["shifts"][-1]["step"] == 1.0
        for layer in final_layers(ckpt["model"].float()):
            s = torch.linalg.svdvals(layer.module.weight.detach().flatten(1))
            assert int((s > 1e-2 * s[0]).sum()) <= math.ceil(layer.module.weight.shape[1] / 2)


def test_the_loss_that_is_reported_is_that_of_the_checkpoint_as_written(train):
    """Of the run's shift, and of one at the end: computed anew by whole models, on the images that were held out."""
    run = train(trainer=Fading, sos=True, sos_start=1.0, save_period=1)
    dataset, _ = run.trainer.plain_images()
    place = {file.rsplit("/", 1)[-1]: i for i, file in enumerate(dataset.im_files)}
    sets = iter(run.images[4])  # fit and held-out, of the EMA, the live model and best.pt
    heldout = dict(zip(("last", "model", "best"), list(sets)[1::2], strict=True))
    assert [r["model"] for r in run.shifts][::6] == ["ema", "model", "best"]
    for name, row in ("last", run.shifts[0]), ("best", run.shifts[-1]):
        batch = run.trainer.preprocess_plain(dataset.collate_fn([dataset[place[f]] for f in heldout[name]]))
        model = torch_load(run.save_dir / f"weights/{name}.pt", map_location="cpu")["model"].float()
        model.args = run.trainer.args
        task = YoloTask(model)
        with evaluation(model):
            found = float(task.loss(task.run(model, batch), batch))
        assert float(row["heldout_after"]) == pytest.approx(found, rel=2e-3)  # half precision


# A folder of two runs -------------------------------------------------------------------------------------------------
@pytest.fixture
def again(train, tmp_path):
    """``again(**settings)`` trains in one and the same folder."""
    return lambda **settings: train(project=str(tmp_path), name="one", exist_ok=True, **settings)


def test_a_second_run_in_one_folder_has_no_shifts_of_the_first(again):
    first = again(sos=True, epochs=3)
    assert {row["epoch"] for row in first.shifts} == {"2", "3"}
    second = again(trainer=Fading, sos=True, epochs=3, sos_start=1.0)
    assert second.save_dir == first.save_dir
    assert {(row["epoch"], row["model"]) for row in second.shifts} == {("3", "ema"), ("3", "model"), ("1", "best")}
    assert [row["epoch"] for row in second.results] == ["1", "2", "3"]
    assert [s["epoch"] for s in torch_load(second.save_dir / "weights/best.pt")["sos"]["shifts"]] == [1]


@pytest.mark.parametrize("trainer", [SOSDetectionTrainer, DetectionTrainer])
@pytest.mark.slow
def test_a_second_run_without_sos_is_the_stock_one(again, train, trainer):
    again(sos=True, epochs=2, plots=True)
    second, alone = again(trainer=trainer, epochs=2), train(epochs=2)
    assert same(state(second.save_dir / "weights/best.pt"), state(alone.save_dir / "weights/best.pt"))
    assert "sos" not in torch_load(second.save_dir / "weights/last.pt")
    if trainer is SOSDetectionTrainer:
        assert not [p.name for p in second.save_dir.iterdir() if p.name.startswith("sos.")]


def test_a_run_that_saves_nothing_leaves_the_checkpoints_of_another_alone(again):
    first = again(sos=True, epochs=2)
    before = {p.name: state(p) for p in (first.save_dir / "weights").iterdir()}
    run = again(sos=True, sos_start=1.0, epochs=9, save=False, callbacks=stop_after(1, "on_fit_epoch_end"))
    assert not run.shifts and sorted(run.ended) == [1]
    for path in (run.save_dir / "weights").iterdir():
        assert same(state(path), before[path.name])


def test_a_run_that_saves_nothing_ends_as_it_does_without_sos(train):
    ending = {"epochs": 9, "save": False, "callbacks": stop_after(1, "on_fit_epoch_end"), "error": FileNotFoundError}
    run, stock = train(sos=True, sos_start=1.0, **ending), train(**ending)
    assert [str(r.error).split(". ")[0] for r in (run, stock)] == ["Training completed but no checkpoint was saved"] * 2
    assert not list((run.save_dir / "weights").iterdir()) and not run.shifts


# Frozen layers --------------------------------------------------------------------------------------------------------
def freeze(kinds, value):
    def callback(trainer):
        for layer in final_layers(trainer.model):
            if layer.kind in kinds and trainer.epoch + 1 == 3:
                layer.module.weight.requires_grad = value

    return {"on_train_epoch_start": callback}


def test_layers_are_looked_at_when_a_shift_is_made(train):
    frozen = train(sos=True, callbacks=freeze({"box"}, False))
    kinds = {(row["epoch"], row["kind"]) for row in frozen.shifts}
    assert kinds == {("2", "box"), ("2", "cls"), ("3", "cls"), ("4", "cls")}
    thawed = train(sos=True, freeze=["5.cv3"], callbacks=freeze({"cls"}, True))
    kinds = {(row["epoch"], row["kind"]) for row in thawed.shifts}
    assert kinds == {("2", "box"), ("3", "box"), ("3", "cls"), ("4", "box"), ("4", "cls")}


def test_a_run_whose_final_layers_are_all_frozen_by_then_goes_on_with_a_warning(train):
    run = train(sos=True, sos_start=0.75, callbacks=freeze({"box", "cls"}, False))
    assert sorted(run.ended) == [1, 2, 3, 4] and not run.shifts
    said = [line for line in run.log if "all final layers are frozen" in line]
    assert "ema and model not shifted" in said[0] and "best not shifted" in said[-1]
    assert torch_load(run.save_dir / "weights/last.pt")["sos"]["shifts"] == []


# Settings -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("given", [{"sos_rank": 0.3}, {"sos_rank": 0.3, "swa": 0.5}, {"sos_guard": None}])
def test_settings_of_a_shift_without_sos_are_refused_as_by_the_command(digits, tiny, tmp_path, given):
    with pytest.raises(ValueError, match=r"without sos=true would train without SOS\. Add sos=true"):
        YOLO(tiny).train(trainer=SOSDetectionTrainer, data=str(digits), project=str(tmp_path), epochs=1, **given)
    assert not list(tmp_path.iterdir())
