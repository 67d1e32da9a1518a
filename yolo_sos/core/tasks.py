# yolo-sos, AGPL-3.0
"""What a shift must know of a task: how to run a batch, what the rows hold, and what the loss is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from yolo_sos.core.layers import FinalLayer


class Task(Protocol):
    """The interface between the engine and a kind of model; ``ModelTask`` is the general one.

    Attributes:
        layers (Sequence[FinalLayer]): The layers whose inputs are needed beside those of the layers that are shifted.
    """

    layers: Sequence[FinalLayer]

    def run(self, model: nn.Module, batch: Any) -> Any:
        """Return the model's output for a batch, as ``loss`` takes it."""

    def loss(self, output: Any, batch: Any) -> Tensor:
        """Return the task loss of an output, a scalar: the mean over the batch's images."""

    def size(self, batch: Any) -> int:
        """Return the number of images in a batch."""

    def probabilities(self, layer: FinalLayer, logits: Tensor, batch: Any) -> Tensor:
        """Return class probabilities ``(n, C)`` of the rows, from the outputs ``(n, C)`` of their class layer.

        It may write over those.
        """

    def replay_state(self, batch: Any, output: Any) -> tuple[Any, Any] | None:
        """Return what ``loss`` needs of a batch and what ``replay`` needs of an output.

        None: outputs cannot be replayed; other weights are judged by running the model with them.
        """

    def replay(self, state: Any, outputs: dict[str, Tensor]) -> Any:
        """Return the output that the model would have returned, had its final layers returned ``outputs``."""


class ModelTask:
    """Any PyTorch model with any loss.

    A batch is a sequence whose last item is the targets, ``(inputs, targets)``, or a mapping with the targets as
    ``labels``. By default the model is called as ``model(inputs)`` or ``model(**batch)``.

    Args:
        criterion (Callable): ``criterion(output, targets) -> scalar``, the mean over the batch.
        forward (Callable, optional): ``forward(model, batch) -> output``, for models that are called otherwise.
    """

    layers: Sequence[FinalLayer] = ()

    def __init__(
        self,
        criterion: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ):
        """Keep the functions."""
        self.criterion = criterion
        self.forward = forward

    def run(self, model: nn.Module, batch: Any) -> Any:
        """Return the model's output.

        Raises:
            TypeError: If the batch is not of a known form and no ``forward`` was given.
        """
        if self.forward is not None:
            return self.forward(model, batch)
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, Sequence) and len(batch) == 2:
            return model(batch[0])
        raise TypeError(
            f"A batch is a {type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, Sequence) else ''}; "
            "expected (inputs, targets) or a mapping. Pass forward=lambda model, batch: … for other models."
        )

    def loss(self, output: Any, batch: Any) -> Tensor:
        """Return the criterion.

        Raises:
            ValueError: If it is no scalar.
            TypeError: If the output or the targets are none that the default criterion takes.
        """
        targets = _targets(batch)
        if self.criterion is nn.functional.cross_entropy and not (
            isinstance(output, Tensor) and isinstance(targets, Tensor)
        ):
            raise TypeError(
                f"The model returned a {type(output).__name__} and the targets are a {type(targets).__name__}; "
                "cross_entropy, the default criterion, takes two tensors. Pass criterion=lambda output, targets: …"
            )
        loss = self.criterion(output, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"criterion returned {shape}; it must return a scalar tensor, the mean over the batch "
                "(reduction='mean')."
            )
        return loss

    def size(self, batch: Any) -> int:
        """Return the number of samples: the length of the targets, or else of the inputs.

        Raises:
            TypeError: If the batch holds no tensor.
        """
        size = _length(_targets(batch))
        size = _length(batch) if size is None else size
        if size is None:
            raise TypeError(f"A batch is a {type(batch).__name__} without a tensor: its size is not known.")
        return size

    def probabilities(self, layer: FinalLayer, logits: Tensor, batch: Any) -> Tensor:
        """Return the labels as one-hot rows: what is known is better than what is predicted.

        Labels outside 0 … C−1, such as cross-entropy's ignore_index, give rows of zeros, which no weighting counts.
        Where there is not one integer label per row (regression, soft labels), or a single output, what the layer
        predicts is taken instead.
        """
        labels, (n, c) = _targets(batch), logits.shape
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.numel() != n or c == 1:
            return logits.softmax(1)
        classes = torch.arange(c, device=labels.device)
        return (labels.reshape(-1, 1) == classes).to(logits)

    def replay_state(self, batch: Any, output: Any) -> None:
        """Return None: what lies between the final layers and the output is not known."""

    def replay(self, state: Any, outputs: dict[str, Tensor]) -> Any:
        """Not possible, see ``replay_state``."""
        raise NotImplementedError


def _targets(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[-1] if isinstance(batch, Sequence) and len(batch) > 1 else None


def _length(value: Any) -> int | None:
    """Return the length of the first tensor in a nested value; None if there is none."""
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    if isinstance(value, Tensor):
        return len(value) if value.ndim else None
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, Sequence) or isinstance(value, str):
        return None
    return next((n for n in map(_length, value) if n is not None), None)


def to_device(value: Any, device: torch.device) -> Any:
    """Return a nested value of the same types with its tensors on the device; what holds no tensor as it is."""
    if isinstance(value, Tensor) or (hasattr(value, "to") and not isinstance(value, nn.Module)):
        return value.to(device)  # PackedSequence and the batches of other libraries, too
    if isinstance(value, Mapping):
        moved = {key: to_device(item, device) for key, item in value.items()}
        if type(value) is dict:
            return moved
        other = copy(value)
        for key, item in moved.items():
            other[key] = item  # type: ignore[index]
        return other
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value)
    return value
