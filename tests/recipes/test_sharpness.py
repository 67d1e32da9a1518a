# yolo-sos, AGPL-3.0
"""SAM, ASAM and GNP: the papers' steps, on a toy problem and in Ultralytics' own loop."""

from __future__ import annotations

import builtins
import math
import random
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_optimizer import SAM
from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.patches import torch_load
from watched import same

from yolo_sos.config import PEERS, SOSConfig
from yolo_sos.recipes.sharpness import BALANCE, RHO, SharpnessAware, frozen_statistics
from yolo_sos.trainers import SOSDetectionTrainer

CLIP = 10.0  # Ultralytics'


def papers_gradient(method, weights, gradient, rho):
    """Return the gradient that the papers step along, written out in float64.

    ``weights`` is a list of tensors, ``gradient(weights)`` the list of the loss's gradients there.
    """
    at = [w.double() for w in weights]
    g = gradient(at)
    t = [w.abs() if method == "asam" else torch.ones_like(w) for w in at]  # Kwon et al.'s T_w
    norm = math.sqrt(sum(float(((s * d) ** 2).sum()) for s, d in zip(t, g, strict=True)))
    climb = [rho * s**2 * d / norm for s, d in zip(t, g, strict=True)]
    up = gradient([w + e for w, e in zip(at, climb, strict=True)])
    if method != "gnp":
        return up
    share = 0.8  # λ/r
    return [(1 - share) * d + share * u for d, u in zip(g, up, strict=True)]


def clipped(gradients):
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    return [g * min(1.0, CLIP / norm) for g in gradients]


# A toy problem in Ultralytics' own optimizer_step ----------------------------------------------------------------
class Toy(nn.Module):
    """A loss that is far from quadratic, with a factor that takes the gradient over Ultralytics' clip."""

    def __init__(self, factor=1.0, dropout=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(5, 4, generator=generator, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
        self.idle = nn.Parameter(torch.ones(3, dtype=torch.float64))  # no gradient ever reaches it
        self.dropout = nn.Dropout(dropout)
        self.factor = factor
        self.seen: list[torch.Tensor] = []  # what each forward pass saw, after dropout

    def forward(self, batch):
        x = self.dropout(batch["img"])
        self.seen.append(x)
        loss = self.factor * (torch.tanh(x @ self.a.T + self.b) ** 2).sum(1)
        return loss, {"loss": loss.detach().sum()}


class ToyStock(BaseTrainer):
    """Ultralytics' trainer without what surrounds its steps."""

    def __init__(self, model, method, rho, scaler, lr=0.1, momentum=0.0):
        self.sos = SOSConfig.from_dict({"sharpness_aware": method, "rho": rho})
        self.model, self.ema, self.amp, self.scaler, self.callbacks = model, None, False, scaler, {}
        self.start_epoch, self.metrics = 0, {}
        self.args, self.device = SimpleNamespace(amp=False, compile=False, distill_model=None), torch.device("cpu")
        self.optimizer = torch.optim.SGD(
            [{"params": [model.a]}, {"params": [model.b, model.idle]}], lr=lr, momentum=momentum
        )

    def _setup_train(self):
        """There is nothing to set up."""

    def train_on(self, *batches):
        """One step of Ultralytics' loop: accumulate the gradients of some batches, step."""
        for x in batches:
            self.run_callbacks("on_train_batch_start")
            batch = self.preprocess_batch({"img": x})
            self.scaler.scale(self.model(batch)[0].sum()).backward()
            if x is batches[-1]:
                self.optimizer_step()
            self.run_callbacks("on_train_batch_end")


class ToyTrainer(SharpnessAware, ToyStock):
    """Ours."""

    __init__ = ToyStock.__init__


def scaler(enabled):
    return torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**12)


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def toy(method, *, factor=1.0, rho=None, amp=False, dropout=0.0, trainer=ToyTrainer, **kwargs):
    made = trainer(Toy(factor, dropout), method, rho, scaler(amp), **kwargs)
    made._setup_train()
    return made


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize("amp", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("factor", [0.1, 50.0], ids=["small", "clipped"])
@pytest.mark.parametrize("rho", [None, 0.7])
def test_a_step_is_the_papers(method, amp, count, factor, rho):
    """Of all batches that are accumulated, with the final gradient clipped, whatever the scaler's scale."""
    trainer = toy(method, factor=factor, rho=rho, amp=amp)
    given = batches(count)
    before = [trainer.model.a.detach().clone(), trainer.model.b.detach().clone()]

    def gradient(weights):
        a, b = (w.clone().requires_grad_() for w in weights)
        loss = sum(factor * (torch.tanh(x @ a.T + b) ** 2).sum() for x in given)
        return torch.autograd.grad(loss, [a, b])

    step = clipped(papers_gradient(method, before, gradient, rho or {"sam": 0.05, "asam": 0.5, "gnp": 0.05}[method]))
    plain = clipped(gradient(before))
    trainer.train_on(*given)
    for w, old, d, p in zip((trainer.model.a, trainer.model.b), before, step, plain, strict=True):
        torch.testing.assert_close(w.detach(), old - 0.1 * d, rtol=0, atol=1e-6)
        assert (w.detach() - (old - 0.1 * p)).abs().max() > 1e-5  # the comparison can fail
    assert len(trainer.model.seen) == 2 * count
    assert torch.equal(trainer.model.idle, torch.ones(3, dtype=torch.float64))
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer._window == []


@pytest.mark.parametrize(("method", "adaptive"), [("sam", False), ("asam", True)])
def test_a_run_is_that_of_the_library(method, adaptive):
    """Twenty steps with momentum, beside the library's own wrapper of SGD in its own loop."""
    ours = toy(method, factor=0.1, lr=0.05, momentum=0.9)
    model = Toy(0.1)
    theirs = SAM([model.a, model.b], torch.optim.SGD, rho=RHO[method], adaptive=adaptive, lr=0.05, momentum=0.9)
    for x in batches(20):
        ours.train_on(x)

        def closure(x=x):
            theirs.zero_grad()
            model({"img": x})[0].sum().backward()

        closure()
        theirs.step(closure)
    for name in "a", "b":
        torch.testing.assert_close(getattr(ours.model, name), getattr(model, name), rtol=1e-6, atol=1e-7)


def test_sam_is_gnp_with_the_second_gradient_alone(monkeypatch):
    runs = []
    for method, balance in ("sam", 1.0), ("gnp", 0.8), ("gnp", 1.0):
        monkeypatch.setitem(BALANCE, method, balance)
        trainer = toy(method)
        trainer.train_on(*batches(2))
        runs.append(trainer.model.a.detach())
    assert torch.equal(runs[0], runs[2]) and not torch.equal(runs[0], runs[1])


def test_a_window_begins_where_there_are_no_gradients():
    """Ultralytics drops what is accumulated when it runs out of memory, or recovers from NaN."""
    trainer, other = toy("sam"), toy("sam")
    dropped, *kept = batches(3)
    trainer.run_callbacks("on_train_batch_start")
    trainer.model(trainer.preprocess_batch({"img": dropped}))[0].sum().backward()
    trainer.optimizer.zero_grad()
    trainer.run_callbacks("on_train_epoch_start")
    for made in trainer, other:
        made.train_on(*kept)
    assert torch.equal(trainer.model.a, other.model.a)


def test_batches_that_are_not_trained_on_are_not_kept():
    trainer = toy("sam")
    trainer.train_on(*batches(1))
    trainer.run_callbacks("on_train_epoch_end")
    trainer.preprocess_batch({"img": batches(1)[0]})
    assert trainer._window == []


@pytest.mark.parametrize("method", PEERS)
def test_dropout_is_that_of_the_first_pass_and_random_numbers_go_on_as_without(method):
    trainer, stock = toy(method, dropout=0.5), toy(method, dropout=0.5, trainer=ToyStock)
    states = []
    for made in trainer, stock:
        torch.manual_seed(1)
        made.train_on(*batches(3))
        states.append(torch.get_rng_state())
    first, second = trainer.model.seen[:3], trainer.model.seen[3:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all((x == 0).any() for x in first) and not torch.equal(first[0] == 0, first[1] == 0)
    assert torch.equal(*states)


class Faulty(Toy):
    """Fails at one of its forward passes."""

    def __init__(self, at, what, dropout=0.0):
        super().__init__(dropout=dropout)
        self.at, self.what = at, what

    def forward(self, batch):
        loss, items = super().forward(batch)
        if len(self.seen) != self.at:
            return loss, items
        if isinstance(self.what, Exception):
            raise self.what
        return loss * self.what, items


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("at", [1, 2, 3, 4], ids=["first", "first, second batch", "second", "second, second batch"])
def test_what_overflows_skips_the_step_and_lowers_the_scale(method, value, at):
    trainer = ToyTrainer(Faulty(at, value), method, None, scaler(True))
    trainer._setup_train()
    before = deepcopy(trainer.model.state_dict())
    given = batches(2)
    trainer.train_on(*given)
    assert same(trainer.model.state_dict(), before)
    assert trainer.scaler.get_scale() == 2.0**11
    assert len(trainer.model.seen) == (2 if at < 3 else 4)
    trainer.train_on(*given)  # and the next step is one again
    assert not torch.equal(trainer.model.a, before["a"]) and trainer.model.a.isfinite().all()


def test_nan_without_a_scaler_is_what_it_is_without_us():
    runs = []
    for kind in ToyTrainer, ToyStock:
        trainer = kind(Faulty(1, math.nan), "sam", None, scaler(False))
        trainer._setup_train()
        trainer.train_on(*batches(1))
        runs.append(trainer.model.a)
    assert all(a.isnan().all() for a in runs)


def test_an_error_in_the_second_pass_leaves_weights_and_random_numbers_as_they_were():
    trainer = ToyTrainer(Faulty(3, RuntimeError("out of memory"), dropout=0.5), "sam", None, scaler(False))
    trainer._setup_train()
    before = deepcopy(trainer.model.state_dict())
    torch.manual_seed(5)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train_on(*batches(2))
    assert same(trainer.model.state_dict(), before)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    toy("sam", dropout=0.5, trainer=ToyStock).train_on(*batches(2))
    assert torch.equal(after, torch.get_rng_state())


def test_running_statistics_rest_and_normalization_goes_on():
    """By the batch in training mode; a layer that was set to eval mode goes on to use its statistics."""
    x = torch.randn(4, 3, 5, 5) * 3 + 1
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    model(x)
    model[1].eval()
    expected = deepcopy(model)(x)
    before = deepcopy(model.state_dict())
    flags = [m.track_running_stats for m in model]
    with pytest.raises(ZeroDivisionError), frozen_statistics(model):
        torch.testing.assert_close(model(x), expected)
        assert same(model.state_dict(), before)
        raise ZeroDivisionError
    assert [m.track_running_stats for m in model] == flags
    model(x)
    assert not same(model.state_dict(), before)


def test_the_library_is_asked_for_before_the_data_are_read(digits, tiny, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "pytorch_optimizer":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    trainer = SOSDetectionTrainer(
        overrides={"model": str(tiny), "data": str(digits), "project": str(tmp_path), "sharpness_aware": "gnp"}
    )
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"sharpness_aware=gnp needs pytorch-optimizer.*pip install 'yolo-sos\[peers"):
        trainer.train()
    assert not hasattr(trainer, "train_loader")


# In Ultralytics' loop -------------------------------------------------------------------------------------------
COUNTED: list[bool] = []  # forward passes in training; not the trainer's, for Ultralytics copies a model with its hooks


def count(model, _):
    if model.training:
        COUNTED.append(True)


class Recorded:
    """Notes, for each step, the model before and after it, its batches, the EMA and the optimizer."""

    def _setup_train(self):
        self.steps, self.batches, self.shown = [], [], []
        super()._setup_train()
        COUNTED.clear()
        self.model.register_forward_pre_hook(count)
        self.pristine = deepcopy(self.ema.ema)

    def copied(self):
        """Return a copy of the live model without the graphs that hang on it."""
        model = deepcopy(self.pristine)
        model.load_state_dict(self.model.state_dict())
        for p, live in zip(model.parameters(), self.model.parameters(), strict=True):
            p.requires_grad = live.requires_grad
        return model.train()

    def final_eval(self):
        self.passes = len(COUNTED)
        super().final_eval()

    def preprocess_batch(self, batch):
        batch = super().preprocess_batch(batch)
        if self._in_batch:
            self.batches.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
        return batch

    def optimizer_step(self):
        model, ema, optimizer = self.copied(), deepcopy(self.ema.ema), deepcopy(self.optimizer.state_dict())
        self.shown.append({k: float(v) for k, v in self.loss_items.items()})
        super().optimizer_step()
        taken = sum(len(step["batches"]) for step in self.steps)
        self.steps.append(
            {
                **{"model": model, "ema": ema, "optimizer": optimizer, "batches": self.batches[taken:]},
                **{"after": deepcopy(self.model.state_dict()), "ema_after": deepcopy(self.ema.ema.state_dict())},
                **{"updates": self.ema.updates},
            }
        )


class Ours(Recorded, SOSDetectionTrainer):
    """Noted."""


def buffers(model):
    return dict(model.named_buffers())


ONE_EPOCH = {"epochs": 2, "nbs": 8, "warmup_epochs": 0, "trainer": Ours}


@pytest.fixture(scope="module")
def plain(train):
    """The stock run: with nothing asked for, ours is stock."""
    return train(**ONE_EPOCH).trainer


@pytest.fixture(scope="module")
def sam(train):
    return train(**ONE_EPOCH, sharpness_aware="sam").trainer


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize("nbs", [8, 16], ids=["each batch", "two batches"])
def test_every_step_of_a_run_is_the_papers(train, method, nbs):
    """From the weights and the optimizer before it, and the batches that Ultralytics accumulated for it."""
    trainer = train(**{**ONE_EPOCH, "nbs": nbs}, sharpness_aware=method).trainer
    assert len(trainer.steps) == 6 * 8 // nbs
    names = {p: name for name, p in trainer.model.named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in trainer.optimizer.param_groups]
    for step in trainer.steps:
        assert len(step["batches"]) == nbs // 8
        model = step["model"].double()
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        old = [p.detach().clone() for p in named.values()]

        def gradient(weights, model=model, named=named, step=step):
            model.zero_grad()
            for p, w in zip(named.values(), weights, strict=True):
                p.data.copy_(w)
            for batch in step["batches"]:
                model({**batch, "img": batch["img"].double()})[0].sum().backward()
            return [p.grad.clone() for p in named.values()]

        final = clipped(papers_gradient(method, old, gradient, RHO[method]))
        for p, w, g in zip(named.values(), old, final, strict=True):
            p.data.copy_(w)
            p.grad = g
        every = dict(model.named_parameters())
        optimizer = torch.optim.SGD([{"params": [every[n] for n in group]} for group in groups], lr=1.0)
        optimizer.load_state_dict(step["optimizer"])
        optimizer.step()
        for name, p in named.items():
            torch.testing.assert_close(step["after"][name].double(), p.detach(), rtol=1e-4, atol=1e-6)


def test_a_step_takes_two_passes_of_which_the_first_is_logged(plain, sam):
    assert (plain.passes, sam.passes) == (6, 12)
    assert sam.shown[0] == plain.shown[0]  # of the same weights, the one batch
    assert sam.shown[1] != plain.shown[1]


def test_running_statistics_are_those_of_the_first_pass(plain, sam):
    first, same_first = plain.steps[0], sam.steps[0]
    assert same(buffers(same_first["model"]), buffers(first["model"]))
    for step in sam.steps:
        statistics = buffers(step["model"])
        assert all(torch.equal(step["after"][k], v) for k, v in statistics.items())
    assert int(buffers(sam.model)["model.0.bn.num_batches_tracked"]) == 6


def test_the_ema_is_updated_once_per_step_and_from_the_weights_after_it(sam):
    for i, step in enumerate(sam.steps):
        assert step["updates"] == i + 1
        share = 1 - sam.ema.decay(i + 1)
        for name, w in step["ema"].state_dict().items():
            if w.dtype.is_floating_point:
                torch.testing.assert_close(step["ema_after"][name], w.lerp(step["after"][name], share))


def test_images_are_those_of_the_stock_run(plain, sam):
    assert len(plain.batches) == len(sam.batches) == 6
    for a, b in zip(plain.batches, sam.batches, strict=True):
        assert a["im_file"] == b["im_file"] and torch.equal(a["img"], b["img"]) and torch.equal(a["cls"], b["cls"])


def test_one_seed_is_one_run(train, sam):
    again = train(**ONE_EPOCH, sharpness_aware="sam").trainer
    assert same(again.model.state_dict(), sam.model.state_dict())
    other = train(**ONE_EPOCH, sharpness_aware="sam", rho=0.2).trainer
    assert not same(other.model.state_dict(), sam.model.state_dict())


@pytest.mark.slow
def test_the_warmup_of_accumulation_and_batches_over_the_end_of_an_epoch(train):
    """Ultralytics steps when so many batches have come; 24 images make three of 8."""
    trainer = train(trainer=Ours, epochs=4, nbs=32, warmup_epochs=2, sharpness_aware="sam").trainer
    sizes = [len(step["batches"]) for step in trainer.steps]
    assert sum(sizes) <= 12 and max(sizes) == 4 and min(sizes) == 1
    assert trainer.passes == 12 + sum(sizes)


@pytest.mark.parametrize("optimizer", ["MuSGD", "AdamW"])
@pytest.mark.slow
def test_other_optimizers_and_what_they_save(train, optimizer):
    """The library's keys stay out of the optimizer, and so out of checkpoints."""
    settings = {"epochs": 1, "optimizer": optimizer, "nbs": 8, "warmup_epochs": 0}
    ours, stock = (train(**settings, **given) for given in ({"sharpness_aware": "asam"}, {}))
    for run in ours, stock:
        assert type(run.trainer.optimizer).__name__ == optimizer
    a, b = (run.trainer.optimizer.state_dict() for run in (ours, stock))
    assert [list(group) for group in a["param_groups"]] == [list(group) for group in b["param_groups"]]
    assert {k: list(v) for k, v in a["state"].items()} == {k: list(v) for k, v in b["state"].items()}
    assert not same(ours.ended[1]["model"], stock.ended[1]["model"])


@pytest.fixture
def cut(train, interrupt):
    callbacks = interrupt("on_train_epoch_start", 3)
    settings = {"sharpness_aware": "gnp", "rho": 0.1, "nbs": 8, "callbacks": callbacks}
    return train(**settings, error=KeyboardInterrupt).save_dir / "weights"


def test_a_run_is_resumed_with_its_settings(train, cut):
    run = train(model=cut / "last.pt", resume=True, trainer=Ours)
    assert sorted(run.ended) == [3, 4]
    assert (run.trainer.sos.sharpness_aware, run.trainer.sos.rho) == ("gnp", 0.1)
    assert run.trainer.passes == 2 * len(run.trainer.batches) == 12


def test_the_stock_trainer_resumes_its_checkpoints(train, cut):
    run = train(model=cut / "last.pt", resume=True, trainer=DetectionTrainer)
    assert sorted(run.ended) == [3, 4]


def test_an_epoch_that_runs_again(train):
    poisoned = []

    def poison(trainer):
        if trainer.epoch + 1 == 2 and not poisoned:
            poisoned.append(True)
            trainer.loss = trainer.loss * math.nan

    run = train(sharpness_aware="sam", trainer=Ours, nbs=32, callbacks={"on_train_epoch_end": poison})
    assert poisoned and sorted(run.ended) == [1, 2, 3, 4]
    assert all(v.isfinite().all() for v in run.ended[4]["model"].values())
    assert len(run.trainer.batches) < run.trainer.passes <= 2 * len(run.trainer.batches)


@pytest.mark.parametrize("method", PEERS)
def test_together_with_sos(train, method):
    run = train(sos=True, sharpness_aware=method, trainer=Ours)
    assert {(row["epoch"], row["model"]) for row in run.shifts} == {
        (str(e), m) for e in (2, 3, 4) for m in ("ema", "model")
    }
    assert all(row["status"] == "ok" for row in run.shifts)
    assert run.trainer.passes == 12 + sum(len(step["batches"]) for step in run.trainer.steps)
    ckpt = torch_load(run.save_dir / "weights/last.pt", map_location="cpu")
    assert ckpt["sos"]["settings"]["sharpness_aware"] == method


def test_a_run_leaves_python_and_numpy_their_random_numbers(train):
    states = []

    def note(_):
        states.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))

    for given in {}, {"sharpness_aware": "sam"}:
        train(epochs=1, callbacks={"on_train_end": note}, **given)
    assert states[0] == states[1]
