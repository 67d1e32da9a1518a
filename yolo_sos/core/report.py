# yolo-sos, AGPL-3.0
"""What a shift did to a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from yolo_sos.core.solvers import OK


@dataclass(frozen=True)
class LayerReport:
    """What a shift did to one layer, at the accepted step t.

    Attributes:
        name (str): Qualified name of the layer.
        kind (str): ``box``, ``cls``, ``mask``, ``kpt``, ``angle`` or ``linear``.
        level (int): Detection level.
        d (int): Length of an input row.
        rows (int): Rows seen.
        rank (float): Rank of the full shift (t = 1), numerical or effective.
        norm_before (float): ‖V‖_F.
        norm_after (float): ‖V_t‖_F, of the weight as it was written.
        deviation (float): ``‖A(V_t−V)ᵀ‖_F / ‖AVᵀ‖_F`` on the rows that the solver saw, weighted as it saw them.
        status (str): See ``ShiftResult.status``.
    """

    name: str
    kind: str
    level: int
    d: int
    rows: int
    rank: float
    norm_before: float
    norm_after: float
    deviation: float
    status: str


@dataclass(frozen=True)
class ShiftReport:
    """What one shift did to a model.

    Attributes:
        layers (tuple[LayerReport, ...]): One per layer.
        heldout_before (float): Task loss per held-out image before the shift; nan without held-out images.
        heldout_after (float): The same at the accepted step, of the weights as they were written.
        step (float): The accepted step size t; 0 if nothing was written.
        guard (float | None): Largest relative rise of the held-out loss that was allowed; None: there was no guard.
        milliseconds (dict[str, float]): Wall time of ``sample`` (waiting for batches), ``forward``, ``rows``
            (accumulating), ``solve``, ``guard`` (held-out losses) and ``write``.
    """

    layers: tuple[LayerReport, ...]
    heldout_before: float
    heldout_after: float
    step: float
    guard: float | None
    milliseconds: dict[str, float]

    @property
    def status(self) -> str:
        """``ok``, or why nothing was written: the first failed solve, or ``guarded``."""
        failed = [f"{layer.status} in {layer.name}" for layer in self.layers if layer.status != OK]
        return failed[0] if failed else OK if self.step > 0 else "guarded"

    @property
    def squared_norm_ratio(self) -> float:
        """``Σ‖V_t‖² / Σ‖V‖²`` over the layers."""
        before = sum(layer.norm_before**2 for layer in self.layers)
        return sum(layer.norm_after**2 for layer in self.layers) / before if 0 < before < math.inf else 1.0

    @property
    def rank(self) -> float:
        """Mean rank over the layers."""
        return sum(layer.rank for layer in self.layers) / len(self.layers)

    @property
    def deviation(self) -> float:
        """Mean deviation over the layers."""
        return sum(layer.deviation for layer in self.layers) / len(self.layers)

    def __str__(self) -> str:
        """Return one line: which layers, what became smaller, and what happened to outputs and loss."""
        names = [layer.name for layer in self.layers]
        what = ", ".join(names) if len(names) <= 2 else f"{len(names)} layers"
        loss = "unknown" if math.isnan(self.heldout_before) else f"{self.heldout_before:.4g} → {self.heldout_after:.4g}"
        guard = ", no guard" if self.guard is None else ""
        status = "" if self.status == OK else f", {self.status}"
        return (
            f"{what}: squared norm ×{self.squared_norm_ratio:.3f}, rank {self.rank:.1f}, "
            f"deviation {self.deviation:.2g}, held-out loss {loss}{guard}, t={self.step:g}{status}"
        )
