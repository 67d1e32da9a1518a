# yolo-sos, AGPL-3.0
"""A fit of the final layer of any PyTorch model."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from yolo_sos.core import FitReport, RidgeProblem, Rows, affine_matrix, fit_model


class Net(nn.Module):
    """A pretrained body, as far as a random projection of separable data is one, and a final layer."""

    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.5))
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.body(x))


def batches(count, seed, classes=3, size=20, noise=0.5):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, 8, generator=torch.Generator().manual_seed(7))
    for _ in range(count):
        labels = torch.randint(classes, (size,), generator=generator)
        yield centres[labels] + noise * torch.randn(size, 8, generator=generator), labels


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def accuracy(model, data):
    model.eval()
    return sum(float((model(x).argmax(1) == y).float().mean()) for x, y in data) / len(data)


def test_a_model_learns_its_classes_without_a_gradient_step():
    model = Net()
    before = state(model)
    report = fit_model(model, batches(10, 1), list(batches(5, 2)))
    assert isinstance(report, FitReport) and not report.refusal
    assert [layer.name for layer in report.layers] == ["head"]
    assert model.training  # as it was
    assert report.heldout_after < report.heldout_before / 2 and report.explained > 0.5
    after = state(model)
    assert {k for k in after if not torch.equal(after[k], before[k])} == {"head.weight", "head.bias"}
    held = list(batches(5, 2))
    assert accuracy(model, held) > 0.95
    with torch.no_grad():
        loss = sum(float(nn.functional.cross_entropy(model(x), y)) for x, y in held) / len(held)
    assert report.heldout_after == pytest.approx(loss, rel=1e-5)  # of the model as it was written
    assert "1 layers fitted" in str(report)


def test_the_layer_is_the_solution_for_its_rows():
    model = Net()
    prior = affine_matrix(model.head)
    data = list(batches(6, 1))
    report = fit_model(model, data, ridge=2.0)
    with torch.no_grad():
        inputs = torch.cat([model.body.eval()(x) for x, _ in data])
    labels = torch.cat([y for _, y in data])
    rows = Rows(inputs, nn.functional.one_hot(labels, 3).float(), torch.ones(len(labels)))
    right = RidgeProblem(rows, prior, "softmax").solve(2.0).weight
    assert torch.allclose(affine_matrix(model.head).double(), right, atol=1e-5)
    assert report.layers[0].ridge == 2.0 and report.layers[0].rows == 120
    assert report.heldout_before != report.heldout_before  # nan: nothing was judged


def test_other_losses_labels_and_batches():
    soft = [{"x": x, "labels": nn.functional.one_hot(y, 3).float()} for x, y in batches(5, 1)]
    held = [{"x": x, "labels": nn.functional.one_hot(y, 3).float()} for x, y in batches(5, 2)]
    forward = lambda model, batch: model(batch["x"])  # noqa: E731
    for criterion in nn.BCEWithLogitsLoss(), nn.functional.binary_cross_entropy_with_logits, nn.CrossEntropyLoss():
        model = Net()
        assert not fit_model(model, soft, held, criterion=criterion, forward=forward).refusal
        assert accuracy(model, list(batches(5, 2))) > 0.95
    smooth = Net()
    fit_model(smooth, batches(5, 1), list(batches(5, 2)), criterion=nn.CrossEntropyLoss(label_smoothing=0.2))
    sharp = Net()
    fit_model(sharp, batches(5, 1), list(batches(5, 2)))
    assert smooth.head.weight.norm() < sharp.head.weight.norm()


def test_pixels_are_rows_and_ignored_labels_count_for_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Tanh(), nn.Conv2d(32, 2, 1))
    x = torch.rand(4, 3, 6, 6)
    labels = (x[:, 0] + x[:, 1] > 1).long()
    again, other = deepcopy(model), deepcopy(model)
    fit_model(model, [(x, labels)], [(x, labels)])
    assert float((model(x).argmax(1) == labels).float().mean()) > 0.8
    masked = labels.clone()
    masked[2:] = -100
    fit_model(again, [(x, masked)], ridge=1.0)
    fit_model(other, [(x[:2], labels[:2])], ridge=1.0)
    assert not torch.allclose(other[2].weight, model[2].weight, atol=1e-2)
    assert torch.allclose(other[2].weight, again[2].weight, atol=1e-2)


def test_what_gains_nothing_leaves_the_model_bit_identical():
    model, generator = Net(), torch.Generator().manual_seed(0)
    noise = lambda n: [(torch.randn(20, 8), torch.randint(3, (20,), generator=generator)) for _ in range(n)]  # noqa: E731
    before = state(model)
    report = fit_model(model, noise(3), noise(20))
    assert report.refusal.startswith("nothing to fit: the features explain") and str(report).startswith(
        "nothing written"
    )
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())
    fitted = Net()
    fit_model(fitted, batches(5, 2), ridge=1e-3)  # nothing is better on these
    kept = state(fitted)
    worse = fit_model(fitted, batches(5, 3), list(batches(5, 2)))
    assert "does not fall" in worse.refusal and worse.heldout_after >= worse.heldout_before
    assert str(worse).count("held-out loss") == 1  # the log says it once
    assert all(torch.equal(v, kept[k]) for k, v in state(fitted).items())


def test_a_ridge_that_leaves_nothing_of_a_fit_is_named():
    model = Net()
    nn.init.zeros_(model.head.weight)
    before = state(model)
    report = fit_model(model, batches(10, 1), list(batches(5, 2)), ridge=1e9)
    assert report.refusal.startswith("with ridge=1e+09 the fit explains 0.") and "Leave out" in report.refusal
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())
    assert not fit_model(model, batches(10, 1), list(batches(5, 2)), ridge=1.0).refusal


class Scaled(Net):
    def forward(self, x):
        return 3 * super().forward(x)


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "text"),
    [
        (Net, [], {}, ValueError, "nothing to fit on: no batch"),
        (Net, list(batches(1, 0)), {"heldout": []}, ValueError, "chosen on held-out batches"),
        (Net, list(batches(1, 0)), {"ridge": -1.0}, ValueError, "'ridge=-1.0' is invalid"),
        (Net, list(batches(1, 0)), {"criterion": nn.functional.mse_loss}, TypeError, "criterion=mse_loss"),
        (Net, list(batches(1, 0)), {"criterion": nn.CrossEntropyLoss(torch.ones(3))}, TypeError, "CrossEntropyLoss"),
        (Net, list(batches(1, 0)), {"layers": ["head", "body.0"]}, TypeError, "layers=head, body.0"),
        (Net, list(batches(1, 0)), {"layers": "body.0"}, ValueError, "output of the model is not that of body.0"),
        (Scaled, list(batches(1, 0)), {}, ValueError, "output of the model is not that of head"),
        (Net, list(batches(1, 0, classes=5)), {}, ValueError, r"Label \d is out of range: head has the classes 0 to 2"),
    ],
)
def test_what_cannot_be_fitted_is_refused_and_left_alone(model, data, options, error, text):
    made = model()
    before = state(made)
    heldout = options.pop("heldout", list(batches(1, 2)))
    with pytest.raises(error, match=text):
        fit_model(made, data, heldout, **options)
    assert all(torch.equal(v, before[k]) for k, v in state(made).items()) and not made.head._forward_pre_hooks
