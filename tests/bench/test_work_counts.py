# yolo-sos, AGPL-3.0
"""A regression guard that counts work, not seconds: images read, forward passes, solver calls, bytes captured."""

from __future__ import annotations

import math
import weakref
from collections import Counter

import pytest
from torch import is_tensor
from ultralytics.data import build as loaders
from ultralytics.data.dataset import YOLODataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.torch_utils import unwrap_model

from yolo_sos import SOSDetectionTrainer
from yolo_sos.core import HeldOut, InputCapture, Moments, engine, solvers
from yolo_sos.yolo.heads import final_layers

IMAGES, HELD, BATCH, IMGSZ, MODELS = 8, 4, 8, 64, 2
GIVEN = {"sos_method": "principal", "sos_rank": 0.5, "sos_guard": 1.0}  # a strength that is not searched for


@pytest.fixture
def make(digits, tiny, tmp_path):
    """``make(trainer class, **settings)`` returns a trainer that is ready to train."""

    def make(kind, **settings):
        trainer = kind(
            overrides={
                **{"model": str(tiny), "data": str(digits), "epochs": 2, "imgsz": IMGSZ, "batch": BATCH, "workers": 0},
                **{"device": "cpu", "plots": False, "val": False, "project": str(tmp_path), **settings},
            }
        )
        trainer._setup_train()
        trainer.epoch = 0
        model = unwrap_model(trainer.model)
        model.criterion = model.init_criterion()  # as the first training batch does
        return trainer

    return make


@pytest.fixture
def count(monkeypatch):
    """``count(owner, name)`` counts the calls of a function in ``count.calls``, by name."""
    calls: Counter[str] = Counter()

    def count(owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count.calls = calls  # type: ignore[attr-defined]
    return count


def shift(trainer):
    """Shift both models as at the end of an epoch; returns the reports."""
    return trainer._shift_everywhere({"ema": trainer.ema.ema, "model": unwrap_model(trainer.model)})


def test_a_shift_reads_each_image_once_and_runs_each_model_once_over_it(make, count, monkeypatch):
    trainer = make(SOSDetectionTrainer, sos=True, sos_images=IMAGES, **GIVEN)
    models = (trainer.ema.ema, unwrap_model(trainer.model))
    layers = len(final_layers(models[0]))
    seen: Counter[int] = Counter()
    handles = [
        m.register_forward_pre_hook(lambda module, args: seen.update({id(module): len(args[0])})) for m in models
    ]
    count(YOLODataset, "get_image_and_label")
    count(YOLODataset, "__getitem__")
    count(engine, "solve")
    count(solvers, "principal_shift")
    count(HeldOut, "loss")
    reports = shift(trainer)
    for handle in handles:
        handle.remove()
    assert sorted(reports) == ["ema", "model"]
    assert count.calls["__getitem__"] == IMAGES + HELD  # for both models together
    assert count.calls["get_image_and_label"] == IMAGES + HELD  # no mosaic: each takes one image
    assert sorted(seen.values()) == [IMAGES + HELD] * MODELS
    assert count.calls["principal_shift"] == count.calls["solve"] == layers * MODELS
    assert count.calls["loss"] == MODELS  # after the full step; the loss before it is that of the forward pass


def test_a_pass_captures_the_inputs_of_the_final_layers_and_nothing_else(make):
    trainer = make(SOSDetectionTrainer, sos=True, sos_images=IMAGES, **GIVEN)
    model = trainer.ema.ema.eval()
    layers = final_layers(model)
    batch = next(trainer.sample_images({"fit": IMAGES}, 0).batches("fit"))
    with InputCapture(layers) as capture:
        model(batch["img"])
        inputs = capture.take()
    per_image = sum(
        layer.module.in_channels * (IMGSZ // stride) ** 2
        for layer, stride in zip(layers, [8, 16, 32] * 2, strict=True)  # box layers, then class layers
    )
    assert sum(x.numel() * x.element_size() for x in inputs.values()) == 4 * IMAGES * per_image


def test_one_product_per_layer_accumulates_all_groups(make, count):
    trainer = make(SOSDetectionTrainer, sos=True, sos_images=IMAGES, **GIVEN)
    count(Moments, "update")
    shift(trainer)
    layers = len(final_layers(trainer.ema.ema))
    assert count.calls["update"] == layers * MODELS  # not times classes and background


@pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
def test_rows_are_released_before_images_are_held_out(make, monkeypatch, given):
    accumulated, checks = [], []
    accumulator, add = engine._accumulator, HeldOut.add

    def remembered(*args):
        made = accumulator(*args)
        accumulated.append(weakref.ref(made))
        return made

    def checked(self, *args):
        checks.append([ref() for ref in accumulated])
        add(self, *args)

    monkeypatch.setattr(engine, "_accumulator", remembered)
    monkeypatch.setattr(HeldOut, "add", checked)
    trainer = make(SOSDetectionTrainer, sos=True, sos_images=IMAGES, **(GIVEN if given else {"sos_method": "expected"}))
    shift(trainer)
    layers = len(final_layers(trainer.ema.ema))
    assert checks == [[None] * layers, [None] * layers * MODELS]


def test_the_guard_holds_the_inputs_of_final_layers_and_the_labels_but_neither_images_nor_features(make, monkeypatch):
    held, loss = [], HeldOut.loss

    def seen(self, weights):
        for batch, rest, inputs in self._batches:
            tensors = [*batch.values(), *rest["feats"], *inputs.values()]
            held.append({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if is_tensor(x)})
            assert set(rest) == {"feats"}
            expected = sum(x.numel() * x.element_size() for x in inputs.values())
            assert expected < sum(held[-1].values()) < 1.01 * expected
        return loss(self, weights)

    monkeypatch.setattr(HeldOut, "loss", seen)
    shift(make(SOSDetectionTrainer, sos=True, sos_images=IMAGES, **GIVEN))
    assert len(held) == MODELS


def test_rows_that_are_not_in_the_sample_go_into_no_product(make, monkeypatch):
    held, multiplied = 30_000, []  # bytes
    monkeypatch.setattr(engine, "CAPACITY", held)
    update = Moments.update

    def counted(self, features, weights=None):
        multiplied.append(features.numel() * features.element_size())
        return update(self, features, weights)

    monkeypatch.setattr(Moments, "update", counted)
    trainer = make(SOSDetectionTrainer, sos=True, sos_images=24, sos_guard=1.0, sos_method="expected")
    shift(trainer)
    layers = len(final_layers(trainer.ema.ema))
    assert 0 < sum(multiplied) <= held * layers * MODELS


def test_the_guard_stops_at_the_first_step_that_passes(make, count, monkeypatch):
    trainer = make(SOSDetectionTrainer, sos=True, sos_images=IMAGES, **{**GIVEN, "sos_guard": 0.0})
    for loss, tried in ((0.0, 1), (math.inf, 3)):  # t = 1; t = 1, ½, ¼, and no more than that, however bad
        monkeypatch.setattr(HeldOut, "loss", lambda self, weights, loss=loss: loss)
        count.calls.clear()
        count(HeldOut, "loss")
        reports = shift(trainer)
        assert count.calls["loss"] == tried * MODELS
        assert {report.step for report in reports.values()} == {1.0 if tried == 1 else 0.0}


def test_sos_scans_no_data_set_again_and_makes_no_second_loader(make, count):
    count(loaders, "build_yolo_dataset")
    count(YOLODataset, "get_labels")
    count(loaders.InfiniteDataLoader, "__init__")
    made = {}
    for name, kind, settings in (
        ("stock", DetectionTrainer, {}),
        ("off", SOSDetectionTrainer, {}),
        ("on", SOSDetectionTrainer, {"sos": True, "sos_guard": 1.0}),
    ):
        count.calls.clear()
        trainer = make(kind, **settings)
        if name == "on":
            shift(trainer)
        made[name] = dict(count.calls)
    assert made["stock"]["get_labels"] == made["stock"]["__init__"] == 2  # train and val
    assert made["off"] == made["on"] == made["stock"]


def test_sos_that_is_off_prepares_nothing(make, count):
    for name in "sample_images", "plain_images", "_shift_everywhere":
        count(SOSDetectionTrainer, name)
    trainer = make(SOSDetectionTrainer)
    trainer.run_callbacks("on_train_epoch_end")
    assert not count.calls
    assert not hasattr(trainer, "_shift_log")
