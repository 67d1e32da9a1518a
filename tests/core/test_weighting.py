# yolo-sos, AGPL-3.0
"""Whose outputs matter: weights, grouped second moments, and rows drawn by weight."""

import itertools
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
    Gram,
    GroupedGram,
    RowSample,
    has_background,
    minimum_norm_shift,
    principal_shift,
    row_weights,
)
from yolo_sos.core import gram as gram_module
from yolo_sos.core import weighting as weighting_module

PROPERTY = settings(derandomize=True, max_examples=50, deadline=None, database=None)


def generator(seed=0):
    """Return a seeded generator on the CPU."""
    return torch.Generator().manual_seed(seed)


# Weights --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("weighting", "kinds", "expected"),
    [
        ("uniform", ("box", "cls", "mask", "kpt", "angle", "linear"), [[1], [1], [1]]),
        ("confidence", ("box", "mask", "kpt", "angle"), [[0.5], [1], [0]]),  # the highest probability
        ("confidence", ("cls", "linear"), [[0.25 * 0.75 + 0.25], [0], [0]]),  # Σ p(1−p)
        ("balanced", ("box", "cls", "mask", "kpt", "angle", "linear"), [[0.25, 0.5], [1, 0], [0, 0]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_weights_by_hand(weighting, kinds, expected, dtype):
    p = torch.tensor([[0.25, 0.5], [1, 0], [0, 0]], dtype=dtype)  # exact in every dtype
    for kind in kinds:
        w = row_weights(weighting, kind, p)
        assert w.dtype == dtype
        assert w.tolist() == expected, kind
        assert has_background(weighting, kind) == (weighting == "balanced" and kind == "cls")


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_rows_have_no_weights(weighting):
    groups = {"uniform": 1, "confidence": 1, "balanced": 3}[weighting]
    assert row_weights(weighting, "cls", torch.zeros(0, 3)).shape == (0, groups)


def test_unknown_weighting():
    with pytest.raises(ValueError, match=r"weighting='loss' is unknown\. Choose one of balanced, confidence, uniform"):
        row_weights("loss", "cls", torch.zeros(2, 3))


# Second moment --------------------------------------------------------------------------------------------------------
def balanced_moment(a, p, kind):
    """Return Σ_c (Σ_i p_ic a_iᵀa_i)/(Σ_i p_ic), plus the mean over all rows for kind "cls", row by row in numpy."""
    total = np.zeros((a.shape[1],) * 2)
    for c in range(p.shape[1]):
        if p[:, c].sum() > 0:
            total += sum(pi * np.outer(ai, ai) for ai, pi in zip(a, p[:, c], strict=True)) / p[:, c].sum()
    if kind == "cls" and len(a):
        total += sum(np.outer(ai, ai) for ai in a) / len(a)
    return total


@PROPERTY
@given(
    st.integers(1, 25), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31), st.sampled_from(["cls", "linear"])
)
def test_balanced_moment_is_the_formula_however_the_rows_arrive(n, d, classes, seed, kind):
    g = generator(seed)
    a = torch.randn(n, d, generator=g, dtype=torch.float64)
    p = torch.rand(n, classes, generator=g, dtype=torch.float64) * (torch.rand(n, classes, generator=g) > 0.3)
    expected = balanced_moment(a.numpy(), p.numpy(), kind)
    for pieces in (1, 2, n):
        moment = GroupedGram(d, background=has_background("balanced", kind))
        for ai, pi in zip(a.tensor_split(pieces), p.tensor_split(pieces), strict=True):
            moment.update(ai, row_weights("balanced", kind, pi))
        np.testing.assert_allclose(moment.gram.matrix.numpy(), expected, rtol=1e-10, atol=1e-12)
        assert moment.rows == moment.gram.rows == n
        assert moment.gram.mass == int((p.sum(0) > 0).sum()) + (kind == "cls")


def thinned(a, w, held, monkeypatch, *, seed=0, pieces=5, **options):
    """Return what holds at most so many bytes of the rows; after every piece, that it does."""
    monkeypatch.setattr(weighting_module, "HELD", held)
    moment = GroupedGram(a.shape[1], generator(seed), **options)
    for ai, wi in zip(a.tensor_split(pieces), w.tensor_split(pieces), strict=True):
        moment.update(ai, wi)
        kept = [x for part in (*moment._kept, *moment._new) for x in part[:2]]
        assert sum(x.untyped_storage().nbytes() if moment.threshold else 0 for x in kept) <= held
    assert bool(moment.threshold) == (held < sum(x.numel() * x.element_size() for x in (a, w)))
    return moment


def lopsided(rows=300, d=4):
    """Return rows and weights of three groups: everything, a tenth, and two rows that alone have a last column."""
    a = torch.randn(rows, d, generator=generator(), dtype=torch.float64)
    w = torch.rand(rows, 3, generator=generator(1), dtype=torch.float64)
    w[torch.arange(rows) % 10 > 0, 1] = 0.0
    a[:, -1], w[:, 2] = 0.0, 0.0
    a[[20, 270], -1], w[[20, 270], 2] = 1.0, 0.9
    return a, w


def grouped_moment(a, w):
    """Return Σ_g (Σᵢ w_ig aᵢᵀaᵢ)/(Σᵢ w_ig)."""
    return sum((w[:, [g]] * a).T @ a / w[:, g].sum() for g in range(w.shape[1]))


@pytest.mark.parametrize("background", [False, True])
def test_too_many_rows_are_thinned_and_right_on_average(background, monkeypatch):
    a, w = lopsided()
    expected = grouped_moment(a, torch.cat([w, torch.ones(len(w), background, dtype=w.dtype)], 1))
    whole = thinned(a, w, 1 << 25, monkeypatch, background=background)
    torch.testing.assert_close(whole.gram.matrix, expected, rtol=1e-12, atol=1e-15)
    found = []
    for seed in range(400):
        moment = thinned(a, w, 60 * 7 * 8, monkeypatch, seed=seed, background=background)  # a fifth of the rows
        for _ in range(2):  # asking changes nothing
            found.append(moment.gram.matrix)
        assert torch.equal(found.pop(), found[-1])
        assert 20 <= sum(len(part[0]) for part in moment._kept) <= 60
        assert (moment.rows, moment.gram.rows, moment.gram.mass) == (300, 300, 3.0 + background)
    error = torch.stack(found) - expected
    assert (error.mean(0).abs() <= 4 * error.std(0) / len(found) ** 0.5 + 1e-12).all()
    assert error[..., -1, -1].abs().max() < 0.02 * expected[-1, -1]  # two rows that nothing stands for
    relative = error.flatten(1).norm(dim=1) / expected.norm()
    assert 1e-3 < relative.mean() < 0.2


def test_thinning_follows_the_seed_and_leaves_the_global_state(monkeypatch):
    a, w = lopsided()
    state = torch.get_rng_state()
    first, again, other = (thinned(a, w, 4000, monkeypatch, seed=seed).gram.matrix for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_single_group_is_exact_and_holds_no_rows(monkeypatch):
    a, w = torch.randn(40, 3, generator=generator()), torch.rand(40, 1, generator=generator(1))
    monkeypatch.setattr(weighting_module, "HELD", 0)
    moment = GroupedGram(3)
    for ai, wi in zip(a.split(7), w.split(7), strict=True):
        moment.update(ai, wi)
    assert not moment._new and not moment._kept
    torch.testing.assert_close(moment.gram.matrix, grouped_moment(a.double(), w.double()), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_any_dtype_add_up(dtype, monkeypatch):
    a, w = (x.to(dtype) for x in lopsided(3000))
    w[:, 0] = 1000.0  # whose sum is more than float16 holds
    for held in (1 << 25, 30_000):
        moment = thinned(a, w, held, monkeypatch)
        expected = grouped_moment(a.double(), w.double())
        assert (moment.gram.matrix - expected).norm() < (0.05 if moment.threshold else 1e-6) * expected.norm()


@pytest.mark.parametrize("held", [1 << 25, 1 << 9], ids=["all", "thinned"])
def test_rows_that_take_part_in_a_graph_leave_it(held, monkeypatch):
    monkeypatch.setattr(weighting_module, "HELD", held)
    moments = []
    for wanted in False, True:
        a, w = torch.randn(60, 4, generator=generator()), torch.rand(60, 3, generator=generator())
        grouped = GroupedGram(4, generator(), background=True)
        grouped.update(a.requires_grad_(wanted), w.requires_grad_(wanted))
        assert (grouped.threshold > 0) == (held == 1 << 9)
        moments.append(grouped.gram.matrix)
    assert torch.equal(*moments) and not moments[1].requires_grad


def test_rows_and_weights_must_fit():
    with pytest.raises(ValueError, match=r"features has shape \(4, 2\); expected \(4, 3\)"):
        GroupedGram(3).update(torch.ones(4, 2), torch.ones(4, 1))


def test_a_class_counts_the_same_however_many_rows_it_has():
    a, labels = torch.randn(6, 4, generator=generator(), dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 2])
    one_hot = torch.nn.functional.one_hot(labels, 3).double()
    once, often = GroupedGram(4), GroupedGram(4)
    once.update(a, one_hot)
    often.update(torch.cat([a, a[:2], a[:2]]), torch.cat([one_hot, one_hot[:2], one_hot[:2]]))
    assert torch.allclose(once.gram.matrix, often.gram.matrix, rtol=1e-12, atol=0)
    plain = Gram(4).update(torch.cat([a, a[:2], a[:2]]))
    assert not torch.allclose(plain.mean().matrix * 3, once.gram.matrix, rtol=1e-2, atol=0)


def test_one_group_is_the_weighted_mean():
    a, w = torch.randn(9, 4, generator=generator(), dtype=torch.float64), torch.rand(9, 1, generator=generator(1))
    moment = GroupedGram(4)
    moment.update(a, w)
    assert torch.allclose(moment.gram.matrix, Gram(4).update(a, w[:, 0]).mean().matrix, rtol=1e-12, atol=0)


def test_groups_without_mass_add_nothing():
    a = torch.randn(5, 3, generator=generator(), dtype=torch.float64)
    moment = GroupedGram(3)
    moment.update(a, torch.tensor([[1.0, 0.0]] * 5))
    assert torch.allclose(moment.gram.matrix, a.T @ a / 5, rtol=1e-12, atol=0)
    assert principal_shift(moment.gram, torch.ones(1, 3)).rank == 3
    nothing = GroupedGram(3)
    assert (nothing.rows, nothing.gram.rows) == (0, 0)
    assert principal_shift(nothing.gram, torch.ones(1, 3)).status == RANK_ZERO


def test_the_number_of_groups_cannot_change():
    moment = GroupedGram(3)
    moment.update(torch.ones(2, 3), torch.ones(2, 2))
    with pytest.raises(ValueError, match="4 groups; there were 2"):
        moment.update(torch.ones(2, 3), torch.ones(2, 4))


def test_rows_are_weighted_a_chunk_at_a_time(monkeypatch):
    g = generator()
    a, w = torch.randn(20, 3, generator=g), torch.rand(20, 2, generator=g)
    whole = GroupedGram(3)
    whole.update(a, w)
    expected = whole.gram.matrix
    sizes, convert = [], weighting_module.as_float64

    def spy(x):
        sizes.append(len(x))
        return convert(x)

    monkeypatch.setitem(gram_module.CHUNK, "cpu", 6)
    monkeypatch.setattr(weighting_module, "as_float64", spy)
    chunked = GroupedGram(3)
    chunked.update(a, w)
    torch.testing.assert_close(chunked.gram.matrix, expected, rtol=1e-6, atol=0)
    assert sizes == [6, 6, 6, 2]


# Drawn rows -----------------------------------------------------------------------------------------------------------
def numbered(n, d=3):
    """Return rows that carry their own number in the first column."""
    return torch.cat([torch.arange(n)[:, None].float(), torch.ones(n, d - 1)], dim=1)


def draw(rows, weights, seed=0, pieces=1):
    """Return the numbers of the rows drawn."""
    sample = RowSample(3, rows, generator(seed))
    for a, w in zip(numbered(len(weights)).tensor_split(pieces), weights.tensor_split(pieces), strict=True):
        sample.update(a, w)
    assert sample.rows == len(weights)
    return sample.sample[:, 0].int().tolist()


@pytest.mark.parametrize("pieces", [1, 3, 40])
@pytest.mark.parametrize("rows", [1, 5, 39, 40, 100])
def test_as_many_rows_as_wanted_none_twice(rows, pieces):
    drawn = draw(rows, torch.rand(40, 1, generator=generator()) + 0.01, pieces=pieces)
    assert len(drawn) == min(rows, 40)
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 9])
def test_rows_are_divided_evenly_among_groups(rows, pieces):
    labels = torch.arange(30) % 3
    lots = set()
    for seed in range(20):
        drawn = draw(rows, torch.nn.functional.one_hot(labels, 3).float(), seed, pieces)
        per_group = torch.bincount(labels[drawn], minlength=3).tolist()
        assert sorted(per_group, reverse=True) == [rows // 3 + (g < rows % 3) for g in range(3)]
        lots.add(tuple(per_group))
    assert len(lots) == math.comb(3, rows % 3)  # who gets what does not divide is drawn by lot


def test_a_group_with_few_rows_gives_what_it_has():
    labels = torch.tensor([0] * 2 + [1] * 20)
    drawn = draw(10, torch.nn.functional.one_hot(labels, 3).float())  # no row of class 2
    counts = torch.bincount(labels[drawn], minlength=3).tolist()
    assert counts[0] == 2
    assert counts[1] in {3, 4}
    assert counts[2] == 0


def test_a_row_can_be_drawn_by_more_than_one_group():
    assert sorted(draw(4, torch.tensor([[1.0, 1.0], [1.0, 1.0]]))) == [0, 0, 1, 1]


@pytest.mark.parametrize("pieces", [1, 5])
def test_no_row_of_weight_zero_is_drawn(pieces):
    weights = torch.rand(30, 1, generator=generator()) * (torch.arange(30)[:, None] % 3 == 0)
    for seed in range(30):
        for rows in (4, 10, 25):
            drawn = draw(rows, weights, seed, pieces)
            assert len(drawn) == min(rows, 10)
            assert all(i % 3 == 0 for i in drawn)


def test_the_seed_decides():
    weights = torch.rand(50, 2, generator=generator())
    state = torch.get_rng_state()
    assert draw(6, weights, seed=1, pieces=3) == draw(6, weights, seed=1, pieces=3)
    assert len({tuple(draw(6, weights, seed)) for seed in range(20)}) == 20
    assert torch.equal(torch.get_rng_state(), state)  # the global generator takes no part


def inclusion(weights, k):
    """Return the probability of each row to be among k drawn one after the other in proportion to their weights."""
    result = np.zeros(len(weights))
    for order in itertools.permutations(range(len(weights)), k):
        probability, left = 1.0, sum(weights)
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        result[list(order)] += probability
    return result


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_draws_follow_the_weights(rows, pieces):
    weights, trials = [1.0, 2.0, 3.0, 4.0, 0.0], 1500
    counts = np.zeros(5)
    for seed in range(trials):
        counts[draw(rows, torch.tensor(weights)[:, None], seed, pieces)] += 1
    expected = np.append(inclusion(weights[:4], rows), 0.0)
    assert expected.sum() == pytest.approx(rows)
    deviation = 4 * np.sqrt(expected * (1 - expected) / trials)  # four standard errors
    assert (np.abs(counts / trials - expected) <= deviation).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", [1.0, 1e-9, 0.0, float("nan")])
@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize(("groups", "held"), [(1, 0), (2, 1 << 25), (2, 800)])
def test_a_row_that_is_not_finite_is_always_seen(bad, weight, pieces, groups, held, monkeypatch):
    monkeypatch.setattr(weighting_module, "HELD", held)
    a, w = numbered(500), torch.ones(500, groups)
    a[321, 2], w[321] = bad, weight
    sample, moment = RowSample(3, 2, generator()), GroupedGram(3)
    for ai, wi in zip(a.tensor_split(pieces), w.tensor_split(pieces), strict=True):
        sample.update(ai, wi)
        moment.update(ai, wi)
    assert 321 in sample.sample[:, 0].tolist()
    assert minimum_norm_shift(sample.sample, torch.ones(1, 3)).status == NON_FINITE
    assert principal_shift(moment.gram, torch.ones(1, 3)).status == NON_FINITE


@pytest.mark.parametrize(("groups", "held"), [(1, 0), (2, 1 << 25), (2, 800)])
def test_weights_that_are_no_numbers_show(groups, held, monkeypatch):
    monkeypatch.setattr(weighting_module, "HELD", held)
    a, w = numbered(500), torch.ones(500, groups)
    w[123] = float("nan")
    sample, moment = RowSample(3, 2, generator()), GroupedGram(3)
    sample.update(a, w)
    moment.update(a, w)
    assert 123 in sample.sample[:, 0].tolist()
    assert principal_shift(moment.gram, torch.ones(1, 3)).status == NON_FINITE


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_keep_their_bits_and_nothing_else_is_held(dtype):
    a = torch.randn(200, 3, generator=generator()).to(dtype)
    sample = RowSample(3, 4, generator())
    for _ in range(3):
        sample.update(a, torch.ones(200, 2))
    drawn = sample.sample
    assert drawn.dtype == dtype
    assert all((a == row).all(1).any() for row in drawn)
    held = sum(x.untyped_storage().nbytes() for x in (sample._groups, sample._keys, sample._kept))
    assert held == 4 * (8 + 8 + 3 * a.element_size())  # groups, keys and rows, whatever was offered


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("at_once", [1 << 16, 1 << 12, 1])
def test_rows_drawn_are_those_of_the_smallest_keys_and_few_keys_are_computed(at_once, pieces, monkeypatch):
    """Against all keys, computed from the same random numbers."""
    n, groups, rows = 2000, 3, 9
    w = torch.rand(n, groups, generator=generator(7)).pow(8)
    computed, draws, log1p, rand = [], [], torch.log1p, torch.rand
    monkeypatch.setattr(weighting_module, "DRAWN", at_once)
    monkeypatch.setattr(torch, "log1p", lambda x: computed.append(len(x)) or log1p(x))
    monkeypatch.setattr(torch, "rand", lambda *a, **k: draws.append(rand(*a, **k)) or draws[-1])
    drawn = draw(rows, w, pieces=pieces)
    keys = -log1p(-torch.cat(draws)) / w
    assert keys.shape == w.shape
    assert drawn == keys.topk(rows // groups, dim=0, largest=False).indices.T.flatten().tolist()
    assert sum(computed) < 0.2 * n * groups


@PROPERTY
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**31), st.integers(1, 3))
def test_a_smaller_sample_is_what_would_have_been_drawn(rows, groups, seed, pieces):
    weights = torch.rand(9, groups, generator=generator(seed)) * (torch.rand(9, groups, generator=generator(1)) > 0.2)
    large = RowSample(3, 12, generator(seed))
    for a, w in zip(numbered(9).tensor_split(pieces), weights.tensor_split(pieces), strict=True):
        large.update(a, w)
    assert sorted(large.take(rows)[:, 0].int().tolist()) == sorted(draw(rows, weights, seed, pieces))
    assert torch.equal(large.take(12), large.sample)


def test_no_more_can_be_taken_than_was_drawn():
    sample = RowSample(3, 4, generator())
    sample.update(numbered(9), torch.ones(9, 1))
    with pytest.raises(ValueError, match="rows=5 is more than the 4 that were drawn"):
        sample.take(5)


def test_nothing_to_draw():
    assert RowSample(3, 5, generator()).sample.shape == (0, 3)
    assert draw(5, torch.zeros(4, 1)) == []
    with pytest.raises(ValueError, match="rows=0 must be at least 1"):
        RowSample(3, 0, generator())
