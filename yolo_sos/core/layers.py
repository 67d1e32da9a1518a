# yolo-sos, AGPL-3.0
"""Linear layers as matrices: ``Z = A Vᵀ + b`` for ``nn.Linear`` and 1×1 ``nn.Conv2d``; and which ones to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FinalLayer:
    """A final linear layer of a model.

    Attributes:
        name (str): Qualified name in the model, as in ``named_modules()``.
        module (nn.Module): The ``nn.Linear`` or 1×1 ``nn.Conv2d``.
        kind (str): What its outputs mean: ``box``, ``cls``, ``mask``, ``kpt``, ``angle`` or ``linear``.
        level (int): Detection level, 0 for the finest. Always 0 for ``linear``.
        classifier (str): Name of the layer whose outputs give the class of a row of this layer's input: the class layer
            of the same level and branch, or the layer itself.
    """

    name: str
    module: nn.Module
    kind: str = "linear"
    level: int = 0
    classifier: str = ""

    def __post_init__(self):
        """Refuse what is not a linear map of rows; a layer without a classifier is its own."""
        check_linear(self.module, self.name)
        if not self.classifier:
            object.__setattr__(self, "classifier", self.name)


Layers: TypeAlias = str | nn.Module | FinalLayer | Sequence[str | nn.Module | FinalLayer]


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
            f"{name} computes its weight from other parameters (weight norm, pruning): a new weight would be lost."
        )
    base = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
    if type(module).forward is not base.forward:
        raise TypeError(
            f"{name} is a {type(module).__name__}, which does not compute its outputs as nn.{base.__name__} does "
            "(adapters, fake quantization): it is not known to be linear in its weight."
        )
    if not module.weight.is_floating_point():
        raise TypeError(f"{name} has a weight of {module.weight.dtype}: a quantized layer cannot be shifted.")
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


def check_unshared(model: nn.Module, layers: Sequence[FinalLayer]) -> None:
    """Raise a ``ValueError`` that names a layer whose weight another module holds, too.

    Writing such a weight changes the layer's own inputs (a language model whose head is its embedding), so no loss that
    was predicted for it would be true.
    """
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.numel():  # compared by memory: `.data` can be shared, too
                owners.setdefault(parameter.data_ptr(), []).append(f"{prefix}.{name}" if prefix else name)
    for layer in layers:
        own = f"{layer.name}.weight" if layer.name else "weight"
        others = [name for name in owners.get(layer.module.weight.data_ptr(), []) if name != own]  # type: ignore[operator, union-attr]
        if others:
            raise ValueError(
                f"{own} is shared with {', '.join(others)}: a shift would change the layer's own inputs. Untie the "
                "weights, or choose other layers."
            )


def select_layers(model: nn.Module, layers: Layers) -> list[FinalLayer]:
    """Return the final layers of a model that are named by ``layers``.

    Args:
        model (nn.Module): The model.
        layers (str | nn.Module | FinalLayer | Sequence): A module of the model, its qualified name, a glob of names
            (``head.*``), a ``FinalLayer``, or several of these. Of what a glob matches, only ``nn.Linear`` and
            ``nn.Conv2d`` are taken.

    Raises:
        ValueError: If something names no layer of the model, or a layer is not linear; names it.
        TypeError: If a named module is not a linear layer, or ``layers`` is of another type.
    """
    items = [layers] if isinstance(layers, (str, nn.Module, FinalLayer)) else layers
    if not isinstance(items, Sequence) or not all(isinstance(item, (str, nn.Module, FinalLayer)) for item in items):
        raise TypeError(f"layers={layers!r} is invalid: layers must be modules, names or globs of names.")
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    found: dict[str, FinalLayer] = {}
    for item in items:
        if isinstance(item, FinalLayer):
            found[item.name] = item
            continue
        if isinstance(item, nn.Module):
            if item not in names:
                raise ValueError(f"{type(item).__name__}(…) is not a module of this {type(model).__name__}.")
            matches = [names[item]]
        elif item in modules:
            matches = [item]
        else:
            matches = [
                name
                for name, module in modules.items()
                if fnmatchcase(name, item) and isinstance(module, (nn.Linear, nn.Conv2d))
            ]
        if not matches:
            linear = [name for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))]
            raise ValueError(
                f"layers='{item}' names no nn.Linear or nn.Conv2d of this {type(model).__name__}. Its last ones: "
                f"{', '.join(linear[-5:]) or 'none'}."
            )
        for module in (getattr(modules[name], "_orig_mod", modules[name]) for name in matches):  # of torch.compile
            found[names[module]] = FinalLayer(names[module], module)
    if not found:
        raise ValueError("layers is empty: there is no layer to shift.")
    return list(found.values())


def last_layer(model: nn.Module, run: Callable[[], Any]) -> FinalLayer:
    """Return the layer that runs last in a forward pass, if it is an ``nn.Linear`` or a 1×1 ``nn.Conv2d``.

    Args:
        model (nn.Module): The model.
        run (Callable): Runs the model on a batch.

    Raises:
        TypeError: If what runs last is another module with weights, quantized, or an adapter; asks for ``layers``.
        ValueError: If it is not linear in each row or pixel.
    """
    order: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: order.append(name))  # type: ignore[misc]
        for name, module in model.named_modules()
        if "quantized" in type(module).__module__
        # A module that has others returns after they do, whatever it uses its own parameters for.
        or (set(module._modules) <= {"parametrizations"} and next(module.parameters(), None) is not None)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise TypeError(f"{type(model).__name__} runs no module with weights: there is no layer to shift.")
    name = order[-1]
    module = model.get_submodule(name)
    parent = model.get_submodule(name.rpartition(".")[0])  # an adapter's parts run in any order
    adapter = any(part.startswith("lora_") for part in (*name.split("."), *parent._modules, *parent._parameters))
    if adapter or not isinstance(module, (nn.Linear, nn.Conv2d)):
        what = "part of an adapter" if adapter else f"a {type(module).__module__}.{type(module).__name__}"
        raise TypeError(
            f"The last layer that {type(model).__name__} runs is '{name}', {what}, which cannot be shifted. Name the "
            "final nn.Linear or 1×1 nn.Conv2d: layers='…'."
        )
    return FinalLayer(name, module)


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


def affine_matrix(module: nn.Module) -> Tensor:
    """Return ``[V b]`` as ``(out, d + 1)``, a copy; V alone, ``(out, d)``, where the layer has no bias."""
    weight, bias = weight_matrix(module), module.bias
    return weight.clone() if bias is None else torch.cat([weight, bias.detach()[:, None]], 1)  # type: ignore[operator, index]


def _parameters(module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
    """Return a layer's parameters by name, from V ``(out, d)`` alone, or from ``[V b]`` ``(out, d + 1)``."""
    d = weight_matrix(module).shape[1]
    parameters = {"weight": weight[:, :d].reshape(module.weight.shape)}  # type: ignore[arg-type, operator, union-attr]
    return parameters if weight.shape[1] == d else {**parameters, "bias": weight[:, d]}


def layer_output(layer: FinalLayer, weight: Tensor, x: Tensor) -> Tensor:
    """Return what a layer makes of its input ``x`` with another weight; the layer stays as it is.

    Args:
        layer (FinalLayer): The layer.
        weight (Tensor): V ``(out, d)``, or ``[V b]`` ``(out, d + 1)`` for another bias, too.
        x (Tensor): Its input.
    """
    x = x.to(weight.dtype)  # a model that ran under autocast captures less than float32
    return torch.func.functional_call(layer.module, _parameters(layer.module, weight), x)


def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Copy V ``(out, d)``, or ``[V b]`` ``(out, d + 1)``, into a layer in place: optimizers keep their tensors."""
    with torch.no_grad():
        for name, value in _parameters(module, weight).items():
            getattr(module, name).copy_(value)


def write_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Write weights into a model's layers by their names, each as ``write_weight`` does."""
    for name, weight in weights.items():
        write_weight(model.get_submodule(name), weight)
