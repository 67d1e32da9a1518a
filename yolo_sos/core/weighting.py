# yolo-sos, AGPL-3.0
"""Whose outputs matter: weights of rows, and the two accumulators that use them.

A weighting turns what the model says of a row into columns of non-negative weights, one column per group of rows. Each
group counts as much as any other:

- ``uniform``: one group, every row alike.
- ``confidence``: one group; class layers ``Σ_c p_c(1−p_c)`` (undecided rows), other layers ``max_c p_c`` (rows with
  something in them).
- ``balanced``: a group per class with weights ``p_c``; for the class layers of a detector also one for all rows, the
  background.

For the second moment that means ``G = Σ_g (Σᵢ w_ig aᵢᵀaᵢ) / (Σᵢ w_ig)``; drawn rows are divided evenly among the
groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from yolo_sos.core.gram import CHUNK, Gram, as_float64

WEIGHTINGS = ("balanced", "confidence", "uniform")


def row_weights(weighting: str, kind: str, probabilities: Tensor) -> Tensor:
    """Return the weight of each row in each group.

    Args:
        weighting (str): ``balanced``, ``confidence`` or ``uniform``.
        kind (str): Kind of the layer that the rows are inputs of, see ``FinalLayer.kind``.
        probabilities (Tensor): ``(n, C)`` class probabilities of the rows, in [0, 1]; labels as one-hot rows.

    Returns:
        (Tensor): ``(n, groups)``, non-negative, dtype and device of ``probabilities``.

    Raises:
        ValueError: If ``weighting`` is unknown.
    """
    p = probabilities
    if weighting == "uniform":
        return torch.ones_like(p[:, :1])
    if weighting == "confidence":
        undecided = kind in {"cls", "linear"}
        return (p * (1 - p)).sum(1, keepdim=True) if undecided else p.amax(1, keepdim=True)
    if weighting == "balanced":
        # A classifier has no background: each of its rows belongs to a class.
        return torch.cat([p, torch.ones_like(p[:, :1])], dim=1) if kind == "cls" else p
    raise ValueError(f"weighting='{weighting}' is unknown. Choose one of {', '.join(WEIGHTINGS)}.")


HELD = 1 << 25  # bytes of rows and weights that a GroupedGram keeps before it folds them: little beside a training step


class GroupedGram:
    """Second moment in which every group of rows counts the same, streaming.

    What a row weighs depends on the masses of its groups, which the last row completes. So rows are kept, as they are
    and not copied, until ``gram`` is asked for: then each has one weight, and one product does for all groups. Once
    they take more than ``HELD`` bytes, and more than a ``Gram`` per group would, they are folded into those: memory
    does not grow with the number of rows.

    Args:
        d (int): Length of a row.

    Attributes:
        rows (int): Rows seen.
        groups (list[Gram]): One per group once rows have been folded.
    """

    def __init__(self, d: int):
        """Start at zero; the number of groups comes with the first rows."""
        self.d = d
        self.rows = 0
        self.groups: list[Gram] = []
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._bytes = 0
        self._count: int | None = None  # of groups

    def update(self, features: Tensor, weights: Tensor) -> None:
        """Add rows ``features`` ``(n, d)`` with ``weights`` ``(n, groups)``; do not write into either afterwards.

        Raises:
            ValueError: If shapes do not fit, or the number of groups changes.
        """
        n, count = weights.shape
        if features.shape != (n, self.d):
            raise ValueError(f"features has shape {tuple(features.shape)}; expected ({n}, {self.d}).")
        if count != (self._count or count):
            raise ValueError(f"weights has {count} groups; there were {self._count} before.")
        self._count = count
        self.rows += n
        self._kept.append((features, weights))
        self._bytes += sum(x.numel() * x.element_size() for x in (features, weights))
        if self._bytes > max(HELD, 8 * count * self.d**2):
            self._fold()

    def _fold(self) -> None:
        """Add the rows kept to the groups' own moments, and let them go."""
        self.groups = self.groups or [Gram(self.d) for _ in range(self._count or 0)]
        for features, weights in self._kept:
            for i in range(0, len(features), CHUNK):
                chunk = as_float64(features[i : i + CHUNK])  # once, not once per group
                for gram, w in zip(self.groups, weights[i : i + CHUNK].T, strict=True):
                    gram.update(chunk, w)
        self._kept, self._bytes = [], 0

    @property
    def gram(self) -> Gram:
        """The sum of the groups' mean second moments; groups without mass add nothing."""
        total = Gram(self.d)
        if self.groups:
            self._fold()
            for group in self.groups:
                total = total + group.mean()
        elif self.rows:
            chunks = [
                (features[i : i + CHUNK], weights[i : i + CHUNK])
                for features, weights in self._kept
                for i in range(0, len(features), CHUNK)
            ]
            mass = torch.stack([as_float64(w).sum(0) for _, w in chunks]).sum(0)
            share = torch.where(mass > 0, 1 / mass, 0.0)
            for features, w in chunks:
                total.update(features, as_float64(w) @ share)
            total.mass = float((mass > 0).sum())
        total.rows = self.rows
        return total


class RowSample:
    """Rows drawn without replacement, each group's in proportion to its weights, streaming.

    Weighted reservoir sampling by exponential keys (Efraimidis & Spirakis, *Weighted random sampling with a reservoir*,
    2006): of all rows the ones with the smallest ``Eᵢ/wᵢ``, E exponential, stay. Memory O(rows · d).

    Args:
        d (int): Length of a row.
        rows (int): Rows to draw, divided evenly among the groups; what does not divide goes to groups drawn by lot. A
            group with fewer rows of positive weight gives what it has. A row can be drawn by more than one group; its
            span does not change by that.
        generator (torch.Generator): Source of all randomness, on the CPU.
    """

    def __init__(self, d: int, rows: int, generator: torch.Generator):
        """Start empty; the number of groups comes with the first rows."""
        if rows < 1:
            raise ValueError(f"rows={rows} must be at least 1.")
        self.d = d
        self.wanted = rows
        self.rows = 0
        self.generator = generator
        self._lot: list[int] = []  # the groups, in the order in which they get what does not divide
        self._kept: list[tuple[Tensor, Tensor]] = []  # per group: keys (k,), rows (k, d)

    def update(self, features: Tensor, weights: Tensor) -> None:
        """Offer rows ``features`` ``(n, d)`` with ``weights`` ``(n, groups)``."""
        n, groups = weights.shape
        if not self._lot:
            self._lot = torch.randperm(groups, generator=self.generator).tolist()
            self._kept = [(torch.empty(0, dtype=torch.float64), features[:0]) for _ in range(groups)]
        self.rows += n
        waiting = torch.empty(n, groups, dtype=torch.float64).exponential_(generator=self.generator)
        # Weight 0 waits for ever. A row that is not a number is drawn for certain: the solver must see it.
        keys = (waiting / weights.double().cpu()).nan_to_num(nan=0.0, posinf=torch.inf)
        keys[~features.isfinite().all(1).cpu()] = 0.0
        for g, quota in enumerate(self._quotas(self.wanted)):
            pool = torch.cat([self._kept[g][0], keys[:, g]])
            finite = int(pool.isfinite().sum())
            best, index = pool.topk(min(quota, finite), largest=False)
            held = len(self._kept[g][0])
            old, new = index[index < held], index[index >= held] - held
            order = torch.cat([(index < held).nonzero()[:, 0], (index >= held).nonzero()[:, 0]])
            rows = torch.cat([self._kept[g][1][old.to(features.device)], features[new.to(features.device)]])
            self._kept[g] = (best[order], rows)

    def _quotas(self, rows: int) -> list[int]:
        share, rest = divmod(rows, len(self._lot))
        return [share + (g in self._lot[:rest]) for g in range(len(self._lot))]

    @property
    def sample(self) -> Tensor:
        """The rows drawn, ``(at most rows, d)``, in the features' dtype and device."""
        return self.take(self.wanted)

    def take(self, rows: int) -> Tensor:
        """Return the sample that would have been drawn if ``rows`` had been asked for, at most as many as were."""
        if not self._kept:
            return torch.empty(0, self.d)
        if rows > self.wanted:
            raise ValueError(f"rows={rows} is more than the {self.wanted} that were drawn.")
        # The rows of the smallest keys: a smaller sample is part of a larger one.
        quotas = zip(self._quotas(rows), self._kept, strict=True)
        return torch.cat([kept[keys.argsort()[:quota].to(kept.device)] for quota, (keys, kept) in quotas])
