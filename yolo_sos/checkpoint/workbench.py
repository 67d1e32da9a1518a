# yolo-sos, AGPL-3.0
"""A checkpoint with its data, its captured features, and the shifts that they allow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils.torch_utils import select_device

from yolo_sos.checkpoint.file import Checkpoint
from yolo_sos.checkpoint.images import Images
from yolo_sos.checkpoint.score import score
from yolo_sos.core import FinalLayer, Gram, InputCapture, Method, ShiftResult
from yolo_sos.core.gram import as_float64
from yolo_sos.core.layers import input_rows, weight_matrix
from yolo_sos.core.shift import Collector, HeldOut, Stopwatch, evaluation, guarded_step, run_batches, stepped
from yolo_sos.core.solver import OK
from yolo_sos.heads import HostTask, final_layers, select_layers


@dataclass(frozen=True)
class Candidate:
    """The shift of all chosen layers by one method.

    Attributes:
        method (Method): How.
        seed (int): Seed of drawn rows.
        results (dict[str, ShiftResult]): Layer name → its shift.
        milliseconds (dict[str, float]): Layer name → time to solve.
    """

    method: Method
    seed: int
    results: dict[str, ShiftResult]
    milliseconds: dict[str, float]

    @property
    def solved(self) -> bool:
        """Whether no layer failed."""
        return all(r.status == OK for r in self.results.values())

    def summary(self) -> dict[str, float]:
        """Return figures of the full step over all layers: norm ratio (of squares), mean rank, mean deviation."""
        results = self.results.values()
        before = sum(r.norm_before**2 for r in results)
        return {
            "norm_ratio": sum(r.norm_after**2 for r in results) / before if before else 1.0,
            "mean_rank": sum(r.rank for r in results) / len(results),
            "deviation_fit": sum(r.deviation for r in results) / len(results),
        }


class Workbench:
    """A checkpoint and its data, ready to be shifted. What is wrong with the data shows on construction.

    Args:
        checkpoint (Checkpoint): The checkpoint.
        data (str | Path, optional): The data set. None: the one that the model was trained on.
        kinds (Iterable[str]): Kinds of final layers to shift; those that the model lacks are ignored.
        images (int, optional): Training images to fit on. None: all but those held out.
        imgsz (int, optional): Size of the images. None: that of the training.
        batch (int, optional): Images in a batch. None: that of the training.
        device (str | int, optional): As the host names devices.
        seed (int): Chooses the images.
        splits (tuple[str, ...]): Splits that ``score`` will be asked for.

    Attributes:
        checkpoint (Checkpoint): The checkpoint.
        images (Images): The data.
        shifted (list[FinalLayer]): The layers that are shifted.
        heldout (HeldOut): The held-out images and the inputs of their final layers; filled by ``capture``.
        watch (Stopwatch): Time by phase.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: str | Path | None = None,
        *,
        kinds: Iterable[str],
        images: int | None = None,
        imgsz: int | None = None,
        batch: int | None = None,
        device: str | int | None = None,
        seed: int = 0,
        splits: tuple[str, ...] = (),
    ):
        """Read and check the data."""
        self.checkpoint = checkpoint
        self.shifted = select_layers(self.checkpoint.layers, kinds)
        self.device = select_device("" if device is None else device, verbose=False)
        self.images = Images(
            self.checkpoint,
            data,
            images=images,
            imgsz=imgsz,
            batch=batch,
            device=self.device,
            seed=seed,
            splits=splits,
        )
        self.model = self.checkpoint.model.to(self.device)
        self.task = HostTask(self.model)
        self.heldout = HeldOut(self.task, self.checkpoint.layers)
        self.watch = Stopwatch(self.device)
        self._moments: dict[str, Gram] = {}
        self._verified_on: list[dict[str, Any]] = []  # the held-out batches, whole: what is written runs on them again

    def capture(self, trials: Sequence[tuple[Method, int]]) -> Collector:
        """Run the images through the model, each once, and keep what the methods need of them.

        Of the images to fit on only sums and drawn rows stay. Those held out stay, and what their final layers get.

        Args:
            trials (Sequence[tuple[Method, int]]): Methods that ``solve`` will be asked for, each with its seed.
        """
        layers = self.checkpoint.layers
        collector = Collector(self.task, layers, self.shifted, trials)

        def hold(batch: dict[str, Any], output: Any, inputs: dict[str, Tensor]) -> None:
            self._verified_on.append(batch)
            self.heldout.add(batch, output, inputs)

        with evaluation(self.model), InputCapture(layers) as capture:
            for split, phase, add in (("fit", "rows", collector.add), ("heldout", "guard", hold)):
                run_batches(self.model, self.images.batches(split), self.task, capture, self.watch, phase, add)
            for layer in self.shifted:
                self._moments[layer.name] = Gram(weight_matrix(layer.module).shape[1])
                for _, _, inputs in self.heldout.batches:
                    self._moments[layer.name].update(input_rows(layer.module, inputs[layer.name]))
            self.watch.lap("rows")
        return collector

    def solve(self, collector: Collector, method: Method, seed: int) -> Candidate:
        """Return the shift of all layers by one method."""
        results, milliseconds = {}, {}
        self.watch.lap("solve")
        for layer in self.shifted:
            start = self.watch.milliseconds["solve"]
            results[layer.name] = collector.solve(layer, method, seed)
            self.watch.lap("solve")
            milliseconds[layer.name] = self.watch.milliseconds["solve"] - start
        return Candidate(method, seed, results, milliseconds)

    def weights(self, candidate: Candidate, step: float = 1.0) -> dict[str, Tensor]:
        """Return the weights at a step along the shift, before they are rounded."""
        return {layer.name: stepped(layer, candidate.results[layer.name], step) for layer in self.shifted}

    def loss(self, weights: dict[str, Tensor]) -> float:
        """Return the held-out loss per image."""
        with evaluation(self.model):
            return self.heldout.loss(weights)

    def guard(self, candidate: Candidate, guard: float | None) -> tuple[float, float, float]:
        """Return the accepted step and the held-out loss before and after it; without a guard a full step."""
        with evaluation(self.model):
            if guard is not None:
                return guarded_step(self.shifted, candidate.results, self.heldout, guard)
            step = float(candidate.solved)
            return step, self.heldout.before, self.heldout.loss(self.weights(candidate, step))

    def deviations(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """Return ``‖A(V*−V)ᵀ‖_F / ‖AVᵀ‖_F`` of each layer on all rows of the held-out images."""
        deviations = {}
        for layer in self.shifted:
            g = self._moments[layer.name].matrix
            v = as_float64(weight_matrix(layer.module)).to(g.device)
            change = as_float64(weights[layer.name]).to(g.device) - v
            size, moved = (float((x @ g * x).sum()) for x in (v, change))
            deviations[layer.name] = (max(moved, 0.0) / size) ** 0.5 if size > 0 else 0.0
        return deviations

    def score(
        self, weights: Sequence[dict[str, Tensor]], split: str = "val"
    ) -> tuple[list[dict[str, float]], dict[str, float]]:
        """Return the host's metrics on a split, of the model as it is and with each set of weights, and the time spent.

        Weights are rounded to half precision first, as a checkpoint holds them.
        """
        args = {**self.images.args, "split": split, "rect": True}  # rect as 'yolo val' has it
        rounded = [{name: w.half().to(w.dtype) for name, w in one.items()} for one in weights]
        return score(self.checkpoint.validator, args, self.model, rounded)

    def rounding(self, path: Path, weights: dict[str, Tensor]) -> tuple[dict[str, float], float]:
        """Read a written checkpoint back, as the host does, and return what rounding did to the held-out outputs.

        Args:
            path (Path): The written file.
            weights (dict[str, Tensor]): The weights before they were rounded.

        Returns:
            deviations (dict[str, float]): Layer name → relative change of its outputs against those of ``weights`` and
                of the model before it was rounded.
            loss (float): The held-out loss per image of the file itself.

        Raises:
            ValueError: If the file's outputs are not finite.
        """
        model, _ = load_checkpoint(path, device=self.device)
        layers, task = final_layers(model), HostTask(model, self.task.criterion)
        changed, size = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)
        saved = {layer.name: layer for layer in layers}
        total, images = 0.0, 0
        with evaluation(model), InputCapture(layers) as capture:
            for batch, (_, _, inputs) in zip(self._verified_on, self.heldout.batches, strict=True):
                output = task.forward(model, batch)
                new = capture.take()
                total += task.size(batch) * float(task.loss(output, batch))
                images += task.size(batch)
                for layer in self.shifted:
                    exact = _outputs(layer, inputs[layer.name], weights[layer.name])
                    module = saved[layer.name].module
                    off = _outputs(saved[layer.name], new[layer.name], weight_matrix(module)) - exact
                    changed[layer.name] += float(off.square().sum())
                    size[layer.name] += float(exact.square().sum())
        deviations = {name: (changed[name] / size[name]) ** 0.5 if size[name] else 0.0 for name in weights}
        if not all(d < float("inf") for d in deviations.values()):
            raise ValueError("Half precision cannot hold the shifted weights: they leave outputs that are not finite.")
        return deviations, total / images


def _outputs(layer: FinalLayer, inputs: Tensor, weight: Tensor) -> Tensor:
    """Return a layer's output rows ``(n, out)`` with another weight, in float64: no rounding but that of the weight."""
    bias = layer.module.bias
    out = as_float64(input_rows(layer.module, inputs)) @ as_float64(weight).T
    return out if bias is None else out + as_float64(bias)  # type: ignore[arg-type]
