# yolo-sos, AGPL-3.0
"""SOS for any PyTorch model, without the host."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, nll_loss
from torchvision.models import VisionTransformer, resnet18

from yolo_sos.core import ClassifierTask, FinalLayer, Method, last_linear, shift_model

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
    layer = last_linear(model)
    assert (layer.name, layer.kind) == (name, "linear")
    norm = float(layer.module.weight.detach().norm())
    report = shift_model(model, [(x[:4], y[:4]), (x[4:], y[4:])], method=Method("full"), guard=None)
    assert model.training
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
    if guard is None:
        assert (report.step, loss() == before) == (1.0, False)
    else:
        assert report.heldout_before == pytest.approx(before, rel=1e-5)
        assert report.heldout_after == pytest.approx(loss(), rel=1e-5)
        assert report.step == 1.0 if guard else loss() <= before * (1 + 1e-6)


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
    assert reports[0].norm_ratio < 0.95 and all(r.heldout_after <= 1.01 * r.heldout_before for r in reports)
    assert float((outputs(model, x[90:]).argmax(1) == y[90:]).float().mean()) > 0.9


def test_the_readme_says_it():
    """What the README shows under this heading runs as it stands, in a user's loop."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## Any PyTorch model\n.*?```python\n(.*?)```", text, re.DOTALL)
    assert block is not None
    model, _, shape = mlp()
    loader = [data(12, shape, seed=seed) for seed in range(4)]
    scope = {
        **{"model": model, "train_loader": loader, "fit_batches": loader[:2], "other_batches": loader[2:]},
        **{"epochs": 4, "loss_fn": cross_entropy, "optimizer": torch.optim.SGD(model.parameters(), 0.1)},
    }
    norm = model[3].weight.norm().item()
    exec(block[1], scope)
    assert scope["report"].status in {"ok", "guarded"}
    assert len([line for line in block[1].splitlines() if "shift" in line or "Method" in line]) <= 5
    assert model[3].weight.norm().item() != norm


def test_the_host_stays_away():
    code = """
import sys, torch
sys.modules["ultralytics"] = None  # an import of it would fail
from yolo_sos.core import Method, shift_model
model = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.ReLU(), torch.nn.Linear(9, 2))
batch = torch.randn(6, 4), torch.arange(6) % 2
report = shift_model(model, [batch], heldout=[batch], method=Method(rank=3), guard=1e9)
assert report.status == "ok" and report.layers[0].rank == 3
assert not [m for m in sys.modules if m.startswith(("torchvision", "cv2", "yolo_sos.train", "yolo_sos.heads"))]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Which layer ----------------------------------------------------------------------------------------------------------
def test_a_layer_can_be_named():
    model, _, shape = mlp()
    report = shift_model(model, [data(6, shape)], layer=model[0], method=Method("full"), guard=None)
    assert report.layers[0].name == "0"
    with pytest.raises(ValueError, match=r"layer=Linear.* is not a module of this Sequential"):
        shift_model(model, [data(6, shape)], layer=nn.Linear(2, 2), guard=None)


def test_what_is_no_linear_layer_is_refused():
    with pytest.raises(TypeError, match=r"Sequential has no nn.Linear and no nn.Conv2d"):
        last_linear(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"1 has kernel_size=\(3, 3\)"):  # not the layer before it, silently
        last_linear(nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 3)))
    with pytest.raises(TypeError, match=r"1 is a ReLU"):
        model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        shift_model(model, [], layer=model[1])


def test_a_guard_needs_heldout_batches():
    model, _, shape = mlp()
    before = model[3].weight.clone()
    with pytest.raises(ValueError, match="The guard needs held-out batches"):
        shift_model(model, [data(6, shape)])
    assert torch.equal(model[3].weight, before)


# Batches and targets --------------------------------------------------------------------------------------------------
def test_batches_move_to_the_model():
    from yolo_sos.core.plain import _moved

    meta = torch.device("meta")
    moved = _moved((torch.ones(2), [torch.ones(3), "text"], {"k": torch.ones(4), "n": 5}), meta)
    assert moved[0].device == moved[1][0].device == moved[2]["k"].device == meta
    assert (moved[1][1], moved[2]["n"]) == ("text", 5)


class Named(nn.Module):
    """Takes a dictionary and returns one, as models from other libraries do."""

    def __init__(self):
        super().__init__()
        self.body, self.classifier = nn.Linear(5, 24), nn.Linear(24, 3)

    def forward(self, inputs):
        return {"logits": self.classifier(inputs["x"] @ self.body.weight.T)}


def test_inputs_and_outputs_may_be_dictionaries():
    model = seeded(Named())
    x, y = data(12, (5,))
    report = shift_model(
        model,
        [({"x": x}, y)],
        heldout=[({"x": x}, y)],
        criterion=lambda out, y: cross_entropy(out["logits"], y),
        method=Method("rows", rank=2),
        guard=1e9,
    )
    assert report.layers[0].name == "classifier"
    assert report.heldout_after == pytest.approx(cross_entropy(model({"x": x})["logits"], y).item(), rel=1e-5)


def probabilities(labels, logits):
    layer = FinalLayer("0", nn.Linear(4, logits.shape[1]))
    return ClassifierTask().probabilities(layer, logits, (None, labels))


def test_labels_are_taken_where_there_are_any():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one_hot = torch.eye(3, dtype=torch.float64)[[2, 0, 1, 1]]
    for labels in (
        torch.tensor([2, 0, 1, 1]),
        torch.tensor([[2, 0], [1, 1]]),
        torch.tensor([2, 0, 1, 1]).to(torch.uint8),
    ):
        assert torch.equal(probabilities(labels, logits), one_hot)
    ignored = probabilities(torch.tensor([2, -100, 1, 255]), logits)  # no class: no weight
    assert torch.equal(ignored, one_hot * torch.tensor([1, 0, 1, 0])[:, None])


@pytest.mark.parametrize(
    "targets",
    [torch.full((4, 3), 1 / 3), torch.linspace(0, 1, 4), torch.tensor([1, 2]), ["a", "b", "c", "d"], None],
    ids=["soft", "regression", "too few", "words", "none"],
)
def test_without_labels_the_softmax_stands_in(targets):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(probabilities(targets, logits), logits.softmax(1))


def test_a_single_output_has_no_classes():
    assert torch.equal(probabilities(torch.tensor([0, 1, 7]), torch.randn(3, 1)), torch.ones(3, 1))


def test_a_regression():
    model = seeded(nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 2)))
    x, _ = data(40, (5,))
    y = torch.stack([x.sum(1), x.prod(1)], 1)
    before = outputs(model, x[:10])
    report = shift_model(
        model,
        [(x[:10], y[:10])],
        heldout=[(x[10:], y[10:])],
        criterion=mse_loss,
        method=Method("full", weighting="uniform"),
        guard=1e9,
    )
    assert report.status == "ok" and report.norm_ratio < 1
    assert torch.allclose(outputs(model, x[:10]), before, rtol=1e-4, atol=1e-5)
