# yolo-sos, AGPL-3.0
"""Stochastic weight averaging: the mean of the epochs' weights, with statistics of its own, where the EMA was."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.patches import torch_load
from watched import same

from yolo_sos.trainers import SOSDetectionTrainer
from yolo_sos.yolo.heads import final_layers


def parameters(run, weights):
    """Return the part of a state that is averaged."""
    names = {name for name, _ in run.trainer.ema.ema.named_parameters()}
    return {k: v.double() for k, v in weights.items() if k in names}


def mean(run, epochs):
    """Return the mean of the live model at the end of these epochs, by hand."""
    states = [parameters(run, run.trained[e]["model"]) for e in epochs]
    return {k: sum(state[k] for state in states) / len(states) for k in states[0]}


def close(found, expected, **tolerance):
    assert list(found) == list(expected)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **(tolerance or {"rtol": 1e-5, "atol": 1e-7}), msg=name)


@pytest.fixture(scope="module")
def averaged(train):
    """A run that averages at the end of epochs 2, 3 and 4."""
    return train(swa=0.5, save_period=1)


def test_what_is_validated_and_saved_is_the_mean_of_the_epochs(averaged):
    for epoch in 2, 3, 4:
        expected = mean(averaged, range(2, epoch + 1))
        close(parameters(averaged, averaged.ended[epoch]["ema"]), expected)
        assert same(averaged.validated[epoch]["ema"], averaged.ended[epoch]["ema"])
        saved = torch_load(averaged.save_dir / f"weights/epoch{epoch - 1}.pt", map_location="cpu")
        close(parameters(averaged, saved["ema"].state_dict()), expected, rtol=1e-3, atol=1e-4)  # half precision
        assert saved["sos"]["averaged"] == epoch - 1
    apart = mean(averaged, [4])
    assert any((expected[k] - apart[k]).abs().max() > 1e-3 for k in apart)  # the comparison can fail
    assert [line for line in averaged.log if "mean of 3 epochs" in line]
    last = torch_load(averaged.save_dir / "weights/last.pt", map_location="cpu")
    assert last["sos"]["averaged"] == 3 and last["model"] is not None  # stripped, as Ultralytics does at the end


def test_until_it_begins_and_apart_from_the_ema_a_run_is_the_stock_one(averaged, stock):
    assert same(averaged.ended[1]["ema"], stock.ended[1]["ema"])
    for epoch in stock.ended:
        assert same(averaged.ended[epoch]["model"], stock.ended[epoch]["model"]), epoch
    assert not same(averaged.ended[2]["ema"], stock.ended[2]["ema"])


def test_steps_leave_the_average_alone(averaged):
    for epoch in 3, 4:
        assert same(averaged.trained[epoch]["ema"], averaged.ended[epoch - 1]["ema"])


def test_without_it_nothing_is_averaged(train, stock):
    run = train(sharpness_aware="sam", epochs=1)
    assert "averaged" not in torch_load(run.save_dir / "weights/last.pt", map_location="cpu")["sos"]
    assert run.trainer.ema.enabled


class Plain(SOSDetectionTrainer):
    """Keeps the images that statistics are computed from."""

    def _bn_images(self, frozen):
        self.images, self.frozen = [], frozen
        for images in super()._bn_images(frozen):
            self.images.append(images.clone())
            yield images


def test_statistics_are_those_of_the_average_on_the_training_images(train):
    """Of every image once and as validation sees it. The first layer's means by hand, all by torch's own function."""
    trainer = train(swa=0.5, epochs=2, trainer=Plain).trainer
    source, _ = trainer.plain_images()
    files = sorted(source.im_files)
    batch = trainer.preprocess_batch(source.collate_fn([source[i] for i in range(len(source))]))
    assert len(files) == 24 and [len(images) for images in trainer.images] == [8, 8, 8]
    seen = torch.cat(trainer.images)
    order = [int((batch["img"] - image).abs().flatten(1).sum(1).argmin()) for image in seen]
    assert sorted(order) == list(range(24)) and order != sorted(order)
    assert torch.equal(batch["img"][order], seen)

    model = trainer.ema.ema
    first = model.model[0]
    with torch.inference_mode():
        torch.testing.assert_close(first.bn.running_mean, first.conv(seen).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    again = deepcopy(model)
    update_bn(iter(trainer.images), again)
    close(dict(model.named_buffers()), dict(again.named_buffers()))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {int(m.num_batches_tracked) for m in norms} == {3} and not any(m.training for m in norms)
    assert {m.momentum for m in norms} == {m.momentum for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert not torch.allclose(first.bn.running_mean, trainer.model.model[0].bn.running_mean, rtol=0.01)


def test_statistics_of_frozen_layers_stay(train):
    run = train(swa=0.5, epochs=2, trainer=Plain, freeze=2)
    trainer = run.trainer
    assert trainer.frozen == ["model.0.bn", "model.1.bn"]
    for i, m in enumerate(trainer.ema.ema.model[:3]):
        frozen = i < 2
        live = trainer.model.model[i].bn
        assert torch.equal(m.bn.running_mean, live.running_mean) == frozen
        assert torch.equal(m.bn.running_var, live.running_var) == frozen
        assert m.bn.momentum == live.momentum and not m.bn.training
    again = deepcopy(trainer.ema.ema.model[:3]).train()
    again[:2].eval()
    again[2].bn.momentum = None
    again[2].bn.reset_running_stats()
    with torch.no_grad():
        for images in trainer.images:
            again(images)
    torch.testing.assert_close(trainer.ema.ema.model[2].bn.running_mean, again[2].bn.running_mean)


def test_the_average_goes_on_where_a_run_was_cut_off(train, interrupt):
    """From the checkpoint's half precision, as Ultralytics' EMA does, with the weight of the epochs that it holds."""
    broken = train(swa=0.25, callbacks=interrupt("on_train_epoch_start", 4), error=KeyboardInterrupt)
    last = broken.save_dir / "weights/last.pt"
    ckpt = torch_load(last, map_location="cpu")
    assert ckpt["sos"]["averaged"] == 3
    run = train(model=last, resume=True)
    assert sorted(run.ended) == [4]
    kept, new = (parameters(run, s) for s in (ckpt["ema"].state_dict(), run.trained[4]["model"]))
    close(parameters(run, run.trained[4]["ema"]), kept)
    close(parameters(run, run.ended[4]["ema"]), {k: (3 * kept[k] + new[k]) / 4 for k in kept})
    assert torch_load(last, map_location="cpu")["sos"]["averaged"] == 4


def test_the_stock_trainer_resumes_its_checkpoints(train, interrupt):
    broken = train(swa=0.25, callbacks=interrupt("on_train_epoch_start", 4), error=KeyboardInterrupt)
    run = train(model=broken.save_dir / "weights/last.pt", resume=True, trainer=DetectionTrainer)
    assert sorted(run.ended) == [4]


def test_an_epoch_that_runs_again_counts_once(train):
    poisoned = []

    def poison(trainer):
        if trainer.epoch + 1 == 3 and not poisoned:
            poisoned.append(True)
            trainer.loss = trainer.loss * math.nan

    run = train(swa=0.5, callbacks={"on_train_epoch_end": poison})
    assert poisoned and run.trainer._averaged == 3
    second = {k: v.half().double() for k, v in parameters(run, run.ended[2]["ema"]).items()}  # from last.pt
    third, fourth = (parameters(run, run.trained[e]["model"]) for e in (3, 4))
    expected = {k: (second[k] + third[k] + fourth[k]) / 3 for k in third}
    close(parameters(run, run.ended[4]["ema"]), expected, rtol=1e-5, atol=1e-6)


def test_what_is_shifted_is_the_average(train):
    """A shift changes final layers; the average of an epoch later goes on from the shifted one."""
    run = train(swa=0.5, sos=True)
    finals = {f"{layer.name}.weight": layer.name for layer in final_layers(run.trainer.ema.ema)}
    assert finals and {row["epoch"] for row in run.shifts} == {"2", "3", "4"}
    told = {(int(r["epoch"]), r["name"]): r for r in run.shifts if r["model"] == "ema"}
    for count, epoch in enumerate((2, 3, 4)):
        live = parameters(run, run.trained[epoch]["model"])
        before = parameters(run, run.ended[epoch - 1]["ema"]) if count else live
        average = {k: (count * before[k] + live[k]) / (count + 1) for k in live}
        ended = parameters(run, run.ended[epoch]["ema"])
        others = [k for k in ended if k not in finals]
        close({k: ended[k] for k in others}, {k: average[k] for k in others})
        for weight, name in finals.items():
            row = told[epoch, name]
            assert float(row["norm_before"]) == pytest.approx(float(average[weight].norm()), rel=1e-4)
            assert float(row["norm_after"]) == pytest.approx(float(ended[weight].norm()), rel=1e-4)
    assert any(float(row["norm_after"]) < 0.99 * float(row["norm_before"]) for row in told.values())


def test_together_with_sharpness_aware_minimization(train):
    run = train(swa=0.5, sharpness_aware="sam")
    close(parameters(run, run.ended[4]["ema"]), mean(run, (2, 3, 4)))


def test_one_seed_is_one_run(train, averaged):
    again = train(swa=0.5)
    assert same(again.ended[4]["ema"], averaged.ended[4]["ema"])


def test_the_end_of_a_run_by_the_clock(train):
    """Ultralytics estimates the epochs anew as it goes: an average that has begun goes on."""

    def extend(trainer):
        if trainer.epoch + 1 == 2:
            trainer.epochs = 8  # of which half are not over

    run = train(swa=0.5, epochs=4, callbacks={"on_fit_epoch_end": extend})
    assert len(run.ended) == 8 and run.trainer._averaged == 7


@pytest.mark.parametrize("asked", [{"swa": 0.5}, {"sharpness_aware": "sam"}])
def test_distillation_is_refused(train, asked):
    run = train(**asked, distill_model="other.pt", error=ValueError)
    assert f"{next(iter(asked))} does not work together with distill_model" in str(run.error)
