# yolo-sos, AGPL-3.0
"""Whose outputs matter: groups and weights of rows, and rows drawn by them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_sos.core import (
    NON_FINITE,
    RANK_ZERO,
    WEIGHTINGS,
    RowSample,
    has_background,
    minimum_norm_shift,
    principal_shift,
    row_groups,
)

PROPERTY = settings(derandomize=True, max_examples=50, deadline=None, database=None)


def generator(seed=0):
    """Return a seeded generator on the CPU."""
    return torch.Generator().manual_seed(seed)


# Groups and weights ---------------------------------------------------------------------------------------------------
KINDS = ("box", "cls", "mask", "kpt", "angle", "linear")


@pytest.mark.parametrize(
    ("weighting", "kinds", "groups", "weights"),
    [
        ("uniform", KINDS, [0, 0, 0], [1, 1, 1]),
        ("confidence", ("box", "mask", "kpt", "angle"), [0, 0, 0], [0.5, 1, 0]),  # the highest probability
        ("confidence", ("cls", "linear"), [0, 0, 0], [0.25 * 0.75 + 0.25, 0, 0]),  # Σ p(1−p)
        ("balanced", KINDS, [1, 0, 0], [0.5, 1, 0]),  # the most probable class, and its probability
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_groups_and_weights_by_hand(weighting, kinds, groups, weights, dtype):
    p = torch.tensor([[0.25, 0.5], [1, 0], [0, 0]], dtype=dtype)  # exact in every dtype
    for kind in kinds:
        group, weight = row_groups(weighting, kind, p)
        assert weight.dtype == dtype
        assert group.dtype == torch.long
        assert (group.tolist(), weight.tolist()) == (groups, weights), kind
        assert has_background(weighting, kind) == (weighting == "balanced" and kind == "cls")


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_rows_have_no_groups(weighting):
    groups, weights = row_groups(weighting, "cls", torch.zeros(0, 3))
    assert groups.shape == weights.shape == (0,)


def test_unknown_weighting():
    with pytest.raises(ValueError, match=r"weighting='loss' is unknown\. Choose one of balanced, confidence, uniform"):
        row_groups("loss", "cls", torch.zeros(2, 3))


# Second moment --------------------------------------------------------------------------------------------------------
def sampled(a, groups, weights, size, *, count=3, seed=0, pieces=1, background=False):
    """Return a sample that has seen the rows in several pieces."""
    sample = RowSample(a.shape[1], count, size, generator(seed), background=background)
    for part in zip(*(x.tensor_split(pieces) for x in (a, groups, weights)), strict=True):
        sample.update(*part)
    return sample


def grouped_moment(a, groups, weights, background=False):
    """Return Σ_g (Σᵢ∈g wᵢ aᵢᵀaᵢ)/(Σᵢ∈g wᵢ), and the mean over all rows for the background, row by row in numpy."""
    a, groups, weights = (x.double().numpy() if x.is_floating_point() else x.numpy() for x in (a, groups, weights))
    total = np.zeros((a.shape[1],) * 2)
    for g in range(3):
        if weights[groups == g].sum() > 0:
            rows = zip(a[groups == g], weights[groups == g], strict=True)
            total += sum(w * np.outer(x, x) for x, w in rows) / weights[groups == g].sum()
    return total + (a.T @ a / len(a) if background else 0)


@PROPERTY
@given(st.integers(1, 25), st.integers(1, 5), st.integers(0, 2**31), st.booleans(), st.integers(1, 4))
def test_where_all_rows_stay_the_moment_is_exact(n, d, seed, background, pieces):
    g = generator(seed)
    a = torch.randn(n, d, generator=g, dtype=torch.float64)
    groups, weights = (
        torch.randint(3, (n,), generator=g),
        torch.rand(n, generator=g) * (torch.rand(n, generator=g) > 0.3),
    )
    sample = sampled(a, groups, weights, 4 * n, background=background, pieces=pieces)
    expected = grouped_moment(a, groups, weights, background)
    np.testing.assert_allclose(sample.moments.matrix.numpy(), expected, rtol=1e-10, atol=1e-12)
    assert sample.rows == sample.moments.rows == n
    assert sample.moments.mass == pytest.approx(len(set(groups[weights > 0].tolist())) + background)


def lopsided(rows=300, d=4):
    """Return rows, groups and weights: a common group, a tenth, and two rows that alone have a last column."""
    a = torch.randn(rows, d, generator=generator(), dtype=torch.float64)
    weights = torch.rand(rows, generator=generator(1), dtype=torch.float64)
    groups = (torch.arange(rows) % 10 == 0).long()
    a[:, -1] = 0.0
    a[[20, 270], -1], groups[[20, 270]], weights[[20, 270]] = 1.0, 2, 0.9
    return a, groups, weights


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("pieces", [1, 5, 40])
def test_sums_over_a_sample_are_right_on_average(background, pieces):
    """Priority sampling: the sum of a group's ``max(w, τ)`` over any subset of rows is unbiased."""
    a, groups, weights = lopsided()
    subset = torch.arange(300) % 7 < 3
    a[:, 0] = subset.double()  # G₀₀ · mass is the estimate of the subset's weight
    estimates, masses = [], []
    for seed in range(400):
        sample = sampled(a, groups, weights, 40, seed=seed, background=background, pieces=pieces)
        sample._select()
        ((rows, _, group, weight, _),) = sample._parts
        weight = torch.maximum(weight, sample._threshold[group])
        inside = rows[:, 0] == 1
        estimates.append([float(weight[inside & (group == g)].sum()) for g in range(3 + background)])
        masses.append([float(weight[group == g].sum()) for g in range(3 + background)])
    true = [float(weights[subset & (groups == g)].sum()) for g in range(3)] + [float(subset.sum())] * background
    whole = [float(weights[groups == g].sum()) for g in range(3)] + [300.0] * background
    for found, expected in ((np.array(estimates), true), (np.array(masses), whole)):
        error = np.abs(found.mean(0) - expected)
        assert (error <= 4 * found.std(0) / len(found) ** 0.5 + 1e-9).all()
    assert np.array(masses)[:, 2].std() < 1e-12  # two rows that both stay
    assert np.array(masses)[:, 0].std() > 1e-3


@pytest.mark.parametrize("background", [False, True])
def test_the_moment_of_a_sample_is_near_that_of_all_rows(background):
    a, groups, weights = lopsided()
    expected = torch.from_numpy(grouped_moment(a, groups, weights, background))
    found = torch.stack(
        [sampled(a, groups, weights, 80, seed=s, background=background, pieces=5).moments.matrix for s in range(200)]
    )
    relative = (found - expected).flatten(1).norm(dim=1) / expected.norm()
    assert 1e-3 < relative.mean() < 0.3
    assert (found.mean(0) - expected).norm() / expected.norm() < 0.03


def test_asking_changes_nothing():
    sample = sampled(*lopsided(), 20, pieces=4)
    first, rows = sample.moments.matrix, sample.sample
    assert torch.equal(sample.moments.matrix, first)
    assert torch.equal(sample.sample, rows)


@pytest.mark.parametrize("background", [False, True])
def test_memory_is_bounded(background):
    """At most twice the size stays in memory between batches, whatever is offered."""
    sample = RowSample(4, 3, 50, generator(), background=background)
    for seed in range(60):
        a = torch.randn(40, 4, generator=generator(seed))
        sample.update(a, torch.arange(40) % 3, torch.rand(40, generator=generator(seed)))
        held = {f.untyped_storage().data_ptr(): f.untyped_storage().nbytes() for f, *_ in sample._parts}
        assert sum(held.values()) <= (2 * 50 + 40) * 4 * 4
        assert sum(len(part[1]) for part in sample._parts) <= 2 * (2 * 50 + 40)
    assert (len(sample.sample), sample.rows) == (50, 2400)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_any_dtype_add_up(dtype):
    a, groups, weights = lopsided(3000)
    a, weights = a.to(dtype), weights.to(dtype)
    weights[groups == 0] = 1000.0  # whose sum is more than float16 holds
    expected = torch.from_numpy(grouped_moment(a, groups, weights))
    for size, tolerance in ((9000, 1e-6), (1500, 0.1)):
        found = sampled(a, groups, weights, size, pieces=7).moments.matrix
        assert (found - expected).norm() < tolerance * expected.norm()


def test_rows_that_take_part_in_a_graph_leave_it():
    for size in 200, 10:
        found = []
        for wanted in False, True:
            a, w = torch.randn(60, 4, generator=generator()), torch.rand(60, generator=generator())
            sample = sampled(a.requires_grad_(wanted), torch.arange(60) % 3, w.requires_grad_(wanted), size)
            found.append(sample.moments.matrix)
        assert torch.equal(*found) and not found[1].requires_grad


def test_a_class_counts_the_same_however_many_rows_it_has():
    a, labels, w = torch.randn(6, 4, generator=generator(), dtype=torch.float64), torch.arange(6) // 2, torch.ones(6)
    once = sampled(a, labels, w, 100).moments.matrix
    often = sampled(torch.cat([a, a[:2], a[:2]]), torch.cat([labels, labels[:2], labels[:2]]), torch.ones(10), 100)
    assert torch.allclose(often.moments.matrix, once, rtol=1e-12, atol=0)


def test_groups_without_rows_add_nothing():
    a = torch.randn(5, 3, generator=generator(), dtype=torch.float64)
    sample = sampled(a, torch.zeros(5, dtype=torch.long), torch.ones(5), 100)
    assert torch.allclose(sample.moments.matrix, a.T @ a / 5, rtol=1e-12, atol=0)
    for nothing in (RowSample(3, 2, 5, generator()), sampled(a, torch.arange(5) % 2, torch.zeros(5), 9)):
        assert principal_shift(nothing.moments, torch.ones(1, 3)).status == RANK_ZERO
        assert nothing.sample.shape == (0, 3)


@pytest.mark.parametrize(
    "shapes", [((4, 2), (4,), (4,)), ((4, 3), (3,), (4,)), ((4, 3), (4,), (4, 1)), ((3,), (3,), (3,))]
)
def test_shapes_that_do_not_fit(shapes):
    features, groups, weights = (torch.zeros(shape) for shape in shapes)
    sample = RowSample(3, 2, 5, generator())
    with pytest.raises(ValueError, match=r"do not fit: expected \(n, 3\), \(n,\) and \(n,\)"):
        sample.update(features, groups.long(), weights)
    assert sample.rows == 0


# Drawn rows -----------------------------------------------------------------------------------------------------------
def numbered(n, d=3):
    """Return rows that carry their own number in the first column."""
    return torch.cat([torch.arange(n)[:, None].float(), torch.ones(n, d - 1)], dim=1)


def draw(size, weights, groups=None, seed=0, pieces=1, **options):
    """Return the numbers of the rows drawn."""
    groups = torch.zeros(len(weights), dtype=torch.long) if groups is None else groups
    count = max(1, int(groups.max()) + 1)
    sample = sampled(numbered(len(weights)), groups, weights, size, count=count, seed=seed, pieces=pieces, **options)
    assert sample.rows == len(weights)
    return sample.sample[:, 0].int().tolist()


@pytest.mark.parametrize("pieces", [1, 3, 40])
@pytest.mark.parametrize("size", [1, 5, 39, 40, 100])
def test_as_many_rows_as_wanted_none_twice(size, pieces):
    drawn = draw(size, torch.rand(40, generator=generator()) + 0.01, pieces=pieces)
    assert len(drawn) == len(set(drawn)) == min(size, 40)


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
def test_rows_are_divided_evenly_among_groups(size, pieces):
    labels, lots = torch.arange(30) % 3, set()
    for seed in range(20):
        counts = torch.bincount(labels[draw(size, torch.ones(30), labels, seed, pieces)], minlength=3).tolist()
        assert sorted(counts, reverse=True) == [size // 3 + (g < size % 3) for g in range(3)]
        lots.add(tuple(counts))
    assert len(lots) == math.comb(3, size % 3)  # which group gets the rest is drawn by lot


def test_a_group_with_few_rows_gives_what_it_has():
    labels = torch.tensor([0] * 2 + [1] * 20 + [2])
    counts = torch.bincount(labels[draw(10, (labels < 2).float(), labels)], minlength=3).tolist()
    assert counts[0] == 2
    assert counts[1] in {3, 4}
    assert counts[2] == 0


def test_the_background_is_one_more_group_of_all_rows():
    labels = torch.tensor([0] * 10 + [1] * 10)
    drawn = draw(6, (labels == 1).float(), labels, background=True)  # class 0 weighs nothing
    assert len(drawn) == 4  # two of class 1, and two of all rows
    assert sum(i >= 10 for i in drawn) >= 2
    both = draw(6, torch.ones(1), background=True)
    assert both == [0, 0]  # a row can be drawn by its class and by the background
    chosen = [i for seed in range(200) for i in draw(3, torch.zeros(20), labels, seed, background=True)]
    assert set(chosen) == set(range(20))


@pytest.mark.parametrize("pieces", [1, 5])
def test_no_row_of_weight_zero_is_drawn(pieces):
    weights = torch.rand(30, generator=generator()) * (torch.arange(30) % 3 == 0)
    for seed in range(30):
        for size in (4, 10, 25):
            drawn = draw(size, weights, seed=seed, pieces=pieces)
            assert len(drawn) == min(size, 10)
            assert all(i % 3 == 0 for i in drawn)


def test_the_seed_decides():
    weights, groups, state = torch.rand(50, generator=generator()), torch.arange(50) % 2, torch.get_rng_state()
    assert draw(6, weights, groups, 1, 3) == draw(6, weights, groups, 1, 3)
    assert len({tuple(draw(6, weights, groups, seed)) for seed in range(20)}) == 20
    assert torch.equal(torch.get_rng_state(), state)  # the global generator takes no part


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_single_draw_follows_the_weights_of_two_rows(pieces):
    """The larger of w₁/u₁ and w₂/u₂: for w₁ ≤ w₂, row 1 has it with probability w₁/(2 w₂)."""
    trials = 2000
    counts = np.bincount([draw(1, torch.tensor([1.0, 4.0]), seed=s, pieces=pieces)[0] for s in range(trials)])
    assert abs(counts[0] / trials - 1 / 8) <= 4 * math.sqrt(1 / 8 * 7 / 8 / trials)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", [1.0, 1e-9, 0.0, float("nan")])
@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("size", [2, 30, 2000])
def test_a_row_that_is_not_finite_is_always_kept(bad, weight, pieces, size):
    """Even where there are more groups than rows to draw."""
    a, w = numbered(500), torch.ones(500)
    a[321, 2], w[321] = bad, weight
    for seed in range(5):
        sample = sampled(a, torch.arange(500) % 5, w, size, count=5, seed=seed, pieces=pieces, background=True)
        assert 321 in sample.sample[:, 0].tolist()
        assert minimum_norm_shift(sample.sample, torch.ones(1, 3)).status == NON_FINITE
        assert principal_shift(sample.moments, torch.ones(1, 3)).status == NON_FINITE


@pytest.mark.parametrize("size", [2, 2000])
def test_weights_that_are_no_numbers_show(size):
    a, w = numbered(500), torch.ones(500)
    w[123] = float("nan")
    sample = sampled(a, torch.arange(500) % 5, w, size, count=5)
    assert 123 in sample.sample[:, 0].tolist()
    assert principal_shift(sample.moments, torch.ones(1, 3)).status == NON_FINITE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_keep_their_bits(dtype):
    a = torch.randn(200, 3, generator=generator()).to(dtype)
    drawn = sampled(a, torch.arange(200) % 3, torch.ones(200), 8, pieces=3).sample
    assert drawn.dtype == dtype
    assert drawn.shape == (8, 3)
    assert all((a == row).all(1).any() for row in drawn)


def test_large_rows_of_half_precision_are_finite():
    a = torch.full((500, 3), 60000.0, dtype=torch.float16)  # their sum is not, in float16
    assert len(sampled(a, torch.zeros(500, dtype=torch.long), torch.ones(500), 4, count=1).sample) == 4


def test_nothing_to_draw():
    assert RowSample(3, 2, 5, generator()).sample.shape == (0, 3)
    empty = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), torch.zeros(0)
    assert sampled(*empty, 5).sample.shape == (0, 3)
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        RowSample(3, 2, 0, generator())
