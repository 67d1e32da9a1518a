# yolo-sos, AGPL-3.0
"""The task loss on held-out batches, as a function of the weights of the final layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from yolo_sos.core.capture import evaluation
from yolo_sos.core.layers import FinalLayer, affine_matrix, layer_output, weight_matrix, write_weight
from yolo_sos.core.tasks import Task

FAITHFUL = 1e-3  # relative difference of a replayed loss from the model's own: far above rounding, far below a mistake


class HeldOut:
    """The task loss on held-out batches as a function of the final layers' weights.

    Each batch runs through the model once, which gives the loss as it is. For other weights, where the task can replay
    its outputs, only the final layers and what follows them are evaluated, on their captured inputs; otherwise the
    model runs again, with these weights written temporarily.

    Attributes:
        images (int): Number of images.
    """

    def __init__(self, model: nn.Module, task: Task, layers: Sequence[FinalLayer]):
        """Start empty; ``layers`` are all that the task needs for ``replay``."""
        self.model, self.task, self.layers = model, task, layers
        self.images = 0
        self._total = 0.0  # of the losses of the images
        self._batches: list[tuple[Any, Any, dict[str, Tensor] | None]] = []  # batch, state, inputs; None: run again

    def add(self, batch: Any, output: Any, inputs: dict[str, Tensor]) -> None:
        """Add a batch; keep of it what another loss needs.

        Raises:
            RuntimeError: If the outputs that the final layers give on their inputs do not give the model's loss.
        """
        size = self.task.size(batch)
        if size == 0:  # the mean over no image is not a number
            return
        loss = float(self.task.loss(output, batch))
        self.images += size
        self._total += size * loss
        state = self.task.replay_state(batch, output)
        self._batches.append((batch, None, None) if state is None else (*state, inputs))
        if state is not None and len(self._batches) == 1:
            del batch, output
            again = self._loss({}, *self._batches[0])
            if math.isfinite(loss) and not abs(again - loss) <= FAITHFUL * abs(loss) + 1e-6:
                raise RuntimeError(
                    f"The final layers give a loss of {again:.6g} on their captured inputs, the model {loss:.6g}: what "
                    "follows them cannot be replayed, so no shift of this model can be judged."
                )

    @property
    def before(self) -> float:
        """The mean loss per image of the model as it ran; nan without images."""
        return self._total / self.images if self.images else math.nan

    def allows(self, loss: float, guard: float | None) -> bool:
        """Tell whether a loss is at most ``guard`` above the one before, relative; without a guard every loss is.

        A loss of NaN is not, before or after, and to an infinite one before there is no relative rise.
        """
        return guard is None or (math.isfinite(self.before) and loss <= self.before + guard * abs(self.before))

    @property
    def inputs(self) -> Iterator[dict[str, Tensor]]:
        """The captured inputs of each batch, where outputs are replayed."""
        return (inputs for _, _, inputs in self._batches if inputs is not None)

    def loss(self, weights: dict[str, Tensor]) -> float:
        """Return the mean loss per image with ``weights``, as ``write_weight`` takes them; other layers keep theirs."""
        with evaluation(self.model):
            total = sum(self.task.size(batch) * self._loss(weights, batch, *rest) for batch, *rest in self._batches)
        return total / self.images if self.images else math.nan

    def _loss(self, weights: dict[str, Tensor], batch: Any, state: Any, inputs: dict[str, Tensor] | None) -> float:
        # No names for what is large: it would stay in memory while the loss, which takes the most, is computed.
        if inputs is None:
            with temporary_weights(self.layers, weights):
                return float(self.task.loss(self.task.run(self.model, batch), batch))
        return float(self.task.loss(self.task.replay(state, layer_outputs(self.layers, weights, inputs)), batch))


def layer_outputs(
    layers: Sequence[FinalLayer], weights: dict[str, Tensor], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return what the layers make of their ``inputs`` with ``weights``, as ``write_weight`` takes them, by layer name.

    Layers without a weight there keep theirs; the layers themselves stay as they are.
    """
    return {
        layer.name: layer_output(layer, weights.get(layer.name, weight_matrix(layer.module)), inputs[layer.name])
        for layer in layers
    }


@contextmanager
def temporary_weights(layers: Sequence[FinalLayer], weights: dict[str, Tensor]) -> Iterator[None]:
    """Write weights by layer name, as ``write_weight`` takes them; restore the layers' own, bit for bit, on leaving."""
    before = [(layer, affine_matrix(layer.module)) for layer in layers if layer.name in weights]
    try:
        for layer, _ in before:
            write_weight(layer.module, weights[layer.name])
        yield
    finally:
        for layer, own in before:
            write_weight(layer.module, own)
