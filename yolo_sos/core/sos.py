# yolo-sos, AGPL-3.0
"""Stochastic optimum shifting for a training loop of one's own, and a single shift of any PyTorch model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from yolo_sos.core import checks
from yolo_sos.core.capture import evaluation, original_module
from yolo_sos.core.engine import Engine
from yolo_sos.core.layers import FinalLayer, Layers, last_layer, select_layers
from yolo_sos.core.method import Method
from yolo_sos.core.report import ShiftReport
from yolo_sos.core.tasks import ModelTask, Task, to_device

# First moments of a gradient in an optimizer's state: torch's SGD, torch's Adam and kin, Ultralytics' MuSGD.
MOMENTUM = ("momentum_buffer", "exp_avg", "momentum_buffer_SGD")
SEEDS = 1_000_003  # between the seeds of two epochs: a resumed run draws what an unbroken one would have drawn


def is_due(trained: int, epochs: int, start: float, interval: int) -> bool:
    """Tell whether a shift is due.

    Args:
        trained (int): Epochs that have been trained: 0 before the first one, ``epochs`` at the end of the last.
        epochs (int): Epochs of the whole run.
        start (float): Fraction of the epochs that are trained before the first shift, in [0, 1].
        interval (int): Epochs from one shift to the next.

    Returns:
        (bool): True after ``ceil(start · epochs)`` epochs and every ``interval`` from there on.
    """
    first = math.ceil(round(start * epochs, 6))  # rounded first: 0.1 · 30 is 3.0000000000000004
    return trained >= first and (trained - first) % interval == 0


class SOS:
    """Stochastic optimum shifting (SOS) for a training loop of one's own.

    Batches are ``(inputs, targets)`` or mappings with ``labels``, see ``ModelTask``; they are moved to the model's
    device. Held-out batches guard a shift: without them, nothing limits the rise of the loss, and the report says so.

    Args:
        model (nn.Module): The model, on one device. It is shifted in place.
        layers (str | nn.Module | Sequence, optional): The final layers: modules, names or globs such as ``"head.*"``,
            see ``select_layers``. None: the layer that runs last, see ``last_layer``; the report names it.
        method (str | Method): A ``Method``, or the name of one; ``loss`` needs a ``task`` that can replay outputs.
        rank (int | float, optional): Rank kept, in place of the method's own, see ``Method``. None: the least that the
            guard accepts, found on the held-out batches; a rank of half of d where there are none.
        budget (float, optional): Likewise.
        solver (str, optional): Likewise.
        weighting (str, optional): Likewise.
        start (float): Fraction of the epochs before the first shift, in [0, 1]; 1: once, after the last epoch.
        interval (int): Epochs from one shift to the next.
        step (float): Largest step size t of ``V + t(V* − V)``, above 0 and up to 1.
        guard (float | None): Largest relative rise of the held-out loss. Where a given rank or budget rises more, ½
            and ¼ of its step are tried, then the shift is refused. None: no guard; held-out losses are reported all the
            same.
        optimizer (torch.optim.Optimizer, optional): Its momentum takes the same linear map as the weights, which it
            would otherwise move back.
        criterion (Callable): ``criterion(output, targets) -> scalar``, the mean over the batch.
        forward (Callable, optional): ``forward(model, batch) -> output``, for models that are not called as
            ``model(inputs)`` or ``model(**batch)``.
        seed (int): Seeds the drawing of rows.
        task (Task, optional): How to run and judge a batch, in place of ``criterion`` and ``forward``; batches are then
            taken as they are.

    Raises:
        ValueError: If a setting is wrong or a layer cannot be shifted; names it.
        TypeError: If a layer is not linear.

    Examples:
        >>> sos = SOS(model, start=0.5, interval=5, optimizer=optimizer)
        >>> for epoch in range(epochs):
        ...     train_one_epoch(model)
        ...     report = sos.step(epoch, epochs, fit_batches, heldout_batches)  # None where no shift is due
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers | None = None,
        *,
        method: str | Method = "expected",
        rank: int | float | None = None,
        budget: float | None = None,
        solver: str | None = None,
        weighting: str | None = None,
        start: float = 0.5,
        interval: int = 5,
        step: float = 1.0,
        guard: float | None = 0.005,
        optimizer: torch.optim.Optimizer | None = None,
        criterion: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        seed: int = 0,
        task: Task | None = None,
    ):
        """Check the settings and find the layers."""
        self.model = original_module(model)
        given: dict[str, Any] = {"rank": rank, "budget": budget, "solver": solver, "weighting": weighting}
        self.method = replace(
            method if isinstance(method, Method) else Method(method),
            **{key: value for key, value in given.items() if value is not None},
        )
        self.start = checks.start("start", start)
        self.interval = checks.interval("interval", interval)
        self.largest = checks.up_to_1("step", step)
        self.guard = checks.guard("guard", guard)
        self.optimizer = optimizer
        self.seed = seed
        self._task = task or ModelTask(criterion, forward)
        self._moves_batches = task is None
        self.layers = None if layers is None else select_layers(self.model, layers)
        self.shifts = 0  # made or refused so far

    def step(self, epoch: int, epochs: int, batches: Iterable[Any], heldout: Iterable[Any] = ()) -> ShiftReport | None:
        """Shift at the end of an epoch if it is time to, see ``is_due``.

        Args:
            epoch (int): The epoch that has ended, counted from 0.
            epochs (int): Epochs of the whole run.
            batches (Iterable): As in ``shift``; read only where a shift is due.
            heldout (Iterable): As in ``shift``.

        Returns:
            (ShiftReport | None): What happened; None where no shift is due.
        """
        if not is_due(epoch + 1, epochs, self.start, self.interval):
            return None
        return self.shift(batches, heldout, seed=self.seed + SEEDS * (epoch + 1))

    def shift(self, batches: Iterable[Any], heldout: Iterable[Any] = (), *, seed: int | None = None) -> ShiftReport:
        """Shift now.

        Everything is computed before anything is written. A failed solve leaves the model as it was, which the
        report's ``status`` tells. An exception at any point leaves every weight bit-identical, every hook removed, and
        every module in its train or eval mode.

        Args:
            batches (Iterable): Batches of training data to fit on, read once.
            heldout (Iterable): Other batches, for the guard, read once and kept in memory. Empty: no guard, and the
                report says so.
            seed (int, optional): Seeds the drawing of rows. None: another one for each call.

        Returns:
            (ShiftReport): One record per layer, held-out loss before and after, accepted step, times.

        Raises:
            ValueError: If there is nothing to fit on, a layer's weight is shared, or the criterion gives no scalar.
            TypeError: If the batches are of an unknown form, or the layer that runs last cannot be shifted.
            RuntimeError: If a layer does not run exactly once in a forward pass.
        """
        seed = self.seed + SEEDS * self.shifts if seed is None else seed
        batches = self._on_device(batches)
        if self.layers is None:
            first = next(batches, None)
            if first is None:
                raise ValueError("There is nothing to fit on: no batch.")
            with evaluation(self.model):
                self.layers = [last_layer(self.model, lambda: self._task.run(self.model, first))]
            batches = chain([first], batches)
        engine = Engine(self.model, self.layers, self._task, [(self.method, seed)])
        engine.fit(batches)
        held = engine.hold_out(self._on_device(heldout))
        guard = self.guard if held.images else None
        shift = engine.find(self.method, seed, held, guard)
        step, before, after = engine.accept(shift, held, guard, self.largest)
        engine.write(shift, step, {layer.name: self.momentum(layer) for layer in shift.layers})
        self.shifts += 1
        return engine.report(shift, step, before, after, guard)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to draw what an unbroken one would have drawn."""
        return {"shifts": self.shifts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a ``state_dict``."""
        self.shifts = state["shifts"]

    def _on_device(self, batches: Iterable[Any]) -> Iterator[Any]:
        if not self._moves_batches:
            return iter(batches)
        device = next(self.model.parameters(), torch.empty(0)).device
        return (to_device(batch, device) for batch in batches)

    def momentum(self, layer: FinalLayer) -> list[Tensor]:
        """Return the first moments of a layer's weight in the optimizer's state; none without an optimizer."""
        state = self.optimizer.state.get(layer.module.weight, {}) if self.optimizer else {}
        return [state[key] for key in MOMENTUM if state.get(key) is not None]


def shift_model(model: nn.Module, batches: Iterable[Any], heldout: Iterable[Any] = (), **settings: Any) -> ShiftReport:
    """Shift the final layer of any PyTorch model in place, once.

    Args:
        model (nn.Module): The model, on one device.
        batches (Iterable): Batches of training data to fit on, read once: ``(inputs, targets)`` or mappings.
        heldout (Iterable): Other batches, which guard the shift: it is shortened or refused where it raises their loss
            by more than ``guard``, 0.005 by default. Empty: no guard, and the report says so.
        **settings (Any): As of ``SOS``: ``layers``, ``method``, ``rank``, ``criterion``, ``forward``, ``guard``, …

    Returns:
        (ShiftReport): What happened.

    Raises:
        ValueError, TypeError, RuntimeError: As ``SOS`` and ``SOS.shift``.

    Examples:
        >>> report = shift_model(model, fit_batches, heldout_batches, rank=0.5)
        >>> print(report)
    """
    return SOS(model, **settings).shift(batches, heldout)
