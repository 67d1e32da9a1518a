# yolo-sos, AGPL-3.0
"""Measure a training every few epochs: curvature before the final layers, and neural collapse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any

from torch import nn
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from yolo_sos.analyze import curves
from yolo_sos.analyze.collapse import MEASURES, Collapse, collect, mean_measures
from yolo_sos.analyze.hessian import Subject, traces
from yolo_sos.analyze.report import digits
from yolo_sos.core import Engine
from yolo_sos.yolo.heads import CLASS_KINDS, YoloTask, final_layers, head_of, layers_of_kinds
from yolo_sos.yolo.images import ImageSample, preserve_rng
from yolo_sos.yolo.memory import with_fewer
from yolo_sos.yolo.training import PREFIX, TrainerExtension

PROBES = 8
CURVATURE = 8  # images
FEATURES = 64  # images


def log_line(measured: dict[str, float]) -> str:
    """Return one line that tells what was measured."""
    traces = [
        f"{title} {digits(measured[key], 4)} ± {digits(measured[f'{key}_stderr'], 2)}"
        for key, title in (("trace", "Hessian trace"), ("gauss_newton", "Gauss-Newton trace"))
    ]
    return ", ".join([*traces, *(f"{name} {digits(measured[name], 3)}" for name in MEASURES)])


def measure(
    model: nn.Module, batches: Callable[[int], Iterable[Any]], *, probes: int = PROBES, seed: int = 0
) -> dict[str, float]:
    """Measure an Ultralytics model: traces before the final layers, and NC1 to NC4 as the mean over class layers.

    Args:
        model (nn.Module): The model; a copy is measured.
        batches (Callable): ``batches(n)`` returns preprocessed batches of the same first n training images each time.
        probes (int): For the traces.
        seed (int): Of the probes.

    Returns:
        (dict[str, float]): By the names of ``curves.COLUMNS``.
    """
    copied = deepcopy(model).float()
    # A validation leaves anchor points there, made in inference mode, which cannot be part of a graph.
    head_of(copied).shape = None  # type: ignore[assignment]
    task = YoloTask(copied)
    subject = Subject("model", copied, task, task.layers)

    def curvature(images: int):
        return traces([subject], list(batches(images)), ["before"], probes=probes, seed=seed)[0]["before"]

    found = with_fewer(CURVATURE, curvature, "images for the curvature")[0].estimates()
    collapses = [Collapse(layer, seed) for layer in layers_of_kinds(task.layers, CLASS_KINDS)]

    def add(batch: Any, output: Any, inputs: dict[str, Any]) -> None:
        collect(collapses, task, output, inputs, batch)

    Engine(copied, task.layers, task).run(batches(FEATURES), add)
    return {
        "trace": found["hessian"].estimate,
        "trace_stderr": found["hessian"].stderr,
        "gauss_newton": found["gauss_newton"].estimate,
        "gauss_newton_stderr": found["gauss_newton"].stderr,
        **mean_measures(collapses),
    }


class Watching(TrainerExtension):
    """Adds ``sos_analyze`` to a trainer: measures the EMA, which is what is validated and saved."""

    _watch_columns = curves.columns()

    def __init__(self, *args: Any, **kwargs: Any):
        """Refuse an interval that is longer than the run."""
        super().__init__(*args, **kwargs)
        every = self.sos.sos_analyze
        if every is not None and every > self.args.epochs:
            raise ValueError(f"sos_analyze={every} is more than epochs={self.args.epochs}: nothing would be measured.")

    def _setup_train(self) -> None:
        """Set up as Ultralytics does; a model without final layers raises here."""
        super()._setup_train()
        if self.sos.sos_analyze is not None and RANK in {-1, 0}:
            final_layers(unwrap_model(self.model))
            self._watched: dict[int, ImageSample] = {}

    def run_callbacks(self, event: str) -> None:
        """Measure at the end of every ``sos_analyze``-th epoch, ahead of the callbacks."""
        if event == "on_train_epoch_end" and self.sos.sos_analyze is not None:
            due = (self.epoch + 1) % self.sos.sos_analyze == 0
            measured: dict[str, float] = {}
            if due and RANK in {-1, 0}:  # other ranks wait for rank 0 at validation
                with preserve_rng():
                    measured = measure(self.ema.ema, self._watched_batches, seed=self.args.seed)
                LOGGER.info(PREFIX + log_line(measured))
            self._watch_columns = curves.columns(measured)
        super().run_callbacks(event)

    def _watched_batches(self, images: int) -> Iterator[dict[str, Any]]:
        """Yield the batches that are measured: of the same images in every epoch."""
        if images not in self._watched:
            available = len(self.train_loader.dataset)
            self._watched[images] = self.sample_images({"fit": min(images, available)}, self.args.seed)
        return self._watched[images].batches("fit")

    def extra_columns(self) -> dict[str, float]:
        """Add the columns of the last measurement."""
        return {**super().extra_columns(), **(self._watch_columns if self.sos.sos_analyze is not None else {})}

    def plot_metrics(self) -> None:
        """Plot as Ultralytics does, and the curves of what was measured."""
        super().plot_metrics()
        if self.sos.sos_analyze is not None:
            curves.plot(self.csv, self.save_dir / "analyze.png", self.on_plot)
