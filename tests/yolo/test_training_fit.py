# yolo-sos, AGPL-3.0
"""``fit_head=true``: a training whose class layers are fitted before the first epoch."""

from __future__ import annotations

import json

import pytest
import torch
from renamed import renamed_data
from ultralytics.utils.patches import torch_load
from watched import same

from yolo_sos.core import affine_matrix
from yolo_sos.yolo import class_fit, fit_checkpoint
from yolo_sos.yolo.classes import in_order
from yolo_sos.yolo.fitting import Fitting


def matrices(model):
    return [affine_matrix(layer.module).cpu() for layer in in_order(model)]


class Starts:
    """What a run starts its first epoch with."""

    def __init__(self):
        self.model, self.ema, self.calls = [], [], 0

    def __call__(self, trainer):
        self.calls += 1
        self.model, self.ema = matrices(trainer.model), matrices(trainer.ema.ema)
        self.random = torch.random.get_rng_state()

    @property
    def callbacks(self):
        return {"on_train_start": self}


@pytest.fixture(scope="module")
def renamed(able, tmp_path_factory):
    return renamed_data(able["data"], tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def fitted(train, able, renamed):
    """A fitted run, and what its first epoch started with."""
    starts = Starts()
    run = train(model=able["best"], data=str(renamed), fit_head=True, callbacks=starts.callbacks)
    return run, starts


def test_model_and_ema_start_with_the_fit(fitted, train, able, renamed):
    run, starts = fitted
    assert starts.calls == 1
    assert all(map(torch.equal, starts.model, starts.ema))
    stock = Starts()
    train(model=able["best"], data=str(renamed), callbacks=stock.callbacks)
    assert not any(map(torch.equal, starts.ema, stock.ema))
    assert torch.equal(starts.random, stock.random)  # the fit has taken no random number of the run
    told = json.loads((run.save_dir / "fit.json").read_text())
    assert told["heldout_after"] < told["heldout_before"] and not told["refusal"]
    line, saved = [line for line in run.log if "fit_head: " in line]
    assert "before the first epoch the model has a fitness of" in saved
    assert f"{told['heldout_before']:.4g} → {told['heldout_after']:.4g}" in line and line.endswith(" s")


def test_it_is_the_fit_of_the_command(fitted, able, renamed, tmp_path):
    path = tmp_path / "best.pt"
    path.write_bytes(able["best"].read_bytes())
    report = fit_checkpoint(path, renamed, batch=8, val=False)
    told = json.loads((fitted[0].save_dir / "fit.json").read_text())
    assert report.heldout_after == pytest.approx(told["heldout_after"], rel=0.02)
    assert [layer.ridge for layer in report.layers] == pytest.approx([layer["ridge"] for layer in told["layers"]])
    model = torch_load(path.with_name("best-fit.pt"), map_location="cpu")["model"].float()
    for ours, theirs in zip(fitted[1].ema, matrices(model), strict=True):
        assert torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2)  # theirs is of half precision


def test_the_first_epochs_find_more(fitted, train, able, renamed):
    first = lambda run: float(run.results[0]["metrics/mAP50(B)"])  # noqa: E731
    stock = train(model=able["best"], data=str(renamed))
    assert first(fitted[0]) > first(stock)


def test_what_gains_nothing_leaves_the_run_bit_equal_to_the_stock_one(train, stock):
    run = train(fit_head=True)  # of a model from scratch
    (line,) = [line for line in run.log if "fit_head: " in line]
    assert "nothing written: nothing to fit" in line
    for epoch in stock.ended:
        assert same(run.ended[epoch]["model"], stock.ended[epoch]["model"]), epoch
        assert same(run.ended[epoch]["ema"], stock.ended[epoch]["ema"]), epoch


def test_a_resumed_run_is_not_fitted_again(train, able, renamed, interrupt, monkeypatch):
    broken = train(
        model=able["best"],
        data=str(renamed),
        fit_head=True,
        callbacks=interrupt("on_train_epoch_start", 3),
        error=KeyboardInterrupt,
    )
    last = broken.save_dir / "weights/last.pt"
    told = torch_load(last, map_location="cpu")["sos"]
    assert told["settings"]["fit_head"] is True and told["fit"]["refusal"] == "" and told["fit"]["ridges"]
    monkeypatch.setattr(Fitting, "_fit", lambda _: pytest.fail("fitted again"))
    resumed = train(model=last, resume=True)
    assert torch_load(resumed.save_dir / "weights/last.pt", map_location="cpu")["sos"]["fit"] == told["fit"]


def test_a_run_that_ends_in_its_first_epoch_leaves_the_fitted_model(train, able, renamed, interrupt):
    stop = interrupt("on_train_batch_start", 1)
    broken = train(model=able["best"], data=str(renamed), fit_head=True, callbacks=stop, error=KeyboardInterrupt)
    best = broken.save_dir / "weights/best.pt"
    assert [p.name for p in best.parent.iterdir()] == ["best.pt"]  # Ultralytics resumes after whole epochs only
    starts = Starts()
    train(model=best, data=str(renamed), epochs=1, callbacks=starts.callbacks)
    kept = matrices(broken.trainer.ema.ema)
    assert all(torch.equal(a, b.half().float()) for a, b in zip(starts.model, kept, strict=True))


def test_a_shift_before_the_first_epoch_comes_after_the_fit(train, able, renamed):
    starts, order = Starts(), []
    with pytest.MonkeyPatch.context() as patch:
        own, real = Fitting._fit, class_fit.fit_classes
        patch.setattr(Fitting, "_fit", lambda trainer: (order.append("fit"), own(trainer))[1])
        assert real is class_fit.fit_classes
        run = train(
            model=able["best"], data=str(renamed), fit_head=True, sos=True, sos_start=0.0, callbacks=starts.callbacks
        )
    assert order == ["fit"]
    lines = [line for line in run.log if "layers fitted" in line or "squared norm ×" in line]
    assert "layers fitted" in lines[0] and "squared norm" in lines[1]


def test_known_rows_are_known(train, able):
    """The same names: the rows that Ultralytics copies are the prior, and the fit starts from them."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        own = Fitting._known_rows
        patch.setattr(Fitting, "_known_rows", lambda trainer: kept.append(own(trainer)) or kept[-1])
        train(model=able["best"], data=str(able["data"]), fit_head=True, epochs=1)
    assert kept == [{k: k for k in range(10)}]


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"distill_model": "yolov8n.pt"}, "distill_model"), ({"quantize": 8}, "quantize=8")],
)
def test_what_does_not_go_together_is_refused(train, able, renamed, settings, text):
    run = train(model=able["best"], data=str(renamed), fit_head=True, error=ValueError, **settings)
    assert f"fit_head=true does not work together with {text}" in str(run.error)


def test_the_error_of_a_fit_ends_the_run(train, able, renamed, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no memory for the rows")

    monkeypatch.setattr("yolo_sos.yolo.fitting.fit_classes", broken)
    run = train(model=able["best"], data=str(renamed), fit_head=True, error=RuntimeError)
    assert "no memory for the rows" in str(run.error)
