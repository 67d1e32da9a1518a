# yolo-sos, AGPL-3.0
"""The engine of every shift: run batches, accumulate the inputs of the final layers, solve, judge, write, report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from yolo_sos.core.capture import InputCapture, evaluation
from yolo_sos.core.curvature import Curvature
from yolo_sos.core.heldout import HeldOut
from yolo_sos.core.layers import (
    FinalLayer,
    check_unshared,
    weight_matrix,
    write_weight,
)
from yolo_sos.core.method import Method
from yolo_sos.core.moments import CAPACITY, Moments, RowSample, as_float64
from yolo_sos.core.report import LayerReport, ShiftReport
from yolo_sos.core.solvers import OK, ShiftResult, solve
from yolo_sos.core.tasks import Task
from yolo_sos.core.weighting import LayerRows, has_background

STEPS = (1.0, 0.5, 0.25)  # parts of the largest t of V + t(V* − V), in the order in which the guard tries them; else 0
HALVINGS = 5  # of the interval of strengths: a rank is then found to within 1/64 of d, a budget to within a quarter


class Stopwatch:
    """Wall time by phase; waits for the device first, so that each phase is charged for its own kernels."""

    def __init__(self, device: torch.device):
        """Start the clock."""
        self.device = device
        self.milliseconds = dict.fromkeys(("sample", "forward", "rows", "solve", "guard", "write"), 0.0)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> float:
        """Charge what passed since the last lap to ``phase`` and return it, in milliseconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        passed, self._last = 1e3 * (now - self._last), now
        self.milliseconds[phase] = self.milliseconds.get(phase, 0.0) + passed
        return passed


@dataclass(frozen=True)
class Shift:
    """The shift of all chosen layers by one method; nothing is written yet.

    Attributes:
        method (Method): How.
        seed (int): Seed of drawn rows.
        layers (list[FinalLayer]): The layers.
        results (dict[str, ShiftResult]): Layer name → its shift.
        rows (dict[str, int]): Layer name → rows that were seen.
        milliseconds (dict[str, float]): Layer name → time to solve.
        judged (tuple[HeldOut, float], optional): What the strength was found on, and the loss there at t = 1.
    """

    method: Method
    seed: int
    layers: list[FinalLayer]
    results: dict[str, ShiftResult]
    rows: dict[str, int]
    milliseconds: dict[str, float]
    judged: tuple[HeldOut, float] | None = None

    @property
    def status(self) -> str:
        """``ok``, or the status of the first layer that failed."""
        return next((r.status for r in self.results.values() if r.status != OK), OK)

    @property
    def squared_norm_ratio(self) -> float:
        """``Σ‖V*‖² / Σ‖V‖²`` over the layers, at t = 1."""
        before = sum(r.norm_before**2 for r in self.results.values())
        return sum(r.norm_after**2 for r in self.results.values()) / before if before else 1.0

    @property
    def rank(self) -> float:
        """Mean rank over the layers."""
        return sum(r.rank for r in self.results.values()) / len(self.results)

    @property
    def deviation(self) -> float:
        """Mean deviation over the layers, at t = 1."""
        return sum(r.deviation for r in self.results.values()) / len(self.results)

    def weights(self, step: float = 1.0) -> dict[str, Tensor]:
        """Return ``V + t(V* − V)`` by layer name, ``(out, d)``, in the layer's dtype and device."""
        return {
            layer.name: interpolate_weight(weight_matrix(layer.module), self.results[layer.name].weight, step)
            for layer in self.layers
        }


def interpolate_weight(weight: Tensor, target: Tensor, step: float) -> Tensor:
    """Return ``V + step · (V* − V)`` in V's dtype and device; V itself for 0, V* itself for 1."""
    if step in {0.0, 1.0}:
        return weight if step == 0.0 else target
    v, end = as_float64(weight), as_float64(target)
    return (v + step * (end - v)).to(weight.dtype).to(weight.device)


class Engine:
    """Shifts of a model's final layers by one method or by many, from one pass over the images.

    Args:
        model (nn.Module): The model that the layers belong to.
        layers (Sequence[FinalLayer]): The layers to shift.
        task (Task): How to run and judge a batch.
        trials (Iterable[tuple[Method, int]]): The methods that ``solve`` will be asked for, each with the seed of its
            drawing. Methods that need the same of the rows share it.

    Attributes:
        watched (list[FinalLayer]): The layers to shift, and the others whose inputs the task needs.
        watch (Stopwatch): Time by phase.

    Raises:
        ValueError: If there is no layer to shift, or another module shares a layer's weight.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[FinalLayer],
        task: Task,
        trials: Iterable[tuple[Method, int]] = (),
    ):
        """Check the layers; nothing runs yet."""
        self.model, self.task = model, task
        self.layers = list(layers)
        if not self.layers:
            raise ValueError("There is no layer to shift.")
        check_unshared(model, self.layers)
        self.watched = list({layer.name: layer for layer in (*task.layers, *layers)}.values())
        self.watch = Stopwatch(self.layers[0].module.weight.device)  # type: ignore[arg-type]
        self._trials: dict[tuple[Any, ...], list[tuple[Method, int]]] = {}
        self._curvature: Curvature | None = None
        for method, seed in trials:
            if method.name != "loss":
                self._trials.setdefault(_cache_key(method, seed), []).append((method, seed))
            elif self._curvature is None:
                self._curvature = Curvature(task, self.layers, self.watched, seed)
        self._accumulators: dict[tuple[Any, ...], dict[str, Moments | RowSample]] = {key: {} for key in self._trials}

    def run(
        self, batches: Iterable[Any], add: Callable[[Any, Any, dict[str, Tensor]], None], phase: str = "forward"
    ) -> None:
        """Run the model on batches, and hand each with its output and the inputs of all layers to ``add``.

        What ``add`` takes is charged to ``phase``. On return nothing of the last batch is left in memory.

        Raises:
            RuntimeError: If a layer does not run exactly once in a forward pass.
        """
        with evaluation(self.model), InputCapture(self.watched) as capture:
            for batch in batches:
                self.watch.lap("sample")
                output = self.task.run(self.model, batch)
                inputs = capture.take()
                self.watch.lap("forward")
                add(batch, output, inputs)
                del output, inputs
                capture.clear()  # of what ran the layers once more, such as a replayed loss
                self.watch.lap(phase)

    def fit(self, batches: Iterable[Any], observe: Callable[[Any, Any, dict[str, Tensor]], None] | None = None) -> None:
        """Accumulate what the methods need of the final layers' inputs.

        Args:
            batches (Iterable): Batches of the task, read once.
            observe (Callable, optional): Called with each batch, its output and the inputs of all layers, as ``add`` of
                ``run``, for what else is to be measured in the same pass.

        Raises:
            ValueError: If no batch had a row.
            RuntimeError: If a layer does not run exactly once in a forward pass.
        """
        trials = {
            key: ([method for method, _ in alike], torch.Generator().manual_seed(alike[0][1]))
            for key, alike in self._trials.items()
        }

        def add(batch: Any, output: Any, inputs: dict[str, Tensor]) -> None:
            rows = LayerRows(self.task, self.watched, inputs, batch)
            for layer in self.layers:
                for key, (methods, generator) in trials.items():
                    accumulators = self._accumulators[key]
                    if layer.name not in accumulators:
                        accumulators[layer.name] = _accumulator(methods, layer, rows.classes(layer), generator)
                    accumulator = accumulators[layer.name]
                    groups, weights = rows.groups(layer, _weighting(methods[0]))
                    if isinstance(accumulator, Moments):
                        accumulator.update(rows.of(layer), weights)
                    else:
                        accumulator.update(rows.of(layer), groups, weights)
            if self._curvature:
                self._curvature.add(batch, output, inputs)
            if observe is not None:
                observe(batch, output, inputs)

        self.run(batches, add, "rows")
        seen = [a.rows for of in self._accumulators.values() for a in of.values()]
        if not any((*seen, *(self._curvature.rows.values() if self._curvature else ()))):
            raise ValueError("There is nothing to fit on: no batch had a row.")
        for key, accumulators in self._accumulators.items():
            if self._trials[key][0][0].name != "rows":  # the sample has served; held-out batches need the memory
                self._accumulators[key] = {
                    name: rows.moments if isinstance(rows, RowSample) else rows for name, rows in accumulators.items()
                }

    def hold_out(self, batches: Iterable[Any]) -> HeldOut:
        """Run held-out batches and return the task loss on them, as a function of the layers' weights."""
        heldout = HeldOut(self.model, self.task, self.watched)
        self.run(batches, heldout.add, "guard")
        return heldout

    def solve(self, method: Method, seed: int = 0) -> Shift:
        """Return the shift of all chosen layers by one of the methods."""
        self.watch.lap("solve")
        if method.name == "loss":
            assert self._curvature is not None
            results, rows = self._curvature.solve(method.rank_of), self._curvature.rows
            each = self.watch.lap("solve") / len(results)  # they are solved together
            return Shift(method, seed, self.layers, results, rows, dict.fromkeys(results, each))
        accumulators = self._accumulators[_cache_key(method, seed)]
        results, milliseconds = {}, {}
        for layer in self.layers:
            results[layer.name] = solve(method, accumulators[layer.name], weight_matrix(layer.module))
            milliseconds[layer.name] = self.watch.lap("solve")
        rows = {layer.name: accumulators[layer.name].rows for layer in self.layers}
        return Shift(method, seed, self.layers, results, rows, milliseconds)

    def moments(self, layer: FinalLayer, method: Method) -> Moments:
        """Return the second moment of a layer's rows that a method is solved with; not for ``rows`` and ``loss``."""
        moments = self._accumulators[_cache_key(method, 0)][layer.name]
        assert isinstance(moments, Moments)
        return moments

    def find(self, method: Method, seed: int, heldout: HeldOut, guard: float | None) -> Shift:
        """Return the shift by a method, as strong as the guard accepts where no rank or budget is given.

        The largest strength is tried first, then bisection, by the held-out loss of each shift. Where none passes, the
        weakest is returned, for ``accept`` to shorten or refuse. Without held-out images, or without a guard, the
        strength is that of ``Method.at()``.
        """
        if not method.is_found or guard is None or not math.isfinite(heldout.before):
            return self.solve(method.at(), seed)
        best, low, strength, high = None, 0.0, 1.0, 1.0
        for _ in range(1 + HALVINGS):
            shift = self.solve(method.at(strength), seed)
            loss = heldout.loss(shift.weights()) if shift.status == OK else math.nan
            self.watch.lap("guard")
            if heldout.allows(loss, guard):
                low, best = strength, replace(shift, judged=(heldout, loss))
                if strength == 1.0:
                    break
            else:
                high = strength
            strength = (low + high) / 2
        return best or shift

    def accept(
        self, shift: Shift, heldout: HeldOut, guard: float | None, largest: float = 1.0
    ) -> tuple[float, float, float]:
        """Return the accepted step size, and the held-out loss before and after it.

        Args:
            shift (Shift): The shift.
            heldout (HeldOut): Held-out batches. Where there are none, the largest step is accepted.
            guard (float, optional): Largest relative rise of the held-out loss. Where the largest step rises more, ½
                and ¼ of it are tried, then 0. None: no guard; the losses are reported all the same.
            largest (float): Largest step, in (0, 1].
        """
        before = heldout.before
        if shift.status != OK:
            return 0.0, before, before
        if not heldout.images:
            return largest, before, before
        for step in [part * largest for part in STEPS]:
            known = step == 1.0 and shift.judged and shift.judged[0] is heldout
            after = shift.judged[1] if known else heldout.loss(shift.weights(step))  # type: ignore[index]
            self.watch.lap("guard")
            if heldout.allows(after, guard):
                return step, before, after
        return 0.0, before, before

    def write(self, shift: Shift, step: float, optimizer_state: Mapping[str, Sequence[Tensor]] | None = None) -> None:
        """Write the weights at a step along the shift, or nothing at all if that raises.

        Args:
            shift (Shift): The shift.
            step (float): The step size t; 0 writes nothing.
            optimizer_state (Mapping[str, Sequence[Tensor]], optional): Layer name → tensors of its weight's shape that
                take the same linear map as the weight: an optimizer's momentum, which otherwise moves the weight back.
        """
        if step == 0.0:
            return
        beside = [(x, shift.results[name], x.clone()) for name, xs in (optimizer_state or {}).items() for x in xs]
        new = shift.weights(step)
        before = {layer.name: weight_matrix(layer.module).clone() for layer in shift.layers}
        try:
            for layer in shift.layers:
                write_weight(layer.module, new[layer.name])
            for tensor, result, old in beside:
                tensor.copy_(result.apply(old, step))
        except BaseException:  # KeyboardInterrupt too
            for layer in shift.layers:
                write_weight(layer.module, before[layer.name])
            for tensor, _, old in beside:
                tensor.copy_(old)
            raise
        self.watch.lap("write")

    def report(self, shift: Shift, step: float, before: float, after: float, guard: float | None) -> ShiftReport:
        """Return the report of a shift that was accepted with ``step`` and written, or refused with 0."""
        new = shift.weights(0.0)  # as they are in the model now
        layers = []
        for layer in shift.layers:
            result, weight = shift.results[layer.name], new[layer.name]
            norm = float(as_float64(weight).norm()) if step > 0 else result.norm_before
            seen = layer.name, layer.kind, layer.level, weight.shape[1], shift.rows[layer.name]
            done = result.rank, result.norm_before, norm, step * result.deviation, result.status
            layers.append(LayerReport(*seen, *done))
        return ShiftReport(tuple(layers), before, after, step, guard, self.watch.milliseconds)


def _weighting(method: Method) -> str:
    return "uniform" if method.name == "full" else method.weighting  # the span of all rows has no weights


def _cache_key(method: Method, seed: int) -> tuple[Any, ...]:
    """Return what tells accumulators apart: the weighting and, for drawn rows, the seed."""
    return (_weighting(method), seed) if method.name == "rows" else (_weighting(method),)


def _accumulator(
    methods: list[Method], layer: FinalLayer, classes: int, generator: torch.Generator
) -> Moments | RowSample:
    """Return the accumulator of a layer's rows for methods that share it.

    A single group has its exact second moment. Several groups have the mean of theirs, which needs the mass of each,
    known only at the end: so a sample of the rows is held until then.
    """
    method, d = methods[0], weight_matrix(layer.module).shape[1]
    weighting = _weighting(method)
    groups, background = classes if weighting == "balanced" else 1, has_background(weighting, layer.kind)
    if method.name == "rows":
        size = max(d if m.is_found else m.rank_of(d) for m in methods)  # of which each takes as many as it asks for
        return RowSample(d, groups, size, generator, background=background)
    if groups + background == 1:
        return Moments(d)
    return RowSample(d, groups, max(CAPACITY // (4 * d), d), generator, background=background)
