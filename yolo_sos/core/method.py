# yolo-sos, AGPL-3.0
"""How a shift finds the weights of a layer: names and settings, without torch, so that a command reads them fast."""

from __future__ import annotations

from dataclasses import dataclass

from yolo_sos.core import checks

METHODS = ("principal", "expected", "budget", "full", "rows")
SOLVERS = ("svd", "gauss")
WEIGHTINGS = ("balanced", "confidence", "uniform")


@dataclass(frozen=True)
class Method:
    """How the weights of one layer are found.

    Attributes:
        name (str): ``principal``: keep the leading eigenvectors of the rows' second moment. ``expected``: what randomly
            drawn rows keep on average. ``budget``: the least norm within a relative change of the outputs. ``full``:
            only null directions go. ``rows``: the span of randomly drawn rows, as published.
        rank (int | float): Rank kept (``principal``), rows expected (``expected``) or drawn (``rows``): an int, or a
            float up to 1.0 as a fraction of the layer's input size d.
        budget (float): ``budget``: relative change of the outputs that is allowed, in [0, 1).
        solver (str): ``rows``: ``svd``, or ``gauss``, the elimination of the paper's Algorithm 1.
        weighting (str): Whose outputs matter: ``balanced``, ``confidence`` or ``uniform``, see ``row_groups``.

    Raises:
        ValueError: If a value is wrong; names it and its range.
    """

    name: str = "principal"
    rank: int | float = 0.5
    budget: float = 0.01
    solver: str = "svd"
    weighting: str = "balanced"

    def __post_init__(self):
        """Refuse wrong values where they are written, not in the middle of a shift."""
        checks.choice(*METHODS)("method", self.name)
        checks.rank("rank", self.rank)
        checks.budget("budget", self.budget)
        checks.choice(*SOLVERS)("solver", self.solver)
        checks.choice(*WEIGHTINGS)("weighting", self.weighting)

    def rank_of(self, d: int) -> int:
        """Return the rank for a layer of input size d; at most d, except for drawn rows."""
        rank = max(1, round(self.rank * d)) if isinstance(self.rank, float) else self.rank
        return rank if self.name == "rows" else min(rank, d)
