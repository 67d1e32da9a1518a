# yolo-sos, AGPL-3.0
"""The rows that class layers are fitted on: anchor points with the targets that the task's own assigner gives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import Classify

from yolo_sos.core import Engine, FinalLayer, Rows, input_rows
from yolo_sos.yolo.classes import by_branch
from yolo_sos.yolo.heads import CLASS_KINDS, YoloTask, layers_of_kinds

# Background rows of each image and level. On COCO → VOC07 at 320 px (1,600, 400 and 100 anchor points), 300 images, the
# loss on other images is 3 % less than with 25 in all, and within 1 % of that with all of them.
BACKGROUND = 64
MOST = 200_000  # background rows of a layer: of many images, fewer each


class Assignments:
    """Captures what Ultralytics' assigners give to anchor points; a context manager.

    A criterion assigns objects to anchor points by its predicted boxes and class scores. Where ``known`` is given, the
    scores of all other classes are made alike, so that only the overlap of the boxes decides: they say nothing.

    Args:
        task (YoloTask): A detector's; each branch of its head has an assigner of its own.
        known (Iterable[int], optional): Classes whose scores say something. None: all.
    """

    def __init__(self, task: YoloTask, known: Iterable[int] | None = None):
        """Find the assigners."""
        self._layers = by_branch(task.head, task.layers)
        criterion: Any = task.criterion
        self._assigners = {name: getattr(criterion, name, criterion).assigner for name in self._layers}
        self._known = None if known is None else list(known)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._outputs: dict[str, tuple[Tensor, ...]] = {}

    def __enter__(self) -> Assignments:
        """Register the hooks."""
        for branch, assigner in self._assigners.items():
            self._handles.append(assigner.register_forward_hook(partial(self._keep, branch)))
            if self._known is not None:
                self._handles.append(assigner.register_forward_pre_hook(self._alike))
        return self

    def _keep(self, branch: str, _: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        self._outputs[branch] = output

    def _alike(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scores = torch.full_like(args[0], 0.5)
        scores[..., self._known] = args[0][..., self._known]
        return scores, *args[1:]

    def __exit__(self, *exc) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs = {}

    def take(self, inputs: dict[str, Tensor]) -> Iterator[tuple[FinalLayer, Tensor, Tensor]]:
        """Yield what the last batch's anchor points were given, by class layer, and release it.

        Args:
            inputs (dict[str, Tensor]): Layer name → its input, ``(B, d, H, W)``.

        Yields:
            layer (FinalLayer): The class layer.
            targets (Tensor): Soft targets of its anchor points, ``(B, H·W, C)``.
            labels (Tensor): The class of the object that a point is assigned to, −1 for the background, ``(B, H·W)``.
        """
        outputs, self._outputs = self._outputs, {}
        for branch, (labels, _, targets, foreground, *_) in outputs.items():
            layers = self._layers[branch]
            points = [inputs[layer.name].shape[-2:].numel() for layer in layers]
            parts = targets.split(points, 1), torch.where(foreground.bool(), labels.long(), -1).split(points, 1)
            yield from zip(layers, *parts, strict=True)


class ClassRows:
    """Collects rows for the class layers of a model from labelled images.

    Every anchor point that an object is assigned to is kept, and of the others on each level a random share, each
    weighted by how many it stands for. A classifier has one row per image.

    Args:
        task (YoloTask): The task of the model.
        seed (int): Draws the background.
    """

    def __init__(self, task: YoloTask, seed: int):
        """Find the layers."""
        self.task = task
        self.layers = layers_of_kinds(task.layers, CLASS_KINDS)
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
            with Assignments(self.task, known) as assigned:

                def add(batch: Any, output: Any, inputs: dict[str, Tensor]) -> None:
                    self.task.loss(output, batch)  # which asks the assigners
                    for layer, targets, _ in assigned.take(inputs):
                        parts[layer.name].append(self._drawn(layer, inputs[layer.name], targets, background))

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
