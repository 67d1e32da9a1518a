# yolo-sos, AGPL-3.0
"""The inputs of chosen layers while a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from yolo_sos.core.layers import FinalLayer


class InputCapture:
    """Forward pre-hooks that keep the inputs of chosen layers; a context manager.

    The hooks are removed on leaving, however that happens. Inputs are kept as the layer receives them (``nn.Linear``
    ``(..., d)``, ``nn.Conv2d`` ``(B, d, H, W)``), detached, neither copied nor moved.

    Args:
        layers (Sequence[FinalLayer]): The layers to watch.

    Attributes:
        inputs (dict[str, Tensor]): Layer name → input of its latest call. Empty again after ``clear()``.

    Examples:
        >>> with InputCapture(final_layers(model)) as capture:
        ...     model(images)
        ...     rows = input_rows(layer.module, capture.inputs[layer.name])
    """

    def __init__(self, layers: Sequence[FinalLayer]):
        """Remember the layers; hooks come with ``__enter__``."""
        self.layers = layers
        self.inputs: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def _keep(self, name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        self.inputs[name] = (args[0] if args else kwargs["input"]).detach()

    def __enter__(self) -> InputCapture:
        """Register one hook per layer."""
        for layer in self.layers:
            hook = partial(self._keep, layer.name)
            self._handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exc) -> None:
        """Remove every hook and let the inputs go."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Let the captured inputs go."""
        self.inputs = {}

    def take(self) -> dict[str, Tensor]:
        """Return the inputs of the latest forward pass and forget them.

        Raises:
            RuntimeError: If a layer did not run: its name is not a final layer of this forward pass.
        """
        missing = [layer.name for layer in self.layers if layer.name not in self.inputs]
        if missing:
            raise RuntimeError(f"The forward pass did not reach {', '.join(missing)}: not a layer of this output.")
        inputs, self.inputs = self.inputs, {}
        return inputs
