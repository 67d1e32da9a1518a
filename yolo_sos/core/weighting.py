# yolo-sos, AGPL-3.0
"""Whose outputs matter: the group and the weight of each row.

Each group of rows counts as much as any other:

- ``uniform``: one group, every row alike.
- ``confidence``: one group; class layers ``Σ_c p_c(1−p_c)`` (undecided rows), other layers ``max_c p_c`` (rows with
  an object in them).
- ``balanced``: a group per class; a row belongs to its most probable class c with weight ``p_c``. For the class layers
  of a detector also one of all rows, the background.

For the second moment that means ``G = Σ_g (Σᵢ∈g wᵢ aᵢᵀaᵢ) / (Σᵢ∈g wᵢ)``; drawn rows are divided evenly among groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from yolo_sos.core.layers import FinalLayer, input_rows, output_rows
from yolo_sos.core.method import WEIGHTINGS
from yolo_sos.core.tasks import Task


def row_groups(weighting: str, kind: str, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return the group of each row, and its weight in it.

    Args:
        weighting (str): ``balanced``, ``confidence`` or ``uniform``.
        kind (str): Kind of the layer that the rows are inputs of, see ``FinalLayer.kind``.
        probabilities (Tensor): ``(n, C)`` class probabilities of the rows, in [0, 1]; labels as one-hot rows.

    Returns:
        groups (Tensor): ``(n,)`` int64, below C for ``balanced``, else 0.
        weights (Tensor): ``(n,)``, non-negative, dtype of ``probabilities``.

    Raises:
        ValueError: If ``weighting`` is unknown.
    """
    p = probabilities
    if weighting == "balanced":
        weights, groups = p.max(1)
        return groups, weights
    groups = torch.zeros(len(p), dtype=torch.long, device=p.device)
    if weighting == "uniform":
        return groups, torch.ones_like(p[:, 0])
    if weighting == "confidence":
        return groups, (p * (1 - p)).sum(1) if kind in {"cls", "linear"} else p.amax(1)
    raise ValueError(f"weighting='{weighting}' is unknown. Choose one of {', '.join(WEIGHTINGS)}.")


def has_background(weighting: str, kind: str) -> bool:
    """Return whether all rows together are one more group. A classifier has none: each row belongs to a class."""
    return weighting == "balanced" and kind == "cls"


class LayerRows:
    """The input rows of the final layers in one batch, and the class probabilities of each.

    Args:
        task (Task): Tells the class probabilities of a row from the outputs of its class layer.
        layers (list[FinalLayer]): All final layers, the class layers among them.
        inputs (dict[str, Tensor]): Layer name → its input.
        batch (Any): The batch that they are of.
    """

    def __init__(self, task: Task, layers: list[FinalLayer], inputs: dict[str, Tensor], batch: Any):
        """Keep the inputs; everything is computed when first asked for."""
        self._task, self._inputs, self._batch = task, inputs, batch
        self._layers = {layer.name: layer for layer in layers}
        self._rows: dict[str, Tensor] = {}
        self._probabilities: dict[str, Tensor] = {}
        self._groups: dict[tuple[str, str, bool | str], tuple[Tensor, Tensor]] = {}

    def of(self, layer: FinalLayer) -> Tensor:
        """Return a layer's input rows, ``(n, d)``."""
        if layer.name not in self._rows:
            self._rows[layer.name] = input_rows(layer.module, self._inputs[layer.name])
        return self._rows[layer.name]

    def groups(self, layer: FinalLayer, weighting: str) -> tuple[Tensor, Tensor]:
        """Return the group and the weight of each of a layer's rows, see ``row_groups``."""
        key = layer.classifier, weighting, weighting == "confidence" and layer.kind
        if key not in self._groups:
            # A label has no uncertainty; how decided a row is, only the prediction tells.
            predicted = weighting == "confidence" and layer.kind == "linear"
            p = self._logits(layer).softmax(1) if predicted else self.probabilities(layer)
            self._groups[key] = row_groups(weighting, layer.kind, p)
        return self._groups[key]

    def classes(self, layer: FinalLayer) -> int:
        """Return the number of classes C of a layer's rows."""
        return len(self._layers[layer.classifier].module.weight)  # type: ignore[arg-type]

    def probabilities(self, layer: FinalLayer) -> Tensor:
        """Return the class probabilities of a layer's rows, ``(n, C)``."""
        if layer.classifier not in self._probabilities:
            classifier = self._layers[layer.classifier]
            logits = self._logits(classifier)
            self._probabilities[layer.classifier] = self._task.probabilities(classifier, logits, self._batch)
        return self._probabilities[layer.classifier]

    def _logits(self, layer: FinalLayer) -> Tensor:
        return output_rows(layer.module, self.of(layer))
