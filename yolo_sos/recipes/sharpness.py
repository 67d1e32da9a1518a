# yolo-sos, AGPL-3.0
"""Sharpness-aware minimization in Ultralytics' loop: before each step, a second gradient at weights a step uphill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import autocast, unwrap_model

from yolo_sos.yolo.training import TrainerExtension

RHO = {"sam": 0.05, "asam": 0.5, "gnp": 0.05}  # the papers': CIFAR-10, CIFAR-10, ImageNet
BALANCE = {"sam": 1.0, "asam": 1.0, "gnp": 0.8}  # share of the second gradient; of GNP, λ/r, as its authors' recipes


class _NoStep(torch.optim.Optimizer):
    """In place of the optimizer that the library's SAM would step: Ultralytics steps its own, clipped and scaled."""

    def __init__(self, params: Any, **defaults: Any):
        super().__init__(params, defaults)

    def step(self, closure: Any = None) -> None:
        pass


def library(method: str) -> Any:
    """Return pytorch-optimizer's ``SAM``.

    Raises:
        ImportError: If it is not installed; names what asks for it.
    """
    try:
        from pytorch_optimizer import SAM
    except ImportError as e:
        raise ImportError(
            f"sharpness_aware={method} needs pytorch-optimizer, which is not installed: pip install 'yolo-sos[peers]'"
        ) from e
    return SAM


def perturbation(params: list[nn.Parameter], method: str, rho: float | None = None) -> Any:
    """Return an object whose ``first_step()`` moves parameters uphill and whose ``second_step()`` restores them.

    ``sam`` and ``gnp`` add ρ g/‖g‖, ``asam`` adds ρ w² g/‖w g‖, the norm over all parameters. Neither depends on the
    scale of g, so the gradients may still bear that of a ``GradScaler``.

    Sources: Foret, Kleiner, Mobahi, Neyshabur, *Sharpness-Aware Minimization for Efficiently Improving Generalization*,
    ICLR 2021, eq. 2; Kwon, Kim, Park, Choi, *ASAM*, ICML 2021, Algorithm 1; Zhao, Zhang, Hu, *Penalizing Gradient Norm
    for Efficiently Improving Generalization in Deep Learning*, ICML 2022, Algorithm 1.

    Args:
        params (list[nn.Parameter]): Parameters; those without a gradient stay.
        method (str): ``sam``, ``asam`` or ``gnp``.
        rho (float, optional): ρ, above 0; the method's own by default.
    """
    return library(method)(params, _NoStep, rho=RHO[method] if rho is None else rho, adaptive=method == "asam")


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of BatchNorm, and its count of batches, as they are.

    Layers in training mode go on to normalize by the batch, those in eval mode by their statistics.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False  # a momentum of 0 would still count the batch
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


class SharpnessAware(TrainerExtension):
    """The extension of a trainer by ``sharpness_aware``.

    The batches between two steps are kept. When Ultralytics is about to step, they go through the model again at the
    perturbed weights, each with the random states of its first pass, and so the same dropout; the gradients of this
    second pass replace the first's. So ρ is a step along the gradient of all batches that are accumulated, summed over
    the processes of a distributed run, and what Ultralytics does next is done once, to the final gradient: unscaling,
    clipping, the step, the EMA. Losses and running statistics are those of the first pass.
    """

    _in_batch = False
    _perturbation: Any = None

    def _setup_train(self) -> None:
        """Set up as Ultralytics does; a missing library raises before the data are read."""
        method = self.sos.sharpness_aware
        if method is not None:
            if self.args.distill_model is not None:
                raise ValueError("sharpness_aware does not work together with distill_model. Leave out one of them.")
            library(method)
        super()._setup_train()
        if method is not None:
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            self._perturbation = perturbation(params, method, self.sos.rho)
            self._window: list[tuple[dict[str, Any], list[Tensor]]] = []

    def run_callbacks(self, event: str) -> None:
        """Remember whether a training batch is being processed: others are preprocessed, too."""
        self._in_batch = event == "on_train_batch_start"
        super().run_callbacks(event)

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Preprocess as Ultralytics does, right before the forward pass, and keep a training batch."""
        batch = super().preprocess_batch(batch)
        if self._perturbation is not None and self._in_batch:
            if all(p.grad is None for p in self._params()):  # nothing is accumulated: after a step, or a fresh start
                self._window = []
            self._window.append((batch, self._random_states()))
        return batch

    def optimizer_step(self) -> None:
        """Step as Ultralytics does, along the gradient at the perturbed weights."""
        if self._perturbation is not None:
            self._second_pass()
        super().optimizer_step()

    def _second_pass(self) -> None:
        window, self._window = self._window, []
        assert self.sos.sharpness_aware is not None
        balance = BALANCE[self.sos.sharpness_aware]
        params = [p for p in self._params() if p.grad is not None]
        # Ultralytics and the scaler handle what overflowed: the step is skipped, or the epoch run again.
        if not torch.stack([p.grad.norm() for p in params]).isfinite().all():
            return
        first = [p.grad.clone() for p in params] if balance < 1 else []
        now = self._random_states()
        try:
            self._perturbation.first_step()
            self.optimizer.zero_grad(set_to_none=False)  # what the second pass does not reach has a gradient of 0
            with frozen_statistics(unwrap_model(self.model)):
                for batch, states in window:
                    self._set_random_states(states)
                    self.scaler.scale(self._loss(batch)).backward()
        finally:
            self._perturbation.second_step()
            self._set_random_states(now)
        for p, gradient in zip(params, first, strict=False):
            p.grad.lerp_(gradient, 1 - balance)

    def _params(self) -> list[nn.Parameter]:
        return [p for group in self._perturbation.param_groups for p in group["params"]]

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the loss of a batch, as Ultralytics' loop computes it."""
        with autocast(torch.bfloat16 if self.args.amp == "bf16" else self.amp, device=self.device.type):
            if self.args.compile:
                loss = unwrap_model(self.model).loss(batch, self.model(batch["img"]))[0].sum()
            else:
                loss = self.model(batch)[0].sum()
        return loss if RANK == -1 else loss * self.world_size

    def _random_states(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def _set_random_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, self.device)
