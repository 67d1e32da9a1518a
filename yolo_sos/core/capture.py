# yolo-sos, AGPL-3.0
"""Run a model as it was written, in evaluation mode, and capture the inputs of chosen layers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from yolo_sos.core.layers import FinalLayer


class InputCapture:
    """Forward pre-hooks that capture the inputs of chosen layers; a context manager.

    The hooks are removed on leaving, whatever happens. Inputs are captured as the layer receives them (``nn.Linear``
    ``(..., d)``, ``nn.Conv2d`` ``(B, d, H, W)``), detached, neither copied nor moved.

    Args:
        layers (Sequence[FinalLayer]): The layers to watch.

    Examples:
        >>> with InputCapture(layers) as capture:
        ...     model(images)
        ...     inputs = capture.take()  # layer name → input
    """

    def __init__(self, layers: Sequence[FinalLayer]):
        """Remember the layers; hooks are registered by ``__enter__``."""
        self.layers = layers
        self._inputs: dict[str, list[Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def _append(self, name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        self._inputs.setdefault(name, []).append((args[0] if args else kwargs["input"]).detach())

    def __enter__(self) -> InputCapture:
        """Register one hook per layer."""
        for layer in self.layers:
            hook = partial(self._append, layer.name)
            self._handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exc) -> None:
        """Remove every hook and release the inputs."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Release what was captured."""
        self._inputs = {}

    def take(self) -> dict[str, Tensor]:
        """Return the inputs of the last forward pass, by layer name, and release them.

        Raises:
            RuntimeError: If a layer did not run exactly once: its outputs could not be replayed. Names the layer.
        """
        inputs, self._inputs = self._inputs, {}
        for layer in self.layers:
            if (runs := len(inputs.get(layer.name, []))) != 1:
                hint = (
                    "it is not a layer of this output, or it runs inside code compiled by torch.compile: use the "
                    "module that was compiled"
                    if runs == 0
                    else "its calls cannot be told apart: only layers that run once can be shifted"
                )
                raise RuntimeError(f"Layer '{layer.name}' ran {runs} times in one forward pass, not once: {hint}.")
        return {name: calls[0] for name, calls in inputs.items()}


def original_module(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wrapped, or the model itself; hooks do not fire in compiled code."""
    return getattr(model, "_orig_mod", model)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients and without compiled code.

    Every module's own train or eval mode is restored, whatever happens.

    Raises:
        TypeError: If parts of the model are compiled and this torch cannot run them as they were written.
    """
    modes = [(module, module.training) for module in model.modules()]
    eager: AbstractContextManager = nullcontext()
    if "torch._dynamo" in sys.modules:  # else nothing has been compiled, and importing it takes seconds
        if hasattr(torch.compiler, "set_stance"):
            eager = torch.compiler.set_stance("force_eager")
        elif any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in model.modules()):
            raise TypeError(
                "Parts of the model are compiled by torch.compile, where inputs cannot be captured. Use the module "
                "that was compiled, or torch 2.6 or newer."
            )
    try:
        model.eval()
        with torch.no_grad(), eager:
            yield
    finally:
        for module, mode in modes:
            module.training = mode  # not train(), which would unfreeze frozen BatchNorm layers below
