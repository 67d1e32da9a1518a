# yolo-sos, AGPL-3.0
"""The door for any PyTorch model: give it a model, batches and a loss, and its final layer is shifted in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from yolo_sos.core.layers import FinalLayer
from yolo_sos.core.shift import Method, ShiftReport, shift_layers
from yolo_sos.core.task import ClassifierTask


def last_linear(model: nn.Module) -> FinalLayer:
    """Return the linear layer of a model that was registered last, which in most models is the final one.

    Not so in models with auxiliary heads (GoogLeNet, DeepLab): name their final layer yourself.

    Args:
        model (nn.Module): Any model.

    Raises:
        TypeError: If the model has neither an ``nn.Linear`` nor an ``nn.Conv2d``.
        ValueError: If the last of them is not linear in each row or pixel, see ``check_linear``.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    if not found:
        raise TypeError(f"{type(model).__name__} has no nn.Linear and no nn.Conv2d: there is no layer to shift.")
    return FinalLayer(*found[-1])


def shift_model(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    heldout: Iterable[Any] = (),
    criterion: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
    layer: nn.Module | None = None,
    method: Method | None = None,
    step: float = 1.0,
    guard: float | None = 0.0,
    seed: int = 0,
) -> ShiftReport:
    """Shift the final layer of a model in place: ``shift_layers`` for a model and a loop of your own.

    Call it at the end of an epoch, or once on a model that is trained out. Batches are ``(inputs, targets)`` on any
    device: the model is called as ``model(inputs)`` and judged by ``criterion(output, targets)``. Integer targets, one
    per row of the final layer, are the classes that ``balanced`` balances; without them its groups are what the softmax
    of the layer says, which for a regression means nothing: use ``Method(weighting="uniform")`` there.

    Args:
        model (nn.Module): The model, on one device.
        batches (Iterable): Batches of training data to fit on, consumed once.
        heldout (Iterable): Other batches, for the guard. May be empty with ``guard=None``.
        criterion (Callable): ``criterion(output, targets) -> scalar``, mean over the batch.
        layer (nn.Module, optional): The final ``nn.Linear`` or 1×1 ``nn.Conv2d``. None: that of ``last_linear``.
        method (Method, optional): How to shift. None: ``Method()``.
        step (float): Largest part of the way that the shift goes, see ``shift_layers``.
        guard (float, optional): Largest relative rise of the held-out loss, see ``shift_layers``.
        seed (int): Seeds the drawing of rows.

    Returns:
        (ShiftReport): What happened to the layer, held-out loss before and after, accepted step, times.

    Raises:
        TypeError: If there is no linear layer.
        ValueError: If ``layer`` is not one of the model's, or not linear; see also ``shift_layers``.

    Examples:
        >>> for epoch in range(epochs):
        ...     train_one_epoch(model)
        ...     report = shift_model(model, fit_batches, heldout=other_batches, method=Method(rank=0.5))
    """
    if layer is None:
        final = last_linear(model)
    else:
        names = {module: name for name, module in model.named_modules()}
        if layer not in names:
            raise ValueError(f"layer={type(layer).__name__}(…) is not a module of this {type(model).__name__}.")
        final = FinalLayer(names[layer], layer)
    device = final.module.weight.device  # type: ignore[union-attr]
    return shift_layers(
        model,
        [final],
        _on_device(batches, device),
        ModelTask(model, [final], criterion),
        heldout=_on_device(heldout, device),
        method=method,
        step=step,
        guard=guard,
        seed=seed,
    )


class ModelTask(ClassifierTask):
    """Any model and any loss: whatever lies between the final layers and the output is run again, not assumed.

    Args:
        model (nn.Module): The model.
        layers (Iterable[FinalLayer]): Its final layers.
        criterion (Callable): ``criterion(output, targets) -> scalar``, mean over the batch.
    """

    def __init__(self, model: nn.Module, layers: Iterable[FinalLayer], criterion: Callable[[Any, Any], Tensor]):
        """Keep what a replay needs."""
        super().__init__(criterion)
        self.model = model
        self.layers = list(layers)

    def forward(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        """Return the output, and the inputs for a replay."""
        return model(batch[0]), batch[0]

    def kept(self, batch: Any, output: tuple[Any, Any]) -> tuple[Any, Any]:  # type: ignore[override]
        """Return the batch, and its inputs once more: the model runs on them again."""
        return batch, output[1]

    def replay(self, rest: Any, outputs: dict[str, Tensor]) -> tuple[Any, Any]:  # type: ignore[override]
        """Run the model again, with other outputs of its final layers."""
        handles = []
        try:
            for layer in self.layers:
                replaced = outputs[layer.name]
                handles.append(layer.module.register_forward_hook(lambda *_, z=replaced: z))  # type: ignore[misc]
            return self.model(rest), rest
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, output: tuple[Any, Any], batch: Any) -> Tensor:
        """Return the criterion."""
        return self.criterion(output[0], batch[1])

    def size(self, batch: Any) -> int:
        """Return the number of samples: the length of the targets."""
        return len(batch[1])


def _on_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    for batch in batches:
        yield _moved(batch, device)


def _moved(value: Any, device: torch.device) -> Any:
    """Return tensors, and tensors in tuples, lists and dictionaries, on the device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return [_moved(item, device) for item in value]
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
