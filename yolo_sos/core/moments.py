# yolo-sos, AGPL-3.0
"""What a shift keeps of a layer's input rows: their second moment, or a weighted sample of them."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that are made float64 at a time: 5 MB at d = 320, which a cache can hold; 42 MB, worth starting a kernel.
CHUNK = {"cpu": 1 << 11, "cuda": 1 << 14}
CAPACITY = 1 << 24  # bytes of a layer's rows that a sample holds on average: small beside a training step


def as_float64(x: Tensor) -> Tensor:
    """Return ``x`` in float64, on the CPU where its device has none (MPS)."""
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).double()


class Moments:
    """The weighted second moment ``G = Σ wᵢ aᵢᵀaᵢ`` of rows aᵢ that arrive in batches.

    Memory is O(d²) whatever the number of rows. Two accumulators of the same d add up with ``+``.

    Args:
        d (int): Length of a row.

    Attributes:
        matrix (Tensor): ``(d, d)`` float64, on the device of the first update (the CPU before it, and for MPS, which
            has no float64).
        rows (int): Rows seen, those of weight zero included.
        mass (float): Sum of the weights.
    """

    def __init__(self, d: int):
        """Start at zero."""
        if d < 1:
            raise ValueError(f"d={d} is the length of a row; it must be at least 1.")
        self.d = d
        self.matrix = torch.zeros(d, d, dtype=torch.float64)
        self.rows = 0
        self.mass = 0.0

    def update(self, features: Tensor, weights: Tensor | None = None) -> Moments:
        """Add rows.

        Args:
            features (Tensor): ``(n, d)``, any float dtype and device.
            weights (Tensor, optional): ``(n,)`` non-negative weights; 1 each if None.

        Returns:
            (Moments): Itself.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if features.ndim != 2 or features.shape[1] != self.d:
            raise ValueError(f"features has shape {tuple(features.shape)}; expected (n, {self.d}).")
        if weights is None:
            weights = features.new_ones(len(features))
        if weights.shape != features.shape[:1]:
            raise ValueError(f"weights has shape {tuple(weights.shape)}; expected ({features.shape[0]},).")
        chunk = CHUNK.get(features.device.type, CHUNK["cpu"])
        for some, weight in zip(features.split(chunk), weights.split(chunk), strict=True):
            a = as_float64(some)
            w = as_float64(weight).to(a.device)
            self.matrix = self.matrix.to(a.device) + (a * w[:, None]).T @ a
            self.mass += float(w.sum())
        self.rows += len(features)
        return self

    def __add__(self, other: Moments) -> Moments:
        """Merge two accumulators, as if one had seen the rows of both."""
        if self.d != other.d:
            raise ValueError(f"Cannot add Moments of d={self.d} and d={other.d}.")
        out = Moments(self.d)
        out.matrix = self.matrix + other.matrix.to(self.matrix.device)
        out.rows, out.mass = self.rows + other.rows, self.mass + other.mass
        return out


class RowSample:
    """Rows drawn without replacement, each group's in proportion to their weights, in bounded memory.

    Priority sampling (Duffield, Lund & Thorup, *Priority sampling for estimation of arbitrary subset sums*, J. ACM 54,
    2007): a row of weight w gets the priority w/u, u uniform in (0, 1]; each group keeps its rows of largest priority.
    With τ the largest priority that did not stay, ``max(w, τ)`` estimates weights: sums over the sample are unbiased
    estimates of sums over all rows, and exact where all rows of a group stay.

    Args:
        d (int): Length of a row.
        groups (int): Groups of rows with weights.
        size (int): Rows to draw, divided evenly among the groups; the rest is assigned by lot. A group with fewer rows
            of positive weight gives what it has.
        generator (torch.Generator): Source of all randomness, on the CPU.
        background (bool): Whether all rows together are one more group, each of weight 1.

    Attributes:
        rows (int): Rows seen.
    """

    def __init__(self, d: int, groups: int, size: int, generator: torch.Generator, *, background: bool = False):
        """Start empty."""
        if size < 1:
            raise ValueError(f"size={size} must be at least 1.")
        self.d = d
        self.size = size
        self.background = background
        self.rows = 0
        self.generator = generator
        self._turn = torch.randperm(groups + background, generator=generator)  # in which the rest is assigned
        self._threshold = torch.zeros(groups + background, dtype=torch.float64)  # τ of each group
        # Of the rows held: features, index into them, group, weight, priority; in parts, as they arrived.
        self._parts: list[tuple[Tensor, ...]] = []

    def update(self, features: Tensor, groups: Tensor, weights: Tensor) -> None:
        """Offer rows.

        Args:
            features (Tensor): ``(n, d)``, any float dtype and device. They may be kept without a copy: do not write
                into them afterwards.
            groups (Tensor): ``(n,)`` int64, the group of each row.
            weights (Tensor): ``(n,)``, non-negative; a row of weight 0 is never drawn for its group.

        Raises:
            ValueError: If the shapes do not fit.
        """
        n = len(features)
        if features.shape != (n, self.d) or groups.shape != (n,) or weights.shape != (n,):
            raise ValueError(
                f"features {tuple(features.shape)}, groups {tuple(groups.shape)} and weights {tuple(weights.shape)} do "
                f"not fit: expected (n, {self.d}), (n,) and (n,)."
            )
        self.rows += n
        features, group, weight, index = features.detach(), groups.cpu(), as_float64(weights).cpu(), torch.arange(n)
        if self.background:
            index = index.repeat(2)
            group = torch.cat([group, torch.full_like(group, len(self._turn) - 1)])
            weight = torch.cat([weight, torch.ones_like(weight)])
        priority = weight / (1.0 - torch.rand(len(weight), dtype=torch.float64, generator=self.generator))  # u > 0
        # Always keep non-finite rows, so that the solver reports them. One sum tells whether there are any.
        if not features.sum(dtype=torch.promote_types(features.dtype, torch.float32)).isfinite():
            priority[~features.isfinite().all(1).cpu()[index]] = torch.inf
        priority = priority.nan_to_num(nan=torch.inf, posinf=torch.inf)
        stays = (priority > self._threshold[group]).nonzero()[:, 0]
        index = index[stays]
        if len(stays) < n:  # not a view: the rows that do not stay would remain in memory
            features, index = features[index.to(features.device)], torch.arange(len(stays))
        self._parts.append((features, index, group[stays], weight[stays], priority[stays]))
        if sum(len(part[0]) for part in self._parts) > 2 * self.size:  # seldom: a selection sorts, and copies rows
            self._select()

    def take(self, size: int) -> Tensor:
        """Return the rows that would have been drawn if ``size`` had been asked for, at most as many as were."""
        if not self._parts:
            return torch.empty(0, self.d)
        self._select()
        ((features, _, group, _, priority),) = self._parts
        return features[_first(group, priority, self._quotas(size)).to(features.device)]

    def _select(self) -> None:
        """Keep each group's rows of largest priority, as many as it may have, and raise its threshold."""
        group, weight, priority = (torch.cat(x) for x in list(zip(*self._parts, strict=True))[2:])
        mask = _first(group, priority, self._quotas(self.size))
        self._threshold.scatter_reduce_(0, group[~mask], priority[~mask], "amax")
        masks = mask.split([len(part[1]) for part in self._parts])
        rows = torch.cat([x[i[m].to(x.device)] for (x, i, *_), m in zip(self._parts, masks, strict=True)])
        self._parts = [(rows, torch.arange(len(rows)), group[mask], weight[mask], priority[mask])]

    def _quotas(self, size: int) -> Tensor:
        """Return how many of ``size`` rows each group may have, ``(groups,)``."""
        share, rest = divmod(size, len(self._turn))
        return share + (self._turn < rest).long()

    @property
    def sample(self) -> Tensor:
        """The rows drawn, ``(at most size, d)``, in the features' dtype and device, as they arrived."""
        return self.take(self.size)

    @property
    def moments(self) -> Moments:
        """The sum of the groups' mean second moments, estimated from the sample; an empty group adds nothing."""
        total = Moments(self.d)
        if self._parts:
            self._select()
            ((features, _, group, weight, _),) = self._parts
            weight = torch.maximum(weight, self._threshold[group])
            mass = torch.zeros_like(self._threshold).scatter_add_(0, group, weight)
            total.update(features, weight / mass[group])
        total.rows = self.rows
        return total


def _first(group: Tensor, priority: Tensor, quotas: Tensor) -> Tensor:
    """Return a mask of the rows of largest priority in each group, as many as its quota ``(groups,)``."""
    order = priority.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]  # by group, and by priority within it
    place = torch.arange(len(order)) - torch.searchsorted(group[order], group[order])
    # A group that may have no row still keeps a non-finite one.
    first = (place < quotas[group[order]]) | (place == 0) & priority[order].isinf()
    return torch.zeros(len(order), dtype=torch.bool).index_fill_(0, order[first], True)
