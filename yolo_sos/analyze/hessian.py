# yolo-sos, AGPL-3.0
"""Curvature of the task loss in the parameters: Hessian and Gauss-Newton trace, largest eigenvalue.

With z(θ) the model's outputs and ℓ the loss in them, ``L(θ) = ℓ(z(θ))``, r = ∇ℓ and H_z = ∇²ℓ::

    H = JᵀH_zJ + Σ_k r_k ∇²z_k,    J = ∂z/∂θ.

The first term is the Gauss-Newton matrix. Both products come from one double backward pass (Pearlmutter, *Fast exact
multiplication by the Hessian*, 1994; Schraudolph, *Fast curvature matrix-vector products*, 2002): ``g = Jᵀs`` is kept
as a graph in θ and in the cotangent s, and differentiating ``g·v`` gives ``Σ s_k∇²z_k v`` on the side of θ and ``Jv``
on that of s. What is left, ``H_z u``, is a double backward through the criterion alone.

The model is in evaluation mode: BatchNorm uses its running statistics and dropout is off. A detector's assignment of
anchor points to objects, and whatever else the criterion computes without gradient (the target scores, the weight α of
the CIoU loss), is held as it is. The Gauss-Newton trace cannot be negative as far as the criterion is convex in the
outputs: always so for cross-entropy (labels, class scores, box distributions), not for the overlap of boxes.

Traces are Hutchinson's (*A stochastic estimator of the trace of the influence matrix*, 1990): ``tr H = E[vᵀHv]`` with
entries of v ±1. Their standard error is that of the probes; the images are given.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from yolo_sos.analyze.estimate import Estimate
from yolo_sos.analyze.options import SCOPES
from yolo_sos.core import FinalLayer, Task, evaluation

ROUND = 8  # probes that share a graph; sampling can end after each round
MINIMUM = 3  # minimum number of rounds before early stopping


@dataclass(frozen=True)
class Subject:
    """A model under study.

    Attributes:
        name (str): What tables and figures call it.
        model (nn.Module): The model, float32.
        task (Task): How to run it, and its loss.
        layers (Sequence[FinalLayer]): Its final layers.
    """

    name: str
    model: nn.Module
    task: Task
    layers: Sequence[FinalLayer]

    def parameters(self, block: str) -> list[nn.Parameter]:
        """Return the parameters of a block: ``final``, those of the final layers, or ``before``, all others."""
        final = {id(p) for layer in self.layers for p in layer.module.parameters()}
        return [p for p in self.model.parameters() if (id(p) in final) == (block == "final")]


@dataclass
class Trace:
    """Samples of the traces of one block of parameters; those of models that share seed and images are paired.

    Attributes:
        hessian (list[float]): ``vᵀHv`` by probe.
        gauss_newton (list[float]): ``vᵀJᵀH_zJv`` of the same probes.
    """

    hessian: list[float] = field(default_factory=list)
    gauss_newton: list[float] = field(default_factory=list)

    def estimates(self) -> dict[str, Estimate]:
        """Return ``hessian``, ``gauss_newton`` and their ``gap``, each with its standard error."""
        gap = list(map(operator.sub, self.hessian, self.gauss_newton))
        samples = {"hessian": self.hessian, "gauss_newton": self.gauss_newton, "gap": gap}
        return {name: Estimate.mean(values) for name, values in samples.items()}

    def combined(self, of: Callable[[float, float], float], other: Trace) -> Trace:
        """Return ``of(own, other)`` by probe: the paired difference of two models, or the sum of two blocks."""
        return Trace(list(map(of, self.hessian, other.hessian)), list(map(of, self.gauss_newton, other.gauss_newton)))


class Curvature:
    """Second derivatives of a task's loss on one batch. The graph is built once and serves many vectors.

    Args:
        model (nn.Module): The model, in evaluation mode.
        task (Task): Runs it. Its loss may depend on the parameters through the outputs only.
        batch (Any): A batch of the task.
        parameters (Sequence[nn.Parameter]): Those to differentiate in; they must require gradients.
    """

    def __init__(self, model: nn.Module, task: Task, batch: Any, parameters: Sequence[nn.Parameter]):
        """Run the batch forward and once backward."""
        self.parameters = parameters
        with torch.enable_grad():
            found: list[Tensor] = []
            leaves: list[Tensor] = []

            def cut(output: Tensor) -> Tensor:
                # Beyond this cut the loss depends neither on the model nor on an output that another is computed from.
                if not output.requires_grad:
                    return output
                found.append(output)
                leaves.append(output.detach().requires_grad_())
                return leaves[-1]

            loss = task.loss(_mapped(task.run(model, batch), cut), batch)
            self.loss = float(loss.detach())
            slopes = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            used = [i for i, slope in enumerate(slopes) if slope is not None]
            self._leaves, self._slopes = [leaves[i] for i in used], [slopes[i] for i in used]
            self._outputs = [found[i] for i in used]
            self._cotangents = [slope.detach().requires_grad_() for slope in self._slopes]
            gradient = torch.autograd.grad(
                self._outputs, parameters, self._cotangents, create_graph=True, allow_unused=True
            )
        self._reached = [i for i, g in enumerate(gradient) if g is not None]  # a decoder's constants have none
        self._gradient = [gradient[i] for i in self._reached]

    def _parts(self, vector: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return ``Σ r_k∇²z_k v`` for the parameters reached, ``u = Jv`` and ``H_z u`` for the outputs."""
        inputs = [*(self.parameters[i] for i in self._reached), *self._cotangents]
        both = _grad(self._gradient, inputs, [vector[i] for i in self._reached])
        residual_part, jv = both[: len(self._reached)], both[len(self._reached) :]
        # An output that enters the loss linearly has a slope without a graph: its rows of H_z are zero.
        curved = [i for i, slope in enumerate(self._slopes) if slope.requires_grad]
        h_jv = _grad([self._slopes[i] for i in curved], self._leaves, [jv[i] for i in curved])
        return residual_part, jv, h_jv

    def quadratic(self, vector: Sequence[Tensor]) -> tuple[float, float]:
        """Return ``vᵀHv`` and ``vᵀJᵀH_zJv`` for a vector, one tensor per parameter."""
        residual_part, jv, h_jv = self._parts(vector)
        gauss_newton = dot(jv, h_jv)
        return dot([vector[i] for i in self._reached], residual_part) + gauss_newton, gauss_newton

    def product(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """Return ``Hv``, one tensor per parameter."""
        residual_part, _, h_jv = self._parts(vector)
        reached = [self.parameters[i] for i in self._reached]
        back = torch.autograd.grad(self._outputs, reached, h_jv, retain_graph=True)
        found = [torch.zeros_like(p) for p in self.parameters]
        for i, a, b in zip(self._reached, residual_part, back, strict=True):
            found[i] = a + b
        return found


def traces(
    subjects: Sequence[Subject],
    batches: Sequence[Any],
    blocks: Sequence[str] = SCOPES["all"],
    *,
    probes: int = 24,
    stderr: float | None = None,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda n: None,
) -> list[dict[str, Trace]]:
    """Sample the traces of several models with the same probes on the same batches.

    Args:
        subjects (Sequence[Subject]): The models.
        batches (Sequence[Any]): Batches of the task; the loss is their mean per image.
        blocks (Sequence[str]): ``before`` and ``final``; each has probes of its own.
        probes (int): Number of probes, at most.
        stderr (float, optional): Sampling ends earlier once every standard error is at most this share of its trace.
        seed (int): Probes are the same for the same seed and shapes of parameters.
        progress (Callable): Called with 1 after each probe on a batch.

    Returns:
        (list[dict[str, Trace]]): Per model, block → samples.
    """
    found = [{block: Trace() for block in blocks} for _ in subjects]
    for start in range(0, probes, ROUND):
        indices = range(start, min(start + ROUND, probes))
        for (subject, of), block in product(zip(subjects, found, strict=True), blocks):
            h, g = [0.0] * len(indices), [0.0] * len(indices)
            with differentiable(subject, block) as parameters:
                for share, curvature in _curvatures(subject, batches, parameters):  # one graph for all these probes
                    for i, index in enumerate(indices):
                        both = curvature.quadratic(rademacher(parameters, seed, index, block))
                        h[i], g[i] = h[i] + share * both[0], g[i] + share * both[1]
                        progress(1)
            of[block].hessian += h
            of[block].gauss_newton += g
        done = [e for of in found for t in of.values() for k, e in t.estimates().items() if k != "gap"]
        enough = stderr is not None and all(e.stderr <= stderr * abs(e.estimate) for e in done)
        if enough and start // ROUND + 1 >= MINIMUM:
            break
    return found


def largest_eigenvalue(
    subject: Subject,
    batches: Sequence[Any],
    block: str,
    *,
    iterations: int = 20,
    tolerance: float = 0.02,
    seed: int = 0,
) -> Estimate:
    """Return the eigenvalue of the Hessian that is largest in magnitude, by power iteration.

    Args:
        subject (Subject): The model.
        batches (Sequence[Any]): As for ``traces``.
        block (str): ``before`` or ``final``.
        iterations (int): At most.
        tolerance (float): Stops when the residual is below this share of the eigenvalue.
        seed (int): Of the first vector.

    Returns:
        (Estimate): The Rayleigh quotient λ. Its ``stderr`` is the residual ``‖Hv − λv‖``: an eigenvalue lies no further
            away than that (H is symmetric). ``samples``: iterations.
    """
    with differentiable(subject, block) as parameters:
        vector = rademacher(parameters, seed, -1, block)
        kept = list(_curvatures(subject, batches, parameters)) if len(batches) == 1 else None
        value = residual = 0.0
        done = 0
        while done < iterations:
            done += 1
            length = dot(vector, vector) ** 0.5 or 1.0
            vector = [v / length for v in vector]
            moved = [torch.zeros_like(v) for v in vector]
            for share, curvature in kept or _curvatures(subject, batches, parameters):
                moved = [a + share * b for a, b in zip(moved, curvature.product(vector), strict=True)]
            value = dot(vector, moved)
            rest = [p - value * v for p, v in zip(moved, vector, strict=True)]
            residual = dot(rest, rest) ** 0.5
            vector = moved
            if residual <= tolerance * abs(value):
                break
    return Estimate(value, residual, done)


@contextmanager
def differentiable(subject: Subject, block: str) -> Iterator[list[nn.Parameter]]:
    """Evaluation mode, with gradients for one block of parameters alone; restores all flags and modes in any case.

    Yields:
        (list[nn.Parameter]): The block's parameters.
    """
    flags = [(p, p.requires_grad) for p in subject.model.parameters()]
    chosen = subject.parameters(block)
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        with evaluation(subject.model):
            yield chosen
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def rademacher(parameters: Iterable[Tensor], seed: int, index: int, block: str = "") -> list[Tensor]:
    """Return the probe of an index: entries ±1, one tensor per parameter.

    The same for the same seed, index, block and shapes on any device: drawn on the CPU.
    """
    mixed = (seed * 1_000_003 + index + 1) * 2 + (block == "final")
    generator = torch.Generator().manual_seed(mixed % 2**63)
    return [
        (torch.randint(2, p.shape, generator=generator, dtype=torch.int8) * 2 - 1).to(p.device, p.dtype)
        for p in parameters
    ]


def dot(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """Return the scalar product of two vectors that come in parts, summed in float64 where the device has it."""
    return sum(float((x * y).sum(dtype=None if x.device.type == "mps" else torch.float64)) for x, y in zip(a, b))  # noqa: B905


def _curvatures(
    subject: Subject, batches: Sequence[Any], parameters: Sequence[nn.Parameter]
) -> Iterator[tuple[float, Curvature]]:
    """Yield each batch's share of the images and its curvature, one graph in memory at a time."""
    images = sum(subject.task.size(batch) for batch in batches)
    for batch in batches:
        yield subject.task.size(batch) / images, Curvature(subject.model, subject.task, batch, parameters)


def _grad(outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """Return a vector-Jacobian product that keeps the graph; zeros where an input plays no part."""
    if not any(o.requires_grad for o in outputs):
        return [torch.zeros_like(x) for x in inputs]
    return list(
        torch.autograd.grad(outputs, inputs, vectors, retain_graph=True, allow_unused=True, materialize_grads=True)
    )


def _mapped(tree: Any, of: Callable[[Tensor], Tensor]) -> Any:
    """Return a nest of dictionaries, lists and tuples with its tensors replaced."""
    if isinstance(tree, Tensor):
        return of(tree)
    if isinstance(tree, dict):
        return {k: _mapped(v, of) for k, v in tree.items()}
    return type(tree)(_mapped(v, of) for v in tree) if isinstance(tree, (list, tuple)) else tree
