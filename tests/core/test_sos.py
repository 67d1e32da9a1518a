# yolo-sos, AGPL-3.0
"""SOS for any PyTorch model and any training loop, without Ultralytics."""

from __future__ import annotations

import copy
import math
import shutil
import subprocess
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, nll_loss
from torchvision.models import VisionTransformer, resnet18

from yolo_sos import SOS, Method, shift_model
from yolo_sos.core import is_due, select_layers

ROOT = Path(__file__).parents[2]


def seeded(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1, generator=g)
    return model


def data(n, shape, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=g), torch.arange(n) % classes


def outputs(model, x):
    model.eval()
    with torch.no_grad():
        return model(x)


# Models ---------------------------------------------------------------------------------------------------------------
def resnet():
    return seeded(resnet18(num_classes=3)), "fc", (3, 32, 32)


def vit():
    size = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 32}
    return seeded(VisionTransformer(**size, num_classes=3)), "heads.head", (3, 16, 16)


def mlp(*last):
    return seeded(nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 3), *last)), "3", (5,)


def convolutional():
    """As SqueezeNet ends: a 1×1 convolution, and after it more than nothing."""
    model = nn.Sequential(nn.Conv2d(1, 20, 3), nn.ReLU(), nn.Conv2d(20, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return seeded(model.append(nn.Flatten())), "2", (1, 4, 4)


@pytest.mark.parametrize("make", [resnet, vit, mlp])
def test_outputs_on_the_rows_stay_and_the_norm_falls(make):
    model, name, shape = make()
    model.train()
    x, y = data(6, shape)
    before = outputs(model, x)
    model.train()
    (layer,) = select_layers(model, name)
    norm = float(layer.module.weight.detach().norm())
    report = shift_model(model, [(x[:4], y[:4]), (x[4:], y[4:])], method=Method("full"), guard=None)
    assert model.training
    assert (report.layers[0].name, report.layers[0].kind) == (name, "linear")
    after = outputs(model, x)
    assert torch.allclose(after, before, rtol=1e-3, atol=1e-4)
    assert report.status == "ok" and report.layers[0].rank <= 6
    assert layer.module.weight.norm().item() == pytest.approx(report.layers[0].norm_after, rel=1e-5)
    assert report.layers[0].norm_after < 0.9 * norm
    assert not layer.module._forward_hooks and not layer.module._forward_pre_hooks


@pytest.mark.parametrize(
    ("make", "criterion"),
    [
        (mlp, cross_entropy),
        (lambda: mlp(nn.LogSoftmax(1)), nll_loss),
        (convolutional, cross_entropy),
        (vit, lambda z, y: mse_loss(z.softmax(1), nn.functional.one_hot(y, 3).float())),
    ],
)
@pytest.mark.parametrize("guard", [None, 1e9, 0.0])
def test_the_guard_knows_what_follows_the_layer(make, criterion, guard):
    model, name, shape = make()
    fit, held = data(9, shape), data(8, shape, seed=1)

    def loss():
        return float(criterion(outputs(model, held[0]), held[1]))

    before = loss()
    report = shift_model(
        model,
        [fit],
        heldout=[(held[0][:5], held[1][:5]), (held[0][5:], held[1][5:])],
        criterion=criterion,
        method=Method("rows", rank=2),
        guard=guard,
    )
    assert report.layers[0].name == name
    assert report.heldout_before == pytest.approx(before, rel=1e-5)
    assert report.heldout_after == pytest.approx(loss(), rel=1e-5)
    assert report.step == 1.0 if guard != 0 else loss() <= before * (1 + 1e-6)


def test_a_loop_of_ones_own():
    """A hand-written loop on three blobs: SOS at each epoch of the second half, and the model still learns."""
    torch.manual_seed(0)
    centres = torch.randn(3, 8)
    y = torch.arange(120) % 3
    x = centres[y] + 0.8 * torch.randn(120, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    reports = []
    for epoch in range(8):
        for index in torch.randperm(90).split(30):
            loss = cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch >= 4:
            reports.append(shift_model(model, [(x[:60], y[:60])], heldout=[(x[60:90], y[60:90])], guard=0.01))
    assert reports[0].squared_norm_ratio < 0.95 and all(r.heldout_after <= 1.01 * r.heldout_before for r in reports)
    assert float((outputs(model, x[90:]).argmax(1) == y[90:]).float().mean()) > 0.9


def test_ultralytics_is_not_imported():
    code = """
import sys, torch
sys.modules["ultralytics"] = None  # an import of it would fail
from yolo_sos.core import Method, shift_model
model = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.ReLU(), torch.nn.Linear(9, 2))
batch = torch.randn(6, 4), torch.arange(6) % 2
report = shift_model(model, [batch], heldout=[batch], method=Method("principal", rank=3), guard=1e9)
assert report.status == "ok" and report.layers[0].rank == 3
assert not [m for m in sys.modules if m.startswith(("torchvision", "cv2", "yolo_sos.trainers", "yolo_sos.yolo"))]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# When ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("epochs", "start", "interval", "due"),
    [
        (10, 0.5, 2, [5, 7, 9]),
        (10, 0.5, 5, [5, 10]),
        (10, 0.0, 5, [0, 5, 10]),  # 0: before the first epoch
        (10, 0.05, 100, [1]),  # a part of an epoch is a whole one
        (10, 1.0, 1, [10]),  # once, at the end
        (30, 0.1, 30, [3]),  # 0.1 · 30 is more than 3 in floating point
        (1, 1.0, 1, [1]),
        (1, 0.0, 1, [0, 1]),
        (3, 0.34, 1, [2, 3]),
    ],
)
def test_when_a_shift_is_due(epochs, start, interval, due):
    assert [trained for trained in range(epochs + 1) if is_due(trained, epochs, start, interval)] == due


def test_nothing_is_read_where_no_shift_is_due():
    model, _, shape = mlp()
    sos, read = SOS(model, start=0.5, interval=2), []
    for epoch in range(6):
        batches = (read.append(epoch) or data(9, shape) for _ in range(1))
        assert (sos.step(epoch, 6, batches) is None) == (epoch not in {2, 4})
    assert read == [2, 4]


@pytest.mark.parametrize(
    ("setting", "value", "right"),
    [
        ("rank", True, "an integer of at least 1, or a fraction"),
        ("rank", "0.5", "an integer of at least 1, or a fraction"),
        ("budget", 2.0, "a number of at least 0 and less than 1"),
        ("step", 0.0, "a number above 0 and up to 1"),
        ("step", 1.5, "a number above 0 and up to 1"),
        ("guard", -0.1, "a number of at least 0, or none"),
        ("start", 1.1, "a number from 0 to 1"),
        ("interval", 0, "an integer of at least 1"),
        ("method", "pca", "one of loss"),
        ("solver", "qr", "one of svd, gauss"),
        ("weighting", "loss", "one of balanced"),
    ],
)
def test_wrong_settings_name_value_and_range(setting, value, right):
    with pytest.raises(ValueError, match=rf"^'{setting}={value}' is invalid: {setting} must be {right}"):
        SOS(mlp()[0], **{setting: value})


def test_settings_go_into_the_method():
    assert SOS(mlp()[0]).method == Method()
    assert SOS(mlp()[0], method="rows", rank=7, solver="gauss").method == Method("rows", 7, solver="gauss")
    assert SOS(mlp()[0], method=Method("budget", budget=0.2), weighting="uniform").method == Method(
        "budget", budget=0.2, weighting="uniform"
    )


# Stop and continue ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("by_step", [True, False])
@pytest.mark.parametrize("method", ["rows", "principal"])
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_stop_load_and_continue_equals_an_unbroken_run(stop, method, by_step):
    def start():
        torch.manual_seed(0)
        model, _, _ = mlp()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        return (
            model,
            optimizer,
            SOS(model, method=method, rank=6, start=0.3, interval=1, optimizer=optimizer, guard=9.0),
        )

    def train(parts, epochs):
        model, optimizer, sos = parts
        for epoch in epochs:
            x, y = data(30, (5,), seed=epoch)
            model.eval()
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            if by_step:
                sos.step(epoch, 6, [(x, y)], [data(9, (5,), seed=99)])
            else:
                sos.shift([(x, y)], [data(9, (5,), seed=99)])
        return parts

    unbroken, first = train(start(), range(6)), train(start(), range(stop))
    saved = copy.deepcopy([part.state_dict() for part in first])
    second = start()
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    train(second, range(stop, 6))
    for a, b in zip(unbroken[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    plain = start()
    assert not torch.equal(unbroken[0][3].weight, plain[0][3].weight)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_momentum_takes_the_same_map_as_the_weight(kind):
    model, _, shape = mlp()
    new = torch.optim.Adam if kind == "adam" else partial(torch.optim.SGD, momentum=0.9)
    optimizer = new(model.parameters(), 0.1)
    x, y = data(9, shape)
    cross_entropy(model(x), y).backward()
    optimizer.step()
    key = "exp_avg" if kind == "adam" else "momentum_buffer"
    optimizer.state[model[3].weight][key] = model[3].weight.detach().clone()  # ends where the weight does
    shift_model(model, [(x, y)], rank=3, optimizer=optimizer)
    torch.testing.assert_close(optimizer.state[model[3].weight][key], model[3].weight.detach())


# The simplest call ----------------------------------------------------------------------------------------------------
def test_a_model_and_batches_are_enough():
    model, _, shape = mlp()
    report = shift_model(model, [data(9, shape)])
    assert (report.step, report.guard, report.layers[0].name) == (1.0, None, "3")
    assert report.squared_norm_ratio < 1
    assert str(report).startswith("3: squared norm ×") and "held-out loss unknown, no guard" in str(report)


def test_with_heldout_batches_the_tolerance_is_half_a_hundredth():
    for seed in range(20):
        model, _, shape = mlp()
        report = shift_model(model, [data(9, shape)], [data(9, shape, seed=seed)], rank=1)
        assert report.guard == 0.005
        assert "no guard" not in str(report)
        assert report.heldout_after <= 1.005 * report.heldout_before
        assert (report.status == "ok") == (report.step > 0)
    with pytest.raises(ValueError, match="nothing to fit on"):
        shift_model(model, [])


# What is reported is true of the model as written ---------------------------------------------------------------------
def shift_by_shift_model(model, *batches, **settings):
    return shift_model(model, *batches, **settings)


def shift_by_step(model, *batches, **settings):
    return SOS(model, start=0, interval=1, **settings).step(0, 2, *batches)


COMPILER = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
DOORS = pytest.mark.parametrize("shift", [shift_by_shift_model, shift_by_step])


def mean_loss(model, heldout, criterion=cross_entropy):
    model.eval()
    with torch.no_grad():
        return sum(len(y) * float(criterion(model(x), y)) for x, y in heldout) / sum(len(y) for _, y in heldout)


class Language(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.emb, self.body, self.head = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, x):
        return self.head(self.body(self.emb(x)).tanh()).flatten(0, 1)


@DOORS
def test_tied_weights_are_refused_by_name(shift):
    x = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(0))
    criterion = lambda z, y: cross_entropy(z, y.flatten())  # noqa: E731
    for tied in False, True:
        model = seeded(Language(tied))
        before = model.head.weight.detach().clone()
        if tied:
            with pytest.raises(ValueError, match=r"head\.weight is shared with emb\.weight.*Untie the weights"):
                shift(model, [(x, x)], [(x, x)], criterion=criterion)
            assert torch.equal(model.head.weight, before)
        else:
            report = shift(model, [(x, x)], [(x, x)], criterion=criterion, guard=9.0, rank=3)
            assert report.heldout_after == pytest.approx(mean_loss(model, [(x, x)], criterion), rel=1e-5)


class Twins(nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.calls, self.body, self.fc, self.unused = calls, nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return sum(self.fc(self.body(k * x).tanh()) for k in range(1, self.calls + 1))


@DOORS
@pytest.mark.parametrize(("calls", "layers", "runs"), [(2, None, 2), (3, "fc", 3), (1, "unused", 0), (1, "*u*", 0)])
def test_a_layer_that_does_not_run_once_is_refused_by_name(shift, calls, layers, runs):
    model, batch = seeded(Twins(calls)), data(9, (5,))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=rf"Layer '(fc|unused)' ran {runs} times in one forward pass, not once"):
        shift(model, [batch], [batch], layers=layers)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def compiled_models(backend):
    def wrapped(model):
        return torch.compile(model, backend=backend)

    def in_place(model):
        model.compile(backend=backend)
        return model

    def head(model):
        model[3] = torch.compile(model[3], backend=backend)
        return model

    def body(model):
        model[0].compile(backend=backend)
        return model

    def method(model):
        model.forward = torch.compile(model.forward, backend=backend)
        return model

    return {"wrapped": wrapped, "in place": in_place, "head": head, "body": body, "forward": method}


@DOORS
@pytest.mark.parametrize("how", ["wrapped", "in place", "head", "body", "forward"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=COMPILER)])
def test_a_compiled_model_is_judged_as_it_was_written(shift, how, backend):
    torch._dynamo.reset()
    raw = mlp()[0]
    plain, model = copy.deepcopy(raw), compiled_models(backend)[how](raw)
    fit, held = [data(9, (5,))], [data(8, (5,), seed=1), data(5, (5,), seed=2)]
    mean_loss(model, held)  # traced before any hook was there
    report = shift(model, fit, held, rank=1, guard=9.0)
    weight = [p for p in raw.parameters() if p.shape == plain[3].weight.shape][0]  # noqa: RUF015
    assert not torch.equal(weight, plain[3].weight)
    with torch.no_grad():
        plain[3].weight.copy_(weight)
    assert report.heldout_after == pytest.approx(mean_loss(plain, held), rel=1e-5)
    assert report.heldout_after == pytest.approx(mean_loss(model, held), rel=1e-5)
    assert abs(report.heldout_after - report.heldout_before) > 1e-4


# Batches of other forms -----------------------------------------------------------------------------------------------
Pair = namedtuple("Pair", "first second")


class Forms(nn.Module):
    """Takes a namedtuple, two tensors in a tuple, a PackedSequence, or keywords, and returns the same logits."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, batch=None, *, x=None, labels=None):
        if isinstance(batch, nn.utils.rnn.PackedSequence):
            batch = nn.utils.rnn.pad_packed_sequence(batch, batch_first=True)[0].sum(1)
        elif isinstance(batch, Pair):
            batch = batch.first + batch.second
        elif isinstance(batch, tuple):
            batch = batch[0] + batch[1]
        logits = self.head(self.body(x if batch is None else batch).tanh())
        return logits if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


@DOORS
@pytest.mark.parametrize("form", ["namedtuple", "two", "packed", "dictionary", "forward"])
def test_batches_of_any_form_give_the_same_shift(shift, form):
    (x, y), settings = data(9, (5,)), {"rank": 3, "guard": 9.0}
    expected = seeded(Forms())
    wanted = shift(expected, [(x, y)], [(x, y)], **settings)
    batch = {
        "namedtuple": (Pair(x, torch.zeros_like(x)), y),
        "two": ((x, torch.zeros_like(x)), y),
        "packed": (nn.utils.rnn.pack_sequence([row[None] for row in x]), y),
        "dictionary": {"x": x, "labels": y},
        "forward": (x, 0 * x, y),
    }[form]
    if form == "dictionary":
        settings["criterion"] = lambda output, labels: output["loss"]
    if form == "forward":
        settings["forward"] = lambda model, batch: model((batch[0], batch[1]))
    model = seeded(Forms())
    report = shift(model, [batch], [batch], **settings)
    torch.testing.assert_close(model.head.weight, expected.head.weight)
    assert report.heldout_after == pytest.approx(wanted.heldout_after, rel=1e-5)


@DOORS
def test_targets_of_none_and_a_criterion_without_reduction(shift):
    (x, y), model = data(9, (5,)), mlp()[0]
    report = shift(model, [(x, None)], [(x, None)], criterion=lambda z, y: z.square().mean(), rank=3)
    assert report.heldout_after == pytest.approx(float(outputs(model, x).square().mean()), rel=1e-5)
    with pytest.raises(ValueError, match=r"criterion returned \(9,\); it must return a scalar tensor"):
        shift(mlp()[0], [(x, y)], [(x, y)], criterion=partial(cross_entropy, reduction="none"))


def test_the_guard_is_judged_per_sample():
    model, _, shape = mlp()
    held = [data(n, shape, seed=n) for n in (1, 9, 3)]
    report = shift_model(model, [data(9, shape)], held, guard=None)
    assert report.heldout_after == pytest.approx(mean_loss(model, held), rel=1e-5)
    assert math.isfinite(report.heldout_before) and report.guard is None and "no guard" in str(report)
