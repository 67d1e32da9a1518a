# yolo-sos, AGPL-3.0
"""One linear system: the weights of least norm with the same outputs."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from yolo_sos.core import NON_FINITE, OK, RANK_ZERO, SOLVERS, minimum_norm_shift

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PROPERTY = settings(derandomize=True, max_examples=60, deadline=None, database=None)

# name: rows n, columns d, rank of the rows, times that the rows are repeated
SHAPES = {
    "n < d": (5, 9, 5, 1),
    "n = d": (6, 6, 6, 1),
    "n > d": (12, 5, 5, 1),
    "n < d, rank-deficient": (6, 9, 3, 1),
    "n = d, rank-deficient": (6, 6, 2, 1),
    "n > d, rank-deficient": (12, 7, 4, 1),
    "duplicated rows, n < d": (3, 9, 3, 2),
    "duplicated rows, n > d": (4, 7, 4, 5),
    "one row": (1, 7, 1, 1),
    "one column": (7, 1, 1, 1),
    "one entry": (1, 1, 1, 1),
    "rank one": (40, 30, 1, 1),
    "larger": (60, 90, 60, 1),
}


def system(n, d, rank, seed, out=3):
    """Return rows ``(n, d)`` of the given rank, singular values 1 to 10, and a weight ``(out, d)``."""
    g = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    left, right = torch.linalg.qr(randn(n, rank)).Q, torch.linalg.qr(randn(d, rank)).Q
    values = 1 + 9 * torch.rand(rank, generator=g, dtype=torch.float64)
    return (left * values) @ right.T, randn(out, d)


def by_pinv(a, v):
    """First oracle: V A⁺A."""
    return v @ torch.linalg.pinv(a, rtol=1e-10) @ a


def by_lstsq(a, v):
    """Second oracle: the minimum-norm solution X of AX = AVᵀ, by LAPACK's gelsd."""
    return torch.from_numpy(scipy.linalg.lstsq(a.numpy(), (a @ v.T).numpy(), cond=1e-10)[0].T.copy())


def relative(x, y):
    """Return ‖x − y‖ / ‖y‖."""
    return float((x - y).norm() / y.norm())


@st.composite
def systems(draw):
    """Draw rows of any shape and rank, a weight, and a seed for what else a test needs."""
    n, d, seed = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(0, 2**31))
    rank = draw(st.integers(1, min(n, d)))
    return *system(n, d, rank, seed), rank, torch.Generator().manual_seed(seed + 1)


@pytest.mark.parametrize("oracle", [by_pinv, by_lstsq])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_oracles_agree_on_every_shape(shape, solver, oracle):
    n, d, rank, times = SHAPES[shape]
    a, v = system(n, d, rank, seed=len(shape))
    a = a.repeat(times, 1)
    result = minimum_norm_shift(a, v, solver=solver)
    assert result.status == OK
    assert result.rank == rank
    assert relative(result.weight, oracle(a, v)) < 1e-9


@PROPERTY
@given(systems())
def test_methods_agree(drawn):
    a, v, rank, _ = drawn
    first, *others = (minimum_norm_shift(a, v, solver=solver) for solver in SOLVERS)
    assert first.rank == rank
    for other in others:
        assert other.rank == rank
        assert relative(other.weight, first.weight) < 1e-9


@PROPERTY
@given(systems(), st.sampled_from(SOLVERS))
def test_outputs_stay_and_nothing_smaller_keeps_them(drawn, solver):
    a, v, rank, g = drawn
    result = minimum_norm_shift(a, v, solver=solver)
    assert relative(a @ result.weight.T, a @ v.T) < 1e-12
    assert result.norm_after <= result.norm_before * (1 + 1e-12)
    # All weights with these outputs are V* + N with A Nᵀ = 0: the smallest is orthogonal to every such N.
    null = torch.from_numpy(scipy.linalg.null_space(a.numpy(), rcond=1e-10))  # (d, d - rank)
    assert null.shape[1] == a.shape[1] - rank
    assert (result.weight @ null).norm() < 1e-11 * v.norm()
    other = result.weight + torch.randn(len(v), null.shape[1], generator=g, dtype=torch.float64) @ null.T
    assert other.norm() >= result.weight.norm() * (1 - 1e-12)


@PROPERTY
@given(systems(), st.sampled_from(SOLVERS))
def test_twice_is_once(drawn, solver):
    a, v, rank, _ = drawn
    once = minimum_norm_shift(a, v, solver=solver)
    twice = minimum_norm_shift(a, once.weight, solver=solver)
    assert twice.rank == rank
    assert relative(twice.weight, once.weight) < 1e-12
    assert twice.norm_before == once.norm_after


@PROPERTY
@given(systems(), st.sampled_from(SOLVERS))
def test_the_map_of_the_weight_is_the_projector_on_the_rows(drawn, solver):
    a, v, _, g = drawn
    result = minimum_norm_shift(a, v, solver=solver)
    assert relative(result.apply(v), result.weight) < 1e-12
    other = torch.randn(4, a.shape[1], generator=g, dtype=torch.float64)
    assert (result.apply(other) - other @ torch.linalg.pinv(a, rtol=1e-10) @ a).norm() < 1e-9 * other.norm()


@PROPERTY
@given(systems(), st.sampled_from(SOLVERS))
def test_only_the_span_of_the_rows_matters(drawn, solver):
    a, v, rank, g = drawn
    expected = minimum_norm_shift(a, v, solver=solver).weight
    order = torch.randperm(len(a), generator=g)
    scales = 10 ** (40 * torch.rand(len(a), 1, generator=g, dtype=torch.float64) - 20)  # far beyond float64's digits
    variants = {
        "order": a[order],
        "scale of each row": a * scales,
        "sign": -a,
        "duplicates": torch.cat([a, a[order], a[:1]]),
        "zero rows": torch.cat([torch.zeros_like(a[:1]), a, torch.zeros_like(a[:2])]),
    }
    for name, rows in variants.items():
        result = minimum_norm_shift(rows, v, solver=solver)
        assert result.rank == rank, name
        assert relative(result.weight, expected) < 1e-9, name


def test_elimination_does_not_square_the_condition_number():
    n = 18  # all pivots are 1 and nothing is exchanged, and still the condition number is 1e6
    a = torch.eye(n, n + 2, dtype=torch.float64) - 0.999 * torch.triu(torch.ones(n, n + 2, dtype=torch.float64), 1)
    a[:, n:] = 1e-6 * system(n, 2, 2, seed=0)[0]
    v = system(n, n + 2, 1, seed=1)[1]
    assert 1e5 < torch.linalg.cond(a) < 1e7
    result = minimum_norm_shift(a, v, solver="gauss")
    assert result.rank == n
    assert relative(result.weight, by_pinv(a, v)) < 1e-9


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_deviation_is_that_of_the_shift_whatever_is_written_afterwards(solver):
    a = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.01, 0.0]], dtype=torch.float64)
    v = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    asked = minimum_norm_shift(a, v, rtol=0.1, solver=solver).deviation
    late = minimum_norm_shift(a, v, rtol=0.1, solver=solver)
    v.copy_(late.weight)  # as a shift does, in place
    a.zero_()
    assert asked > 1e-3
    assert late.deviation == asked


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-156, 1e-154, 1e-150, 1e-139, 1e150, 1e154, 1e200, 1e300])
@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_of_extreme_length(solver, scale):
    a, v = system(4, 6, 4, seed=3)
    result = minimum_norm_shift(a * scale, v, solver=solver)
    assert relative(result.weight, by_pinv(a, v)) < 1e-9
    assert result.deviation < 1e-12  # a number: neither 0/0 nor Inf/Inf


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("features_dtype", DTYPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_any_dtype_is_solved_in_float64_and_comes_back_as_the_weight_was(solver, features_dtype, weight_dtype):
    a, v = system(6, 10, 6, seed=5)
    a, v = a.to(features_dtype), v.to(weight_dtype)
    result = minimum_norm_shift(a, v, solver=solver)
    expected = by_lstsq(a.double(), v.double())
    assert result.weight.dtype == weight_dtype
    # Rounding to the weight's dtype, once, is all that is lost.
    assert relative(result.weight.double(), expected) < max(torch.finfo(weight_dtype).eps, 1e-9)
    assert result.norm_after == pytest.approx(float(expected.norm()), rel=1e-9)  # float64 whatever the dtype


@pytest.mark.parametrize("solver", SOLVERS)
def test_default_tolerance_is_that_of_the_features_dtype(solver):
    a, v = system(12, 8, 3, seed=7)
    a32 = a.float()  # rounding makes the rank 8, 1e-7 beside the signal
    assert minimum_norm_shift(a32, v, solver=solver).rank == 3
    assert minimum_norm_shift(a32.double(), v, solver=solver).rank == 8
    assert relative(minimum_norm_shift(a32, v, solver=solver).weight, by_pinv(a, v)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", SOLVERS)
def test_half_precision_does_not_throw_signal_away(solver, dtype):
    a = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0**-12, 0.0]], dtype=dtype)  # far below bfloat16's eps, but exact
    result = minimum_norm_shift(a, torch.ones(1, 3), solver=solver)
    assert result.rank == 2
    assert torch.equal(result.weight, torch.tensor([[1.0, 1.0, 0.0]]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_rtol_decides_on_the_rank(solver):
    a = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.01, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    v = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    assert [minimum_norm_shift(a, v, rtol=t, solver=solver).rank for t in (0.0, 1e-6, 0.1)] == [2, 2, 1]
    cut = minimum_norm_shift(a, v, rtol=0.1, solver=solver)
    dense = float((a @ (cut.weight - v).T).norm() / (a @ v.T).norm())
    assert cut.deviation == pytest.approx(dense, rel=1e-9)  # what the cut does to the outputs is told
    assert dense > 1e-3


@PROPERTY
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31), st.floats(1e-6, 0.9))
def test_the_svd_cuts_where_the_singular_values_of_scaled_rows_do(n, d, seed, rtol):
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(n, d, generator=g, dtype=torch.float64) + 0.5  # one large singular value, and small ones
    values = np.linalg.svd((a / a.norm(dim=1, keepdim=True)).numpy(), compute_uv=False)
    ratios = values / values[0]
    assume(np.abs(ratios - rtol).min() > 1e-9)
    assert minimum_norm_shift(a, torch.ones(2, d), rtol=rtol).rank == int((ratios > rtol).sum())


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_reported_is_what_was_returned(solver):
    a, v = system(5, 8, 4, seed=9)
    result = minimum_norm_shift(a, v, solver=solver)
    assert result.norm_before == pytest.approx(np.linalg.norm(v.numpy()), rel=1e-14)
    assert result.norm_after == pytest.approx(np.linalg.norm(result.weight.numpy()), rel=1e-14)
    # Pythagoras: what goes is orthogonal to what stays.
    gone = np.linalg.norm((v - result.weight).numpy())
    assert result.norm_before**2 == pytest.approx(result.norm_after**2 + gone**2, rel=1e-12)
    assert gone > 0.1
    assert result.deviation < 1e-13
    assert result.rank == np.linalg.matrix_rank(a.numpy())


@pytest.mark.parametrize("rows", [0, 1, 4, 9])
@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_that_span_nothing_change_nothing(solver, rows):
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    result = minimum_norm_shift(torch.zeros(rows, 5), weight, solver=solver)
    assert result.status == RANK_ZERO
    assert result.weight is weight
    assert torch.equal(weight, before)
    assert (result.rank, result.deviation) == (0.0, 0.0)
    assert result.norm_after == result.norm_before == pytest.approx(float(before.double().norm()), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["features", "weight"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_not_finite_changes_nothing(solver, where, value, dtype):
    a, v = (x.to(dtype) for x in system(4, 6, 4, seed=1))
    (a if where == "features" else v)[1, 2] = value
    before = v.clone()
    result = minimum_norm_shift(a, v, solver=solver)
    assert result.status == NON_FINITE
    assert result.weight is v
    assert torch.equal(v.nan_to_num(7.0, 8.0, 9.0), before.nan_to_num(7.0, 8.0, 9.0))
    assert (result.rank, result.deviation) == (0.0, 0.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_weight_that_is_not_finite_is_told_even_where_the_rows_span_nothing(solver):
    weight = torch.full((3, 5), float("nan"))
    assert minimum_norm_shift(torch.zeros(4, 5), weight, solver=solver).status == NON_FINITE


@pytest.mark.parametrize("solver", SOLVERS)
def test_overflow_on_the_way_changes_nothing(solver):
    a, v = system(4, 6, 4, seed=1)
    v = v * 1e200  # its norm has no square
    result = minimum_norm_shift(a, v, solver=solver)
    assert result.status == NON_FINITE
    assert result.weight is v


@pytest.mark.parametrize("solver", SOLVERS)
def test_overflow_of_the_weights_dtype_changes_nothing(solver):
    weight = torch.tensor([[60000.0, 60000.0]], dtype=torch.float16)
    # The projection on (0.92, 0.38) has an entry of 72 500; float16 ends at 65 504.
    result = minimum_norm_shift(torch.tensor([[0.92, 0.38]]), weight, solver=solver)
    assert result.status == NON_FINITE
    assert result.weight is weight
    assert minimum_norm_shift(torch.tensor([[0.92, 0.38]]), weight / 2, solver=solver).status == OK


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_weight_of_zero_stays_zero(solver):
    a, v = system(4, 6, 4, seed=1)
    result = minimum_norm_shift(a, torch.zeros_like(v), solver=solver)
    assert result.status == OK
    assert not result.weight.any()
    assert (result.norm_before, result.norm_after, result.deviation) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_inputs_are_not_touched_and_no_graph_is_kept(solver):
    a, v = system(4, 6, 4, seed=2)
    features, weight = a.clone().requires_grad_(), nn.Parameter(v.clone())
    result = minimum_norm_shift(features, weight, solver=solver)
    assert torch.equal(features, a)
    assert torch.equal(weight, v)
    assert not result.weight.requires_grad
    assert result.weight.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("features", "weight", "options", "message"),
    [
        ((4, 5), (3, 6), {}, r"features \(4, 5\) and weight \(3, 6\) do not fit: expected \(n, d\) and \(out, d\)"),
        ((5,), (3, 5), {}, r"features \(5,\) and weight \(3, 5\) do not fit"),
        ((2, 4, 5), (3, 5), {}, r"features \(2, 4, 5\)"),
        ((4, 5), (5,), {}, r"weight \(5,\) do not fit"),
        ((4, 5), (3, 5, 1, 1), {}, r"weight \(3, 5, 1, 1\) do not fit"),
        ((4, 5), (3, 5), {"solver": "lu"}, r"'solver=lu' is invalid: solver must be one of svd, gauss"),
        ((4, 5), (3, 5), {"rtol": -1e-9}, r"rtol=-1e-09 must be at least 0 and less than 1"),
        ((4, 5), (3, 5), {"rtol": 1.0}, r"rtol=1\.0 must be"),
        ((4, 5), (3, 5), {"rtol": float("nan")}, r"rtol=nan must be"),
    ],
)
def test_errors_say_what_was_wrong(features, weight, options, message):
    with pytest.raises(ValueError, match=message):
        minimum_norm_shift(torch.ones(features), torch.ones(weight), **options)
