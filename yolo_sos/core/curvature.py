# yolo-sos, AGPL-3.0
"""The smallest weights with the same loss, to second order: method ``loss``.

A change ΔV of the final layers changes the loss, where its slope is 0, by about ``½ Σ_k Δv_k G_k Δv_kᵀ``. The sum is
over all outputs k of all layers, v_k is the row of V that makes output k, and ``G_k = Σᵢ h_ik aᵢᵀaᵢ`` with h_ik the
second derivative of the loss in that output on row i: the diagonal of its Hessian in the outputs. Of all weights for
which the loss rises by as much, those of least norm are ``v_k G_k (G_k + μI)⁻¹`` with one μ for all outputs.

What a sample of images does not show is not known to be 0. So in every output a share of the curvature that is typical
of the layers of its kind, ``Σh² / Σh``, is added to the row's own: the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from yolo_sos.core.heldout import layer_outputs
from yolo_sos.core.layers import FinalLayer, input_rows, weight_matrix
from yolo_sos.core.moments import CHUNK, Moments, as_float64
from yolo_sos.core.solvers import EPS, NON_FINITE, ShiftResult, filtered_deviation, ridge_of_rank, solved, unchanged
from yolo_sos.core.tasks import Task

# Fitted on 430 images of VOC07 without a large object, which leave the boxes of the coarsest level little curvature,
# a shift costs .38 of mAP50-95 on all images without a floor, .007 with this one (studies/voc07/strength.md).
FLOOR = 0.003


class Curvature:
    """Second moments of the final layers' rows, one for each output, weighted by the curvature of the loss in it.

    Memory is O(out · d²) for each layer, whatever the number of rows.

    Args:
        task (Task): Gives the loss as a function of the layers' outputs, see ``Task.replay``.
        layers (Sequence[FinalLayer]): The layers to shift.
        watched (Sequence[FinalLayer]): All layers whose outputs the task replays.
        seed (int): Of the random signs by which the diagonal of the Hessian is estimated.
        floor (float): Curvature that is added to each row's own, relative to what is typical of its kind of layer.
    """

    def __init__(
        self,
        task: Task,
        layers: Sequence[FinalLayer],
        watched: Sequence[FinalLayer],
        seed: int,
        floor: float = FLOOR,
    ):
        """Start at zero."""
        self.task, self.layers, self.watched, self.floor = task, layers, watched, floor
        self._matrices: dict[str, Tensor] = {}  # layer name → G, (out, d, d)
        self._alike = {layer.name: Moments(weight_matrix(layer.module).shape[1]) for layer in layers}  # all rows alike
        self._sums = {layer.kind: torch.zeros(2, dtype=torch.float64) for layer in layers}  # kind → Σh, Σh²
        self._generator = torch.Generator(layers[0].module.weight.device).manual_seed(seed)  # type: ignore[arg-type]

    @property
    def rows(self) -> dict[str, int]:
        """Layer name → rows seen."""
        return {name: moments.rows for name, moments in self._alike.items()}

    def add(self, batch: Any, output: Any, inputs: dict[str, Tensor]) -> None:
        """Add the rows of a batch, with what the model returned and what its layers received.

        Raises:
            ValueError: If the task cannot replay outputs.
        """
        for layer, h in zip(self.layers, self._second_derivatives(batch, output, inputs), strict=True):
            rows = input_rows(layer.module, inputs[layer.name])
            self._alike[layer.name].update(rows)
            self._sums[layer.kind] += torch.stack([h.sum(), h.square().sum()]).cpu().double()
            if layer.name not in self._matrices:
                self._matrices[layer.name] = as_float64(rows).new_zeros(h.shape[1], rows.shape[1], rows.shape[1])
            some = h.any(1)  # a box has a loss only where there is an object
            chunk = CHUNK.get(rows.device.type, CHUNK["cpu"])
            for a, weights in zip(rows[some].split(chunk), h[some].split(chunk), strict=True):
                a, weights = as_float64(a), as_float64(weights)
                for g, w in zip(self._matrices[layer.name], weights.T, strict=True):
                    g.addmm_((a * w[:, None]).T, a)

    def _second_derivatives(self, batch: Any, output: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Return ``∂²L/∂z²``, ``(n, out)`` and at least 0, of each layer, for L the sum of the images' losses."""
        size, state = self.task.size(batch), self.task.replay_state(batch, output)
        if state is None:
            raise ValueError(
                "method='loss' differentiates the loss in the outputs of the final layers, which only a task that can "
                "replay them allows, such as a detector's. Choose another method: 'expected' is the default."
            )
        outputs = layer_outputs(self.watched, {}, inputs)
        leaves = {layer.name: outputs[layer.name].detach().requires_grad_() for layer in self.layers}
        with torch.enable_grad():
            loss = size * self.task.loss(self.task.replay(state[1], {**outputs, **leaves}), state[0])
            found = hessian_diagonal(loss, list(leaves.values()), self._generator)
        # Convolutions (B, out, H, W), linear layers (..., out)
        return [(h.movedim(1, -1) if h.ndim == 4 else h).flatten(0, -2).clamp(min=0) for h in found]

    @cached_property
    def _spectra(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Eigenvalues ``(out, d)``, 0 where rounding decides, and eigenvectors ``(out, d, d)`` of finite layers."""
        found = {}
        for layer in self.layers:
            name, (total, squares) = layer.name, self._sums[layer.kind].tolist()
            floor = self.floor * squares / total if total else 0.0
            matrix = self._matrices.pop(name) + floor * self._alike[name].matrix
            if matrix.isfinite().all():
                values, vectors = torch.linalg.eigh(matrix)
                least = values.shape[1] * EPS * values[:, -1:]
                found[name] = values.where(values > least, values.new_zeros(())), vectors
        return found

    def solve(self, rank_of: Callable[[int], int]) -> dict[str, ShiftResult]:
        """Return the shift of each layer, all of them together: one μ, by which the mean rank is what is asked for.

        Layers of a kind in whose outputs the loss has no curvature keep their weights.

        Args:
            rank_of (Callable): Length d of a layer's rows → effective rank of an output, ``Σ λ/(λ+μ)``, see
                ``Method.rank_of``. It is reached in the mean over all outputs of all layers.

        Returns:
            (dict[str, ShiftResult]): Layer name → its shift, with ``transform`` ``(out, d, d)``. ``rank`` is the mean
                over its outputs; in ``deviation`` the curvature weighs outputs and rows.
        """
        weights = {layer.name: weight_matrix(layer.module) for layer in self.layers}
        results = {name: unchanged(v, NON_FINITE) for name, v in weights.items()}
        finite = {name: of for name, of in self._spectra.items() if weights[name].isfinite().all()}
        filters = _one_ridge({name: values for name, (values, _) in finite.items()}, rank_of)
        for name, (values, vectors) in finite.items():
            v, f = as_float64(weights[name]).to(vectors.device), filters[name]
            outputs = values * torch.einsum("kd,kde->ke", v, vectors).square()
            deviation = filtered_deviation(f, outputs)
            transform = (vectors * f[:, None]) @ vectors.mT
            results[name] = solved(weights[name], transform, float(f.sum()) / len(f), deviation)
        return results


def _one_ridge(values: dict[str, Tensor], rank_of: Callable[[int], int]) -> dict[str, Tensor]:
    """Return ``λ/(λ+μ)`` of each layer's eigenvalues ``(out, d)``, one μ for all; 1 in layers that are all 0."""
    curved = {name: of for name, of in values.items() if of.any()}
    filters = {name: torch.zeros_like(of) if name in curved else torch.ones_like(of) for name, of in values.items()}
    if curved:
        wanted = sum(len(of) * rank_of(of.shape[1]) for of in curved.values())
        parts = [of[of > 0].cpu() for of in curved.values()]  # finding μ takes a hundred comparisons of scalars
        f = ridge_of_rank(torch.cat(parts), wanted)
        for (name, of), part in zip(curved.items(), f.split([len(part) for part in parts]), strict=True):
            filters[name][of > 0] = part.to(of)
    return filters


def hessian_diagonal(loss: Tensor, leaves: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Return an unbiased estimate of ``∂²loss/∂z²`` for each entry of the leaves, shaped as they are.

    ``s ⊙ Hs`` for random signs s (Bekas, Kokiopoulou & Saad, *An estimator for the diagonal of a matrix*, Applied
    Numerical Mathematics 57, 2007). It is exact where H is diagonal, as for class scores that have a loss each; for box
    outputs one draw is enough, since a sum over hundreds of images follows.

    Args:
        loss (Tensor): A scalar, with a graph that can be differentiated twice.
        leaves (Sequence[Tensor]): The tensors z.
        generator (torch.Generator): Of the signs, on the leaves' device.
    """
    found = [torch.zeros_like(leaf) for leaf in leaves]
    if not loss.requires_grad:  # it depends on none of them
        return found
    slopes = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    bent = [k for k, slope in enumerate(slopes) if slope is not None and slope.requires_grad]  # in others it is linear
    if bent:
        curved = [leaves[k] for k in bent]
        signs = [torch.empty_like(z, dtype=torch.int8).random_(2, generator=generator).to(z) * 2 - 1 for z in curved]
        products = torch.autograd.grad([slopes[k] for k in bent], curved, signs, materialize_grads=True)
        for k, sign, product in zip(bent, signs, products, strict=True):
            found[k] = sign * product
    return found
