# yolo-sos, AGPL-3.0
"""A shift of a model's final layers: sample, capture, solve, guard, write."""

import copy
import gc
import math
import re
import time
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from yolo_sos.core import (
    METHODS,
    SOLVERS,
    Engine,
    FinalLayer,
    HeldOut,
    LayerReport,
    Method,
    ModelTask,
    Moments,
    RowSample,
    ShiftReport,
    budgeted_shift,
    expected_shift,
    layer_outputs,
    minimum_norm_shift,
    principal_shift,
    row_groups,
    weight_matrix,
)
from yolo_sos.core import engine as engine_module
from yolo_sos.core import solvers as solvers_module

WIDTH, CLASSES = 16, 3


def shift_layers(
    model,
    layers,
    fit,
    task,
    *,
    heldout=(),
    shifted=None,
    beside=None,
    method=None,
    step=1.0,
    guard=None,
    seed=0,
):
    """Shift by all steps of the engine, one after the other; the task knows of all layers."""
    task.layers, method = layers, method or Method("principal", rank=0.5)
    engine = Engine(model, layers if shifted is None else shifted, task, [(method, seed)])
    engine.fit(fit)
    shift = engine.solve(method, seed)
    held = engine.hold_out(heldout)
    accepted, before, after = engine.accept(shift, held, guard, step)
    engine.write(shift, accepted, beside)
    return engine.report(shift, accepted, before, after, guard)


# Models ---------------------------------------------------------------------------------------------------------------
def filled(model, seed=0):
    """Give a model seeded weights and BatchNorm statistics, and train mode with one BatchNorm frozen."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5, generator=g)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d):
            m.running_mean.normal_(generator=g)
            m.running_var.uniform_(0.5, 2, generator=g)
    model.train()
    return model


def mlp(dtype=torch.float32, dropout=0.5):
    """Return a classifier with BatchNorm and dropout in train mode, and its final layer."""
    model = nn.Sequential(
        nn.Linear(4, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Dropout(dropout), nn.Linear(WIDTH, CLASSES)
    )
    model = filled(model).to(dtype)
    return model, [FinalLayer("4", model[4])]


def batches(*sizes, seed=1, dtype=torch.float32):
    """Return batches of inputs and labels; every class has rows."""
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 4, generator=g).to(dtype), torch.arange(n) % CLASSES) for n in sizes]


class Detector(nn.Module):
    """A stem, a tower for boxes and one for classes, and a 1×1 convolution on each."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU())
        self.frozen = nn.BatchNorm2d(6)
        self.box_tower = nn.Sequential(nn.Conv2d(6, 12, 1), nn.ReLU(), nn.Dropout(0.3))
        self.cls_tower = nn.Sequential(nn.Conv2d(6, 10, 1), nn.SiLU())
        self.box, self.cls = nn.Conv2d(12, 4, 1), nn.Conv2d(10, CLASSES, 1)

    def forward(self, x):
        x = self.frozen(self.stem(x))
        return {"box": self.box(self.box_tower(x)), "cls": self.cls(self.cls_tower(x))}


class DetectorTask:
    """Squared error of boxes and cross-entropy of classes, against what the batch holds."""

    def run(self, model, batch):
        return model(batch["img"])

    def probabilities(self, layer, logits, batch):
        assert layer.name == "cls"
        return logits.sigmoid()

    def replay_state(self, batch, output):
        return batch, {}

    def replay(self, rest, outputs):
        return {**rest, **outputs}

    def loss(self, output, batch):
        return (output["box"] - batch["box"]).square().mean() + cross_entropy(output["cls"], batch["label"])

    def size(self, batch):
        return len(batch["img"])


def detector():
    """Return a detector in train mode but for a frozen BatchNorm, and its final layers."""
    model = filled(Detector())
    model.frozen.eval()
    layers = [FinalLayer("box", model.box, "box", classifier="cls"), FinalLayer("cls", model.cls, "cls")]
    return model, layers


def images(*sizes, seed=2):
    """Return batches for the detector."""
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "img": torch.randn(n, 2, 5, 4, generator=g),
            "box": torch.randn(n, 4, 5, 4, generator=g),
            "label": torch.randint(CLASSES, (n, 5, 4), generator=g),
        }
        for n in sizes
    ]


# What must be as it was -----------------------------------------------------------------------------------------------
def bits(model):
    """Return every parameter and buffer, bit by bit: NaN equals itself."""
    return {k: v.detach().numpy().tobytes() for k, v in model.state_dict().items()}


def surroundings(model):
    """Return all but the weights that a shift must leave alone."""
    return {
        "modes": [(name, m.training) for name, m in model.named_modules()],
        "hooks": [(n, len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()],
        "grads": [(n, p.requires_grad, p.is_leaf, p.grad is None) for n, p in model.named_parameters()],
        "identity": [(n, id(p), p.data_ptr()) for n, p in model.named_parameters()],
        "grad mode": torch.is_grad_enabled(),
        "random state": torch.get_rng_state().tolist(),
    }


def features(model, x):
    """Return the inputs of the MLP's final layer in eval mode, by running the layers before it."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        return twin[:-1](x)


def norm(weight):
    """Return the Frobenius norm, by numpy."""
    return float(np.linalg.norm(weight.detach().double().numpy()))


def counted(module):
    """Return a list that grows with each call of a module."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


# The solution ---------------------------------------------------------------------------------------------------------
def balanced(a, groups, w):
    """Return the sum of the groups' mean second moments."""
    moments = Moments(a.shape[1])
    for g in groups.unique():
        moments.update(a[groups == g], w[groups == g] / w[groups == g].sum())
    return moments


def reference(method, a, p, v):
    """Return the shift of one layer from dense rows, by the formula of each weighting and method."""
    gram = balanced(a, *row_groups("uniform" if method.name == "full" else method.weighting, "linear", p))
    rank = method.rank if isinstance(method.rank, int) else round(method.rank * a.shape[1])
    return {
        "principal": lambda: principal_shift(gram, v, rank=rank),
        "expected": lambda: expected_shift(gram, v, rows=rank),
        "budget": lambda: budgeted_shift(gram, v, budget=method.budget),
        "full": lambda: principal_shift(gram, v),
    }[method.name]()


class SoftTask(ModelTask):
    """Labels with probabilities strictly between 0 and 1, so that every weighting has something to weigh."""

    def probabilities(self, layer, logits, batch):
        return logits.softmax(1)


@pytest.mark.parametrize("weighting", ["balanced", "confidence", "uniform"])
@pytest.mark.parametrize("name", ["principal", "expected", "budget", "full"])
def test_each_method_writes_its_solution(name, weighting):
    model, layers = mlp(torch.float64)
    fit = batches(20, 1, 13, dtype=torch.float64)
    method = Method(name, rank=5, budget=0.1, weighting=weighting)
    a = features(model, torch.cat([x for x, _ in fit]))
    v, bias = model[4].weight.detach().clone(), model[4].bias.detach()
    expected = reference(method, a, (a @ v.T + bias).softmax(1), v)
    report = shift_layers(model, layers, iter(fit), SoftTask(), method=method, guard=None)
    assert torch.allclose(model[4].weight, expected.weight, rtol=1e-9, atol=1e-12)
    (record,) = report.layers
    assert (record.name, record.kind, record.level, record.d, record.rows) == ("4", "linear", 0, WIDTH, 34)
    assert record.rank == pytest.approx(expected.rank, rel=1e-9)
    assert record.norm_before == pytest.approx(norm(v), rel=1e-12)
    assert record.norm_after == pytest.approx(norm(model[4].weight), rel=1e-12)
    assert record.deviation == pytest.approx(expected.deviation, rel=1e-6, abs=1e-12)
    assert report.squared_norm_ratio == pytest.approx((norm(model[4].weight) / norm(v)) ** 2, rel=1e-12)
    assert (report.status, report.step) == ("ok", 1.0)


def test_balanced_by_labels_is_the_mean_over_classes():
    model, layers = mlp(torch.float64)
    fit = [(x, torch.tensor([0] * 10 + [1] * 3 + [2] * 1)) for x, _ in batches(14, dtype=torch.float64)]
    a, labels, v = features(model, fit[0][0]), fit[0][1], model[4].weight.detach().clone()
    g = sum(a[labels == c].T @ a[labels == c] / (labels == c).sum() for c in range(CLASSES))
    _, vectors = np.linalg.eigh(g.numpy())
    top = torch.from_numpy(vectors[:, -4:].copy())
    shift_layers(model, layers, fit, ModelTask(), method=Method("principal", rank=4), guard=None)
    assert torch.allclose(model[4].weight, v @ top @ top.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_keep_the_outputs_of_the_rows_drawn(solver):
    model, layers = mlp()
    fit = batches(5, 3)  # eight rows, sixteen columns
    model.eval()
    with torch.no_grad():
        before = [model(x) for x, _ in fit]
    method = Method("rows", rank=8, solver=solver, weighting="uniform")
    report = shift_layers(model, layers, fit, ModelTask(), method=method, guard=None)
    with torch.no_grad():
        after = [model(x) for x, _ in fit]
    for b, z in zip(before, after, strict=True):
        assert torch.allclose(z, b, rtol=1e-5, atol=1e-5)
    assert report.squared_norm_ratio < 0.9
    assert (report.rank, report.layers[0].rows) == (8.0, 8)
    assert report.deviation < 1e-6


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_are_solved_by_the_solver_asked_for(monkeypatch, solver):
    asked, solve = [], solvers_module.minimum_norm_shift

    def spy(features, weight, *, solver):
        asked.append(solver)
        return solve(features, weight, solver=solver)

    monkeypatch.setattr(solvers_module, "minimum_norm_shift", spy)
    model, layers = detector()
    shift_layers(model, layers, images(2), DetectorTask(), method=Method("rows", rank=3, solver=solver))
    assert asked == [solver, solver]


def test_rows_are_the_minimum_norm_shift_of_some_rows_and_the_seed_says_of_which():
    fit = batches(40, 40)
    written = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model, layers = mlp()
        torch.manual_seed(noise)
        method = Method("rows", rank=6)
        shift_layers(model, layers, copy.deepcopy(fit), ModelTask(), method=method, guard=None, seed=seed)
        written.append(model[4].weight.detach().clone())
    assert torch.equal(written[0], written[1])
    assert not torch.allclose(written[0], written[2], rtol=1e-2)
    model, _ = mlp()
    sample = RowSample(WIDTH, CLASSES, 6, torch.Generator().manual_seed(0))
    for x, y in fit:
        sample.update(features(model, x), y, torch.ones(len(y)))
    assert torch.equal(written[0], minimum_norm_shift(sample.sample, model[4].weight).weight)


@pytest.mark.parametrize("name", METHODS)
def test_a_shift_repeats_bit_by_bit(name):
    runs = []
    for _ in range(2):
        model, layers = detector()
        method = Method(name, rank=0.5, budget=0.1)
        shift_layers(model, layers, images(3, 2), DetectorTask(), method=method, guard=None, seed=7)
        runs.append(bits(model))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("name", ["principal", "expected", "budget", "full"])
def test_batches_do_not_matter_to_the_spectral_methods(name):
    whole, layers = mlp(torch.float64)
    (x, y), method = batches(24, dtype=torch.float64)[0], Method(name, rank=5, budget=0.05)
    shift_layers(whole, layers, [(x, y)], ModelTask(), method=method, guard=None)
    pieces, layers = mlp(torch.float64)
    cut = list(zip(x.split(7), y.split(7), strict=True))
    shift_layers(pieces, layers, cut, ModelTask(), method=method, guard=None)
    assert torch.allclose(pieces[4].weight, whole[4].weight, rtol=1e-9, atol=1e-12)


def test_convolutions_of_a_detector():
    """Each layer is shifted on its own inputs, weighted by what the class layer says of the same pixels."""
    model, layers = detector()
    twin, batch = copy.deepcopy(model).eval(), images(3)[0]
    with torch.no_grad():
        x = twin.frozen(twin.stem(batch["img"]))
        maps = {"box": twin.box_tower(x), "cls": twin.cls_tower(x)}
        p = twin.cls(maps["cls"]).sigmoid().permute(0, 2, 3, 1).reshape(-1, CLASSES).double()
    report = shift_layers(model, layers, [batch], DetectorTask(), method=Method("principal", rank=4), guard=None)
    for record, layer in zip(report.layers, layers, strict=True):
        a = maps[layer.name].permute(0, 2, 3, 1).reshape(60, -1).double()
        moments = balanced(a, *row_groups("balanced", layer.kind, p))
        if layer.name == "cls":
            moments.update(a, torch.full((60,), 1 / 60))  # the background
        expected = principal_shift(moments, getattr(twin, layer.name).weight.flatten(1), rank=4)
        assert torch.allclose(layer.module.weight.flatten(1), expected.weight, rtol=1e-4, atol=1e-5)
        assert (record.name, record.kind, record.d, record.rows) == (layer.name, layer.name, a.shape[1], 60)
        assert record.deviation == pytest.approx(expected.deviation, rel=1e-3)


def test_a_convolutional_classifier():
    """A 1×1 convolution behind a pooling is a final layer like another: one row per image."""
    model = filled(
        nn.Sequential(
            nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 3, 1)
        ).append(nn.Flatten())
    ).eval()
    x = torch.randn(7, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(x)
    fit = [(x, torch.arange(7) % 3)]
    report = shift_layers(
        model, [FinalLayer("4", model[4])], fit, ModelTask(), method=Method("full"), heldout=fit, guard=1e-3
    )
    with torch.no_grad():
        assert torch.allclose(model(x), before, rtol=1e-4, atol=1e-4)
    assert (report.step, report.rank) == (1.0, 7.0)
    assert report.squared_norm_ratio < 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "loss"])  # which asks for a replay
def test_a_model_keeps_its_dtype(name, dtype):
    model, layers = mlp(dtype)
    report = shift_layers(model, layers, batches(10, dtype=dtype), ModelTask(), method=Method(name, rank=4), guard=None)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert report.squared_norm_ratio < 1
    assert report.layers[0].norm_after == pytest.approx(norm(model[4].weight), rel=1e-12)


def test_only_the_layers_asked_for_are_shifted():
    model, layers = detector()
    before = bits(model)
    batch = images(2, seed=5)
    report = shift_layers(
        model,
        layers,
        images(3),
        DetectorTask(),
        shifted=layers[:1],
        method=Method("principal", rank=3),
        heldout=batch,
        guard=9e9,
    )
    changed = {k for k, v in bits(model).items() if v != before[k]}
    assert changed == {"box.weight"}
    assert [r.name for r in report.layers] == ["box"]
    assert report.heldout_after == pytest.approx(heldout_loss(model, batch), rel=1e-5)


def test_everything_but_the_weights_stays():
    model, layers = detector()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, around = bits(model), surroundings(model)
    report = shift_layers(model, layers, images(2, 3), DetectorTask(), heldout=images(2, seed=5), guard=9e9)
    assert report.step == 1.0
    assert {k for k, v in bits(model).items() if v != before[k]} == {"box.weight", "cls.weight"}
    assert surroundings(model) == around  # train and eval modes, hooks, gradients, identities, random state
    assert all((p.grad == 1).all() for p in model.parameters())
    assert not model.frozen.training
    assert model.stem[1].training


def test_no_gradients_are_left():
    model, layers = detector()
    shift_layers(model, layers, images(2), DetectorTask(), heldout=images(2), guard=9e9)
    assert [p.grad for p in model.parameters()] == [None] * len(list(model.parameters()))
    assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in model.parameters())


def test_no_graph_is_built():
    class Task(DetectorTask):
        def run(self, model, batch):
            assert not torch.is_grad_enabled()
            assert not model.training
            output = model(batch["img"])
            assert not output["box"].requires_grad
            return output

        def loss(self, output, batch):
            assert not output["box"].requires_grad
            return super().loss(output, batch)

    model, layers = detector()
    report = shift_layers(model, layers, images(2), Task(), heldout=images(2), guard=9e9)
    assert report.step == 1.0
    assert torch.is_grad_enabled()


def test_dropout_is_off_and_batchnorm_uses_its_running_statistics():
    weights = []
    for dropout in (0.0, 0.9):
        model, layers = mlp(dropout=dropout)
        before = bits(model[1])
        shift_layers(model, layers, batches(12, 9), ModelTask(), method=Method("principal", rank=5), guard=None)
        assert bits(model[1]) == before
        weights.append(model[4].weight)
    assert torch.equal(*weights)


# The guard ------------------------------------------------------------------------------------------------------------
class DriftTask(ModelTask):
    """The loss is a constant plus how far the outputs are from the batch's reference: t²·D at step t."""

    def __init__(self, base):
        super().__init__(lambda z, y: base + (z - y).square().sum() / len(z))

    def probabilities(self, layer, logits, batch):
        return torch.ones(len(logits), 1)


def drift():
    """Return a model, its layers, a batch whose reference is its own output, V, V* and the full step's loss D."""
    model, layers = mlp(torch.float64)
    x = batches(20, dtype=torch.float64)[0][0]
    a, v = features(model, x), model[4].weight.detach().clone()
    batch = (x, a @ v.T + model[4].bias.detach())
    target = principal_shift(Moments(WIDTH).update(a), v, rank=3).weight
    return model, layers, batch, a, v, target, float((a @ (target - v).T).square().sum() / 20)


@pytest.mark.parametrize(
    ("base", "step"),  # a rise of t²·D is accepted up to guard·base = base
    [(1.01, 1.0), (0.99, 0.5), (0.26, 0.5), (0.24, 0.25), (0.07, 0.25), (0.06, 0.0), (1e-9, 0.0)],
)
def test_the_guard_steps_back_until_the_loss_is_in_bounds(base, step):
    model, layers, batch, a, v, target, full = drift()
    before = bits(model)
    report = shift_layers(
        model, layers, [batch], DriftTask(base * full), heldout=[batch], method=Method("principal", rank=3), guard=1.0
    )
    assert report.step == step
    assert report.heldout_before == pytest.approx(base * full, rel=1e-9)
    assert report.heldout_after == pytest.approx((base + step**2) * full, rel=1e-9)
    written = model[4].weight.detach()
    assert torch.allclose(written, v + step * (target - v), rtol=1e-12, atol=1e-12)
    (record,) = report.layers
    assert record.norm_before == pytest.approx(norm(v), rel=1e-12)
    assert record.norm_after == pytest.approx(norm(written), rel=1e-12)
    assert record.deviation == pytest.approx(float((a @ (written - v).T).norm() / (a @ v.T).norm()), abs=1e-12)
    assert record.rank == 3  # that of the full shift
    assert report.squared_norm_ratio == pytest.approx((norm(written) / norm(v)) ** 2, rel=1e-12)
    if step == 0:
        assert report.status == "guarded"
        assert bits(model) == before
        assert (report.squared_norm_ratio, report.deviation) == (1.0, 0.0)
    else:
        assert report.status == "ok"


@pytest.mark.parametrize(("guard", "t"), [(None, 0.6), (1.0, 0.6), (0.35, 0.3), (0.05, 0.15), (0.02, 0.0)])
def test_a_shift_goes_no_further_than_its_largest_step(guard, t):
    model, layers, batch, _, v, target, full = drift()  # from D the loss rises by t²·D
    report = shift_layers(
        model,
        layers,
        [batch],
        DriftTask(full),
        heldout=[batch],
        method=Method("principal", rank=3),
        step=0.6,
        guard=guard,
    )
    assert report.step == pytest.approx(t)
    assert torch.allclose(model[4].weight, v + t * (target - v), rtol=1e-12, atol=1e-12)
    assert report.squared_norm_ratio == pytest.approx((norm(model[4].weight) / norm(v)) ** 2, rel=1e-12)


def test_a_guard_of_zero_accepts_what_does_not_rise():
    model, layers = mlp(torch.float64)
    task = ModelTask(lambda z, y: z.square().mean())  # smaller outputs, smaller loss
    fit = batches(20, dtype=torch.float64)
    with torch.no_grad():
        model[4].bias.zero_()
    report = shift_layers(
        model, layers, fit, task, heldout=fit, method=Method("expected", rank=3, weighting="uniform"), guard=0.0
    )
    assert report.step == 1.0
    assert report.heldout_after < report.heldout_before
    assert norm(model[4].weight) < 0.9 * report.layers[0].norm_before


def test_a_negative_loss_rises_by_a_part_of_its_size():
    model, _, batch, *_, full = drift()
    # From −4D a full step rises by D, which is a quarter.
    for guard, step in ((0.26, 1.0), (0.24, 0.5)):
        twin = copy.deepcopy(model)
        report = shift_layers(
            twin,
            [FinalLayer("4", twin[4])],
            [batch],
            DriftTask(-4 * full),
            heldout=[batch],
            method=Method("principal", rank=3),
            guard=guard,
        )
        assert report.step == step


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_not_accepted(where, value):
    model, layers, batch, *_ = drift()
    before = bits(model)

    class Task(DriftTask):
        def loss(self, output, batch):
            moved = (output - batch[1]).abs().max() > 1e-6
            return torch.tensor(value if moved == (where == "after") else 1.0)

    report = shift_layers(
        model, layers, [batch], Task(1.0), heldout=[batch], method=Method("principal", rank=3), guard=1.0
    )
    assert (report.step, report.status) == (0.0, "guarded")
    assert bits(model) == before
    expected = 1.0 if where == "after" else value
    for loss in (report.heldout_before, report.heldout_after):
        assert loss == expected or (math.isnan(loss) and math.isnan(expected))


def heldout_loss(model, heldout):
    """Return the detector's loss per image, by running the whole model."""
    task, twin = DetectorTask(), copy.deepcopy(model).eval()
    with torch.no_grad():
        losses = [float(task.loss(twin(b["img"]), b)) * len(b["img"]) for b in heldout]
    return sum(losses) / sum(len(b["img"]) for b in heldout)


@pytest.mark.parametrize("name", METHODS)
def test_heldout_losses_are_those_of_the_whole_model(name):
    model, layers = detector()
    heldout = images(1, 4, 2, seed=5)  # the mean is over images, not batches
    before = heldout_loss(model, heldout)
    report = shift_layers(
        model, layers, images(3), DetectorTask(), heldout=iter(heldout), method=Method(name, budget=0.2), guard=9e9
    )
    assert report.step == 1.0
    assert report.heldout_before == pytest.approx(before, rel=1e-5)
    assert report.heldout_after == pytest.approx(heldout_loss(model, heldout), rel=1e-5)


def test_a_classifiers_loss_is_per_image_too():
    model, layers = mlp(torch.float64)
    heldout = batches(1, 9, 3, seed=5, dtype=torch.float64)
    report = shift_layers(
        model,
        layers,
        batches(10, dtype=torch.float64),
        ModelTask(),
        heldout=heldout,
        method=Method("full"),
        guard=9e9,
    )
    with torch.no_grad():
        z = model.eval()(torch.cat([x for x, _ in heldout]))
    expected = cross_entropy(z, torch.cat([y for _, y in heldout]))
    assert report.heldout_after == pytest.approx(float(expected), rel=1e-9)


def test_a_model_that_runs_under_autocast_is_judged_too():
    class Autocast(ModelTask):
        def run(self, model, batch):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return model(batch[0])

    model, layers = mlp()
    report = shift_layers(
        model, layers, batches(20), Autocast(), heldout=batches(8, seed=3), method=Method("expected", rank=3), guard=9e9
    )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ((x, y),) = batches(8, seed=3)
        expected = cross_entropy(model.eval()(x).float(), y)
    assert report.step == 1.0
    assert report.heldout_after == pytest.approx(float(expected), rel=0.02)


def test_the_guard_evaluates_only_the_final_layers():
    model, layers = detector()
    calls = counted(model.stem), counted(model.box_tower), counted(model.cls)
    report = shift_layers(
        model,
        layers,
        images(2, 2),
        DetectorTask(),
        heldout=images(1, 1, 1),
        method=Method("principal", rank=1),
        guard=-0.5,
    )
    assert report.step == 0.0  # all steps were tried: no loss falls by half
    assert [len(c) for c in calls[:2]] == [5, 5]  # once per batch
    assert len(calls[2]) == 5 + 1 + 3 * 3  # once more to compare, and at 1, ½, ¼ on each held-out batch


@pytest.mark.parametrize("step", [1.0, 0.6])
def test_without_a_guard_the_same_losses_are_reported(step):
    reports = []
    for guard in None, 9e9:
        model, layers = detector()
        heldout = images(2, 1, seed=5)
        reports.append(shift_layers(model, layers, images(2), DetectorTask(), heldout=heldout, step=step, guard=guard))
        assert reports[-1].heldout_after == pytest.approx(heldout_loss(model, heldout), rel=1e-5)
    assert reports[0].heldout_before == reports[1].heldout_before
    assert reports[0].heldout_after == reports[1].heldout_after
    assert reports[0].step == step


def test_without_heldout_images_there_is_no_loss():
    for heldout in (), [images(0)[0]]:
        model, layers = detector()
        report = shift_layers(model, layers, images(2), DetectorTask(), heldout=heldout, guard=0.0)
        assert report.step == 1.0
        assert math.isnan(report.heldout_before) and math.isnan(report.heldout_after)


def test_batches_without_images_change_nothing():
    losses = []
    for sizes in (2, 1), (0, 2, 0, 1):
        model, layers = detector()
        report = shift_layers(model, layers, images(*sizes), DetectorTask(), heldout=images(*sizes, seed=5), guard=9e9)
        losses.append((report.heldout_before, report.layers[0].rows))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("batch", [0, 1])
def test_outputs_that_cannot_be_replayed_are_refused(batch):
    """What follows the final layers has a part that the task does not know of; told before anything is written."""

    class Task(DetectorTask):
        def replay(self, state, outputs):
            return {"box": 2 * outputs["box"], "cls": outputs["cls"]}

    model, layers = detector()
    before, around = bits(model), surroundings(model)
    with pytest.raises(RuntimeError, match=r"The final layers give a loss of .* the model .*: what follows"):
        shift_layers(model, layers, images(2), Task(), heldout=images(*[2] * (batch + 1)), guard=9e9)
    assert bits(model) == before
    assert surroundings(model) == around


# Many methods on one pass ---------------------------------------------------------------------------------------------
def test_many_methods_get_from_one_pass_what_each_would_get_alone():
    model, layers = detector()
    fit, task = images(2, 3), DetectorTask()
    trials = [(Method(name, rank=r, budget=0.1), 0) for name in METHODS for r in (3, 5)]
    trials += [(Method("principal", rank=3, weighting="uniform"), 0), (Method("rows", rank=0.5), 1)]
    trials += [(Method("rows", rank=4, weighting="confidence"), s) for s in (0, 1)]
    trials += [(Method("rows", rank=r, weighting="uniform"), 0) for r in (1, 1.0)]  # one row, and as many as columns
    task.layers = layers
    engine, calls = Engine(model, layers, task, trials), counted(model.stem)
    engine.fit(fit)
    assert len(calls) == 2
    weights = set()
    for method, seed in trials:
        twin, own = detector()
        shift_layers(twin, own, fit, task, method=method, guard=None, seed=seed)
        shift = engine.solve(method, seed)
        assert shift.rows == {"box": 100, "cls": 100}
        for layer, alone in zip(layers, own, strict=True):
            assert torch.equal(shift.weights()[layer.name], weight_matrix(alone.module)), (method, seed)
        weights.add(weight_matrix(twin.box).numpy().tobytes())
    assert len(weights) == len(trials) - 2  # full and budget have no rank


def test_rows_are_released_before_others_are_held_out(monkeypatch):
    model, layers = detector()
    task, method = DetectorTask(), Method("principal", rank=4)
    task.layers = layers
    accumulators = []

    class Watched(RowSample):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            accumulators.append(weakref.ref(self))

    monkeypatch.setattr(engine_module, "RowSample", Watched)
    engine = Engine(model, layers, task, [(method, 0)])
    engine.fit(images(2))
    inputs = []
    engine.run(images(2), lambda batch, output, captured: inputs.extend(weakref.ref(x) for x in captured.values()))
    engine.solve(method)
    gc.collect()
    assert len(accumulators) == len(inputs) == 2
    assert [ref() for ref in (*accumulators, *inputs)] == [None] * 4


def test_outputs_with_other_weights_leave_the_layers_alone():
    model, layers = detector()
    g = torch.Generator().manual_seed(0)
    inputs = {"box": torch.randn(2, 12, 5, 4, generator=g), "cls": torch.randn(2, 10, 5, 4, generator=g)}
    new = torch.randn(4, 12, generator=g)
    before, around = bits(model), surroundings(model)
    outputs = layer_outputs(layers, {"box": new}, inputs)
    by_hand = torch.einsum("oc,bchw->bohw", new, inputs["box"]) + model.box.bias[:, None, None]
    assert torch.allclose(outputs["box"], by_hand, rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs["cls"], model.cls(inputs["cls"]))
    assert bits(model) == before
    assert surroundings(model) == around


# Failed solves --------------------------------------------------------------------------------------------------------
def spoil_features(model):
    model.box_tower[0].bias.data[3] = float("nan")


def spoil_weight(model):
    model.box.weight.data[1, 2] = float("nan")


def spoil_infinity(model):
    model.box.weight.data[1, 2] = float("inf")


def spoil_rank(model):
    model.box_tower[0].weight.data.zero_()
    model.box_tower[0].bias.data.fill_(-1.0)  # the ReLU after it lets nothing through


@pytest.mark.parametrize("guard", [None, 9e9])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    ("spoil", "status"),
    [
        (spoil_features, "non-finite"),
        (spoil_weight, "non-finite"),
        (spoil_infinity, "non-finite"),
        (spoil_rank, "rank-zero"),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_a_failed_solve_leaves_the_model_bit_identical(name, spoil, status, order, guard):
    if (name, status) == ("loss", "rank-zero"):
        pytest.skip("loss keeps what it knows nothing of")
    model, layers = detector()
    layers = [layers[i] for i in order]
    spoil(model)
    before, around = bits(model), surroundings(model)
    report = shift_layers(
        model, layers, images(2, 3), DetectorTask(), heldout=images(2), method=Method(name, rank=4), guard=guard
    )
    assert report.status == f"{status} in box"
    assert {r.name: r.status for r in report.layers} == {"box": status, "cls": "ok"}
    assert bits(model) == before
    assert surroundings(model) == around
    assert report.step == 0.0
    assert report.squared_norm_ratio == 1.0
    assert report.deviation == 0.0
    assert all(r.norm_after == r.norm_before or math.isnan(r.norm_before) for r in report.layers)


@pytest.mark.parametrize("pixel", [0, 17, 59])
def test_rows_see_a_single_bad_pixel(pixel):
    model, layers = detector()
    batch = images(3)[0]
    poison = torch.zeros(60)
    poison[pixel] = float("nan")
    model.box_tower.append(nn.Module())
    model.box_tower[-1].forward = lambda x: x + poison.view(3, 1, 5, 4)  # the boxes' features alone
    before = bits(model)
    report = shift_layers(model, layers, [batch], DetectorTask(), method=Method("rows", rank=3), guard=None)
    assert report.status == "non-finite in box"
    assert bits(model) == before


# What goes along -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("step", "guard", "t"), [(1.0, None, 1.0), (0.5, None, 0.5), (1.0, -1.0, 0.0)])
@pytest.mark.parametrize("name", METHODS)
def test_tensors_go_along_by_the_map_of_the_weight(name, step, guard, t):
    model, layers = detector()
    before = {layer.name: weight_matrix(layer.module).clone() for layer in layers}
    # A copy of the weight ends where the weight does; what is twice as large, at twice that.
    along = {layer.name: [layer.module.weight.detach().clone() * k for k in (1, 2)] for layer in layers}
    report = shift_layers(
        model,
        layers,
        images(2),
        DetectorTask(),
        heldout=images(2),
        beside=along,
        method=Method(name, rank=4, budget=0.3),
        step=step,
        guard=guard,
    )
    assert report.step == t
    for layer in layers:
        if name != "full":  # the inputs of one layer have no null direction
            assert torch.equal(weight_matrix(layer.module), before[layer.name]) == (t == 0)
        for k, tensor in enumerate(along[layer.name], start=1):
            torch.testing.assert_close(tensor, k * layer.module.weight.detach())


# Exceptions -----------------------------------------------------------------------------------------------------------
class Boom(Exception):
    """Raised half way."""


def on_call(number, function, error=Boom):
    """Return a function that raises when it is called for the ``number``-th time."""
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise error
        return function(*args, **kwargs)

    return wrapper


def broken_batches(number):
    """Yield batches and raise instead of the ``number``-th."""
    yield from images(*[2] * (number - 1))
    raise Boom


@pytest.mark.parametrize("name", ["principal", "rows"])
@pytest.mark.parametrize(
    "where",
    [
        "fit",
        "heldout",
        "forward",
        "task.run",
        "task.probabilities",
        "task.replay_state",
        "task.replay",
        "task.loss",
        "task.size",
        "solver",
        "guard",
        "first write",
        "second write",
        "interrupted write",
        "write beside",
    ],
)
def test_an_exception_leaves_everything_as_it_was(monkeypatch, where, name):
    model, layers = detector()
    task, fit, heldout, error = DetectorTask(), images(2, 2), images(2, 2, seed=5), Boom
    if where == "fit":
        fit = broken_batches(2)
    elif where == "heldout":
        heldout = broken_batches(2)
    elif where == "forward":  # between the hooks of the two layers, in the second batch
        model.cls_tower.forward = on_call(2, model.cls_tower.forward)
    elif where == "write beside":  # a tensor of a wrong shape, when the weights and another one have been written
        wrong = lambda result, x, step: torch.zeros(x.numel() + (x.shape[0] != 4))  # noqa: E731
        monkeypatch.setattr(solvers_module.ShiftResult, "apply", wrong)
        error = RuntimeError
    elif where.startswith("task."):
        monkeypatch.setattr(task, where[5:], on_call(2, getattr(task, where[5:])))
    elif where == "solver":
        function = "minimum_norm_shift" if name == "rows" else "principal_shift"
        monkeypatch.setattr(solvers_module, function, on_call(2, getattr(solvers_module, function)))
    elif where == "guard":
        monkeypatch.setattr(engine_module.Shift, "weights", on_call(2, engine_module.Shift.weights))
    else:
        error = KeyboardInterrupt if where == "interrupted write" else Boom
        write, calls = engine_module.write_weight, []

        def half_written(module, weight):
            calls.append(1)
            if len(calls) == (1 if where == "first write" else 2):
                module.weight.data[0] = 7.0
                raise error
            write(module, weight)

        monkeypatch.setattr(engine_module, "write_weight", half_written)
    beside = {layer.name: [torch.ones_like(layer.module.weight)] for layer in layers}
    before, around = bits(model), surroundings(model)
    with pytest.raises(error):
        shift_layers(model, layers, fit, task, heldout=heldout, beside=beside, method=Method(name, rank=4), guard=9e9)
    assert bits(model) == before
    assert all(torch.equal(x, torch.ones_like(x)) for (x,) in beside.values())
    assert surroundings(model) == around
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert not model.frozen.training
    assert model.stem[1].training
    assert model.training


@pytest.mark.parametrize("runs", [0, 2])
def test_a_layer_that_does_not_run_once_is_named(runs):
    model, layers = detector()
    model.extra = nn.Linear(4, 2)
    plain = model.forward
    model.forward = lambda x: ([model.extra(x) for _ in range(runs)], plain(x))[1]
    extra = FinalLayer("extra", model.extra, classifier="cls")
    before, around = bits(model), surroundings(model)
    with pytest.raises(RuntimeError, match=rf"Layer 'extra' ran {runs} times in one forward pass, not once"):
        shift_layers(model, [*layers, extra], images(2), DetectorTask(), guard=None)
    assert bits(model) == before
    assert surroundings(model) == around


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, "no layer to shift"),
        ({"shifted": []}, "no layer to shift"),
        ({"fit": []}, "nothing to fit on"),
        ({"fit": iter(())}, "nothing to fit on"),
        ({"fit": images(0)}, "nothing to fit on"),
    ],
)
def test_errors_come_before_anything_is_written(options, message):
    model, layers = detector()
    before, around = bits(model), surroundings(model)
    arguments = {"layers": layers, "fit": images(2), "guard": None, **options}
    with pytest.raises(ValueError, match=message):
        shift_layers(model, task=DetectorTask(), **arguments)
    assert bits(model) == before
    assert surroundings(model) == around


# Method and report ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "rank", "d", "expected"),
    [
        ("principal", 0.5, 64, 32),
        ("principal", 1.0, 64, 64),
        ("principal", 0.001, 64, 1),
        ("principal", 1, 64, 1),  # an int is a number of dimensions, 1.0 all of them
        ("principal", 100, 64, 64),
        ("expected", 0.25, 80, 20),
        ("expected", 100, 64, 64),
        ("rows", 0.5, 64, 32),
        ("rows", 100, 64, 100),  # more rows than columns can be drawn
    ],
)
def test_rank_of_a_layer(name, rank, d, expected):
    method = Method(name, rank=rank)
    assert method.rank_of(d) == expected
    assert type(method.rank_of(d)) is int


RANK = "an integer of at least 1, or a fraction of d: a float above 0 and up to 1.0"
BUDGET = "a number of at least 0 and less than 1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "svd"}, "'method=svd' is invalid: method must be one of loss, expected,"),
        ({"name": None}, "'method=None' is invalid"),
        ({"solver": "qr"}, "'solver=qr' is invalid: solver must be one of svd, gauss;"),
        ({"weighting": "loss"}, "'weighting=loss' is invalid: weighting must be one of balanced, confidence, uniform;"),
        *[
            ({"rank": rank}, f"'rank={rank}' is invalid: rank must be {RANK}.")
            for rank in (0, -3, 0.0, 1.5, 36.0, float("nan"), float("inf"), True, "0.5")
        ],
        *[
            ({"budget": budget}, f"'budget={budget}' is invalid: budget must be {BUDGET}.")
            for budget in (2.0, 1.0, -0.1, float("nan"), True, "0.1")
        ],
    ],
)
def test_wrong_values_are_refused_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Method(**options)


def record(name="a", before=2.0, after=1.0, rank=3.0, deviation=0.1, status="ok"):
    """Return a layer's record."""
    return LayerReport(name, "box", 0, 8, 100, rank, before, after, deviation, status)


def test_a_report_sums_up_its_layers():
    layers = record(before=2.0, after=1.0, rank=3, deviation=0.1), record("b", 4.0, 3.0, rank=6, deviation=0.3)
    report = ShiftReport(layers, 1.0, 1.1, 0.5, None, {})
    assert report.squared_norm_ratio == (1 + 9) / (4 + 16)
    assert report.rank == 4.5
    assert report.deviation == pytest.approx(0.2)
    assert report.status == "ok"
    assert ShiftReport(layers, 1.0, 1.0, 0.0, 0.01, {}).status == "guarded"
    failed = record("c", status="rank-zero"), record("d", status="non-finite")
    assert ShiftReport((*layers, *failed), 1.0, 1.0, 0.0, 0.01, {}).status == "rank-zero in c"


@pytest.mark.parametrize("norm", [0.0, float("nan"), float("inf")])
def test_norms_that_have_no_ratio_give_one(norm):
    assert ShiftReport((record(before=norm, after=norm),), 1.0, 1.0, 0.0, 0.01, {}).squared_norm_ratio == 1.0


def test_times_add_up_to_what_passed():
    def slow():
        for batch in images(1, 1):
            time.sleep(0.02)
            yield batch

    model, layers = detector()
    start = time.perf_counter()
    report = shift_layers(model, layers, slow(), DetectorTask(), heldout=images(1), guard=9e9)
    passed = 1e3 * (time.perf_counter() - start)
    assert list(report.milliseconds) == ["sample", "forward", "rows", "solve", "guard", "write"]
    assert all(v >= 0 for v in report.milliseconds.values())
    assert report.milliseconds["sample"] >= 40  # waiting for the batches
    assert 0.5 * passed < sum(report.milliseconds.values()) <= passed


# The strength that the guard finds ------------------------------------------------------------------------------------
def test_strengths_run_from_next_to_nothing_to_everything():
    assert [Method(name).is_found for name in ("principal", "expected", "rows", "budget", "full")] == [True] * 4 + [
        False
    ]
    assert not Method("principal", rank=0.5).is_found and not Method("budget", budget=0.01).is_found
    assert Method("budget", rank=3).is_found  # the rank of another method
    assert [Method("expected").at(s).rank for s in (0.0, 0.5, 1.0)] == [1.0, 0.75, 0.5]
    assert [Method("budget").at(s).budget for s in (0.0, 0.5, 1.0)] == pytest.approx([1e-4, 10**-2.5, 0.1])
    assert (Method("rows").at(None).rank, Method("budget").at(None).budget) == (0.5, 0.01)
    assert Method("full").at(0.3) == Method("full")


@pytest.mark.parametrize("name", ["expected", "principal", "budget", "rows"])
@pytest.mark.parametrize("guard", [0.02, 0.5])
def test_the_strength_found_is_the_largest_that_the_guard_accepts(name, guard):
    model, layers = mlp(torch.float64)
    task, batch = ModelTask(), batches(40, dtype=torch.float64)[0]
    engine = Engine(model, layers, task, [(Method(name), 5)])
    engine.fit([batch])
    heldout = engine.hold_out([batch])
    shift = engine.find(Method(name), 5, heldout, guard)
    limit = heldout.before * (1 + guard)
    passes = {s: heldout.loss(engine.solve(Method(name).at(s / 32), 5).weights()) <= limit for s in range(1, 33)}
    key = "budget" if name == "budget" else "rank"
    found = next(s for s in passes if getattr(Method(name).at(s / 32), key) == getattr(shift.method, key))
    assert not passes.get(found + 1, False)  # one more is too much
    step, before, after = engine.accept(shift, heldout, guard)
    assert before == heldout.before
    assert after <= limit
    if passes[found]:
        assert step == 1.0
    else:  # none passes: the weakest, shortened or refused
        assert found == 1 and step < 1.0


@pytest.mark.parametrize("name", ["expected", "principal", "budget", "rows"])
def test_where_no_strength_passes_nothing_is_written(name):
    model, layers, batch, *_ = drift()  # the reference is the model's own output: every shift raises the loss
    before = bits(model)
    task, method = DriftTask(0.0), Method(name)
    task.layers = layers
    engine = Engine(model, layers, task, [(method, 0)])
    engine.fit([batch])
    heldout = engine.hold_out([batch])
    shift = engine.find(method, 0, heldout, 0.0)
    step, loss_before, loss_after = engine.accept(shift, heldout, 0.0)
    engine.write(shift, step)
    report = engine.report(shift, step, loss_before, loss_after, 0.0)
    assert (report.step, report.status, report.squared_norm_ratio) == (0.0, "guarded", 1.0)
    assert bits(model) == before


def test_without_a_guard_the_strength_is_the_default():
    model, layers = mlp(torch.float64)
    engine = Engine(model, layers, ModelTask(), [(Method("principal"), 0), (Method("budget"), 0)])
    engine.fit(batches(12, dtype=torch.float64))
    heldout = engine.hold_out(batches(12, dtype=torch.float64))
    nothing = engine.hold_out([])
    for held, guard in ((heldout, None), (nothing, 0.01)):
        assert engine.find(Method("principal"), 0, held, guard).method.rank == 0.5
        assert engine.find(Method("budget"), 0, held, guard).method.budget == 0.01
    assert engine.find(Method("principal", rank=3), 0, heldout, 0.0).method.rank == 3


def test_draws_of_one_seed_share_a_sample():
    model, layers = mlp(torch.float64)
    methods = [Method("rows", rank=r, weighting="uniform") for r in (2, 5)]
    engine = Engine(model, layers, ModelTask(), [(m, 3) for m in methods])
    engine.fit(batches(30, dtype=torch.float64))
    alone = Engine(model, layers, ModelTask(), [(methods[1], 3)])
    alone.fit(batches(30, dtype=torch.float64))
    few, many = (engine.solve(m, 3) for m in methods)
    assert (few.rank, many.rank) == (2, 5)
    assert torch.equal(many.weights()["4"], alone.solve(methods[1], 3).weights()["4"])


def test_a_loss_that_is_known_is_not_computed_again_but_only_on_the_images_that_it_is_of(monkeypatch):
    model, layers = mlp(torch.float64)
    engine = Engine(model, layers, ModelTask(), [(Method("expected"), 0)])
    engine.fit(batches(40, dtype=torch.float64))
    one, other = (engine.hold_out(batches(n, dtype=torch.float64)) for n in (40, 30))
    shift = engine.find(Method("expected"), 0, one, 0.5)
    losses = []
    loss = HeldOut.loss
    monkeypatch.setattr(HeldOut, "loss", lambda self, weights: losses.append(self) or loss(self, weights))
    assert engine.accept(shift, one, 0.5)[2] == loss(one, shift.weights())
    assert losses == []
    assert engine.accept(shift, other, 9e9)[2] == loss(other, shift.weights())
    assert losses == [other]
