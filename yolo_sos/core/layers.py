# yolo-sos, AGPL-3.0
"""Linear layers as matrices: ``Z = A Vᵀ + b`` for ``nn.Linear`` and 1×1 ``nn.Conv2d``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FinalLayer:
    """A final linear layer of a model.

    Attributes:
        name (str): Qualified name in the model, as in ``named_modules()``.
        module (nn.Module): The ``nn.Linear`` or 1×1 ``nn.Conv2d``.
        kind (str): What its outputs mean: ``box``, ``cls``, ``mask``, ``kpt``, ``angle`` or ``linear``.
        scale (int): Detection level, 0 for the finest. Always 0 for ``linear``.
        classifier (str): Name of the layer whose outputs say which class a row of this layer's input holds: the class
            layer of the same level and branch, or the layer itself.
    """

    name: str
    module: nn.Module
    kind: str = "linear"
    scale: int = 0
    classifier: str = ""

    def __post_init__(self):
        """Refuse what is not a linear map of rows, and let a layer without a classifier be its own."""
        check_linear(self.module, self.name)
        if not self.classifier:
            object.__setattr__(self, "classifier", self.name)


def check_linear(module: nn.Module, name: str = "layer") -> None:
    """Raise a ``TypeError`` or ``ValueError`` that names the layer unless it maps rows linearly.

    Args:
        module (nn.Module): ``nn.Linear`` or 1×1 ``nn.Conv2d`` of any stride and bias, with groups = 1 and no padding.
        name (str): What the error calls it.
    """
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        raise TypeError(f"{name} is a {type(module).__name__}; a final layer is an nn.Linear or a 1×1 nn.Conv2d.")
    if "weight" not in module._parameters:
        raise ValueError(
            f"{name} computes its weight from other parameters (weight norm, pruning): what is written to it is lost."
        )
    if isinstance(module, nn.Linear):
        return
    if module.groups != 1:
        raise ValueError(
            f"{name} has groups={module.groups}: each group is a linear map of its own. Only groups=1 is supported."
        )
    if module.kernel_size != (1, 1):
        raise ValueError(
            f"{name} has kernel_size={module.kernel_size}; only 1×1 convolutions are linear in each pixel."
        )
    if module.padding not in {(0, 0), "valid", "same"}:
        raise ValueError(f"{name} has padding={module.padding}: padded pixels would be rows of zeros. Use padding=0.")


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's input as the matrix A.

    Args:
        module (nn.Module): The layer that receives ``x``.
        x (Tensor): ``nn.Linear``: ``(..., d)``. 1×1 ``nn.Conv2d``: ``(B, d, H, W)`` or unbatched ``(d, H, W)``.

    Returns:
        (Tensor): ``(n, d)`` in ``x``'s dtype. Linear: n is the product of the leading dimensions. Convolution with
            stride ``(s, t)``: ``n = B · ceil(H / s) · ceil(W / t)``, one row per output pixel, images outermost.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    assert isinstance(module, nn.Conv2d)
    if x.ndim == 3:
        x = x.unsqueeze(0)
    s, t = module.stride
    return x[:, :, ::s, ::t].permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # [B, d, H, W] → [B, H, W, d] → [B·H·W, d]


def weight_matrix(module: nn.Module) -> Tensor:
    """Return the weight V as ``(out, d)``: a view of the layer's own parameter, detached from autograd."""
    weight: Tensor = module.weight.detach()  # type: ignore[assignment, operator]
    return weight.flatten(1)  # Linear (out, d) → itself; Conv2d (out, d, 1, 1) → (out, d)


def output_rows(module: nn.Module, rows: Tensor) -> Tensor:
    """Return ``A Vᵀ + b`` as ``(n, out)`` for ``rows`` A ``(n, d)``."""
    bias = module.bias
    weight = weight_matrix(module)
    return torch.nn.functional.linear(rows.to(weight.dtype), weight, None if bias is None else bias.detach())  # type: ignore[operator]


def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Copy ``weight`` ``(out, d)`` into the layer, in place: optimizers, EMA and DDP keep their references."""
    with torch.no_grad():
        module.weight.copy_(weight.view_as(module.weight))  # type: ignore[operator, union-attr]
