# yolo-sos, AGPL-3.0
"""The class layers of an Ultralytics model for other classes: which rows are known by name, and where others start."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import Classify

from yolo_sos.core import FinalLayer, affine_matrix, write_weight
from yolo_sos.yolo.heads import branches_of, final_layers, head_of, last_of


def class_layers(model: nn.Module) -> dict[str, list[FinalLayer]]:
    """Return the layers that score the classes, by branch of the head: one per level, from the finest on.

    Raises:
        TypeError: If the head has no such layers.
    """
    return by_branch(head_of(model), final_layers(model))


def by_branch(head: nn.Module, layers: Iterable[FinalLayer]) -> dict[str, list[FinalLayer]]:
    """Return those of a head's final ``layers`` that score the classes, see ``class_layers``."""
    of_module = {layer.module: layer for layer in layers}
    if isinstance(head, Classify):
        return {"": list(of_module.values())}
    branches = branches_of(head)  # type: ignore[arg-type]
    return {name: [of_module[last_of(tower)] for tower in branch["cls_head"]] for name, branch in branches.items()}


def in_order(model: nn.Module) -> list[FinalLayer]:
    """Return the layers of ``class_layers``, one branch after the other."""
    return [layer for of in class_layers(model).values() for layer in of]


def known_classes(names: dict[int, str], source: dict[int, str]) -> dict[int, int]:
    """Return which class of ``source`` each class of ``names`` is, where the names are the same but for case.

    Names that only repeat their numbers say nothing, unless they are the same ones.
    """
    if names == source:
        return {k: k for k in names}
    if any(all(str(k) == str(v) for k, v in of.items()) for of in (names, source)):
        return {}
    place = {str(v).strip().lower(): k for k, v in source.items()}
    found = {k: place.get(str(v).strip().lower()) for k, v in names.items()}
    return {k: v for k, v in found.items() if v is not None}


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return names of classes for a message: the first few in quotes, and how many others there are."""
    more = [f"{len(names) - most} more"] * (len(names) > most)
    return ", ".join([*map(repr, names[:most]), *more])


def resized(source: nn.Module, names: dict[int, str], seed: int) -> nn.Module:
    """Return a copy of a model for other classes, as Ultralytics would start to train it.

    The towers stay, whatever width Ultralytics' YAML gives them for the number of classes. In the class layers, rows of
    classes that ``source`` knows by name are its own; others are random, with Ultralytics' bias.

    Args:
        source (nn.Module): The model.
        names (dict[int, str]): The classes.
        seed (int): Of the random rows.
    """
    model, classes = deepcopy(source), len(names)
    known = known_classes(names, source.names)  # type: ignore[arg-type]
    modules = [layer.module for layer in in_order(model)]
    head: Any = head_of(model)
    if (semantic := getattr(getattr(head, "proto", None), "semseg", None)) is not None:
        modules.append(semantic[-1])  # of YOLO26's segmentation: scores the classes of pixels, in training
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for old in modules:
            _replace(model, old, _with_rows(old, classes, known))
    if not isinstance(head, Classify):
        head.nc, head.no = classes, head.no - head.nc + classes
        for layer, bias in zip(in_order(model), _biases(model), strict=True):
            new = [k for k in names if k not in known]
            layer.module.bias.data[new] = bias  # type: ignore[union-attr, operator]
    model.names, model.yaml["nc"] = dict(names), classes  # type: ignore[assignment, index, operator]
    if hasattr(model, "nc"):
        model.nc = classes  # type: ignore[assignment]
    return model


def priors(model: nn.Module, known: dict[int, int]) -> dict[str, Tensor]:
    """Return what a ridge pulls each class layer to, by name: ``[V b]₀`` ``(C, d + 1)`` in float64.

    That is its present row where a class is known, and zero with the bias of an untrained head otherwise: the random
    rows that Ultralytics starts with say nothing.
    """
    found = {}
    biases = [0.0] if isinstance(head_of(model), Classify) else _biases(model)
    for layer, bias in zip(in_order(model), biases, strict=True):
        own = affine_matrix(layer.module).double()
        prior = torch.zeros_like(own)
        prior[:, -1] = bias
        rows = list(known)
        prior[rows] = own[rows]
        found[layer.name] = prior
    return found


def take_over(model: nn.Module, source: nn.Module, known: dict[int, int], seed: int) -> None:
    """Give a model the class towers and known rows of a pretrained one, where Ultralytics has not.

    Releases before 8.4.190 lose towers whose width depends on the number of classes, and know no classes by name.

    Args:
        model (nn.Module): The model, as Ultralytics has built and loaded it.
        source (nn.Module): The pretrained one.
        known (dict[int, int]): Class → the source's, see ``known_classes``.
        seed (int): Of rows that are to be random.
    """
    head, theirs = head_of(model), head_of(source)
    if type(head) is not type(theirs) or isinstance(head, Classify):
        return
    pairs = list(zip(in_order(model), in_order(source), strict=True))
    if any(a.module.in_channels != b.module.in_channels for a, b in pairs):
        if [of[0].conv.in_channels for of in head.cv2] != [of[0].conv.in_channels for of in theirs.cv2]:  # type: ignore[union-attr, operator]
            return  # of another size
        like: Any = head_of(resized(source, {k: str(k) for k in range(head.nc)}, seed))  # type: ignore[arg-type]
        for name in ("cv3", "one2one_cv3"):
            if getattr(head, name, None) is not None:
                setattr(head, name, getattr(like, name).float().requires_grad_(True))
        pairs = list(zip(in_order(model), in_order(source), strict=True))
    for ours, other in pairs:
        own, rows = affine_matrix(ours.module), affine_matrix(other.module)
        own[list(known)] = rows[list(known.values())].to(own)
        write_weight(ours.module, own)


def append_classes(source: nn.Module, fitted: nn.Module) -> nn.Module:
    """Return a copy of a model with the classes of another one after its own, whose rows stay bit-identical."""
    old, new = source.names, fitted.names
    names = dict(enumerate([*old.values(), *new.values()]))  # type: ignore[union-attr, operator, arg-type]
    model = resized(source, names, seed=0)
    for layer, *parts in zip(*map(in_order, (model, source, fitted)), strict=True):
        write_weight(layer.module, torch.cat([affine_matrix(part.module) for part in parts]))
    return model


def _biases(model: nn.Module) -> list[float]:
    """Return the bias of each class layer of an untrained head, as Ultralytics' ``bias_init`` has it."""
    head: Any = head_of(model)
    return [math.log(5 / head.nc / (640 / float(head.stride[layer.level])) ** 2) for layer in in_order(model)]


def _with_rows(old: Any, classes: int, known: dict[int, int]) -> nn.Module:
    """Return a layer like ``old`` for other classes: known rows copied, others random."""
    bias = old.bias is not None
    if isinstance(old, nn.Linear):
        new: Any = nn.Linear(old.in_features, classes, bias)
    else:
        new = nn.Conv2d(old.in_channels, classes, 1, bias=bias)
    with torch.no_grad():
        for name in ("weight", "bias") if bias else ("weight",):
            getattr(new, name)[list(known)] = getattr(old, name).cpu().float()[list(known.values())]
    new.requires_grad_(old.weight.requires_grad)
    return new.to(old.weight.device, old.weight.dtype).train(old.training)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, module in model.named_modules() if module is old)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)
