# yolo-sos, AGPL-3.0
"""How a shift finds the weights of a layer: names and settings, without torch, so that a command reads them fast."""

from __future__ import annotations

from dataclasses import dataclass, replace

from yolo_sos.core import checks

METHODS = ("loss", "expected", "principal", "budget", "full", "rows")
SOLVERS = ("svd", "gauss")
WEIGHTINGS = ("balanced", "confidence", "uniform")
UNJUDGED = {"rank": 0.5, "budget": 0.01}  # where nothing is held out, so that no strength can be found
# Budgets between which the guard searches. A shift that changes less is not worth writing; by more, as below a rank of
# half of d, detectors lose mAP before their held-out loss tells (studies/voc07/strength.md).
WEAKEST, STRONGEST = 1e-4, 0.1


@dataclass(frozen=True)
class Method:
    """How the weights of one layer are found.

    Attributes:
        name (str): ``loss``: the least norm with the same loss, to second order; for tasks that can replay outputs.
            ``expected``: what randomly drawn rows keep on average. ``principal``: the leading eigenvectors of the rows'
            second moment. ``budget``: the least norm within a relative change of the outputs. ``full``: only null
            directions go. ``rows``: the span of randomly drawn rows, as published.
        rank (int | float | None): Rank kept (``principal``), in the mean over all outputs (``loss``), rows expected
            (``expected``) or drawn (``rows``): an int, or a float up to 1.0 as a fraction of the layer's input size d.
            None: the least from half of d on that the guard accepts.
        budget (float | None): ``budget``: relative change of the outputs that is allowed, in [0, 1). None: the
            largest up to 0.1 that the guard accepts.
        solver (str): ``rows``: ``svd``, or ``gauss``, the elimination of the paper's Algorithm 1.
        weighting (str): Whose outputs matter: ``balanced``, ``confidence`` or ``uniform``, see ``row_groups``. For
            ``loss`` the loss says that, for ``full`` nothing.

    Raises:
        ValueError: If a value is wrong; names it and its range.
    """

    name: str = "expected"
    rank: int | float | None = None
    budget: float | None = None
    solver: str = "svd"
    weighting: str = "balanced"

    def __post_init__(self):
        """Refuse wrong values where they are written, not in the middle of a shift."""
        checks.choice(*METHODS)("method", self.name)
        checks.optional(checks.rank)("rank", self.rank)
        checks.optional(checks.budget)("budget", self.budget)
        checks.choice(*SOLVERS)("solver", self.solver)
        checks.choice(*WEIGHTINGS)("weighting", self.weighting)

    @property
    def is_found(self) -> bool:
        """Whether the guard decides how strong a shift is, not a given rank or budget."""
        return self.name != "full" and (self.budget if self.name == "budget" else self.rank) is None

    def at(self, strength: float | None = None) -> Method:
        """Return the method with its rank or budget set, if it has one to be found; itself if not.

        Args:
            strength (float, optional): From 0, which changes next to nothing, to 1. The rank falls linearly to half of
                d, the budget grows geometrically to 0.1. None: a rank of half of d, or a budget of 0.01.
        """
        if not self.is_found:
            return self
        if self.name == "budget":
            budget = UNJUDGED["budget"] if strength is None else WEAKEST * (STRONGEST / WEAKEST) ** strength
            return replace(self, budget=budget)
        return replace(self, rank=UNJUDGED["rank"] if strength is None else 1.0 - strength / 2)

    def rank_of(self, d: int) -> int:
        """Return the rank for a layer of input size d, at least 1 and, except for drawn rows, at most d."""
        rank = self.at().rank
        assert rank is not None
        rank = max(1, round(rank * d)) if isinstance(rank, float) else rank
        return rank if self.name == "rows" else min(rank, d)
