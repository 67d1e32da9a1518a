# yolo-sos, AGPL-3.0
"""The spectrum of a final layer's inputs A, and how much of the weights lies where the inputs do not.

With ``G = Σ w aᵀa = U diag(λ) Uᵀ`` the second moment of the inputs, λ descending, the singular values of (weighted) A
are √λ. A shift of rank r keeps the part of V in the leading r directions; the output energy it gives up is
``Σ_{i>r} λ_i ‖V u_i‖²``, the norm it removes ``Σ_{i>r} ‖V u_i‖²``. Where λ has fallen by orders of magnitude and
‖V‖² has not, much can be removed for little.

Effective rank: ``exp(−Σ p ln p)`` with p = σ/Σσ (Roy & Vetterli, *The effective rank*, EUSIPCO 2007).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from yolo_sos.core import Engine, FinalLayer, Method, Moments, as_float64, solve, weight_matrix

LEVELS = (0.9, 0.99, 0.999, 0.9999)  # of the inputs' energy Σλ
RANKS = (0.125, 0.25, 0.5, 0.75)  # sos_rank, fractions of d
BUDGETS = (0.003, 0.01, 0.03, 0.1)  # sos_budget
ALL_ROWS = Method("full")  # whose second moment counts all rows alike


def spectrum(moments: Moments, weight: Tensor) -> dict[str, Any]:
    """Return the spectrum of a second moment ``(d, d)`` against V ``(out, d)``, as plain values.

    Returns:
        (dict): ``singular_values``, √λ ``(d,)``, descending, of A scaled to unit energy, Σλ = 1; ``effective_rank`` of
            these; ``outside`` ``(d,)``, whose entry r−1 is the share of ‖V‖² outside the leading r directions;
            ``levels``: for each of ``LEVELS`` the ``rank`` that reaches this ``energy``, and the share ``outside``.
    """
    g = moments.matrix / (moments.matrix.trace() or 1.0)
    values, vectors = torch.linalg.eigh((g + g.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    energy = (as_float64(weight).to(g.device) @ vectors).square().sum(0)
    outside = (1 - energy.cumsum(0) / (energy.sum() or 1.0)).clamp(min=0).tolist()
    sigma = values.sqrt()
    p = sigma[sigma > 0] / sigma.sum()
    reached = values.cumsum(0)
    levels = []
    for level in LEVELS:
        # Rounding must not push the last level beyond the last direction.
        rank = min(int((reached < level * float(reached[-1])).sum()) + 1, moments.d)
        levels.append({"energy": level, "rank": rank, "outside": outside[rank - 1]})
    return {
        "singular_values": sigma.tolist(),
        "effective_rank": float((-(p * p.log()).sum()).exp()),
        "outside": outside,
        "levels": levels,
    }


def spectrum_methods(weighting: str) -> list[tuple[Method, int]]:
    """Return the methods, with their seeds, that an engine must accumulate for ``layer_spectrum``."""
    return [(ALL_ROWS, 0), (Method(weighting=weighting), 0)]


def layer_spectrum(engine: Engine, layer: FinalLayer, weighting: str) -> dict[str, Any]:
    """Return what is known of the inputs of one final layer, as plain values.

    The engine is one of ``spectrum_methods(weighting)`` and has been fitted.

    Returns:
        (dict): ``name``, ``kind`` and ``level`` of the layer; ``d``, length of an input row; ``rows`` seen; ``norm``,
            ‖V‖_F; ``unweighted``, the ``spectrum`` of all rows alike, and ``weighted``; ``settings``: what ``sos_rank``
            (method principal) and ``sos_budget`` would do: ``setting``, ``value``, ``rank``, ``squared_norm_ratio``
            (‖V*‖²/‖V‖²) and ``deviation`` of the outputs, weighted.
    """
    weight = weight_matrix(layer.module)
    unweighted = engine.moments(layer, ALL_ROWS)
    weighted = engine.moments(layer, Method(weighting=weighting))
    trials = [("sos_rank", rank, Method("principal", rank=rank)) for rank in RANKS]
    trials += [("sos_budget", budget, Method("budget", budget=budget)) for budget in BUDGETS]
    settings = []
    for setting, value, method in trials:
        result = solve(method, weighted, weight)
        settings.append(
            {
                "setting": setting,
                "value": value,
                "rank": result.rank,
                "squared_norm_ratio": (result.norm_after / result.norm_before) ** 2 if result.norm_before else 1.0,
                "deviation": result.deviation,
            }
        )
    return {
        "name": layer.name,
        "kind": layer.kind,
        "level": layer.level,
        "d": unweighted.d,
        "rows": unweighted.rows,
        "norm": float(as_float64(weight).norm()),
        "unweighted": spectrum(unweighted, weight),
        "weighted": spectrum(weighted, weight),
        "settings": settings,
    }
