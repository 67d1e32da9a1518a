# yolo-sos, AGPL-3.0
"""The rows that class layers are fitted on: anchor points with the targets that the task's own assigner gives them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import Classify

from yolo_sos.core import Engine, FinalLayer, Rows, input_rows
from yolo_sos.yolo.classes import class_layers
from yolo_sos.yolo.heads import YoloTask

# Background rows of each image and level. On COCO → VOC07 at 320 px (1,600, 400 and 100 anchor points), 300 images, the
# loss on other images is 3 % less than with 25 in all, and within 1 % of that with all of them.
BACKGROUND = 64
MOST = 200_000  # background rows of a layer: of many images, fewer each


class Assignments:
    """Captures the targets that Ultralytics' assigners give to anchor points; a context manager.

    A criterion assigns objects to anchor points by its predicted boxes and class scores. Here the scores of classes
    that are yet to be fitted are all alike, so that only the overlap of the boxes decides: they say nothing.

    Args:
        criterion (Callable): Ultralytics' criterion of a model.
        branches (Iterable[str]): The branches of its head, each with an assigner of its own where there are several.
        known (Iterable[int]): Classes whose scores say something.
    """

    def __init__(self, criterion: Any, branches: Iterable[str], known: Iterable[int]):
        """Find the assigners."""
        self._known = list(known)
        self._assigners: dict[str, nn.Module] = {b: getattr(criterion, b, criterion).assigner for b in branches}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._targets: dict[str, Tensor] = {}

    def __enter__(self) -> Assignments:
        """Register the hooks."""
        for branch, assigner in self._assigners.items():

            def alike(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                scores = torch.full_like(args[0], 0.5)
                scores[..., self._known] = args[0][..., self._known]
                return scores, *args[1:]

            def keep(_: nn.Module, args: Any, output: tuple[Tensor, ...], branch: str = branch) -> None:
                self._targets[branch] = output[2]  # soft class targets, (B, anchor points, C)

            self._handles += [assigner.register_forward_pre_hook(alike), assigner.register_forward_hook(keep)]
        return self

    def __exit__(self, *exc) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._targets = {}

    def take(self) -> dict[str, Tensor]:
        """Return the targets of the last batch, by branch, and release them."""
        targets, self._targets = self._targets, {}
        return targets


class ClassRows:
    """Collects rows for the class layers of a model from labelled images.

    Every anchor point that an object is assigned to is kept, and of the others on each level a random share, each
    weighted by how many it stands for. A classifier has one row per image.

    Args:
        model (nn.Module): The model.
        task (YoloTask): Its task.
        seed (int): Draws the background.
    """

    def __init__(self, model: nn.Module, task: YoloTask, seed: int):
        """Find the layers."""
        self.task = task
        self.branches = class_layers(model)
        self.layers = [layer for of in self.branches.values() for layer in of]
        self.loss = "softmax" if isinstance(task.head, Classify) else "binary"
        self._generator = torch.Generator().manual_seed(seed)

    def collect(
        self, engine: Engine, batches: Iterable[Any], images: int, known: Iterable[int] = ()
    ) -> dict[str, Rows]:
        """Run batches and return the rows of each class layer by its name.

        Args:
            engine (Engine): Runs the model.
            batches (Iterable): Ultralytics' batches, preprocessed.
            images (int): How many images they hold, at most.
            known (Iterable[int]): Classes whose scores take part in assigning objects to anchor points.
        """
        parts: dict[str, list[Rows]] = {layer.name: [] for layer in self.layers}
        background = max(1, min(BACKGROUND, MOST // max(images, 1)))
        if self.loss == "softmax":
            (layer,) = self.layers

            def add(batch: Any, output: Any, inputs: dict[str, Tensor]) -> None:
                rows = input_rows(layer.module, inputs[layer.name]).float()
                targets = nn.functional.one_hot(batch["cls"].long().view(-1), layer.module.weight.shape[0]).float()  # type: ignore[union-attr, index]
                parts[layer.name].append(Rows(rows, targets, rows.new_ones(len(rows))))

            engine.run(batches, add, "rows")
        else:
            with Assignments(self.task.criterion, self.branches, known) as assigned:

                def add(batch: Any, output: Any, inputs: dict[str, Tensor]) -> None:
                    self.task.loss(output, batch)  # which asks the assigners
                    for branch, targets in assigned.take().items():
                        layers = self.branches[branch]
                        points = [inputs[layer.name].shape[-2:].numel() for layer in layers]
                        for layer, of in zip(layers, targets.split(points, 1), strict=True):
                            parts[layer.name].append(self._drawn(layer, inputs[layer.name], of, background))

                engine.run(batches, add, "rows")
        return {name: Rows.cat(of) for name, of in parts.items()}

    def _drawn(self, layer: FinalLayer, x: Tensor, targets: Tensor, background: int) -> Rows:
        """Return the foreground rows of a level, and background rows with the weight of all.

        Args:
            layer (FinalLayer): The class layer.
            x (Tensor): Its input, ``(B, d, H, W)``.
            targets (Tensor): ``(B, H·W, C)``.
            background (int): How many to draw for each image.
        """
        flat = targets.flatten(0, 1).float()
        foreground = flat.amax(1) > 0
        others = (~foreground).nonzero()[:, 0]
        count = min(len(others), background * len(targets))
        drawn = others[torch.randperm(len(others), generator=self._generator)[:count].to(others.device)]
        index = torch.cat([foreground.nonzero()[:, 0], drawn])
        weights = flat.new_ones(len(index))
        if count:
            weights[-count:] = len(others) / count
        return Rows(input_rows(layer.module, x)[index].float(), flat[index], weights)
