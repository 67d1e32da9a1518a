# yolo-sos, AGPL-3.0
"""A number with its standard error."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

RESOLVED = 3.0  # standard errors from zero, below which a difference is not called one


@dataclass(frozen=True)
class Estimate:
    """A number that was estimated.

    Attributes:
        estimate (float): The number.
        stderr (float): Its standard error; nan where there was one sample.
        samples (int): Probes, blocks or rows that it rests on.
    """

    estimate: float
    stderr: float
    samples: int

    @classmethod
    def mean(cls, samples: Sequence[float]) -> Estimate:
        """Return the mean of independent samples and ``s/√n``."""
        n = len(samples)
        mean = sum(samples) / n if n else math.nan
        spread = sum((x - mean) ** 2 for x in samples) / (n - 1) if n > 1 else math.nan
        return cls(mean, math.sqrt(spread / n) if n > 1 else math.nan, n)

    @classmethod
    def jackknife(cls, statistic: Callable[[Any], float], blocks: Sequence[Any]) -> Estimate:
        """Return a statistic of a sum, and its delete-one-block jackknife standard error.

        ``SE² = (B−1)/B · Σ_b (θ_b − θ̄)²`` with θ_b the statistic without block b (Efron & Stein, *The jackknife
        estimate of variance*, 1981).

        Args:
            statistic (Callable): Of a sum of blocks.
            blocks (Sequence): What can be added with ``+``; at least one.
        """
        n = len(blocks)
        whole = statistic(reduce(operator.add, blocks))
        if n < 2:
            return cls(whole, math.nan, n)
        without = [statistic(reduce(operator.add, [*blocks[:i], *blocks[i + 1 :]])) for i in range(n)]
        mean = sum(without) / n
        return cls(whole, math.sqrt((n - 1) / n * sum((x - mean) ** 2 for x in without)), n)

    @property
    def resolved(self) -> bool:
        """Whether it differs from zero by at least three standard errors."""
        return math.isfinite(self.stderr) and abs(self.estimate) >= RESOLVED * self.stderr and self.estimate != 0
