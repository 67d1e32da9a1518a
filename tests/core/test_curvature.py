# yolo-sos, AGPL-3.0
"""Method loss: the smallest weights with the same loss, to second order."""

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from yolo_sos.core import (
    NON_FINITE,
    OK,
    Curvature,
    Engine,
    FinalLayer,
    Method,
    Moments,
    Shift,
    hessian_diagonal,
    shift_model,
)
from yolo_sos.core.curvature import FLOOR


class TwoHeads(nn.Module):
    """Two linear layers on the same features, all float64."""

    def __init__(self, d=6):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(d, 3).double(), nn.Linear(d, 2).double()

    def forward(self, x):
        return {"a": self.a(x), "b": self.b(x)}


class SquaredError:
    """A weighted squared error: its Hessian in the outputs is diagonal and constant."""

    def __init__(self, model, weights=(1.0, 1.0, 1.0)):
        self.layers = [FinalLayer("a", model.a), FinalLayer("b", model.b)]
        self.weights = torch.tensor(weights)

    def run(self, model, batch):
        return model(batch["x"])

    def size(self, batch):
        return len(batch["x"])

    def probabilities(self, layer, logits, batch):
        return logits.sigmoid()

    def replay_state(self, batch, output):
        return batch, None

    def replay(self, state, outputs):
        return outputs

    def loss(self, output, batch):
        a = (output["a"] - batch["a"]).square() * self.weights
        return (a.sum() + 3 * (output["b"] - batch["b"]).square().sum()) / len(batch["x"])


def data(*sizes, d=6, seed=1):
    """Return batches of inputs, and of targets for both layers that are half linear in them and half noise."""
    g = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    scale, of = torch.logspace(0, -2, d, dtype=torch.float64), {"a": randn(3, d), "b": randn(2, d)}
    inputs = [randn(n, d) * scale for n in sizes]
    return [{"x": x, **{k: x @ w.T + 0.5 * randn(len(x), len(w)) for k, w in of.items()}} for x in inputs]


def fitted_by_least_squares(model, batches):
    """Give both layers the weights and biases of least loss on the batches."""
    x = torch.cat([b["x"] for b in batches])
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    for name in ("a", "b"):
        layer = getattr(model, name)
        best = torch.linalg.lstsq(x, torch.cat([b[name] for b in batches])).solution.T
        with torch.no_grad():
            layer.weight.copy_(best[:, :-1])
            layer.bias.copy_(best[:, -1])


def loss_of(model, task, batches):
    """Return the mean loss per row."""
    total = sum(task.size(b) * float(task.loss(model(b["x"]), b)) for b in batches)
    return total / sum(map(task.size, batches))


def shifted(model, task, batches, rank, layers=None, floor=0.0):
    """Return an engine, and the shift of the layers, without a floor under the curvature if none is given."""
    engine, method = Engine(model, layers or task.layers, task), Method("loss", rank)
    curvature = Curvature(task, engine.layers, task.layers, 0, floor)
    engine.run(batches, curvature.add)
    return engine, Shift(method, 0, engine.layers, curvature.solve(method.rank_of), curvature.rows, {})


@pytest.mark.parametrize("rank", [5, 0.5, 1])
def test_no_smaller_weights_have_as_small_a_loss(rank):
    model, batches = TwoHeads(), data(30, 50)
    task = SquaredError(model)
    fitted_by_least_squares(model, batches)
    before = loss_of(model, task, batches)
    engine, shift = shifted(model, task, batches, rank)
    engine.write(shift, 1.0)
    after = loss_of(model, task, batches)
    weights = [model.a.weight, model.b.weight]
    norm = sum(float(w.square().sum()) for w in weights)
    assert after > before and norm == pytest.approx(sum(r.norm_after**2 for r in shift.results.values()))
    # To second order is exact here. Along any direction that keeps the norm, or lowers it, the loss rises.
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        old = [w.detach().clone() for w in weights]
        with torch.no_grad():
            for w in weights:
                w += 1e-3 * torch.randn(w.shape, generator=g, dtype=w.dtype)
            scale = (norm / sum(float(w.square().sum()) for w in weights)) ** 0.5
            for w in weights:
                w *= min(1.0, scale)
        assert loss_of(model, task, batches) > after
        with torch.no_grad():
            for w, o in zip(weights, old, strict=True):
                w.copy_(o)


def test_the_rank_is_the_mean_over_all_outputs():
    model, batches = TwoHeads(), data(40)
    task = SquaredError(model, (1.0, 30.0, 0.1))
    for rank, wanted in (2, 2), (0.5, 3), (1.0, 6):
        _, shift = shifted(model, task, batches, rank)
        mean = sum(r.rank * len(r.weight) for r in shift.results.values()) / 5
        assert mean == pytest.approx(wanted, rel=1e-6)
    assert shift.squared_norm_ratio == pytest.approx(1)


def test_one_multiplier_serves_all_outputs_of_all_layers():
    model, batches = TwoHeads(), data(40)
    task, (batch,) = SquaredError(model, (1.0, 5.0, 0.2)), batches
    before = {name: getattr(model, name).weight.detach().clone() for name in ("a", "b")}
    _, shift = shifted(model, task, batches, 3)
    gram = batch["x"].T @ batch["x"]
    multipliers = []
    for name, of in (("a", (1.0, 5.0, 0.2)), ("b", (3.0, 3.0))):
        new = shift.results[name].weight
        for k, weight in enumerate(of):  # v G = v* (G + μI)
            left = (before[name][k] - new[k]) @ (2 * weight * gram)
            multipliers.append(float(left @ new[k] / new[k].square().sum()))
            torch.testing.assert_close(left, multipliers[-1] * new[k], rtol=1e-6, atol=1e-12)
    assert multipliers == pytest.approx([multipliers[0]] * 5, rel=1e-6)


def test_figures_and_maps():
    model, batches = TwoHeads(), data(40, 8)
    task = SquaredError(model)
    _, shift = shifted(model, task, batches, 4)
    assert shift.status == OK and shift.rows == {"a": 48, "b": 48}
    for name, result in shift.results.items():
        weight = getattr(model, name).weight
        assert 0 < result.rank < 6 and 0 < result.deviation < 1
        assert result.transform.shape == (len(weight), 6, 6)
        torch.testing.assert_close(result.apply(weight.detach()), result.weight)
        torch.testing.assert_close(result.apply(2 * weight.detach(), 0.5), weight.detach() + result.weight)
    change = shift.results["b"].weight - model.b.weight
    x = torch.cat([b["x"] for b in batches])
    deviation = float((x @ change.T).norm() / (x @ model.b.weight.T).norm())  # all outputs of b count alike
    assert shift.results["b"].deviation == pytest.approx(deviation, rel=1e-9)


def test_at_the_full_rank_only_null_directions_go():
    model, batches = TwoHeads(), data(40)
    batches[0]["x"][:, 4:] = 0
    before = model.a.weight.detach().clone()
    _, shift = shifted(model, SquaredError(model), batches, 1.0)
    torch.testing.assert_close(shift.results["a"].weight[:, :4], before[:, :4], rtol=1e-9, atol=1e-12)
    assert float(shift.results["a"].weight[:, 4:].abs().max()) < 1e-12
    assert shift.results["a"].rank == pytest.approx(4)


def test_layers_without_curvature_keep_their_weights():
    model, batches = TwoHeads(), data(40)
    before = model.a.weight.detach().clone()
    _, shift = shifted(model, SquaredError(model, (0.0, 0.0, 0.0)), batches, 0.5)
    torch.testing.assert_close(shift.results["a"].weight, before, rtol=1e-12, atol=0)
    assert shift.results["b"].rank == pytest.approx(3) and shift.squared_norm_ratio < 1


def test_the_floor_changes_nothing_where_all_curvature_is_alike():
    model, batches = TwoHeads(), data(40)
    task = SquaredError(model, (3.0, 3.0, 3.0))
    _, plain = shifted(model, task, batches, 3)
    _, floored = shifted(model, task, batches, 3, floor=0.25)
    for name, result in plain.results.items():
        torch.testing.assert_close(floored.results[name].weight, result.weight, rtol=1e-9, atol=1e-12)


def test_the_floor_protects_outputs_that_the_sample_hardly_shows():
    model, batches = TwoHeads(), data(40)
    before = model.a.weight.detach().clone()
    task = SquaredError(model, (1.0, 1e-9, 1.0))
    left = [
        float(shifted(model, task, batches, 4, floor=floor)[1].results["a"].weight[1].norm() / before[1].norm())
        for floor in (0.0, 0.003, 0.1, 1.0)
    ]
    assert left == sorted(left) and left[0] < 0.1 and left[-1] > 0.5
    # Its rows count by the floor alone: a tenth of Σh² / Σh over the layers of its kind
    curvature = torch.tensor([2.0, 2e-9, 2.0, 6.0, 6.0], dtype=torch.float64)
    floor = 0.1 * float(curvature.square().sum() / curvature.sum())
    _, shift = shifted(model, task, batches, 4, floor=0.1)
    gram = Moments(6).update(batches[0]["x"]).matrix
    multipliers = []
    for k, h in enumerate(curvature[:3].tolist()):
        new = shift.results["a"].weight[k]
        change = (before[k] - new) @ (gram * (floor + h))
        multipliers.append(float(change @ new / new.square().sum()))
        torch.testing.assert_close(change, multipliers[-1] * new, rtol=1e-6, atol=1e-12)
    assert multipliers == pytest.approx([multipliers[0]] * 3, rel=1e-6)


def test_the_engine_takes_the_floor():
    model, batches = TwoHeads(), data(40)
    task, method = SquaredError(model, (1.0, 0.1, 1.0)), Method("loss", 3)
    engine = Engine(model, task.layers, task, [(method, 0)])
    engine.fit(batches)
    _, expected = shifted(model, task, batches, 3, floor=FLOOR)
    for name, weight in engine.solve(method).weights().items():
        torch.testing.assert_close(weight, expected.results[name].weight, rtol=1e-12, atol=1e-15)


def test_layers_that_are_not_chosen_stay():
    model, batches = TwoHeads(), data(40)
    task = SquaredError(model)
    _, shift = shifted(model, task, batches, 3, [task.layers[1]])
    assert list(shift.results) == ["b"] and shift.squared_norm_ratio < 1


@pytest.mark.parametrize("where", ["weight", "input"])
def test_what_is_not_finite_is_told(where):
    model, batches = TwoHeads(), data(40)
    if where == "weight":
        model.a.weight.data[0, 0] = float("nan")
    else:
        batches[0]["x"][3, 2] = float("inf")
    _, shift = shifted(model, SquaredError(model), batches, 3)
    assert shift.status == NON_FINITE
    assert shift.results["a"].weight.data_ptr() == model.a.weight.data_ptr()
    assert (shift.results["b"].status == OK) == (where == "weight")


def test_gradients_of_the_model_are_left_alone():
    model, batches = TwoHeads(), data(40)
    shifted(model, SquaredError(model), batches, 3)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_task_that_cannot_replay_is_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="method='loss' differentiates the loss in the outputs"):
        shift_model(model, [(torch.randn(6, 4), torch.arange(6) % 3)], method="loss")


# The diagonal of a Hessian --------------------------------------------------------------------------------------------
def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_diagonal_of_a_separable_loss_is_exact():
    z = torch.randn(7, 3, generator=generator(), dtype=torch.float64).requires_grad_()
    t = torch.rand(7, 3, generator=generator(1), dtype=torch.float64)
    loss = binary_cross_entropy_with_logits(z, t, reduction="sum")
    (found,) = hessian_diagonal(loss, [z], generator())
    p = z.detach().sigmoid()
    torch.testing.assert_close(found, p * (1 - p))


def test_the_diagonal_of_a_coupled_loss_is_unbiased():
    z = torch.randn(2, 4, generator=generator(), dtype=torch.float64).requires_grad_()
    w = torch.randn(3, generator=generator(2), dtype=torch.float64).requires_grad_()

    def loss(z, w):
        return cross_entropy(z, torch.tensor([1, 3]), reduction="sum") + (w.prod() * z[0, 0]) ** 2

    signs = generator()
    draws = [hessian_diagonal(loss(z, w), [z, w], signs) for _ in range(400)]
    of_z = torch.func.hessian(loss, 0)(z.detach(), w.detach()).reshape(8, 8).diagonal().view(2, 4)
    of_w = torch.func.hessian(loss, 1)(z.detach(), w.detach()).diagonal()
    for found, exact in zip(zip(*draws, strict=True), (of_z, of_w), strict=True):
        found = torch.stack(found)
        error = found.std(0) / len(found) ** 0.5
        assert ((found.mean(0) - exact).abs() <= 4 * error + 1e-12).all()


def test_what_a_loss_is_linear_in_or_does_not_know_has_no_curvature():
    z, y, x = (torch.randn(3, generator=generator(k)).requires_grad_() for k in range(3))
    found = hessian_diagonal(z.sum() + y.exp().sum(), [z, y, x], generator())
    assert not found[0].any() and not found[2].any()
    torch.testing.assert_close(found[1], y.detach().exp())
    (found,) = hessian_diagonal(torch.tensor(1.0), [z], generator())
    assert not found.any()
