# yolo-sos, AGPL-3.0
"""Neural collapse, NC1 to NC4, in one pass over the features.

Definitions of Papyan, Han & Donoho (*Prevalence of neural collapse during the terminal phase of deep learning
training*, PNAS 117, 2020). With features h of class c, class means μ_c, their mean μ_G, centred means m_c = μ_c − μ_G,
and V, b the final layer::

    nc1         tr(Σ_W Σ_B⁺) / C            within-class against between-class variation; 0: features are their class
    nc2_norms   std_c ‖m_c‖ / mean_c ‖m_c‖  0: class means are equally far from the centre
    nc2_angles  mean_{c≠c'} |cos(m_c, m_c') + 1/(C−1)|    0: and as far apart as can be, a simplex
    nc3         ‖V/‖V‖_F − M/‖M‖_F‖_F       0: the classifier's rows are the class means; M has the rows m_c
    nc4         P[argmax_c (V h + b)_c ≠ argmin_c ‖h − μ_c‖]    0: it decides as the nearest class mean would

Σ_W is the mean over all features of (h − μ_c)(h − μ_c)ᵀ, Σ_B the mean over classes of m_c m_cᵀ. Only classes with at
least two features take part; C is their number.

For a **classifier** the features are the inputs of its final linear layer, one per image. For a **detector** they are
the inputs of a level's final class layer at those anchor points that the task's own assigner gives to an object, and
the class is that object's; the background is no class. Of a head with two branches, each branch with its own assigner.

Memory is O(C·d + d²): per block of images the count and sum of each class and the second moment of all features, and
for NC4, which needs the means first, a uniform sample of features of fixed size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from yolo_sos.analyze.estimate import Estimate
from yolo_sos.core import FinalLayer, Moments, RowSample, as_float64, input_rows, weight_matrix
from yolo_sos.yolo.class_rows import Assignments
from yolo_sos.yolo.heads import YoloTask

JACKKNIFE = 8  # blocks of images
DECISIONS = 2048  # features kept for NC4: a standard error of at most 1.1 percentage points
MEASURES = ("nc1", "nc2_norms", "nc2_angles", "nc3", "nc4")


@dataclass
class ClassMoments:
    """What NC1 to NC3 need of some features; blocks add up with ``+``.

    Attributes:
        counts (Tensor): ``(C,)`` features of each class.
        sums (Tensor): ``(C, d)`` their sums.
        second (Moments): Second moment of all features.
    """

    counts: Tensor
    sums: Tensor
    second: Moments

    @classmethod
    def empty(cls, classes: int, d: int) -> ClassMoments:
        """Return the moments of no features."""
        zeros = torch.zeros(classes, d + 1, dtype=torch.float64)
        return cls(zeros[:, 0], zeros[:, 1:], Moments(d))

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add features ``(n, d)`` of classes ``(n,)``."""
        a, index = as_float64(features).cpu(), labels.long().cpu()
        self.counts += torch.bincount(index, minlength=len(self.counts))
        self.sums.index_add_(0, index, a)
        self.second.update(features)

    def __add__(self, other: ClassMoments) -> ClassMoments:
        """Merge two blocks."""
        return ClassMoments(self.counts + other.counts, self.sums + other.sums, self.second + other.second)

    @property
    def present(self) -> Tensor:
        """The classes that take part, as indices."""
        return (self.counts >= 2).nonzero()[:, 0]

    @property
    def means(self) -> Tensor:
        """Means of the classes present, ``(C, d)``."""
        return self.sums[self.present] / self.counts[self.present, None]

    @property
    def centred(self) -> Tensor:
        """The means less their own mean, ``(C, d)``."""
        return self.means - self.means.mean(0)


# Each measure is of moments with at least two classes present.
def nc1(moments: ClassMoments) -> float:
    """Return ``tr(Σ_W Σ_B⁺) / C``; inf where the class means are all the same."""
    m, means, counts = moments.centred, moments.means, moments.counts[moments.present]
    # A class with one feature is in the second moment too: its own deviation from its mean is zero.
    lone = moments.sums[moments.counts == 1]
    between = (means * counts[:, None]).T @ means + lone.T @ lone
    within = (moments.second.matrix.cpu() - between) / counts.sum()
    _, s, basis = torch.linalg.svd(m, full_matrices=False)
    kept = s > len(m) * torch.finfo(torch.float64).eps * s[0]
    kept[len(m) - 1 :] = False  # centred: C means span C − 1 dimensions, whatever rounding says
    if not kept.any():
        return math.inf
    # Σ_B = MᵀM/C = Σ_k (s_k²/C) v_k v_kᵀ: the two factors of C cancel.
    variation = ((basis[kept] @ within) * basis[kept]).sum(1).clamp(min=0)
    return float((variation / s[kept].square()).sum())


def nc2_norms(moments: ClassMoments) -> float:
    """Return the coefficient of variation of the centred means' lengths; nan where all means are the same."""
    lengths = moments.centred.norm(dim=1)
    return float(lengths.std(unbiased=False) / lengths.mean())


def nc2_angles(moments: ClassMoments) -> float:
    """Return the mean distance of the cosines between centred means from −1/(C−1)."""
    directions = nn.functional.normalize(moments.centred, dim=1)
    c = len(directions)
    cosines = (directions @ directions.T)[~torch.eye(c, dtype=torch.bool)]
    return float((cosines + 1 / (c - 1)).abs().mean())


def nc3(moments: ClassMoments, weight: Tensor) -> float:
    """Return the distance between V ``(C, d)`` and the centred means, each scaled to norm 1; nan where one is zero."""
    m, v = moments.centred, as_float64(weight).cpu()[moments.present]
    return float((v / v.norm() - m / m.norm()).norm())


class Collapse:
    """NC1 to NC4 of one final layer, streaming.

    Args:
        layer (FinalLayer): A layer whose outputs are class scores ``(n, C)``.
        seed (int): Draws the sample for NC4.
    """

    def __init__(self, layer: FinalLayer, seed: int = 0):
        """Start empty."""
        self.layer = layer
        classes, self.d = weight_matrix(layer.module).shape
        self.blocks = [ClassMoments.empty(classes, self.d) for _ in range(JACKKNIFE)]
        self._drawn = RowSample(self.d, 1, DECISIONS, torch.Generator().manual_seed(seed))
        self._updates = 0

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add the features ``(n, d)`` of a batch with their classes ``(n,)``; −1: of no class."""
        block = self.blocks[self._updates % JACKKNIFE]
        self._updates += 1
        chosen = labels >= 0
        features, labels = features[chosen], labels[chosen]
        if len(features):
            block.update(features, labels)
            self._drawn.update(features, torch.zeros(len(features), dtype=torch.long), torch.ones(len(features)))

    @property
    def features(self) -> int:
        """Features seen."""
        return self.total.second.rows

    @property
    def total(self) -> ClassMoments:
        """The moments of all blocks."""
        return sum(self.blocks[1:], self.blocks[0])

    @property
    def classes(self) -> int:
        """Classes that take part."""
        return len(self.total.present)

    def measures(self) -> dict[str, Estimate]:
        """Return NC1 to NC4 by name; nan where fewer than two classes have two features.

        Standard errors: the jackknife over blocks of images, and ``√(p(1−p)/n)`` for NC4.
        """
        blocks = [block for block in self.blocks if block.counts.any()] or self.blocks[:1]
        weight = weight_matrix(self.layer.module)

        def measure(of: Callable[[ClassMoments], float]) -> Estimate:
            return Estimate.jackknife(lambda moments: of(moments) if len(moments.present) > 1 else math.nan, blocks)

        found = {of.__name__: measure(of) for of in (nc1, nc2_norms, nc2_angles)}
        return {**found, "nc3": measure(lambda moments: nc3(moments, weight)), "nc4": self._nc4(weight)}

    def _nc4(self, weight: Tensor) -> Estimate:
        total = self.total
        h = as_float64(self._drawn.sample).cpu()
        if len(total.present) < 2:
            return Estimate(math.nan, math.nan, len(h))
        bias = self.layer.module.bias
        logits = h @ as_float64(weight).cpu().T + (0.0 if bias is None else as_float64(bias).cpu())  # type: ignore[arg-type]
        decided = logits[:, total.present].argmax(1)
        nearest = torch.cdist(h, total.means).argmin(1)
        p = float((decided != nearest).double().mean())
        return Estimate(p, math.sqrt(p * (1 - p) / len(h)), len(h))


def mean_measures(collapses: Sequence[Collapse]) -> dict[str, float]:
    """Return the mean of each measure over the layers where it is a number; nan where there are none."""
    found = [collapse.measures() for collapse in collapses]
    means = {}
    for name in MEASURES:
        values = [of[name].estimate for of in found if math.isfinite(of[name].estimate)]
        means[name] = sum(values) / len(values) if values else math.nan
    return means


def collect(
    collapses: Sequence[Collapse], task: YoloTask, output: Any, inputs: dict[str, Tensor], batch: dict[str, Any]
) -> None:
    """Add a batch with its ``output`` and the ``inputs`` of its layers to the collapse of each class layer.

    A detector's criterion is run for the decisions of its assigners.
    """
    collapse_of = {collapse.layer.name: collapse for collapse in collapses}
    if collapses[0].layer.kind == "linear":
        found: Iterable[tuple[FinalLayer, Tensor]] = [(collapses[0].layer, batch["cls"].long())]
    else:
        with Assignments(task) as assigned:
            task.loss(output, batch)
            found = [(layer, labels) for layer, _, labels in assigned.take(inputs)]
    for layer, labels in found:  # (B, anchor points of the level) → rows, images outermost as in ``input_rows``
        collapse_of[layer.name].update(input_rows(layer.module, inputs[layer.name]), labels.reshape(-1))
