# yolo-sos, AGPL-3.0
"""The streaming second moment."""

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_sos.core import Moments
from yolo_sos.core import moments as moments_module

PROPERTY = settings(derandomize=True, max_examples=50, deadline=None, database=None)


def dense(a, w):
    """Return Σ w aᵀa by the definition, row by row, in numpy."""
    return sum((wi * np.outer(ai, ai) for ai, wi in zip(a, w, strict=True)), np.zeros((a.shape[1],) * 2))


@st.composite
def streams(draw):
    """Draw rows, weights and the places where the stream is cut."""
    n, d, seed = draw(st.integers(0, 30)), draw(st.integers(1, 6)), draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, generator=g, dtype=torch.float64) * 10 ** draw(st.integers(-3, 3))
    w = torch.rand(n, generator=g, dtype=torch.float64) * (torch.rand(n, generator=g) > 0.2)
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    return a, w, [0, *cuts, n]


@PROPERTY
@given(streams(), st.booleans())
def test_pieces_add_up_to_the_dense_sum(stream, weighted):
    a, w, cuts = stream
    moments = Moments(a.shape[1])
    for i, j in itertools.pairwise(cuts):
        assert moments.update(a[i:j], w[i:j] if weighted else None) is moments
    w = w if weighted else torch.ones_like(w)
    expected = dense(a.numpy(), w.numpy())
    np.testing.assert_allclose(moments.matrix.numpy(), expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())
    assert moments.rows == len(a)  # those of weight zero too
    assert moments.mass == pytest.approx(float(w.sum()), rel=1e-12)


@PROPERTY
@given(streams())
def test_merging_is_having_seen_both(stream):
    a, w, cuts = stream
    d, middle = a.shape[1], cuts[1]
    first, second = Moments(d).update(a[:middle], w[:middle]), Moments(d).update(a[middle:], w[middle:])
    before = first.matrix.clone(), second.matrix.clone()
    merged, whole = first + second, Moments(d).update(a, w)
    assert torch.allclose(merged.matrix, whole.matrix, rtol=1e-12, atol=0)
    assert (merged.rows, merged.mass) == (whole.rows, pytest.approx(whole.mass, rel=1e-12))
    merged.update(torch.ones(1, d))  # no memory is shared with the operands
    assert torch.equal(first.matrix, before[0])
    assert torch.equal(second.matrix, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_rows_are_summed_in_float64(dtype):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(500, 4, generator=g).to(dtype)
    w = torch.rand(500, generator=g).to(dtype)
    moments = Moments(4).update(a, w)
    assert moments.matrix.dtype == torch.float64
    expected = dense(a.double().numpy(), w.double().numpy())
    np.testing.assert_allclose(moments.matrix.numpy(), expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 6, 7, 8, 20])
def test_rows_turn_into_float64_a_chunk_at_a_time(monkeypatch, rows, weighted):
    g = torch.Generator().manual_seed(1)
    a, w = torch.randn(rows, 3, generator=g), torch.rand(rows, generator=g) if weighted else None
    whole = Moments(3).update(a, w)
    sizes, convert = [], moments_module.as_float64

    def spy(x):
        sizes.append(len(x))
        return convert(x)

    monkeypatch.setitem(moments_module.CHUNK, "cpu", 7)
    monkeypatch.setattr(moments_module, "as_float64", spy)
    chunked = Moments(3).update(a, w)
    assert max(sizes, default=0) <= 7
    assert sum(sizes) == 2 * rows
    assert torch.allclose(chunked.matrix, whole.matrix, rtol=1e-13, atol=0)
    assert (chunked.rows, chunked.mass) == (whole.rows, pytest.approx(whole.mass, rel=1e-13))


def test_what_is_held_does_not_grow_with_the_rows():
    def held(moments):
        return sum(v.untyped_storage().nbytes() for v in vars(moments).values() if isinstance(v, torch.Tensor))

    moments = Moments(8).update(torch.ones(1, 8))
    few = held(moments)
    for _ in range(20):
        features, weights = torch.ones(1000, 8, dtype=torch.float64), torch.ones(1000, dtype=torch.float64)
        moments.update(features, weights)
    alive = weakref.ref(features), weakref.ref(weights)
    del features, weights
    gc.collect()
    assert [ref() for ref in alive] == [None, None]  # rows are let go
    assert held(moments) == few == 8 * 8 * 8
    assert moments.rows == 20_001


@pytest.mark.parametrize(
    ("features", "weights", "message"),
    [
        ((3, 4), None, r"features has shape \(3, 4\); expected \(n, 5\)"),
        ((5,), None, r"features has shape \(5,\)"),
        ((2, 3, 5), None, r"features has shape \(2, 3, 5\)"),
        ((3, 5), (4,), r"weights has shape \(4,\); expected \(3,\)"),
        ((3, 5), (3, 1), r"weights has shape \(3, 1\); expected \(3,\)"),
    ],
)
def test_shapes_that_do_not_fit(features, weights, message):
    moments = Moments(5)
    with pytest.raises(ValueError, match=message):
        moments.update(torch.ones(features), None if weights is None else torch.ones(weights))
    assert (moments.rows, moments.mass, bool(moments.matrix.any())) == (0, 0.0, False)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="d=0 is the length of a row; it must be at least 1"):
        Moments(0)
    with pytest.raises(ValueError, match="Cannot add Moments of d=2 and d=3"):
        Moments(2) + Moments(3)
