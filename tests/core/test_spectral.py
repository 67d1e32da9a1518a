# yolo-sos, AGPL-3.0
"""Shifts by a filter on the spectrum of the second moment."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from yolo_sos.core import (
    NON_FINITE,
    OK,
    RANK_ZERO,
    Moments,
    budgeted_shift,
    expected_shift,
    minimum_norm_shift,
    principal_shift,
)

PROPERTY = settings(derandomize=True, max_examples=60, deadline=None, database=None)
SHIFTS = {
    "principal": lambda moments, v: principal_shift(moments, v, rank=2),
    "full": lambda moments, v: principal_shift(moments, v),
    "expected": lambda moments, v: expected_shift(moments, v, rows=1.7),
    "budget": lambda moments, v: budgeted_shift(moments, v, budget=0.2),
}


def randn(*size, seed=0):
    """Return standard normal float64 numbers."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(x, y):
    """Return ‖x − y‖ / ‖y‖."""
    return float((torch.as_tensor(x) - torch.as_tensor(y)).norm() / torch.as_tensor(y).norm())


def ridge(a, v, w, gap):
    """Return ``V G(G+μI)⁻¹`` at the μ where ``gap(V*, G, μ)`` is zero: a linear solve and brentq, no eigenvectors."""
    a, v = np.asarray(a), np.asarray(v)
    g = a.T @ (np.asarray(w)[:, None] * a)

    def shifted(log_mu):
        return np.linalg.solve(g + np.exp(log_mu) * np.eye(len(g)), g @ v.T).T

    root = scipy.optimize.brentq(lambda m: gap(shifted(m), g, np.exp(m)), -30, 30, xtol=1e-13, rtol=1e-14)
    return shifted(root)


def dense_deviation(a, w, v, shifted):
    """Return the relative change of the outputs, row by row, weighted."""
    root = torch.as_tensor(w).sqrt()[:, None]
    return float((root * (a @ (shifted - v).T)).norm() / (root * (a @ v.T)).norm())


@st.composite
def spectra(draw):
    """Draw d rows whose second moment has eigenvalues over 14 orders of magnitude, and a weight."""
    d = draw(st.integers(1, 8))
    exponents = draw(st.lists(st.floats(-3.5, 3.5), min_size=d, max_size=d))  # of singular values
    basis = torch.linalg.qr(randn(d, d, seed=draw(st.integers(0, 2**31)))).Q
    a = torch.tensor([[10**e] for e in exponents], dtype=torch.float64) * basis
    energy = draw(st.lists(st.floats(-1, 1), min_size=d, max_size=d))
    v = randn(3, d, seed=draw(st.integers(0, 2**31))) * torch.tensor([10**e for e in energy], dtype=torch.float64)
    return a, v @ basis


@pytest.mark.parametrize("name", SHIFTS)
def test_the_map_of_the_weight_is_one_matrix_for_any_tensor(name):
    a, v = randn(9, 6), randn(3, 6, seed=1)
    result = SHIFTS[name](Moments(6).update(a), v)
    matrix = result.apply(torch.eye(6, dtype=torch.float64))
    assert relative(v @ matrix, result.weight) < 1e-12
    other = randn(2, 6, seed=2)
    assert relative(result.apply(other), other @ matrix) < 1e-12
    assert float(torch.linalg.eigvalsh(matrix).max()) <= 1 + 1e-12  # nothing grows


@pytest.mark.parametrize("name", SHIFTS)
def test_a_failed_shift_maps_nothing(name):
    other = randn(2, 6)
    assert torch.equal(SHIFTS[name](Moments(6), randn(3, 6)).apply(other), other)


@PROPERTY
@given(spectra(), st.floats(0.001, 0.999))
def test_expected_reaches_the_effective_rank_asked_for(drawn, fraction):
    a, _ = drawn
    d = a.shape[1]
    moments, identity = Moments(d).update(a), torch.eye(d, dtype=torch.float64)
    attainable = principal_shift(moments, identity).rank
    assert attainable == d
    result = expected_shift(moments, identity, rows=fraction * attainable)
    assert result.rank == pytest.approx(fraction * attainable, abs=1e-6)
    # The shift of the identity is the filter itself, U diag(f) Uᵀ: its trace is Σf.
    assert float(result.weight.trace()) == pytest.approx(fraction * attainable, abs=1e-6)
    values = torch.linalg.eigvalsh(result.weight)
    assert values.min() > -1e-12
    assert values.max() < 1 + 1e-12


@PROPERTY
@given(spectra(), st.floats(1e-6, 0.999999))
def test_budget_reaches_the_deviation_asked_for(drawn, budget):
    a, v = drawn
    result = budgeted_shift(Moments(a.shape[1]).update(a), v, budget=budget)
    assert result.status == OK
    assert result.deviation == pytest.approx(budget, abs=1e-6)
    assert dense_deviation(a, torch.ones(len(a)), v, result.weight) == pytest.approx(budget, abs=1e-6)
    assert result.norm_after <= result.norm_before


@PROPERTY
@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 2**31), st.data())
def test_principal_against_numpy(n, d, seed, data):
    a, v, w = randn(n, d, seed=seed), randn(3, d, seed=seed + 1), randn(n, seed=seed + 2).abs()
    rank = data.draw(st.integers(1, min(n, d)))
    # Left singular vectors of √w·A: another route to the eigenvectors of G.
    _, s, vt = np.linalg.svd((w.sqrt()[:, None] * a).numpy(), full_matrices=False)
    assume(s[rank - 1] > 1e-5 * s[0])
    assume(rank == len(s) or s[rank - 1] - s[rank] > 1e-3 * s[0])  # the subspace is well defined
    result = principal_shift(Moments(d).update(a, w), v, rank=rank)
    assert result.rank == rank
    expected = v.numpy() @ vt[:rank].T @ vt[:rank]
    assert np.linalg.norm(result.weight.numpy() - expected) < 1e-8 * np.linalg.norm(v)
    assert result.deviation == pytest.approx(dense_deviation(a, w, v, torch.from_numpy(expected)), abs=1e-7)


def test_principal_holds_more_of_the_rows_than_any_other_subspace():
    a, v = randn(20, 6), torch.eye(6, dtype=torch.float64)
    g = a.T @ a
    projector = principal_shift(Moments(6).update(a), v, rank=3).weight
    held = float((projector @ g).trace())
    for seed in range(50):
        q = torch.linalg.qr(randn(6, 3, seed=seed)).Q
        assert float((q.T @ g @ q).trace()) < held
    assert held == pytest.approx(float(torch.linalg.eigvalsh(g)[3:].sum()), rel=1e-12)


@pytest.mark.parametrize("rows", [0.01, 0.5, 1, 2.5, 4, 4.99])
def test_expected_against_a_linear_solve(rows):
    a, v, w = randn(12, 5), randn(3, 5, seed=1), randn(12, seed=2).abs()
    result = expected_shift(Moments(5).update(a, w), v, rows=rows)
    expected = ridge(a, v, w, lambda _, g, mu: np.trace(np.linalg.solve(g + mu * np.eye(5), g)) - rows)
    assert relative(result.weight, expected) < 1e-8
    assert result.deviation == pytest.approx(dense_deviation(a, w, v, torch.from_numpy(expected)), rel=1e-7)


@pytest.mark.parametrize("budget", [1e-4, 0.01, 0.1, 0.5, 0.9])
def test_budget_against_a_linear_solve(budget):
    a, v, w = randn(12, 5), randn(3, 5, seed=1), randn(12, seed=2).abs()
    result = budgeted_shift(Moments(5).update(a, w), v, budget=budget)
    tensor = torch.from_numpy
    expected = ridge(a, v, w, lambda shifted, g, mu: dense_deviation(a, w, v, tensor(shifted)) - budget)
    assert relative(result.weight, expected) < 1e-8


@PROPERTY
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**31), st.data())
def test_no_budget_is_the_full_shift_is_the_minimum_norm_shift_of_the_rows(n, d, seed, data):
    rank = data.draw(st.integers(1, min(n, d)))
    left, right = torch.linalg.qr(randn(n, rank, seed=seed)).Q, torch.linalg.qr(randn(d, rank, seed=seed + 1)).Q
    a = (left * torch.linspace(1, 5, rank, dtype=torch.float64)) @ right.T
    v = randn(3, d, seed=seed + 2)
    moments = Moments(d).update(a)
    exact = minimum_norm_shift(a, v)
    shifts = {
        "principal": principal_shift(moments, v),
        "principal of rank d": principal_shift(moments, v, rank=d),
        "budget 0": budgeted_shift(moments, v, budget=0.0),
        "expected d": expected_shift(moments, v, rows=d),
        "expected of the numerical rank": expected_shift(moments, v, rows=rank),
    }
    for name, result in shifts.items():
        assert result.rank == exact.rank == rank, name
        assert relative(result.weight, exact.weight) < 1e-9, name
        assert result.norm_after == pytest.approx(exact.norm_after, rel=1e-9), name
        assert result.deviation < 1e-12, name
        assert relative(a @ result.weight.T, a @ v.T) < 1e-9, name


def test_budget_satisfies_the_conditions_of_optimality():
    """At the minimum of ‖W‖² under tr((W−V)G(W−V)ᵀ) = c, μW = (V−W)G for one μ > 0; the problem is convex."""
    a, v, w = randn(15, 6), randn(4, 6, seed=1), randn(15, seed=2).abs()
    g = a.T @ (w[:, None] * a)
    for budget in (0.001, 0.03, 0.3, 0.8):
        new = budgeted_shift(Moments(6).update(a, w), v, budget=budget).weight
        pull = (v - new) @ g
        mu = float((pull * new).sum() / new.square().sum())
        assert mu > 0
        assert relative(mu * new, pull) < 1e-10


def test_no_other_weight_with_the_same_deviation_is_smaller():
    a, v = randn(15, 6), randn(4, 6, seed=1)
    best = budgeted_shift(Moments(6).update(a), v, budget=0.1)
    size = float((a @ v.T).norm())
    tightest = np.inf
    for seed in range(200):
        other = best.weight + 10.0 ** -(seed % 5) * randn(4, 6, seed=seed)
        # Along V + s(W − V) the deviation is proportional to s: bring it to the budget.
        other = v + (other - v) * 0.1 * size / (a @ (other - v).T).norm()
        assert dense_deviation(a, torch.ones(15), v, other) == pytest.approx(0.1, rel=1e-9)
        tightest = min(tightest, float(other.norm()) / best.norm_after - 1)
    assert -1e-12 < tightest < 1e-4  # never below, and the perturbations do come close


def test_budget_against_a_constrained_optimiser():
    a, v = randn(6, 3).numpy(), randn(2, 3, seed=1).numpy()
    limit = 0.15**2 * np.sum((a @ v.T) ** 2)
    found = scipy.optimize.minimize(
        lambda x: np.sum(x**2),
        v.ravel(),
        jac=lambda x: 2 * x,
        constraints={"type": "ineq", "fun": lambda x: limit - np.sum((a @ (x.reshape(2, 3) - v).T) ** 2)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    result = budgeted_shift(Moments(3).update(torch.from_numpy(a)), torch.from_numpy(v), budget=0.15)
    assert found.success
    assert relative(result.weight, found.x.reshape(2, 3)) < 1e-5
    assert result.norm_after**2 == pytest.approx(found.fun, rel=1e-8)


@pytest.mark.parametrize("d", [4, 5, 9])
@pytest.mark.parametrize("mu", [0.05, 1.0, 20.0])
def test_expected_is_the_expectation_over_all_subsets_of_seven_rows(d, mu):
    """Rows drawn by a determinantal process with kernel L = AAᵀ/μ: P(S) = det L_S / det(I + L)."""
    a, v = randn(7, d), randn(3, d, seed=1)
    kernel = (a @ a.T / mu).numpy()
    normaliser = np.linalg.det(np.eye(7) + kernel)
    total, number, projector = 0.0, 0.0, np.zeros((d, d))
    for size in range(min(7, d) + 1):  # L_S is singular for more rows than d
        for subset in map(list, itertools.combinations(range(7), size)):
            probability = np.linalg.det(kernel[np.ix_(subset, subset)]) / normaliser
            rows = a[subset].numpy()
            total += probability
            number += probability * size
            projector += probability * np.linalg.pinv(rows) @ rows
    assert total == pytest.approx(1.0, abs=1e-12)
    g = (a.T @ a).numpy()
    closed = g @ np.linalg.inv(g + mu * np.eye(d))
    np.testing.assert_allclose(projector, closed, rtol=0, atol=1e-12)
    assert number == pytest.approx(np.trace(closed), abs=1e-12)
    result = expected_shift(Moments(d).update(a), v, rows=number)
    assert result.rank == pytest.approx(number, abs=1e-9)
    assert relative(result.weight, v.numpy() @ projector) < 1e-9


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
@PROPERTY
@given(st.integers(0, 2**31), st.integers(-480, 480))
def test_the_scale_of_the_moment_does_not_matter(shift, seed, exponent):
    a, v = randn(9, 5, seed=seed), randn(3, 5, seed=seed + 1)
    moments, scaled = Moments(5).update(a), Moments(5).update(a, torch.full((9,), 2.0**exponent, dtype=torch.float64))
    plain, other = shift(moments, v), shift(scaled, v)
    assert torch.equal(other.weight, plain.weight)  # a power of two rounds nothing
    assert other.rank == plain.rank
    assert other.deviation == plain.deviation


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
def test_the_scale_of_the_weight_goes_through(shift):
    a, v = randn(9, 5), randn(3, 5, seed=1)
    moments = Moments(5).update(a)
    plain = shift(moments, v)
    for scale in (2.0**-40, 2.0**40):
        scaled = shift(moments, v * scale)
        assert relative(scaled.weight, plain.weight * scale) < 1e-12
        assert scaled.deviation == pytest.approx(plain.deviation, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("deficient", [False, True])
@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
def test_what_is_reported_is_what_was_returned(shift, deficient):
    a, v, w = randn(12, 6), randn(3, 6, seed=1), randn(12, seed=2).abs()
    if deficient:
        a = a @ torch.diag(torch.tensor([1.0, 1, 1, 1, 0, 0], dtype=torch.float64)) @ torch.linalg.qr(randn(6, 6)).Q
    result = shift(Moments(6).update(a, w), v)
    assert result.norm_before == pytest.approx(np.linalg.norm(v.numpy()), rel=1e-12)
    assert result.norm_after == pytest.approx(np.linalg.norm(result.weight.numpy()), rel=1e-12)
    assert result.deviation == pytest.approx(dense_deviation(a, w, v, result.weight), abs=1e-12)
    assert result.norm_after < result.norm_before or (not deficient and result.rank == 6)


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_is_solved_in_float64_and_comes_back_as_the_weight_was(shift, dtype):
    moments, v = Moments(5).update(randn(9, 5)), randn(3, 5, seed=1).to(dtype)
    before = v.clone()
    result, exact = shift(moments, v), shift(moments, v.double())
    assert result.weight.dtype == dtype
    assert relative(result.weight.double(), exact.weight) < max(torch.finfo(dtype).eps, 1e-12)
    assert (result.norm_after, result.deviation, result.rank) == (exact.norm_after, exact.deviation, exact.rank)
    assert torch.equal(v, before)


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
def test_a_moment_of_zero_changes_nothing(shift):
    weight = randn(3, 5)
    for moments in (Moments(5), Moments(5).update(torch.zeros(4, 5)), Moments(5).update(randn(4, 5), torch.zeros(4))):
        result = shift(moments, weight)
        assert result.status == RANK_ZERO
        assert result.weight is weight
        assert (result.rank, result.deviation) == (0.0, 0.0)


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])  # squares of 1e200 are not finite
def test_what_is_not_finite_changes_nothing(shift, value):
    good, bad = randn(4, 5), randn(4, 5)
    bad[2, 1] = value
    for features, weight in ((bad, randn(3, 5)), (good, bad)):
        result = shift(Moments(5).update(features), weight)
        assert result.status == NON_FINITE
        assert result.weight is weight
        assert (result.rank, result.deviation) == (0.0, 0.0)
    assert shift(Moments(5), torch.full((3, 5), float("nan"))).status == NON_FINITE  # rather than rank-zero


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
def test_a_weight_without_outputs_goes_to_zero(shift):
    moments = Moments(4).update(torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0]]))
    result = shift(moments, torch.tensor([[0.0, 0.0, 3.0, 4.0]], dtype=torch.float64))  # in the null space
    assert result.status == OK
    assert (result.norm_before, result.norm_after, result.deviation) == (5.0, 0.0, 0.0)
    assert result.rank == pytest.approx(1.7 if shift is SHIFTS["expected"] else 2)


def test_more_than_the_rank_is_the_full_shift():
    moments, v = Moments(6).update(randn(3, 6)), randn(2, 6, seed=1)
    full = principal_shift(moments, v)
    assert full.rank == 3
    for more in (
        principal_shift(moments, v, rank=4),
        principal_shift(moments, v, rank=6),
        expected_shift(moments, v, rows=99),
    ):
        assert torch.equal(more.weight, full.weight)
        assert more.rank == 3


@pytest.mark.parametrize(
    ("shift", "options", "message"),
    [
        (principal_shift, {"rank": 0}, "rank=0 must be an integer from 1 to d=5"),
        (principal_shift, {"rank": -1}, "rank=-1 must be"),
        (principal_shift, {"rank": 6}, "rank=6 must be"),
        (principal_shift, {"rank": 2.5}, r"rank=2\.5 must be an integer"),
        (expected_shift, {"rows": 0}, "rows=0 must be a positive number"),
        (expected_shift, {"rows": -2.0}, r"rows=-2\.0 must be"),
        (expected_shift, {"rows": float("nan")}, "rows=nan must be"),
        (expected_shift, {"rows": float("inf")}, "rows=inf must be"),
        (
            budgeted_shift,
            {"budget": -0.1},
            r"'budget=-0\.1' is invalid: budget must be a number of at least 0 and less than 1",
        ),
        (budgeted_shift, {"budget": 1.0}, r"'budget=1\.0' is invalid"),
        (budgeted_shift, {"budget": float("nan")}, "'budget=nan' is invalid"),
    ],
)
def test_errors_name_the_argument(shift, options, message):
    with pytest.raises(ValueError, match=message):
        shift(Moments(5).update(randn(4, 5)), randn(3, 5), **options)


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
@pytest.mark.parametrize("shape", [(3, 4), (5,), (3, 5, 1, 1)])
def test_sizes_that_do_not_fit(shift, shape):
    with pytest.raises(ValueError, match=r"does not fit Moments of d=5: expected \(out, d\)"):
        shift(Moments(5).update(randn(4, 5)), torch.ones(shape))
