# yolo-sos, AGPL-3.0
"""What Ultralytics can do beside plain training, together with SOS."""

from __future__ import annotations

import random

import pytest
import torch
from ultralytics.engine import trainer as stock_trainer
from ultralytics.utils.patches import torch_load

from yolo_sos.yolo import training
from yolo_sos.yolo.heads import final_layers


def assert_shifted(run, epochs):
    """Assert that EMA and live model were shifted at the end of these epochs, and the checkpoint holds the last."""
    rows = run.rows("sos.csv")
    assert {(int(r["epoch"]), r["model"]) for r in rows} == {(e, m) for e in epochs for m in ("ema", "model")}
    assert all(r["status"] == "ok" and float(r["t"]) > 0 for r in rows)
    assert all(float(r["norm_after"]) <= float(r["norm_before"]) * (1 + 1e-6) for r in rows)
    assert sum(float(r["norm_after"]) for r in rows) < sum(float(r["norm_before"]) for r in rows)
    saved = torch_load(run.save_dir / "weights/last.pt", map_location="cpu")
    model = (saved["ema"] or saved["model"]).float()
    norms = {layer.name: float(layer.module.weight.norm()) for layer in final_layers(model)}
    last = {r["name"]: float(r["norm_after"]) for r in rows if r["model"] == "ema" and int(r["epoch"]) == max(epochs)}
    assert norms == pytest.approx(last, rel=1e-3)  # the checkpoint has half precision


def feature(what: str, *values, outcome: str = "works"):
    return pytest.param(*values, id=what, marks=pytest.mark.feature(what, outcome))


@pytest.mark.parametrize(
    ("settings", "holds"),
    [
        feature("amp=True, the default", {"amp": True}, lambda run: run.trainer.amp is False),  # on the CPU
        feature("nbs=16, accumulation", {"nbs": 16, "warmup_epochs": 0}, lambda run: run.trainer.accumulate == 2),
        feature("freeze=3", {"freeze": 3}, lambda run: not run.said("frozen layers are not shifted")),
        feature("single_cls=True", {"single_cls": True}, lambda run: run.trainer.data["nc"] == 1),
        feature("rect=True", {"rect": True}, lambda run: run.trainer.train_loader.dataset.rect),
        feature("cache=ram", {"cache": "ram"}, lambda run: run.trainer.train_loader.dataset.ims[0] is not None),
        feature("cache=disk", {"cache": "disk"}, lambda run: run.trainer.train_loader.dataset.npy_files[0].exists()),
        feature("close_mosaic=1", {"close_mosaic": 1}, lambda run: run.said("Closing dataloader mosaic")),
        feature("fraction=0.5", {"fraction": 0.5}, lambda run: len(run.trainer.plain_images()[0]) == 12),
        feature("val=False", {"val": False}, lambda run: len(run.rows("results.csv")) == 2),
        feature("plots=True", {"plots": True}, lambda run: (run.save_dir / "sos.png").stat().st_size > 0),
        feature("cos_lr=True", {"cos_lr": True}, lambda run: run.trainer.lf(1) != run.trainer.lf(0)),
        feature("batch=-1", {"batch": -1}, lambda run: run.trainer.batch_size == 16),
        feature("optimizer=auto", {"optimizer": "auto"}, lambda run: run.said("optimizer:")),
        feature("optimizer=MuSGD", {"optimizer": "MuSGD"}, lambda run: type(run.trainer.optimizer).__name__ == "MuSGD"),
        feature(
            "save_period=1",
            {"save_period": 1},
            lambda run: {p.name for p in (run.save_dir / "weights").iterdir()} >= {"epoch0.pt", "epoch1.pt"},
        ),
    ],
)
def test_trains_and_shifts(train, settings, holds):
    run = train(**settings)
    assert holds(run)
    assert_shifted(run, epochs=(1, 2))


@pytest.mark.feature("amp=bf16", "works")
def test_mixed_precision(train, monkeypatch):
    """Ultralytics has it on GPUs alone: here, its autocast is torch's own for the CPU."""
    entered = []

    def autocast(dtype, device):
        entered.append(dtype)
        return torch.autocast(device, dtype)

    monkeypatch.setattr(stock_trainer, "autocast", autocast)
    run = train(amp="bf16")
    assert entered == [torch.bfloat16] * 6
    assert_shifted(run, epochs=(1, 2))


@pytest.mark.feature("compile=True", "works")
@pytest.mark.slow
def test_a_compiled_model(train, monkeypatch):
    """By dynamo without code generation: Ultralytics' own back end takes a minute on the CPU."""
    compiled = []

    def attempt_compile(model, device, mode):
        assert mode is True
        compiled.append(torch.compile(model, backend="eager"))
        return compiled[0]

    monkeypatch.setattr(stock_trainer, "attempt_compile", attempt_compile)
    run = train(compile=True)
    assert run.trainer.model is compiled[0]
    assert_shifted(run, epochs=(1, 2))


@pytest.mark.feature("multi_scale=0.5", "works")
def test_multi_scale_draws_what_it_would_without_sos(train):
    states = []
    for sos in True, False:
        run = train(multi_scale=0.5, sos=sos, callbacks={"on_train_end": lambda _: states.append(random.getstate())})
        if sos:
            assert_shifted(run, epochs=(1, 2))
    assert states[0] == states[1]
    assert states[0] != random.Random(0).getstate()


@pytest.mark.feature("patience=1, early stopping", "works")
def test_early_stopping(train):
    def stagnate(trainer):
        trainer.stopper.best_fitness = 2.0

    run = train(epochs=6, patience=2, callbacks={"on_train_epoch_start": stagnate})
    epochs = [int(r["epoch"]) for r in run.rows("results.csv")]
    assert epochs == [1, 2]
    assert_shifted(run, epochs=epochs)


@pytest.mark.feature("time=", "works")
def test_a_limit_of_time(train):
    run = train(epochs=1000, time=1 / 3600, sos_start=0.001)
    epochs = [int(r["epoch"]) for r in run.rows("results.csv")]
    assert 0 < len(epochs) < 1000
    assert_shifted(run, epochs=epochs)


@pytest.mark.feature("deterministic=True", "same seed, same machine: same weights, bit for bit")
@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(train):
    first, second, other = (
        torch_load(train(seed=seed).save_dir / "weights/last.pt", map_location="cpu")["model"].state_dict()
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


@pytest.mark.feature("quantize=8, quantization-aware training", "refused: it replaces the layers' weights")
@pytest.mark.parametrize("quantize", [8, "int8"])
def test_quantization_aware_training_is_refused(train, quantize):
    run = train(quantize=quantize, error=ValueError)
    assert "sos=true does not work together with quantize=8" in str(run.error)


@pytest.mark.feature("another release of Ultralytics", "works as far as it can; named as untested")
@pytest.mark.parametrize("version", [training.TESTED[0], "8.4.9999"])
def test_an_untested_release_is_named(train, monkeypatch, version):
    monkeypatch.setattr(training, "ultralytics_version", version)
    run = train(epochs=1)
    assert run.said(f"Ultralytics {version} is untested") == (version not in training.TESTED)
