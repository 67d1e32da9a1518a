# yolo-sos, AGPL-3.0
"""Whose outputs matter: weights of rows, and the two accumulators that use them.

A weighting turns what the model says of a row into columns of non-negative weights, one column per group of rows. Each
group counts as much as any other:

- ``uniform``: one group, every row alike.
- ``confidence``: one group; class layers ``Σ_c p_c(1−p_c)`` (undecided rows), other layers ``max_c p_c`` (rows with
  something in them).
- ``balanced``: a group per class with weights ``p_c``; for the class layers of a detector also one for all rows, the
  background, which the accumulators know of without a column.

For the second moment that means ``G = Σ_g (Σᵢ w_ig aᵢᵀaᵢ) / (Σᵢ w_ig)``; drawn rows are divided evenly among the
groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from yolo_sos.core.gram import Gram, as_float64, chunk_size
from yolo_sos.core.layers import FinalLayer, input_rows, output_rows
from yolo_sos.core.task import Task

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
        return p
    raise ValueError(f"weighting='{weighting}' is unknown. Choose one of {', '.join(WEIGHTINGS)}.")


def weighted_rows(
    task: Task,
    layers: Sequence[FinalLayer],
    wanted: Sequence[FinalLayer],
    weightings: Iterable[str],
    inputs: dict[str, Tensor],
    batch: Any,
) -> Iterator[tuple[FinalLayer, Tensor, dict[str, Tensor]]]:
    """Yield each layer of ``wanted`` with its input rows ``(n, d)`` and their weights ``(n, groups)`` by weighting.

    Args:
        task (Task): Tells the class probabilities of a row from what its class layer says.
        layers (Sequence[FinalLayer]): All final layers, the class layers among them.
        wanted (Sequence[FinalLayer]): Those to yield.
        weightings (Iterable[str]): See ``row_weights``.
        inputs (dict[str, Tensor]): Layer name → its input.
        batch (Any): The batch that they are of.
    """
    rows = {layer.name: input_rows(layer.module, inputs[layer.name]) for layer in layers}
    by_name = {layer.name: layer for layer in layers}
    probabilities: dict[str, Tensor] = {}
    for layer in wanted:
        if layer.classifier not in probabilities:
            classifier = by_name[layer.classifier]
            logits = output_rows(classifier.module, rows[classifier.name])
            probabilities[classifier.name] = task.probabilities(classifier, logits, batch)
        weights = {}
        for weighting in weightings:
            p = probabilities[layer.classifier]
            if weighting == "confidence" and layer.kind == "linear":
                # A label is certain of itself; how decided a row is, only the prediction tells.
                p = output_rows(layer.module, rows[layer.name]).softmax(1)
            weights[weighting] = row_weights(weighting, layer.kind, p)
        yield layer, rows[layer.name], weights


def has_background(weighting: str, kind: str) -> bool:
    """Return whether all rows together are one more group. A classifier has none: each row belongs to a class."""
    return weighting == "balanced" and kind == "cls"


HELD = 1 << 25  # bytes of rows and weights that a GroupedGram keeps at most: little beside a training step
DRAWN = 1 << 16  # random numbers that a RowSample draws at once: half a megabyte, which a cache can hold


class GroupedGram:
    """Second moment in which every group of rows counts the same, streaming.

    What a row weighs depends on the masses of its groups, which the last row completes. So rows are kept, as they are
    and not copied, until ``gram`` is asked for: then each has one weight, and one product does for all groups.

    Rows that take more than ``HELD`` bytes are thinned by priority sampling (Duffield, Lund & Thorup, *Priority
    sampling for estimation of arbitrary subset sums*, J. ACM 54, 2007): of sizes xᵢ the rows with the largest
    ``xᵢ/uᵢ``, u uniform, stay, and each counts ``max(1, τ/xᵢ)`` times, with τ the largest that went. The size of a row
    is its part in the trace, by the masses so far. The masses are of all rows, the moment is right on average, and
    neither memory nor the time per row grows with the number of rows. A single group needs no rows: its moment is a
    ``Gram``.

    Args:
        d (int): Length of a row.
        generator (torch.Generator, optional): Source of all randomness, on the CPU; drawn from where rows are thinned.
            None: one of its own, the same each time.
        background (bool): Whether all rows are one more group, after those with weights.

    Attributes:
        rows (int): Rows seen.
        threshold (float): τ; 0 as long as all rows are kept, and the moment exact.
    """

    def __init__(self, d: int, generator: torch.Generator | None = None, *, background: bool = False):
        """Start at zero; the number of groups comes with the first rows."""
        self.d = d
        self.background = background
        self.rows = 0
        self.threshold = 0.0
        self.generator = generator or torch.Generator().manual_seed(0)
        self._mass = torch.empty(0, dtype=torch.float64)  # of each group with weights
        self._single = Gram(d)
        self._new: list[tuple[Tensor, ...]] = []  # features, weights
        self._kept: list[tuple[Tensor, ...]] = []  # features, weights, sizes, priorities; once there is a threshold

    def update(self, features: Tensor, weights: Tensor) -> None:
        """Add rows ``features`` ``(n, d)`` with ``weights`` ``(n, groups)``; do not write into either afterwards.

        Raises:
            ValueError: If shapes do not fit, or the number of groups changes.
        """
        n, count = weights.shape
        if features.shape != (n, self.d):
            raise ValueError(f"features has shape {tuple(features.shape)}; expected ({n}, {self.d}).")
        if count != (len(self._mass) or count):
            raise ValueError(f"weights has {count} groups; there were {len(self._mass)} before.")
        features, weights = features.detach(), weights.detach()
        if features.device.type == "mps":  # it has no float64
            features, weights = features.cpu(), weights.cpu()
        self.rows += n
        if not len(self._mass):
            self._mass = torch.zeros(count, dtype=torch.float64, device=weights.device)
        for chunk in weights.split(chunk_size(weights)):
            # Not in float64 right away, for the sum would copy what is not.
            self._mass += chunk.sum(0, dtype=torch.promote_types(weights.dtype, torch.float32))
        if self._alone:
            self._single.update(features, weights[:, 0])
            return
        self._new.append((features, weights))
        if self.threshold or _bytes(self._new) > HELD:
            self._thin()

    def _thin(self) -> None:
        """Let new rows go whose priority is not above the threshold; where too many are left, raise it to keep half."""
        for features, weights in self._new:
            dtype = torch.promote_types(weights.dtype, torch.float32)  # half precision has no room for sums
            # Times rows: masses grow with them, sizes should not.
            share = (self.rows * self._share()).clamp(max=1e30).to(dtype)
            size = (weights.to(dtype) @ share + self.background) * vector_norm(features, dim=1, dtype=dtype).square()
            chance = 1.0 - torch.rand(len(size), generator=self.generator).to(size.device)  # never 0
            # A row that is not a number stays for certain: the solver must see it.
            priority = (size / chance).nan_to_num(nan=torch.inf, posinf=torch.inf)
            stays, part = priority > self.threshold, (features, weights, size, priority)
            self._kept.append(part if stays.all() else _select([part], [stays]))
        self._new = []
        if (held := _bytes(self._kept)) > HELD:
            priorities = [part[-1] for part in self._kept]
            priority = torch.cat(priorities)
            row = held // len(priority)
            largest, index = priority.topk(HELD // row // 2 + 1, sorted=False)  # a third of the time of sorting
            last = largest.argmin()
            self.threshold = float(largest[last])
            stays = torch.zeros_like(priority, dtype=torch.bool).index_fill_(0, index, True)
            stays[index[last]] = False
            self._kept = [_select(self._kept, stays.split([len(p) for p in priorities]))]
        # Many small parts would leave holes in memory between what batches take: like sizes become one.
        while len(self._kept) > 1 and len(self._kept[-1][0]) >= len(self._kept[-2][0]):
            pair = self._kept.pop(), self._kept.pop()
            self._kept.append(tuple(torch.cat(x) for x in zip(*pair, strict=True)))

    @property
    def _alone(self) -> bool:
        return len(self._mass) == 1 and not self.background

    def _share(self) -> Tensor:
        """Return what a weight of 1 counts in each group, ``(groups,)``; groups without mass have no rows."""
        return torch.where(self._mass > 0, 1 / self._mass, 0.0)

    @property
    def gram(self) -> Gram:
        """The sum of the groups' mean second moments; groups without mass add nothing."""
        if self._alone:
            return self._single.mean()
        total, share = Gram(self.d), self._share()
        for features, weights, *sizes in (*self._kept, *self._new):
            chunk = chunk_size(features)
            for i in range(0, len(features), chunk):
                part = as_float64(weights[i : i + chunk]) @ share + self.background / self.rows
                if sizes:
                    part *= (self.threshold / sizes[0][i : i + chunk].double()).nan_to_num(nan=1.0).clamp(min=1.0)
                total.update(features[i : i + chunk], part)
        total.mass, total.rows = float((self._mass > 0).sum()) + (self.background and self.rows > 0), self.rows
        return total


def _select(parts: Sequence[tuple[Tensor, ...]], stay: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the rows that stay as one part; by their numbers, which takes a third of the time of a mask."""
    indices = [mask.nonzero()[:, 0] for mask in stay]
    sizes = [len(index) for index in indices]
    selected = tuple(x.new_empty(sum(sizes), *x.shape[1:]) for x in parts[0])
    for part, index, *pieces in zip(parts, indices, *(x.split(sizes) for x in selected), strict=True):
        for x, piece in zip(part, pieces, strict=True):
            torch.index_select(x, 0, index, out=piece)
    return selected


def _bytes(kept: list[tuple[Tensor, ...]]) -> int:
    return sum(x.numel() * x.element_size() for part in kept for x in part[:2])


class RowSample:
    """Rows drawn without replacement, each group's in proportion to its weights, streaming.

    Weighted reservoir sampling by exponential keys (Efraimidis & Spirakis, *Weighted random sampling with a reservoir*,
    2006): of all rows the ones with the smallest ``Eᵢ/wᵢ``, E exponential, stay. Memory O(rows · d). E is −ln(1−u) with
    u uniform, so at least u: of most rows ``u/w`` is already too large, and no key is computed.

    Args:
        d (int): Length of a row.
        rows (int): Rows to draw, divided evenly among the groups; what does not divide goes to groups drawn by lot. A
            group with fewer rows of positive weight gives what it has. A row can be drawn by more than one group; its
            span does not change by that.
        generator (torch.Generator): Source of all randomness, on the CPU.
        background (bool): Whether all rows are one more group, after those with weights.
    """

    def __init__(self, d: int, rows: int, generator: torch.Generator, *, background: bool = False):
        """Start empty; the number of groups comes with the first rows."""
        if rows < 1:
            raise ValueError(f"rows={rows} must be at least 1.")
        self.d = d
        self.wanted = rows
        self.background = background
        self.rows = 0
        self.generator = generator
        self._drawn = DRAWN >> 6  # at first few: until groups are full, each is a key
        self._turn = torch.empty(0, dtype=torch.long)  # of each group, to get what does not divide
        # What is drawn, by group and key; its rows are on the features' device.
        self._groups = torch.empty(0, dtype=torch.long)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._kept = torch.empty(0, d)

    def update(self, features: Tensor, weights: Tensor) -> None:
        """Offer rows ``features`` ``(n, d)`` with ``weights`` ``(n, groups)``."""
        features, weights = features.detach(), weights.detach()
        if self.background:
            weights = torch.cat([weights, torch.ones_like(weights[:, :1])], dim=1)
        weights = weights.cpu()
        n, groups = weights.shape
        if not len(self._turn):
            self._turn = torch.randperm(groups, generator=self.generator)
            self._kept = features[:0].clone()
        self.rows += n
        # A row that is not a number is drawn for certain: the solver must see it. Two sums tell whether there is one.
        if not all(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite() for x in (features, weights)):
            bad = ~features.isfinite().all(1, keepdim=True).cpu()
            weights = weights.nan_to_num(nan=torch.inf).masked_fill(bad, torch.inf)
        held = len(self._keys)
        index, limits = torch.arange(held), self._limits()  # index: below held of what is kept, else of what is new
        i = 0
        while i < n:
            w = weights[i : i + max(1, self._drawn // groups)].double()
            u = torch.rand(w.shape, dtype=torch.float64, generator=self.generator)
            row, group = (u < limits * w).nonzero(as_tuple=True)  # none of weight 0, as ∞ · 0 is not a number
            if len(row):
                keys = torch.cat([self._keys, -torch.log1p(-u[row, group]) / w[row, group]])
                group = torch.cat([self._groups, group])
                stay = self._best(keys, group)
                index = torch.cat([index, held + i + row])[stay]
                self._keys, self._groups = keys[stay], group[stay]
                limits = self._limits()
            i += len(w)
            self._drawn = min(2 * self._drawn, DRAWN)
        new = index >= held
        taken = features[(index[new] - held).to(features.device)]
        index[new] = torch.arange(held, held + len(taken))
        self._kept = torch.cat([self._kept, taken])[index.to(features.device)]

    def _best(self, keys: Tensor, groups: Tensor) -> Tensor:
        """Return which of them stay, sorted by group and key."""
        order = keys.argsort(stable=True)
        order = order[groups[order].argsort(stable=True)]
        return order[_places(groups[order]) < self._quotas(self.wanted)[groups[order]]]

    def _quotas(self, rows: int) -> Tensor:
        """Return how many of ``rows`` each group may have, ``(groups,)``."""
        share, rest = divmod(rows, len(self._turn))
        return share + (self._turn < rest).long()

    def _limits(self) -> Tensor:
        """Return for each group the key that a new one must stay below, ``(groups,)``; ∞ as long as it is not full."""
        full = self._groups.bincount(minlength=len(self._turn)) == self._quotas(self.wanted)
        empty = torch.where(full, -torch.inf, torch.inf).double()
        return empty.scatter_reduce(0, self._groups, self._keys, "amax")

    @property
    def sample(self) -> Tensor:
        """The rows drawn, ``(at most rows, d)``, in the features' dtype and device."""
        return self.take(self.wanted)

    def take(self, rows: int) -> Tensor:
        """Return the sample that would have been drawn if ``rows`` had been asked for, at most as many as were."""
        if not len(self._turn):
            return torch.empty(0, self.d)
        if rows > self.wanted:
            raise ValueError(f"rows={rows} is more than the {self.wanted} that were drawn.")
        # The rows of the smallest keys: a smaller sample is part of a larger one.
        smaller = _places(self._groups) < self._quotas(rows)[self._groups]
        return self._kept[smaller.to(self._kept.device)]


def _places(groups: Tensor) -> Tensor:
    """Return the place of each within its group, from 0, of sorted ``groups``."""
    return torch.arange(len(groups)) - torch.searchsorted(groups, groups)
