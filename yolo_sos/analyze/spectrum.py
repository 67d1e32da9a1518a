# yolo-sos, AGPL-3.0
"""The spectrum of a final layer's inputs A, and how much of the weights lies where the inputs do not.

With ``G = Σ w aᵀa = U diag(λ) Uᵀ`` the second moment of the inputs, λ descending, the singular values of (weighted) A
are √λ. A shift of rank r keeps the part of V in the leading r directions; the output energy it gives up is
``Σ_{i>r} λ_i ‖V u_i‖²``, the norm it removes ``Σ_{i>r} ‖V u_i‖²``. Where λ has fallen by orders of magnitude and
‖V‖² has not, much can be removed for little.

Effective rank: ``exp(−Σ p ln p)`` with p = σ/Σσ (Roy & Vetterli, *The effective rank*, EUSIPCO 2007).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from yolo_sos.core import FinalLayer, Gram, GroupedGram, Method, Task, has_background, weight_matrix
from yolo_sos.core.gram import as_float64
from yolo_sos.core.solver import OK
from yolo_sos.core.weighting import weighted_rows

LEVELS = (0.9, 0.99, 0.999, 0.9999)  # of the inputs' energy Σλ
RANKS = (0.125, 0.25, 0.5, 0.75)  # sos_rank, fractions of d
BUDGETS = (0.003, 0.01, 0.03, 0.1)  # sos_budget


@dataclass(frozen=True)
class Spectrum:
    """Spectrum of one second moment against one weight.

    Attributes:
        singular_values (list[float]): √λ ``(d,)``, descending, of A scaled to unit energy: Σλ = 1.
        effective_rank (float): Of these.
        outside (list[float]): ``(d,)``; entry r−1 is the share of ‖V‖² outside the leading r directions.
        levels (list[dict]): Per energy level: the ``rank`` that reaches it and the share of ‖V‖² ``outside``.
    """

    singular_values: list[float]
    effective_rank: float
    outside: list[float]
    levels: list[dict[str, float]]

    @classmethod
    def of(cls, gram: Gram, weight: Tensor) -> Spectrum:
        """Return the spectrum of ``gram`` ``(d, d)`` against V ``(out, d)``."""
        g = gram.matrix / (gram.matrix.trace() or 1.0)
        values, vectors = torch.linalg.eigh((g + g.T) / 2)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        v = as_float64(weight).to(g.device)
        energy = (v @ vectors).square().sum(0)
        outside = 1 - energy.cumsum(0) / (energy.sum() or 1.0)
        sigma = values.sqrt()
        p = sigma[sigma > 0] / sigma.sum()
        reached = values.cumsum(0)
        levels = []
        for level in LEVELS:
            # Rounding must not push the last level beyond the last direction.
            rank = min(int((reached < level * float(reached[-1])).sum()) + 1, gram.d)
            levels.append({"energy": level, "rank": rank, "outside": max(float(outside[rank - 1]), 0.0)})
        return cls(sigma.tolist(), float((-(p * p.log()).sum()).exp()), outside.clamp(min=0).tolist(), levels)


@dataclass(frozen=True)
class LayerSpectrum:
    """The inputs of one final layer.

    Attributes:
        name (str): Qualified name of the layer.
        kind (str): See ``FinalLayer.kind``.
        scale (int): Detection level.
        d (int): Length of an input row.
        rows (int): Rows seen.
        norm (float): ‖V‖_F.
        unweighted (Spectrum): All rows alike.
        weighted (Spectrum): With the weighting that shifts use.
        settings (list[dict]): What ``sos_rank`` (method principal) and ``sos_budget`` would do: ``setting``, ``value``,
            ``rank``, ``norm_ratio`` (‖V*‖²/‖V‖²) and ``deviation`` of the outputs, weighted.
    """

    name: str
    kind: str
    scale: int
    d: int
    rows: int
    norm: float
    unweighted: Spectrum
    weighted: Spectrum
    settings: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)


class Inputs:
    """Second moments of the final layers' inputs, streaming: unweighted, and with the weighting of shifts.

    Args:
        task (Task): Judges rows.
        layers (Sequence[FinalLayer]): All final layers.
        weighting (str): ``balanced``, ``confidence`` or ``uniform``.
    """

    def __init__(self, task: Task, layers: Sequence[FinalLayer], weighting: str = "balanced"):
        """Start empty."""
        self.task, self.layers, self.weighting = task, list(layers), weighting
        self.plain = {layer.name: Gram(self._d(layer)) for layer in layers}
        self.weighted = {layer.name: self._grouped(layer) for layer in layers}

    def _grouped(self, layer: FinalLayer) -> GroupedGram:
        return GroupedGram(self._d(layer), background=has_background(self.weighting, layer.kind))

    @staticmethod
    def _d(layer: FinalLayer) -> int:
        return weight_matrix(layer.module).shape[1]

    def update(self, inputs: dict[str, Tensor], batch: Any) -> None:
        """Add a batch's inputs, layer name → tensor as the layer receives it."""
        weighted = weighted_rows(self.task, self.layers, self.layers, [self.weighting], inputs, batch)
        for layer, rows, weights in weighted:
            self.plain[layer.name].update(rows)
            self.weighted[layer.name].update(rows, weights[self.weighting])

    def shifts(self, method: Method) -> dict[str, Tensor]:
        """Return what a shift by a spectral method would write, layer name → ``(out, d)``."""
        return {
            layer.name: method.solve(self.weighted[layer.name], weight_matrix(layer.module)).weight
            for layer in self.layers
        }

    def spectra(self) -> list[LayerSpectrum]:
        """Return the spectrum of each layer, in order."""
        return [self._spectrum(layer) for layer in self.layers]

    def _spectrum(self, layer: FinalLayer) -> LayerSpectrum:
        weight, plain, weighted = weight_matrix(layer.module), self.plain[layer.name], self.weighted[layer.name]
        trials = [("sos_rank", r, Method("principal", rank=r)) for r in RANKS]
        trials += [("sos_budget", b, Method("budget", budget=b)) for b in BUDGETS]
        settings = []
        for setting, value, method in trials:
            result = method.solve(weighted, weight)
            ratio = (result.norm_after / result.norm_before) ** 2 if result.status == OK and result.norm_before else 1.0
            settings.append(
                {
                    "setting": setting,
                    "value": value,
                    "rank": result.rank,
                    "norm_ratio": ratio,
                    "deviation": result.deviation,
                }
            )
        return LayerSpectrum(
            name=layer.name,
            kind=layer.kind,
            scale=layer.scale,
            d=self._d(layer),
            rows=plain.rows,
            norm=float(as_float64(weight).norm()),
            unweighted=Spectrum.of(plain, weight),
            weighted=Spectrum.of(weighted.gram, weight),
            settings=settings,
        )
