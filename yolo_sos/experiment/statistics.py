# yolo-sos, AGPL-3.0
"""What a few paired seeds say about a difference: its interval, an exact test, a correction for many tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

MOST_PAIRS = 40  # the halves of the exact test are then lists of a million sums, 8 MB each
TIE = 1e-9  # sums of differences that lie closer than this share of Σ|d| are equal but for rounding


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return ``Σx/n`` and the sample standard deviation ``√(Σ(x−mean)²/(n−1))``; nan where n is below 1 and 2."""
    mean = float(np.mean(values)) if len(values) else math.nan
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def t_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return both ends of the confidence interval of a mean, ``mean ± t·s/√n`` with n − 1 degrees of freedom.

    They are nan with fewer than two differences. Source: Student, The probable error of a mean, Biometrika 6 (1908).
    """
    mean, std = mean_and_std(differences)
    n = len(differences)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * std / math.sqrt(n) if n > 1 else math.nan
    return mean - half, mean + half


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the exact sign-flip permutation test of a mean of zero.

    Were both arms alike, each difference would have had the other sign as easily. p is the share of all 2ⁿ sign
    patterns of ±d whose sum is at least as far from zero as that of the data; n pairs give no less than `least_p`.

    Sources: Fisher, The Design of Experiments (1935), § 21; Pitman, Significance tests which may be applied to samples
    from any populations, J. R. Stat. Soc. Suppl. 4 (1937). The patterns are counted, not drawn: every sum of the first
    half is compared with the sorted sums of the second (Horowitz and Sahni, Computing partitions, J. ACM 21, 1974), so
    that 2ⁿ of them cost 2^(n/2).

    Returns:
        (float): Between ``least_p(n)`` and 1; nan without differences, or if one is nan.

    Raises:
        ValueError: If n is above 40.
    """
    n = len(differences)
    if n > MOST_PAIRS:
        raise ValueError(f"{n} pairs are too many for the exact test of all sign patterns: at most {MOST_PAIRS}.")
    d = np.asarray(differences, dtype=np.float64)
    if not n or np.isnan(d).any():
        return math.nan
    reached = abs(d.sum()) - TIE * np.abs(d).sum()
    first, second = _signed_sums(d[: n // 2]), _signed_sums(d[n // 2 :])
    above = len(first) * len(second) - int(np.searchsorted(second, reached - first).sum())
    return min(1.0, 2 * above / 2**n)  # by symmetry; where zero is reached, by all


def _signed_sums(values: np.ndarray) -> np.ndarray:
    """Return ``Σ±v`` over all sign patterns, sorted."""
    sums = np.zeros(1)
    for v in values:
        sums = np.concatenate((sums - v, sums + v))
    return np.sort(sums)


def least_p(pairs: int) -> float:
    """Return the smallest p that ``sign_flip_p`` gives with so many pairs, 2/2ⁿ: all of one sign. nan without pairs."""
    return 2.0 ** (1 - pairs) if pairs else math.nan


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for being several: below α with them, at most α for one false alarm in all.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Stat. 6 (1979). The k-th smallest
    of m is multiplied by m − k + 1, and none becomes less than a smaller one. The order is kept; nan is no test, and
    stays.
    """
    tests = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    corrected, highest = [math.nan] * len(p), 0.0
    for k, (value, i) in enumerate(tests):
        highest = max(highest, min(1.0, (len(tests) - k) * value))
        corrected[i] = highest
    return corrected
