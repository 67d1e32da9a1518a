# yolo-sos, AGPL-3.0
"""Slices of the loss around a model, and between a model and its shifted self.

Directions are Gaussian and filter-normalised (Li et al., *Visualizing the loss landscape of neural nets*, NeurIPS
2018): each row of a weight (a filter, a neuron) of the direction gets the norm of the model's; biases and BatchNorm,
whose effect does not scale with their norm, stay as they are. Models of the same shapes get the same draw, and all are
shown over the same range of the coefficient, which is relative to their own filters: 0.1 moves every filter by a tenth
of its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from yolo_sos.analyze.hessian import Subject
from yolo_sos.core import Engine, Shift, as_float64, evaluation


def direction(subject: Subject, seed: int) -> dict[str, Tensor]:
    """Return a filter-normalised direction, parameter name → tensor; parameters of one dimension have none."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in subject.model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
        if parameter.ndim < 2:
            continue  # drawn all the same: the next parameter's numbers do not depend on what this one is
        rows, own = drawn.flatten(1), parameter.detach().flatten(1)
        scale = own.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
        found[name] = (rows * scale).view_as(parameter)
    return found


def loss_at(subject: Subject, batches: Sequence[Any], moved: dict[str, Tensor]) -> float:
    """Return the mean loss per image with the parameters ``moved``, by name; the model itself is not written to."""
    task, total, images = subject.task, 0.0, 0

    def model(*args: Any) -> Any:
        return torch.func.functional_call(subject.model, moved, args)

    with evaluation(subject.model):
        for batch in batches:
            size = task.size(batch)
            total += size * float(task.loss(task.run(model, batch), batch))  # type: ignore[arg-type]
            images += size
    return total / images


def slices(
    subject: Subject,
    batches: Sequence[Any],
    *,
    radius: float,
    line: int,
    plane: int,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda n: None,
) -> dict[str, Any]:
    """Return the loss along one direction and in the plane of two, up to ``radius`` times each.

    There are ``line`` points along the first direction and ``plane`` along each side of the plane, odd numbers: the
    middle one is the model. ``progress`` is called with 1 after each point.

    Returns:
        (dict): ``line``: ``x`` and ``loss``; ``plane``: ``x``, ``y`` and ``loss`` (rows along y).
    """
    first, second = direction(subject, seed), direction(subject, seed + 1)
    own = dict(subject.model.named_parameters())

    def at(x: float, y: float) -> float:
        moved = {k: own[k].detach() + x * first[k] + y * second[k] for k in first}
        loss = loss_at(subject, batches, moved)
        progress(1)
        return loss

    xs, sides = ([radius * (2 * i / (points - 1) - 1) for i in range(points)] for points in (line, plane))
    return {
        "line": {"x": xs, "loss": [at(x, 0.0) for x in xs]},
        "plane": {"x": sides, "y": sides, "loss": [[at(x, y) for x in sides] for y in sides]},
    }


def interpolation(
    engine: Engine, shift: Shift, batches: Iterable[Any], steps: Sequence[float]
) -> dict[str, list[float]]:
    """Return the loss and the squared norm ratio along ``V + t(V* − V)``; only final layers are evaluated again.

    Nothing is written; t = 0 is the model, 1 its shifted self.

    Returns:
        (dict): ``t``, ``loss`` and ``squared_norm_ratio``, ``‖V_t‖²/‖V‖²`` over all layers.
    """
    heldout = engine.hold_out(batches)

    def squared_norm(weights: dict[str, Tensor]) -> float:
        return sum(float(as_float64(v).square().sum()) for v in weights.values())

    weights = [shift.weights(t) for t in steps]
    size = squared_norm(shift.weights(0.0)) or 1.0
    ratios = [squared_norm(w) / size for w in weights]
    return {"t": list(steps), "loss": [heldout.loss(w) for w in weights], "squared_norm_ratio": ratios}
