# yolo-sos, AGPL-3.0
"""What a shift must know of a task: how to run a batch, what the rows hold, and what the loss is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from yolo_sos.core.layers import FinalLayer


class Task(Protocol):
    """The interface between ``shift_layers`` and a kind of model; ``ClassifierTask`` is the plain one."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Return the model's output for a batch."""

    def probabilities(self, layer: FinalLayer, logits: Tensor, batch: Any) -> Tensor:
        """Return class probabilities ``(n, C)`` of the rows, from the outputs ``(n, C)`` of their class layer.

        It may write over those.
        """

    def kept(self, batch: Any, output: Any) -> tuple[Any, Any]:
        """Return what ``loss`` and ``size`` need of a batch, and the rest of an output: what ``replay`` needs of it."""

    def replay(self, rest: Any, outputs: dict[str, Tensor]) -> Any:
        """Return the output of which this is the rest, if the final layers return ``outputs`` (name → Tensor)."""

    def loss(self, output: Any, batch: Any) -> Tensor:
        """Return the task loss of an output, a scalar: the mean over the batch's images."""

    def size(self, batch: Any) -> int:
        """Return the number of images in a batch."""


class ClassifierTask:
    """A plain PyTorch classifier: batches ``(inputs, labels)``, and a final layer whose output is the model's.

    Args:
        criterion (Callable): ``criterion(outputs (B, C), labels (B,)) -> scalar``, mean over the batch.
    """

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor] = torch.nn.functional.cross_entropy):
        """Keep the criterion."""
        self.criterion = criterion

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return ``model(inputs)``."""
        return model(batch[0])

    def probabilities(self, layer: FinalLayer, logits: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the labels as one-hot rows: what is known is better than what is predicted.

        Labels outside 0 … C−1, such as cross-entropy's ignore_index, give rows of zeros, which no weighting counts.
        Where there is not one integer label per row (regression, soft labels), or a single output, what the layer
        predicts stands in.
        """
        labels, (n, c) = batch[1], logits.shape
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.numel() != n or c == 1:
            return logits.softmax(1)
        classes = torch.arange(c, device=labels.device)
        return (labels.reshape(-1, 1) == classes).to(logits)

    def kept(self, batch: tuple[Tensor, Tensor], output: Tensor) -> tuple[tuple[Tensor, Tensor], None]:
        """Return the batch, and None: the final layer makes all of the output."""
        return batch, None

    def replay(self, rest: Any, outputs: dict[str, Tensor]) -> Tensor:
        """Return the final layer's output, which is the model's."""
        (only,) = outputs.values()
        return only

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the criterion."""
        return self.criterion(output, batch[1])

    def size(self, batch: tuple[Tensor, Tensor]) -> int:
        """Return B."""
        return len(batch[0])
