# yolo-sos, AGPL-3.0
"""One shift of a model's final layers: sample, capture, solve, guard, write."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from yolo_sos.core.capture import InputCapture
from yolo_sos.core.gram import as_float64
from yolo_sos.core.layers import FinalLayer, weight_matrix, write_weight
from yolo_sos.core.solver import (
    OK,
    SOLVERS,
    ShiftResult,
    budgeted_shift,
    expected_shift,
    minimum_norm_shift,
    principal_shift,
)
from yolo_sos.core.task import Task
from yolo_sos.core.weighting import WEIGHTINGS, GroupedGram, RowSample, has_background, weighted_rows

METHODS = ("principal", "expected", "budget", "full", "rows")
STEPS = (1.0, 0.5, 0.25)  # parts of the largest t of V + t(V* − V), in the order in which the guard tries them; else 0
HELD_OUT = 32  # images at most: the inputs of their final layers stay in memory, 6 to 25 MB each at 640 pixels


@dataclass(frozen=True)
class Method:
    """How the weights of one layer are found.

    Attributes:
        name (str): ``principal``, ``expected``, ``budget``, ``full`` or ``rows``.
        rank (int | float): Rank kept (``principal``), rows expected (``expected``) or drawn (``rows``): an int, or a
            float up to 1.0 as a fraction of the layer's d.
        budget (float): ε of ``budget``.
        solver (str): For ``rows``: ``svd``, ``qr`` or ``gauss``.
        weighting (str): ``balanced``, ``confidence`` or ``uniform``.
    """

    name: str = "principal"
    rank: int | float = 0.5
    budget: float = 0.01
    solver: str = "qr"
    weighting: str = "balanced"

    def __post_init__(self):
        """Refuse unknown names here, where they are written, and not in the middle of a shift."""
        for value, choices in ((self.name, METHODS), (self.solver, SOLVERS), (self.weighting, WEIGHTINGS)):
            if value not in choices:
                raise ValueError(f"'{value}' is unknown. Choose one of {', '.join(choices)}.")
        if not (0.0 < self.rank <= 1.0 if isinstance(self.rank, float) else self.rank >= 1):
            raise ValueError(
                f"rank={self.rank} must be an integer of at least 1, or a float in (0, 1], a fraction of d."
            )

    def rank_of(self, d: int) -> int:
        """Return the rank for a layer of input size d; what exceeds d is cut to it, except for drawn rows."""
        rank = max(1, round(self.rank * d)) if isinstance(self.rank, float) else self.rank
        return rank if self.name == "rows" else min(rank, d)

    def collects(self, seed: int) -> tuple[Any, ...]:
        """Return what tells accumulators apart: the weighting and, for drawn rows, the seed."""
        return (self.weighting, seed) if self.name == "rows" else (self.weighting,)

    def accumulator(self, d: int, kind: str, generator: torch.Generator) -> GroupedGram | RowSample:
        """Return what collects the rows of a layer of input size d and of a kind."""
        background = has_background(self.weighting, kind)
        if self.name == "rows":
            return RowSample(d, self.rank_of(d), generator, background=background)
        return GroupedGram(d, generator, background=background)

    def solve(self, rows: GroupedGram | RowSample, weight: Tensor) -> ShiftResult:
        """Return the shift of ``weight`` ``(out, d)`` for the rows collected."""
        if isinstance(rows, RowSample):
            return minimum_norm_shift(rows.take(self.rank_of(rows.d)).to(weight.device), weight, method=self.solver)
        if self.name == "expected":
            return expected_shift(rows.gram, weight, rows=self.rank_of(rows.d))
        if self.name == "budget":
            return budgeted_shift(rows.gram, weight, budget=self.budget)
        return principal_shift(rows.gram, weight, rank=None if self.name == "full" else self.rank_of(rows.d))


@dataclass(frozen=True)
class LayerRecord:
    """What a shift did to one layer, at the accepted step t.

    Attributes:
        name (str): Qualified name of the layer.
        kind (str): ``box``, ``cls``, ``mask``, ``kpt``, ``angle`` or ``linear``.
        scale (int): Detection level.
        d (int): Length of an input row.
        rows (int): Rows seen.
        rank (float): Rank of the full shift (t = 1), numerical or effective.
        norm_before (float): ‖V‖_F.
        norm_after (float): ‖V_t‖_F.
        deviation (float): ``‖A(V_t−V)ᵀ‖_F / ‖AVᵀ‖_F`` on the rows that the solver saw, weighted as it saw them.
        status (str): See ``ShiftResult.status``.
    """

    name: str
    kind: str
    scale: int
    d: int
    rows: int
    rank: float
    norm_before: float
    norm_after: float
    deviation: float
    status: str


@dataclass(frozen=True)
class ShiftReport:
    """What one shift did to a model.

    Attributes:
        layers (tuple[LayerRecord, ...]): One record per layer.
        heldout_before (float): Task loss per held-out image before the shift; nan without a guard.
        heldout_after (float): The same at the accepted step.
        step (float): The accepted t; 0 if nothing was written.
        milliseconds (dict[str, float]): Wall time of ``sample`` (waiting for batches), ``forward``, ``rows``
            (collecting), ``solve``, ``guard`` and ``write``.
    """

    layers: tuple[LayerRecord, ...]
    heldout_before: float
    heldout_after: float
    step: float
    milliseconds: dict[str, float]

    @property
    def status(self) -> str:
        """``ok``, or why nothing was written: the first failed solve, or ``guarded``."""
        failed = [f"{r.status} in {r.name}" for r in self.layers if r.status != OK]
        return failed[0] if failed else OK if self.step > 0 else "guarded"

    @property
    def norm_ratio(self) -> float:
        """``Σ‖V_t‖² / Σ‖V‖²`` over the layers."""
        before = sum(r.norm_before**2 for r in self.layers)
        return sum(r.norm_after**2 for r in self.layers) / before if 0 < before < math.inf else 1.0

    @property
    def rank(self) -> float:
        """Mean rank over the layers."""
        return sum(r.rank for r in self.layers) / len(self.layers)

    @property
    def deviation(self) -> float:
        """Mean deviation over the layers."""
        return sum(r.deviation for r in self.layers) / len(self.layers)


class Stopwatch:
    """Wall time by phase; waits for the device first, so that each phase pays for its own kernels."""

    def __init__(self, device: torch.device):
        """Start the clock."""
        self.device = device
        self.milliseconds = dict.fromkeys(("sample", "forward", "rows", "solve", "guard", "write"), 0.0)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Charge what passed since the last lap to ``phase``."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.milliseconds[phase] += 1e3 * (now - self._last)
        self._last = now


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own train/eval mode comes back, whatever happens."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode  # not train(): it would overrule frozen BatchNorm below


def layer_outputs(
    layers: Sequence[FinalLayer], weights: dict[str, Tensor], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return what the layers make of their ``inputs`` with ``weights`` (layer name → ``(out, d)``); others keep theirs.

    The layers themselves stay as they are.
    """
    outputs = {}
    for layer in layers:
        weight = weights.get(layer.name, weight_matrix(layer.module))
        parameters = {"weight": weight.view_as(layer.module.weight)}  # type: ignore[arg-type]
        x = inputs[layer.name].to(weight.dtype)  # a model that ran under autocast hands over less than float32
        outputs[layer.name] = torch.func.functional_call(layer.module, parameters, x)
    return outputs


class Collector:
    """What the inputs of the final layers say, for one method or for many: images run through the model only once.

    Spectral methods of one weighting share their second moments. Drawings of one weighting and seed share a sample, of
    which each takes as much as it asks for.

    Args:
        task (Task): How to judge a row.
        layers (Sequence[FinalLayer]): All final layers of the model's output.
        shifted (Sequence[FinalLayer]): Those to collect for.
        trials (Iterable[tuple[Method, int]]): The methods that ``solve`` will be asked for, each with the seed of its
            drawing. What methods share goes by the first one's.
    """

    def __init__(
        self,
        task: Task,
        layers: Sequence[FinalLayer],
        shifted: Sequence[FinalLayer],
        trials: Iterable[tuple[Method, int]],
    ):
        """Start empty."""
        self.task = task
        self.layers = layers
        self.shifted = shifted
        self._collected: dict[tuple[Any, ...], dict[str, GroupedGram | RowSample]] = {}
        sharing: dict[tuple[Any, ...], list[tuple[Method, int]]] = {}
        for method, seed in trials:
            sharing.setdefault(method.collects(seed), []).append((method, seed))
        for key, alike in sharing.items():
            generator = torch.Generator().manual_seed(alike[0][1])
            self._collected[key] = {}
            for layer in shifted:
                d = weight_matrix(layer.module).shape[1]
                largest = max((method for method, _ in alike), key=lambda m, d=d: m.rank_of(d))  # type: ignore[misc]
                self._collected[key][layer.name] = largest.accumulator(d, layer.kind, generator)

    def add(self, batch: Any, output: Any, inputs: dict[str, Tensor]) -> None:
        """Add one batch's rows to each accumulator, weighted by what their class layer says of them.

        What ``run_batches`` hands over: the output is not needed.
        """
        weightings = {weighting for weighting, *_ in self._collected}
        for layer, rows, weights in weighted_rows(self.task, self.layers, self.shifted, weightings, inputs, batch):
            for (weighting, *_), collected in self._collected.items():
                collected[layer.name].update(rows, weights[weighting])

    def solve(self, layer: FinalLayer, method: Method, seed: int = 0) -> ShiftResult:
        """Return one layer's shift by one of the methods."""
        return method.solve(self._collected[method.collects(seed)][layer.name], weight_matrix(layer.module))

    def rows(self, layer: FinalLayer) -> int:
        """Return the number of a layer's rows so far."""
        return next(iter(self._collected.values()))[layer.name].rows


class HeldOut:
    """The task loss on held-out batches as a function of the final layers' weights alone.

    Each batch runs through the model once, which tells the loss as it is; after that only the final layers are
    evaluated, on their captured inputs.
    """

    def __init__(self, task: Task, layers: Sequence[FinalLayer]):
        """``layers`` are all that the task needs for ``replay``, shifted or not."""
        self.task = task
        self.layers = layers
        self.batches: list[tuple[Any, Any, dict[str, Tensor]]] = []
        self._images = 0
        self._total = 0.0  # of the losses of the images

    def add(self, batch: Any, output: Any, inputs: dict[str, Tensor]) -> None:
        """Add a batch's loss; keep the inputs of the layers, and of batch and output what another loss will need."""
        size = self.task.size(batch)
        self._images += size
        self._total += size * float(self.task.loss(output, batch))
        self.batches.append((*self.task.kept(batch, output), inputs))

    @property
    def before(self) -> float:
        """The mean loss per image of the model as it ran; nan without images."""
        return self._total / self._images if self._images else float("nan")

    def loss(self, weights: dict[str, Tensor]) -> float:
        """Return the mean loss per image with ``weights`` (layer name → ``(out, d)``); other layers keep theirs."""
        total = 0.0
        for batch, rest, inputs in self.batches:
            # No names for what is large: parts would stay in memory while the loss, its peak, is computed.
            loss = self.task.loss(self.task.replay(rest, layer_outputs(self.layers, weights, inputs)), batch)
            total += self.task.size(batch) * float(loss)
        return total / self._images if self._images else float("nan")


def run_batches(
    model: nn.Module,
    batches: Iterable[Any],
    task: Task,
    capture: InputCapture,
    watch: Stopwatch,
    phase: str,
    add: Callable[[Any, Any, dict[str, Tensor]], None],
) -> None:
    """Run a model on batches, and hand each one with its output and its captured inputs to ``add``.

    What that takes is charged to ``phase``. When this returns, of the last batch nothing is left in memory either.
    """
    for batch in batches:
        watch.lap("sample")
        output = task.forward(model, batch)
        inputs = capture.take()
        watch.lap("forward")
        add(batch, output, inputs)
        watch.lap(phase)


def shift_layers(
    model: nn.Module,
    layers: Sequence[FinalLayer],
    fit: Iterable[Any],
    task: Task,
    *,
    heldout: Iterable[Any] = (),
    shifted: Sequence[FinalLayer] | None = None,
    along: Mapping[str, Sequence[Tensor]] | None = None,
    method: Method | None = None,
    step: float = 1.0,
    guard: float | None = 0.0,
    seed: int = 0,
) -> ShiftReport:
    """Shift the final layers of a model in place.

    Everything is computed before anything is written. A failed solve leaves the model as it was, which the report's
    ``status`` tells. An exception at any point leaves every weight bit-identical, every hook removed, and every module
    in its train or eval mode.

    Args:
        model (nn.Module): The model that the layers belong to.
        layers (Sequence[FinalLayer]): All final layers of its output.
        fit (Iterable): Batches that the shift is fitted on, consumed once.
        task (Task): How to run and judge a batch.
        heldout (Iterable): Other batches, for the guard; consumed once, inputs of the final layers kept.
        shifted (Sequence[FinalLayer], optional): Those of ``layers`` to shift. None: all.
        along (Mapping[str, Sequence[Tensor]], optional): Layer name → tensors of its weight's shape that take the same
            linear map as the weight, in place: an optimizer's momentum, which else carries the weight back.
        method (Method, optional): How. None: ``Method()``.
        step (float): Largest t of ``V + t(V* − V)``, above 0 and up to 1.
        guard (float, optional): Largest relative rise of the held-out loss. Where the whole step rises more, ½ and ¼ of
            it are tried, then 0. None: no guard, ``heldout`` is not read.
        seed (int): Seeds the drawing of rows.

    Returns:
        (ShiftReport): One record per shifted layer, held-out loss before and after, accepted step, times.

    Raises:
        ValueError: If there is nothing to shift or to fit on, or a guard without held-out batches.
        RuntimeError: If the forward pass does not reach a layer.
    """
    method = method or Method()
    shifted = list(layers if shifted is None else shifted)
    if not shifted:
        raise ValueError("There is no layer to shift.")
    if not 0.0 < step <= 1.0:
        raise ValueError(f"step={step} must be above 0 and at most 1.")
    watched = list({layer.name: layer for layer in layers}.values())
    collector = Collector(task, watched, shifted, [(method, seed)])
    kept = HeldOut(task, watched)
    watch = Stopwatch(shifted[0].module.weight.device)  # type: ignore[arg-type]

    with evaluation(model), InputCapture(watched) as capture:
        run_batches(model, fit, task, capture, watch, "rows", collector.add)
        if not any(collector.rows(layer) for layer in shifted):
            raise ValueError("There is nothing to fit on: no batch had a row.")
        results = {layer.name: collector.solve(layer, method, seed) for layer in shifted}
        rows = {layer.name: collector.rows(layer) for layer in shifted}
        del collector  # before others take its place in memory
        watch.lap("solve")
        if guard is not None:
            run_batches(model, heldout, task, capture, watch, "guard", kept.add)
            if not kept.batches:
                raise ValueError("The guard needs held-out batches; pass some, or guard=None.")
        t, before, after = guarded_step(shifted, results, kept, guard, step)
        watch.lap("guard")

    if t > 0:
        _write(
            [(layer, stepped(layer, results[layer.name], t)) for layer in shifted],
            [(x, mapped(x, results[name], t)) for name, tensors in (along or {}).items() for x in tensors],
        )
    watch.lap("write")
    records = tuple(_record(layer, rows[layer.name], results[layer.name], t) for layer in shifted)
    return ShiftReport(records, before, after, t, watch.milliseconds)


def guarded_step(
    layers: Sequence[FinalLayer],
    results: dict[str, ShiftResult],
    heldout: HeldOut,
    guard: float | None,
    largest: float = 1.0,
) -> tuple[float, float, float]:
    """Return the accepted step, at most ``largest``, and the held-out loss before and after it."""
    failed = any(result.status != OK for result in results.values())
    if guard is None:
        return (0.0 if failed else largest), float("nan"), float("nan")
    before = heldout.before
    if failed or not math.isfinite(before):
        return 0.0, before, before
    for step in (part * largest for part in STEPS):
        after = heldout.loss({layer.name: stepped(layer, results[layer.name], step) for layer in layers})
        if after <= before + guard * abs(before):  # a loss that is not a number is not accepted
            return step, before, after
    return 0.0, before, before


def stepped(layer: FinalLayer, result: ShiftResult, step: float) -> Tensor:
    """Return ``V + step · (V* − V)``, ``(out, d)``, in the layer's dtype and device: what would be written."""
    weight = weight_matrix(layer.module)
    if step in {0.0, 1.0}:
        return weight if step == 0.0 else result.weight
    v, target = as_float64(weight), as_float64(result.weight)
    return (v + step * (target - v)).to(weight.dtype).to(weight.device)


def mapped(tensor: Tensor, result: ShiftResult, step: float) -> Tensor:
    """Return what a step of a weight's shift, as a linear map, makes of a tensor of the weight's shape."""
    x = as_float64(tensor.flatten(1)).to(as_float64(result.weight).device)
    return (x + step * (result.linear(x) - x)).to(tensor.device, tensor.dtype).view_as(tensor)


def _write(weights: Sequence[tuple[FinalLayer, Tensor]], along: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write all of the weights, and over each tensor ``along`` the one that follows it; or nothing at all."""
    before = [(layer, weight_matrix(layer.module).clone()) for layer, _ in weights]
    beside = [(tensor, tensor.clone()) for tensor, _ in along]
    try:
        for layer, weight in weights:
            write_weight(layer.module, weight)
        for tensor, new in along:
            tensor.copy_(new)
    except BaseException:  # KeyboardInterrupt too
        for layer, weight in before:
            write_weight(layer.module, weight)
        for tensor, old in beside:
            tensor.copy_(old)
        raise


def _record(layer: FinalLayer, rows: int, result: ShiftResult, step: float) -> LayerRecord:
    """Return what happened to one layer."""
    after = float(as_float64(weight_matrix(layer.module)).norm())
    d = weight_matrix(layer.module).shape[1]
    return LayerRecord(
        layer.name,
        layer.kind,
        layer.scale,
        d,
        rows,
        result.rank,
        result.norm_before,
        after if step > 0 else result.norm_before,
        step * result.deviation,
        result.status,
    )
