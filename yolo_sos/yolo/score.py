# yolo-sos, AGPL-3.0
"""Ultralytics' validation for many weights of the final layers at once."""

from __future__ import annotations

import time
from contextlib import ExitStack
from copy import copy, deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from ultralytics.utils import LOGGER

from yolo_sos.core import InputCapture, layer_outputs
from yolo_sos.yolo.heads import YoloTask

if TYPE_CHECKING:
    from ultralytics.engine.validator import BaseValidator
else:
    BaseValidator = object  # a mixin: the validator comes from the class that uses it


class ManyWeights(BaseValidator):
    """Lets one of Ultralytics' validators score other weights of the final layers beside the model's own.

    The model runs once per batch, by Ultralytics' own code. For each set of weights only the final layers are evaluated
    again, on their captured inputs; Ultralytics decodes, postprocesses and counts. No batch stays in memory.

    Attributes:
        weights (list[dict[str, Tensor]]): The sets, layer name → ``(out, d)``.
        results (list[dict[str, float]]): Ultralytics' metrics for each set.
        seconds (float): Time spent on the sets, beside that of a plain validation.
    """

    weights: list[dict[str, Tensor]]
    results: list[dict[str, float]]
    seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Validate as Ultralytics does, and remove the hooks at the end."""
        with ExitStack() as self._stack:
            return super().__call__(*args, **kwargs)

    def init_metrics(self, model: nn.Module) -> None:
        """Set up as Ultralytics does, and one counter of its kind per set of weights."""
        super().init_metrics(model)
        native = model.model if getattr(model, "format", None) == "pt" else model  # inside Ultralytics' backend
        # No loss is asked for, and a fused model has none.
        self._task = YoloTask(native, criterion=_no_loss)  # type: ignore[arg-type]
        self._capture = self._stack.enter_context(InputCapture(self._task.layers))
        self._counters = [self._counter() for _ in self.weights]

    def _counter(self) -> ManyWeights:
        """Return a copy that counts for itself."""
        counter = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list):  # what validators collect, empty at this point
                setattr(counter, name, list(value))
        counter.metrics, counter.confusion_matrix = deepcopy(self.metrics), deepcopy(self.confusion_matrix)
        return counter

    def preprocess(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Preprocess as Ultralytics does, which warms the model up before the first batch."""
        self._capture.clear()
        return super().preprocess(batch)

    def postprocess(self, preds: Any) -> Any:
        """Keep what the model returned, and go on as Ultralytics does."""
        self._output = preds
        return super().postprocess(preds)

    def update_metrics(self, preds: Any, batch: dict[str, Any]) -> None:
        """Count as Ultralytics does, then once more for each set of weights."""
        super().update_metrics(preds, batch)
        start = time.perf_counter()
        inputs = self._capture.take()
        for counter, weights in zip(self._counters, self.weights, strict=True):
            raw = self._task.replay(self._output[1], layer_outputs(self._task.layers, weights, inputs))
            counter._output = output = self._task.decode(self._output, raw)
            super(ManyWeights, counter).update_metrics(super().postprocess(output), batch)
        self.seconds += time.perf_counter() - start

    def get_stats(self) -> dict[str, Any]:
        """Return Ultralytics' metrics of the model's own weights; those of the sets are in ``results``."""
        start = time.perf_counter()
        self.results = [dict(super(ManyWeights, counter).get_stats()) for counter in self._counters]
        self.seconds += time.perf_counter() - start
        return super().get_stats()


def run_many(
    mixins: tuple[type, ...], validator: type[Any], args: dict[str, Any], model: nn.Module, **attributes: Any
) -> tuple[Any, dict[str, float]]:
    """Validate a model by one of Ultralytics' validators with mixins; return the validator and the model's metrics.

    Args:
        mixins (tuple[type, ...]): ``ManyWeights``, and what is to come between it and the validator.
        validator (type): Ultralytics' validator for the task.
        args (dict): Its arguments.
        model (nn.Module): The model, which stays as it is.
        **attributes (Any): Attributes for the mixins, such as ``weights``.
    """
    with TemporaryDirectory() as folder:  # Ultralytics makes a folder for plots, which are not made
        many = type(f"Many{validator.__name__}", (*mixins, validator), {})(args=args, save_dir=Path(folder))
        vars(many).update(attributes)
        return many, dict(many(model=model))


def class_scores(
    validator: type[Any], args: dict[str, Any], model: nn.Module
) -> tuple[dict[str, float], dict[int, float]]:
    """Validate a model as Ultralytics does.

    Args:
        validator (type): Ultralytics' validator for the task.
        args (dict): Its arguments.
        model (nn.Module): The model, which stays as it is.

    Returns:
        metrics (dict[str, float]): Ultralytics' metrics; empty if the split shows no object, where they would all be 0.
        scores (dict[int, float]): AP50-95 of each class that the split shows, of masks or keypoints where the model has
            them; of a classifier the share of its images that it gets right.
    """
    run, metrics = run_many((), validator, args, model)
    if args["task"] == "classify":
        right, targets = (torch.cat(run.pred)[:, 0] == torch.cat(run.targets)), torch.cat(run.targets)
        return metrics, {int(c): float(right[targets == c].float().mean()) for c in targets.unique()}
    found = next(of for name in ("pose", "seg", "box") if (of := getattr(run.metrics, name, None)) is not None)
    scores = {int(c): float(found.maps[c]) for c in found.ap_class_index}
    if not scores:
        LOGGER.warning(f"{args['data']}: no image of the {args['split']} split has an object, so it is not scored.")
    return metrics if scores else {}, scores


def headline(metrics: dict[str, float]) -> str:
    """Return the key of the metric that sums the others up: the task's mAP50-95, or top-1 accuracy."""
    return [k for k in metrics if "mAP50-95" in k or "top1" in k][-1]


def _no_loss(*_: Any) -> Any:
    raise NotImplementedError
