# yolo-sos, AGPL-3.0
"""Fit the class layers of an Ultralytics model to labelled images, and judge the fit on others."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.utils import TQDM

from yolo_sos.core import (
    ROUGH,
    Engine,
    FitReport,
    RidgeProblem,
    Rows,
    affine_matrix,
    fit_layer,
    judge,
    temporary_weights,
)
from yolo_sos.yolo.class_rows import ClassRows
from yolo_sos.yolo.classes import priors
from yolo_sos.yolo.heads import YoloTask
from yolo_sos.yolo.images import HELD_OUT, ImageSample, counted

IMAGES = 300  # to fit on by default, a fourth of them to choose the ridge first
PER_CLASS = 10  # images at least, of many classes
FIRST = 4  # a part of the images to fit on gives the first weights, which then have a say in the assignment
STRONG = 30  # of them the ridge is the strongest of a path by this: that is where paths have their least loss
LEAST = 5  # images of each class among those to fit on, where there are as many


def default_images(classes: int) -> int:
    """Return how many images to fit on by default."""
    return max(IMAGES, PER_CLASS * classes)


def fit_sizes(available: int, images: int | None) -> dict[str, int]:
    """Return how many images to fit on, to choose the ridge on, and to hold out for the guard.

    Args:
        available (int): Images in the training set.
        images (int, optional): Images asked for to fit on, those that choose the ridge among them. None: all that are
            left.

    Returns:
        (dict[str, int]): Sizes of disjoint sets: ``fit``, three fourths; ``selection``, the rest, which is fitted on,
            too, once the ridge is chosen; ``heldout``, at most ``HELD_OUT`` and a fifth of the training set.

    Raises:
        ValueError: If there are too few images.
    """
    if available < 3:
        raise ValueError(
            f"A fit needs at least 3 training images, to fit on, to choose the ridge on and to judge it on; there "
            f"{'is' if available == 1 else 'are'} {available}."
        )
    heldout = min(HELD_OUT, max(1, available // 5))
    images = max(2, min(images or available, available - heldout))
    selection = max(1, images // 4)
    return {"fit": images - selection, "selection": selection, "heldout": heldout}


@dataclass(frozen=True)
class ClassFit:
    """The fit of a model's class layers; nothing is written yet.

    Attributes:
        weights (dict[str, Tensor]): Layer name → ``[V b]`` ``(C, d + 1)``, in the layer's dtype.
        report (FitReport): How they were found. Its ``refusal`` says why they should not be written.
        shown (list[float]): The sum of each class's targets over all rows and layers. A class with less than 1 is not
            fitted.
    """

    weights: dict[str, Tensor]
    report: FitReport
    shown: list[float]

    @property
    def unfitted(self) -> list[str]:
        """The layers whose rows show no class: there, unknown classes are given low scores."""
        return [name for name in self.weights if name not in {layer.name for layer in self.report.layers}]


def fit_classes(
    model: nn.Module, images: ImageSample, known: dict[int, int], ridge: float | None, seed: int, progress: bool = False
) -> ClassFit:
    """Fit the class layers of a model.

    Args:
        model (nn.Module): The model, which stays as it is.
        images (ImageSample): Images in sets as ``fit_sizes`` has them.
        known (dict[int, int]): The classes whose present rows are worth something, see ``priors``; the others are
            fitted from zero.
        ridge (float, optional): The ridge. None: chosen for each layer.
        seed (int): Draws the background rows.
        progress (bool): Whether to show a bar.
    """
    task = YoloTask(model)
    rows = ClassRows(task, seed)
    engine = Engine(model, rows.layers, task)
    starts = priors(model, known)
    total = sum(len(images.sets[name]) for name in ("fit", "selection"))
    some = math.ceil(total / FIRST)
    with TQDM(total=total + some, desc="fit images", unit="img", disable=not progress) as bar:
        scores, scored = _first(rows, engine, counted(images.batches("fit", some), bar), some, known, starts)
        with temporary_weights(rows.layers, scores):
            fit, selection = (
                rows.collect(engine, counted(images.batches(name), bar), total, scored) for name in ("fit", "selection")
            )
    engine.watch.lap("rows")
    weights, layers = {}, []
    shown = torch.zeros(len(model.names))  # type: ignore[arg-type]
    for layer in rows.layers:
        parts = fit[layer.name], selection[layer.name]
        targets = sum(_target_sums(part) for part in parts)
        shown += targets
        weight = starts[layer.name].clone()
        mass = sum(float(part.weights.sum()) for part in parts)
        weight[[c for c in range(len(weight)) if c not in known], -1] = -math.log(2 * mass)  # as of half a row
        for classes in _groups(targets, known) if rows.loss == "binary" else [list(range(len(targets)))]:
            of = [Rows(part.inputs, part.targets[:, classes], part.weights) for part in parts]
            weight[classes], told = fit_layer(layer, *of, starts[layer.name][classes], rows.loss, ridge, refit=True)
            layers.append(told)
        # As checkpoints hold it: separable rows, as random towers give them, ask for more than half precision can hold.
        weights[layer.name] = weight.half().to(layer.module.weight.dtype)  # type: ignore[arg-type]
    engine.watch.lap("solve")
    heldout = engine.hold_out(images.batches("heldout"))
    before, after = heldout.before, heldout.loss(weights)
    engine.watch.lap("guard")
    if not layers:
        refusal = "nothing to fit: the boxes that the model predicts do not meet the objects, so no row shows a class"
    elif not math.isfinite(before):
        refusal = f"the held-out loss of the model as it is, {before}, is not a number that can fall"
    else:
        refusal = judge(layers, before, after, ridge)  # an infinite or undefined loss after the fit does not fall
    report = FitReport(tuple(layers), before, after, refusal, engine.watch.milliseconds)
    return ClassFit(weights, report, shown.tolist())


def _first(
    rows: ClassRows,
    engine: Engine,
    batches: Iterable[Any],
    images: int,
    known: dict[int, int],
    starts: dict[str, Tensor],
) -> tuple[dict[str, Tensor], list[int]]:
    """Return first weights of the class layers, from few images, and the classes whose scores they can tell.

    Training assigns an object to the anchor points where its box and its class are predicted best; before anything is
    fitted, only the box can decide.
    """
    if rows.loss == "softmax":
        return {}, []
    parts = rows.collect(engine, batches, images, known)
    weights, scored = {}, set(known)
    for layer in rows.layers:
        part, weight = parts[layer.name], affine_matrix(layer.module)
        for classes in _groups(_target_sums(part), known):
            if not known.keys() & set(classes):
                problem = RidgeProblem(
                    replace(part, targets=part.targets[:, classes]), starts[layer.name][classes], "binary"
                )
                weight[classes] = problem.solve(problem.strongest_ridge() / STRONG, tolerance=ROUGH).weight.to(weight)
                scored |= set(classes)
        weights[layer.name] = weight
    return weights, sorted(scored)


def _groups(targets: Tensor, known: dict[int, int]) -> list[list[int]]:
    """Return the classes that a level shows, known and unknown ones apart: they need ridges of their own.

    The classes of a detector have nothing to do with each other. Those that a level does not show are left out.
    """
    shown = [c for c, total in enumerate(targets.tolist()) if total >= 1]
    groups = [c for c in shown if c in known], [c for c in shown if c not in known]
    return [group for group in groups if group]


def _target_sums(rows: Rows) -> Tensor:
    """Return the sum of the targets of each class, ``(C,)``: how many objects' worth of rows show it."""
    return rows.targets.sum(0).cpu()
