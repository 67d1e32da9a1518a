# yolo-sos, AGPL-3.0
"""Fit the final layer of a model to labels, without training: solve, judge on held-out batches, write, report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from yolo_sos.core.capture import evaluation, original_module
from yolo_sos.core.checks import number
from yolo_sos.core.engine import Engine
from yolo_sos.core.fitting import RidgeProblem, Rows, fit_path
from yolo_sos.core.layers import FinalLayer, Layers, affine_matrix, input_rows, last_layer, select_layers, write_weight
from yolo_sos.core.tasks import ModelTask, to_device

# Of the loss on other rows that the frequencies of the classes leave; a fit that explains less has nothing to go by.
# Pretrained towers explain 40 to 60 % on detection sets, random ones at most 1 %.
LEAST_EXPLAINED = 0.05
IGNORED = -100  # cross-entropy's label of what does not count


@dataclass(frozen=True)
class LayerFit:
    """How one layer was fitted.

    Attributes:
        name (str): Qualified name of the layer.
        kind (str): ``cls`` or ``linear``.
        level (int): Detection level.
        classes (int): How many of its outputs were fitted together.
        d (int): Length of an input row.
        rows (int): Rows fitted on.
        ridge (float): The ridge, see ``RidgeProblem``.
        losses (dict[float, float]): Ridge → mean loss on the rows that the ridge was chosen by, from strong to weak.
        explained (float): The share of that loss, where only the classes' frequencies are known, that the fit explains;
            nan where there are no such rows.
        null (float): The sum of that loss over these rows.
        gap (float): See ``Solution``.
        converged (bool): Likewise.
        evaluations (int): Likewise, of the last solution.
    """

    name: str
    kind: str
    level: int
    classes: int
    d: int
    rows: int
    ridge: float
    losses: dict[float, float]
    explained: float
    null: float
    gap: float
    converged: bool
    evaluations: int


@dataclass(frozen=True)
class FitReport:
    """What a fit did to a model.

    Attributes:
        layers (tuple[LayerFit, ...]): One per layer.
        heldout_before (float): Task loss per held-out image before the fit; nan without held-out images.
        heldout_after (float): The same after it, written or not.
        refusal (str): Why nothing was written; empty if the layers were.
        milliseconds (dict[str, float]): Wall time by phase, see ``ShiftReport``.
    """

    layers: tuple[LayerFit, ...]
    heldout_before: float
    heldout_after: float
    refusal: str
    milliseconds: dict[str, float]

    @property
    def explained(self) -> float:
        """The share of the loss on other rows that the fit explains, over all layers."""
        return explained(self.layers)

    def __str__(self) -> str:
        """Return one line."""
        seconds = f"{sum(self.milliseconds.values()) / 1e3:.1f} s"
        if self.refusal:
            return f"nothing written: {self.refusal}; {seconds}"
        ridges = ", ".join(f"{layer.ridge:.3g}" for layer in self.layers)
        loss = "unknown" if math.isnan(self.heldout_before) else f"{self.heldout_before:.4g} → {self.heldout_after:.4g}"
        return f"{len(self.layers)} layers fitted; held-out loss {loss}, ridge {ridges}, {seconds}"


def explained(layers: Iterable[LayerFit]) -> float:
    """Return the share of the loss on other rows that the fit of several layers explains together."""
    layers = list(layers)
    total = sum(layer.null for layer in layers)
    return sum(layer.explained * layer.null for layer in layers) / total if total > 0 else math.nan


def fit_layer(
    layer: FinalLayer,
    rows: Rows,
    others: Rows | None,
    prior: Tensor,
    loss: str,
    ridge: float | None = None,
    refit: bool = False,
) -> tuple[Tensor, LayerFit]:
    """Fit one layer.

    Args:
        layer (FinalLayer): The layer, which stays as it is.
        rows (Rows): To fit on.
        others (Rows, optional): Rows of other images, which choose the ridge.
        prior (Tensor): ``[V b]₀`` ``(C, d + 1)``, or ``V₀`` ``(C, d)``; see ``RidgeProblem``.
        loss (str): ``binary`` or ``softmax``.
        ridge (float, optional): The ridge. None: ``others`` choose it.
        refit (bool): Whether to fit on ``others``, too, once the ridge is chosen: what is reported of the loss on them
            is of the fit before.

    Returns:
        weight (Tensor): ``[V b]`` as the prior has it, in float64.
        fit (LayerFit): How it was found.
    """
    start, losses, share, null = None, {}, math.nan, math.nan
    if others is not None and len(others):
        path = fit_path(rows, others, prior, loss, None if ridge is None else [ridge])
        start, losses, share = path.best.weight, path.losses, path.explained
        ridge, null = path.best.ridge, path.null * float(others.weights.sum())
        rows = Rows.cat([rows, others]) if refit else rows
    assert ridge is not None
    solution = RidgeProblem(rows, prior, loss).solve(ridge, start)
    found = solution.gap, solution.converged, solution.evaluations
    place = layer.name, layer.kind, layer.level
    shape = rows.targets.shape[1], rows.inputs.shape[1], len(rows)
    return solution.weight, LayerFit(*place, *shape, ridge, losses, share, null, *found)


def judge(layers: Iterable[LayerFit], before: float, after: float, ridge: float | None = None) -> str:
    """Return why a fit is to be refused; empty if it is not.

    Args:
        layers (Iterable[LayerFit]): How it was found.
        before (float): The held-out task loss before it.
        after (float): The same after it.
        ridge (float, optional): The ridge, where it was given and not chosen.
    """
    share = explained(layers)
    if share < LEAST_EXPLAINED:
        told = (
            f"{max(share, 0):.1%} of the loss that the classes' frequencies leave on other images, less than "
            f"{LEAST_EXPLAINED:.0%}"
        )
        if ridge is not None:
            return f"with ridge={ridge:g} the fit explains {told}. Leave out the ridge: it is then found for each layer"
        return f"nothing to fit: the features explain {told}. The layers before the final ones must be pretrained"
    if not after < before and not math.isnan(before):
        return f"the held-out loss does not fall: {before:.5g} before, {after:.5g} after"
    return ""


def fit_model(
    model: nn.Module,
    batches: Iterable[Any],
    heldout: Iterable[Any] = (),
    *,
    layers: Layers | None = None,
    criterion: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    ridge: float | None = None,
) -> FitReport:
    """Fit the final layer of any PyTorch model to labels, in place, from one pass over the batches.

    The layer's outputs must be the model's. The ridge, which pulls towards the layer's present weight, is chosen by the
    loss on the held-out batches, which must also fall, or else the model stays bit-identical. Without them nothing is
    judged, and the ridge must be given. All rows stay in memory: 4 (d + C) bytes each.

    Args:
        model (nn.Module): The model, on one device.
        batches (Iterable): Batches of training data, read once: ``(inputs, targets)`` or mappings with ``labels``.
        heldout (Iterable): Other batches, read once and kept.
        layers (str | nn.Module, optional): The final layer. None: the one that runs last.
        criterion (Callable): Its loss: ``cross_entropy`` or ``binary_cross_entropy_with_logits`` of
            ``torch.nn.functional``, or their modules. Of settings only ``label_smoothing`` and ``reduction`` may differ
            from the defaults.
        forward (Callable, optional): ``forward(model, batch) -> output`` for models that are called otherwise.
        ridge (float, optional): The ridge, on the sum of the loss over rows.

    Returns:
        (FitReport): What happened.

    Raises:
        ValueError: If there is nothing to fit on or no way to choose the ridge, labels are out of range, or the model
            goes on after the layer.
        TypeError: If the criterion is another one, there are several layers, or the layer is not linear.
        RuntimeError: If the layer does not run exactly once in a forward pass.

    Examples:
        >>> report = fit_model(model, fit_batches, heldout_batches)
        >>> print(report)
    """
    loss, smoothing = _loss_of(criterion)
    if ridge is not None:
        number("a number above 0", lambda x: x > 0)("ridge", ridge)
    model, task = original_module(model), ModelTask(criterion, forward)
    device = next(model.parameters(), torch.empty(0)).device
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise ValueError("There is nothing to fit on: no batch.")
    heldout = list(heldout)
    if ridge is None and not heldout:
        raise ValueError("The ridge is chosen on held-out batches. Pass some, or the ridge itself: ridge=…")
    layer = _layer(model, layers, task, to_device(first, device))
    engine = Engine(model, [layer], task)
    rows: list[Rows] = []
    others: list[Rows] = []
    held = engine.hold_out([])

    def rows_of(batch: Any, output: Any, inputs: dict[str, Tensor]) -> Rows:
        _check_output(layer, output, inputs[layer.name])
        return _rows(layer, inputs[layer.name], batch, loss, smoothing)

    def hold_out(batch: Any, output: Any, inputs: dict[str, Tensor]) -> None:
        others.append(rows_of(batch, output, inputs))
        held.add(batch, output, inputs)

    engine.run(_on(device, chain([first], stream)), lambda *seen: rows.append(rows_of(*seen)), "rows")
    engine.run(_on(device, heldout), hold_out, "guard")
    whole, other = Rows.cat(rows), Rows.cat(others) if others else None
    weight, fit = fit_layer(layer, whole, other, affine_matrix(layer.module), loss, ridge)
    engine.watch.lap("solve")
    new = {layer.name: weight.to(layer.module.weight.dtype)}  # type: ignore[arg-type]
    before, after = (held.before, held.loss(new)) if held.images else (math.nan, math.nan)
    engine.watch.lap("guard")
    refusal = judge([fit], before, after, ridge)
    if not refusal:
        write_weight(layer.module, new[layer.name])
        engine.watch.lap("write")
    return FitReport((fit,), before, after, refusal, engine.watch.milliseconds)


def _on(device: torch.device, batches: Iterable[Any]) -> Iterator[Any]:
    return (to_device(batch, device) for batch in batches)


def _loss_of(criterion: Callable[[Any, Any], Tensor]) -> tuple[str, float]:
    """Return which loss a criterion is, and its label smoothing."""
    plain = all(getattr(criterion, name, None) is None for name in ("weight", "pos_weight"))
    plain = plain and getattr(criterion, "ignore_index", IGNORED) == IGNORED
    if plain and (criterion is nn.functional.cross_entropy or type(criterion) is nn.CrossEntropyLoss):
        return "softmax", getattr(criterion, "label_smoothing", 0.0)
    binary = nn.functional.binary_cross_entropy_with_logits
    if plain and (criterion is binary or type(criterion) is nn.BCEWithLogitsLoss):
        return "binary", 0.0
    name = getattr(criterion, "__name__", type(criterion).__name__)
    raise TypeError(
        f"criterion={name} is not one that a layer can be fitted by: it must be cross_entropy or "
        "binary_cross_entropy_with_logits of torch.nn.functional, or their modules, without weights of classes."
    )


def _layer(model: nn.Module, layers: Layers | None, task: ModelTask, batch: Any) -> FinalLayer:
    if layers is None:
        with evaluation(model):
            return last_layer(model, lambda: task.run(model, batch))
    chosen = select_layers(model, layers)
    if len(chosen) > 1:
        names = ", ".join(layer.name for layer in chosen)
        raise TypeError(f"layers={names}: a fit solves the one layer whose outputs are the model's. Name that one.")
    return chosen[0]


def _check_output(layer: FinalLayer, output: Any, x: Tensor) -> None:
    """Raise a ``ValueError`` unless a model's output is what the layer makes of its input."""
    same = isinstance(output, Tensor) and (own := layer.module(x)).shape == output.shape
    if not same or not torch.allclose(own.float(), output.float(), rtol=1e-2, atol=1e-3):
        raise ValueError(
            f"The output of the model is not that of {layer.name}, so labels do not say what the layer should give. "
            "Name the layer that makes the output, or pass a forward that returns it."
        )


def _rows(layer: FinalLayer, x: Tensor, batch: Any, loss: str, smoothing: float) -> Rows:
    """Return the rows of a batch; those whose label is cross-entropy's ignore_index count for nothing."""
    inputs, classes = input_rows(layer.module, x).float(), layer.module.weight.shape[0]  # type: ignore[union-attr, index]
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[-1]
    if not isinstance(labels, Tensor):
        raise TypeError(f"The labels of a batch are a {type(labels).__name__}; they must be a tensor.")
    weights = inputs.new_ones(len(inputs))
    if labels.is_floating_point():
        channels_last = labels.movedim(1, -1) if labels.ndim == 4 else labels  # [B, C, H, W] → [B, H, W, C]
        targets = channels_last.reshape(-1, classes).float()
    else:
        labels = labels.reshape(-1)
        if loss == "binary":
            raise ValueError("The labels of binary_cross_entropy_with_logits must be floats, one per output.")
        weights = (labels != IGNORED).float()
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            raise ValueError(f"Label {int(wrong[0])} is out of range: {layer.name} has the classes 0 to {classes - 1}.")
        targets = nn.functional.one_hot(labels.clamp(0), classes).float()
    if len(targets) != len(inputs):
        raise ValueError(f"A batch has {len(targets)} labels for {len(inputs)} rows of {layer.name}.")
    return Rows(inputs, (1 - smoothing) * targets + smoothing / classes, weights)
