# yolo-sos, AGPL-3.0
"""The solver of a fit, against scikit-learn and against torch's own L-BFGS in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from yolo_sos.core import RidgePath, RidgeProblem, Rows, fit_path
from yolo_sos.core.fitting import ALIKE, BIAS_RIDGE


def sample(
    loss: str, n: int = 400, d: int = 12, classes: int = 4, seed: int = 0, weights: bool = True, dtype=torch.float32
) -> Rows:
    """Rows whose labels depend on their inputs, with features of very different size."""
    classes, generator = 4, torch.Generator().manual_seed(seed)
    inputs = (torch.randn(n, d, generator=generator) + 0.5) * torch.logspace(-1, 1, d)
    truth = torch.randn(classes, d, generator=torch.Generator().manual_seed(1)) / torch.logspace(-1, 1, d)
    logits = inputs @ truth.T / 2
    if loss == "softmax":
        targets = nn.functional.one_hot(logits.softmax(1).multinomial(1, generator=generator)[:, 0], classes).float()
    else:
        targets = torch.bernoulli(logits.sigmoid(), generator=generator)
    w = torch.rand(n, generator=generator) * 3 + 0.1 if weights else torch.ones(n)
    return Rows(inputs.to(dtype), targets, w)


def objective(rows: Rows, weight: torch.Tensor, prior: torch.Tensor, ridge: float, loss: str) -> torch.Tensor:
    """The objective as its definition has it, in float64, by torch's own losses."""
    z = rows.inputs.double() @ weight[:, :-1].T + weight[:, -1]
    y = rows.targets.double()
    if loss == "binary":
        each = nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1)
    else:
        each = nn.functional.cross_entropy(z, y, reduction="none")
    pull = ridge / 2 * (weight - prior)[:, :-1].square().sum() + BIAS_RIDGE / 2 * (weight - prior)[:, -1].square().sum()
    return (rows.weights.double() * each).sum() + pull


def null(rows: Rows, loss: str, others: Rows | None = None) -> float:
    """The sum of the losses of a prediction that is the frequency of each class."""
    mass = rows.weights.sum()
    p, others = ((rows.weights[:, None] * rows.targets).sum(0) / mass).clamp(0.5 / mass), others or rows
    if loss == "binary":
        each = nn.functional.binary_cross_entropy(p.expand(len(others), -1), others.targets, reduction="none").sum(1)
    else:
        each = -(others.targets * p.log()).sum(1)
    return float((others.weights * each).sum())


def torch_solution(rows, prior, ridge, loss):
    weight = prior.double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=2000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = objective(rows, weight, prior, ridge, loss)
        value.backward()
        return value

    optimizer.step(closure)
    return weight.detach()


@pytest.mark.parametrize("loss", ["binary", "softmax"])
@pytest.mark.parametrize("ridge", [0.3, 30.0, 3000.0])
def test_the_solution_is_that_of_torchs_lbfgs_in_float64(loss, ridge):
    prior = torch.randn(4, 13, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 10
    for dtype, tolerance in (torch.float64, 1e-12), (torch.float32, 1e-5):
        rows = sample(loss, dtype=dtype)
        solution = RidgeProblem(rows, prior, loss).solve(ridge, tolerance=tolerance)
        right = torch_solution(rows, prior, ridge, loss)
        least = objective(rows, right, prior, ridge, loss)
        assert solution.converged
        assert objective(rows, solution.weight, prior, ridge, loss) - least < 3 * tolerance * null(rows, loss)
        logits, exact = (rows.inputs.double() @ w[:, :-1].T + w[:, -1] for w in (solution.weight, right))
        if loss == "softmax":  # whose logits have a common constant that nothing decides
            logits, exact = logits - logits.mean(1, keepdim=True), exact - exact.mean(1, keepdim=True)
        assert (logits - exact).norm() < (10 * tolerance**0.5 + 1e-4) * exact.norm()


@pytest.mark.parametrize("ridge", [0.5, 20.0])
def test_scikit_learn_finds_the_same(ridge):
    linear_model = pytest.importorskip("sklearn.linear_model")
    for loss in ("binary", "softmax"):
        rows = sample(loss, dtype=torch.float64)
        solution = RidgeProblem(rows, torch.zeros(4, 13), loss).solve(ridge, tolerance=1e-12)
        ours = (rows.inputs.double() @ solution.weight[:, :-1].T + solution.weight[:, -1]).numpy()
        y = rows.targets.argmax(1).numpy() if loss == "softmax" else rows.targets.numpy()
        for c in range(4) if loss == "binary" else [slice(None)]:
            # Its ridge is on every column, so the bias's own is had by the size of the column of ones.
            ones = torch.full((len(rows), 1), (ridge / BIAS_RIDGE) ** 0.5)
            x = torch.cat([rows.inputs, ones], 1).numpy()
            theirs = linear_model.LogisticRegression(C=1 / ridge, tol=1e-9, max_iter=10000, fit_intercept=False)
            theirs.fit(x, y if loss == "softmax" else y[:, c], sample_weight=rows.weights.numpy())
            right = theirs.decision_function(x)
            mine = ours - ours.mean(1, keepdims=True) if loss == "softmax" else ours[:, c]
            assert abs(mine - right).max() < 1e-3 * abs(right).max()
            assert ((mine - right) ** 2).mean() < 1e-8 * (right**2).mean()


def test_the_gap_that_is_reported_is_about_the_true_one():
    rows, prior = sample("binary", dtype=torch.float64), torch.zeros(4, 13, dtype=torch.float64)
    problem = RidgeProblem(rows, prior, "binary")
    least = objective(rows, torch_solution(rows, prior, 1.0, "binary"), prior, 1.0, "binary")
    for tolerance in (1e-2, 1e-4):
        solution = problem.solve(1.0, tolerance=tolerance)
        true = float(objective(rows, solution.weight, prior, 1.0, "binary") - least) / null(rows, "binary")
        assert solution.converged and true < 3 * tolerance
    stopped = problem.solve(1.0, iterations=2)
    assert not stopped.converged and stopped.gap > 1e-5 and stopped.evaluations >= 3


def test_the_ridge_pulls_to_the_prior_and_leaves_the_bias_nearly_free():
    rows = sample("binary", weights=False)
    prior = torch.randn(4, 13, generator=torch.Generator().manual_seed(2))
    solution = RidgeProblem(rows, prior, "binary").solve(1e9, tolerance=1e-12)
    assert (solution.weight[:, :-1] - prior[:, :-1]).norm() < 1e-4
    p = (rows.inputs @ solution.weight[:, :-1].T.float() + solution.weight[:, -1].float()).sigmoid()
    assert torch.allclose(p.mean(0), rows.targets.mean(0), atol=1e-2)  # what a free intercept brings about


def test_a_layer_without_a_bias():
    rows = sample("binary")
    solution = RidgeProblem(rows, torch.zeros(4, 12), "binary").solve(1.0, tolerance=1e-9)
    with_bias = Rows(torch.cat([rows.inputs, torch.zeros(len(rows), 1)], 1), rows.targets, rows.weights)
    assert solution.weight.shape == (4, 12)
    again = RidgeProblem(with_bias, torch.zeros(4, 13), "binary").solve(1.0, tolerance=1e-9)
    assert torch.allclose(solution.weight, again.weight[:, :12], atol=1e-3)


def test_a_row_of_weight_k_counts_as_k_rows():
    rows = sample("softmax", weights=False, dtype=torch.float64)
    whole = torch.arange(len(rows)) % 3 + 1
    repeated = Rows(*(x.repeat_interleave(whole, 0) for x in (rows.inputs, rows.targets, rows.weights)))
    weighted = Rows(rows.inputs, rows.targets, whole.float())
    a, b = (RidgeProblem(r, torch.zeros(4, 13), "softmax").solve(5.0, tolerance=1e-12) for r in (weighted, repeated))
    assert torch.allclose(a.weight, b.weight, atol=1e-3)


@pytest.mark.parametrize("loss", ["binary", "softmax"])
def test_the_path_chooses_the_ridge_of_least_loss_on_other_rows(loss):
    rows, others = sample(loss, n=150), sample(loss, n=4000, seed=9)
    prior = torch.zeros(4, 13)
    path = fit_path(rows, others, prior, loss)
    ridges = list(path.losses)
    assert ridges == sorted(ridges, reverse=True)
    least = min(path.losses.values())
    alike = [r for r in ridges if path.losses[r] <= least + ALIKE * (path.null - least)]
    assert path.best.ridge == max(alike)
    assert ridges[0] > path.best.ridge > ridges[-1]  # it reaches far enough on both sides
    exact = {r: fit_path(rows, others, prior, loss, [r]).losses[r] for r in ridges}  # each from the prior
    assert path.losses == pytest.approx(exact, rel=5e-2)
    assert 0 < path.explained < 1
    assert path.null == pytest.approx(null(rows, loss, others) / float(others.weights.sum()), rel=1e-4)


def test_features_that_say_nothing_explain_nothing():
    generator = torch.Generator().manual_seed(3)
    rows, others = sample("binary"), sample("binary", seed=4)
    noise = [Rows(torch.randn(len(r), 12, generator=generator), r.targets, r.weights) for r in (rows, others)]
    path = fit_path(*noise, torch.zeros(4, 13))
    assert path.explained < 0.01 < fit_path(rows, others, torch.zeros(4, 13)).explained
    assert isinstance(path, RidgePath)


def test_two_solutions_are_bit_equal():
    a, b = (fit_path(sample("binary"), sample("binary", seed=1), torch.zeros(4, 13)) for _ in range(2))
    assert torch.equal(a.best.weight, b.best.weight) and a.losses == b.losses


def test_a_class_that_no_row_shows_keeps_a_finite_bias():
    rows = sample("binary")
    rows.targets[:, 2] = 0
    prior = torch.zeros(4, 13)
    prior[:, -1] = -4.0
    weight = RidgeProblem(rows, prior, "binary").solve(100.0).weight
    assert -20 < weight[2, -1] < -4


def test_more_dimensions_than_rows_and_a_feature_that_is_always_zero():
    rows = sample("softmax", n=20, d=50)
    rows.inputs[:, 3] = 0
    solution = RidgeProblem(rows, torch.zeros(4, 51), "softmax").solve(1e-3)
    assert solution.converged and solution.weight.isfinite().all()
    assert solution.weight[:, 3].abs().max() < 1e-9


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"targets": torch.zeros(400, 3)}, r"\(n, d\), \(n, C\)"),
        ({"weights": torch.zeros(400)}, "no row has a weight above 0"),
        ({"inputs": torch.full((400, 12), torch.nan)}, "inputs that are not finite"),
    ],
)
def test_wrong_rows_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        RidgeProblem(Rows(**{**vars(sample("binary")), **change}), torch.zeros(4, 13), "binary")
    with pytest.raises(ValueError, match="loss must be one of binary, softmax"):
        RidgeProblem(sample("binary"), torch.zeros(4, 13), "hinge")
