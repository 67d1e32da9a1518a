"""Intervals, the exact test and Holm's correction, against SciPy and by hand."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from yolo_sos.experiment.statistics import (
    holm,
    least_p,
    mean_and_std,
    sign_flip_p,
    t_interval,
)


def differences(n: int, seed: int, mean: float = 0.004) -> list[float]:
    return np.random.default_rng(seed).normal(mean, 0.01, n).tolist()


def test_mean_and_standard_deviation():
    assert mean_and_std([1.0, 2.0, 6.0]) == pytest.approx((3.0, 7**0.5))
    mean, std = mean_and_std([0.25])
    assert mean == 0.25 and math.isnan(std)
    assert all(map(math.isnan, mean_and_std([])))


def test_interval_by_hand():
    d = [0.0, 1.0]  # mean 1/2, s/√n = 1/2
    assert t_interval(d) == pytest.approx((0.5 - np.tan(0.95 * math.pi / 2) / 2, 0.5 + np.tan(0.95 * math.pi / 2) / 2))
    d = [-1.0, 0.0, 1.0]  # Student's t with 2 degrees of freedom has a closed form
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3)
    assert t_interval(d) == pytest.approx((-half, half))


@pytest.mark.parametrize("n", [2, 3, 5, 10, 25])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_interval_as_in_scipy(n, level):
    arm, base = np.array(differences(n, seed=n)) + 0.44, np.full(n, 0.44)
    oracle = stats.ttest_rel(arm, base).confidence_interval(level)
    assert t_interval((arm - base).tolist(), level) == pytest.approx((oracle.low, oracle.high), rel=1e-9)


def test_no_interval_from_one_pair_and_none_of_width_from_equal_ones():
    assert all(map(math.isnan, t_interval([0.1])))
    assert all(map(math.isnan, t_interval([])))
    assert t_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


@pytest.mark.parametrize("n", [2, 3, 4, 7, 12])
@pytest.mark.parametrize("mean", [0.0, 0.01])
def test_exact_test_as_in_scipy(n, mean):
    d = differences(n, seed=n, mean=mean)
    oracle = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(d) == oracle.pvalue
    assert sign_flip_p([-x for x in d]) == oracle.pvalue


def test_exact_test_by_enumeration_with_ties():
    for seed in range(20):
        # Differences of metrics of four digits: not exact in binary, and often tied
        rng = np.random.default_rng(seed)
        whole = rng.integers(-4, 6, 9)
        arm = rng.integers(3000, 5000, 9)
        d = (arm + whole) / 1e4 - arm / 1e4
        reached = sum(abs(np.dot(signs, whole)) >= abs(whole.sum()) for signs in product((-1, 1), repeat=9))
        assert sign_flip_p(d.tolist()) == reached / 2**9


def test_exact_test_by_hand():
    assert sign_flip_p([0.1, 0.2, 0.3]) == least_p(3) == 2 / 8
    assert sign_flip_p([-0.1, 0.2, 0.3]) == 4 / 8  # |Σ| of 0.4 or more: ±(0.6), ±(0.4)
    assert sign_flip_p([0.0, 0.0]) == sign_flip_p([0.1, -0.1]) == sign_flip_p([0.3]) == least_p(1) == 1
    assert math.isnan(sign_flip_p([])) and math.isnan(least_p(0))


def test_what_is_unknown_stays_unknown():
    unknown = [0.1, math.nan, 0.2]
    assert all(map(math.isnan, (sign_flip_p(unknown), *mean_and_std(unknown), *t_interval(unknown))))


def test_exact_test_of_many_pairs():
    assert sign_flip_p([0.01] * 20) == least_p(20) == 2**-19
    # A binomial test: 30 pairs of one size, 25 of them up
    assert sign_flip_p([0.01] * 25 + [-0.01] * 5) == pytest.approx(stats.binomtest(25, 30).pvalue, rel=1e-12)
    with pytest.raises(ValueError, match=r"41 pairs are too many .* at most 40"):
        sign_flip_p([0.01] * 41)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # the textbook's four
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_closes_the_family():
    # Its closed form: a hypothesis goes where every set of hypotheses with it goes by Bonferroni (Marcus 1976)
    p = np.random.default_rng(0).uniform(0, 0.3, 5).tolist()
    sets = [[i for i in range(5) if bits[i]] for bits in product((0, 1), repeat=5)]
    closed = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(5)]
    assert holm(p) == pytest.approx(closed)


def test_holm_passes_over_what_was_not_tested():
    without, with_gap = holm([0.01, 0.04]), holm([0.01, math.nan, 0.04])
    assert [with_gap[0], with_gap[2]] == without and math.isnan(with_gap[1])
