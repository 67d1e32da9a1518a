# yolo-sos, AGPL-3.0
"""Fit a linear layer to labels: maximum likelihood on rows of its input, with a ridge towards a prior weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yolo_sos.core.moments import as_float64

LOSSES = ("binary", "softmax")
DECADES = 8.0  # the path of ridges goes this far below its start; it ends where the loss on other rows rises
STEP = 0.5  # decades from one ridge of the path to the next: the loss changes by about 1 % over one near its least
TOLERANCE = 1e-5  # of the gap of a solution
ROUGH = 3e-4  # the same along the path, where ridges are only compared
GAIN, PATIENCE = 1e-3, 2  # the path ends at ridges in a row that lessen the loss by less, relative: it is flat there
# The strongest ridge is taken that explains as much of the loss as the best but for this share, and the path ends where
# less is explained: COCO → VOC07, 300 images, has its least loss at 500, and the same mAP50-95 from 1,000 to 4,000
# (.490 to .485; .471 at 300).
ALIKE = 0.02
BIAS_RIDGE = 0.1  # of the bias, too weak to matter beside a few rows: a class that no row shows keeps a finite one
MEMORY = 10  # pairs of steps and gradients that L-BFGS keeps
ITERATIONS = 500


@dataclass(frozen=True)
class Rows:
    """Rows of a layer's input with what the layer should say of them.

    Attributes:
        inputs (Tensor): A, ``(n, d)``.
        targets (Tensor): ``(n, C)``: for the binary loss each in [0, 1], for softmax each row a distribution.
        weights (Tensor): How many rows each stands for, ``(n,)``.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    def cat(cls, parts: Iterable[Rows]) -> Rows:
        """Return the rows of several, in their order."""
        inputs, targets, weights = zip(*((p.inputs, p.targets, p.weights) for p in parts), strict=True)
        return cls(torch.cat(inputs), torch.cat(targets), torch.cat(weights))

    def __len__(self) -> int:
        """Return n."""
        return len(self.weights)


@dataclass(frozen=True)
class Solution:
    """The weight that minimises ``Σ w·loss + ½ρ‖V − V₀‖²``, see ``RidgeProblem``.

    Attributes:
        weight (Tensor): ``[V b]``, ``(C, d + 1)``, or V, ``(C, d)``, in float64.
        ridge (float): ρ.
        gap (float): Estimate of how far the objective is above its least, as a part of the loss where only the classes'
            frequencies are known: half of ``gᵀH⁻¹g``, g the gradient and H⁻¹ the inverse Hessian as L-BFGS knows it.
        evaluations (int): How often the objective was evaluated, each twice a product with the rows.
        converged (bool): Whether the gap is within the tolerance.
    """

    weight: Tensor
    ridge: float
    gap: float
    evaluations: int
    converged: bool


@dataclass(frozen=True)
class RidgePath:
    """Solutions for ridges from strong to weak, and the one that does best on other rows.

    Attributes:
        best (Solution): The chosen one.
        losses (dict[float, float]): Ridge → mean loss per unit of weight on the other rows.
        null (float): The same where the layer knows no more than how frequent each class is.
    """

    best: Solution
    losses: dict[float, float]
    null: float

    @property
    def explained(self) -> float:
        """The share of ``null`` that the fit explains (McFadden's R² on rows that it has not seen)."""
        return 1 - self.losses[self.best.ridge] / self.null if self.null > 0 else 0.0


class RidgeProblem:
    """Ridge-regularised maximum likelihood of a linear layer, for all of its classes at once.

    The objective is ``Σᵢ wᵢ ℓ(V aᵢ + b, yᵢ) + ½ρ‖V − V₀‖² + ½β‖b − b₀‖²`` with the binary cross-entropy, summed over
    classes, or the cross-entropy of the softmax as ℓ. It is strictly convex. β = ``BIAS_RIDGE`` leaves the bias nearly
    free: on COCO → VOC07 the loss on other images is 1 % less than with the ridge on the bias, too.

    It is minimised by L-BFGS (Nocedal & Wright, *Numerical Optimization*, Algorithm 7.4) with the inverse of
    ``H = Aᵀ diag(w h) A + ρ`` as the initial inverse Hessian of every class, where ``hᵢ`` is the largest curvature
    ``p(1 − p)`` among a row's classes at the start. Products with the rows are in their dtype, at least float32, all
    else in float64.

    Args:
        rows (Rows): The rows.
        prior (Tensor): ``[V b]₀`` ``(C, d + 1)``, or ``V₀`` ``(C, d)`` for a layer without a bias.
        loss (str): ``binary`` or ``softmax``.

    Raises:
        ValueError: If there are no rows, shapes differ, or a value is not finite.
    """

    def __init__(self, rows: Rows, prior: Tensor, loss: str):
        """Check the rows and append the column of ones that the bias needs."""
        n, d = rows.inputs.shape
        if loss not in LOSSES:
            raise ValueError(f"'loss={loss}' is invalid: loss must be one of {', '.join(LOSSES)}.")
        if not n or not float(rows.weights.sum()) > 0:
            raise ValueError("There is nothing to fit on: no row has a weight above 0.")
        classes = prior.shape[0]
        if rows.targets.shape != (n, classes) or rows.weights.shape != (n,) or prior.shape[1] not in {d, d + 1}:
            shapes = [tuple(x.shape) for x in (rows.inputs, rows.targets, rows.weights, prior)]
            raise ValueError(
                f"inputs, targets, weights and prior have shapes {', '.join(map(str, shapes))}; they must be (n, d), "
                "(n, C), (n,) and (C, d + 1) or (C, d)."
            )
        for name, tensor in ("inputs", rows.inputs), ("targets", rows.targets), ("weights", rows.weights):
            if not tensor.isfinite().all():
                raise ValueError(f"The rows to fit on hold {name} that are not finite (NaN or Inf).")
        self.loss, self.prior = loss, as_float64(prior)
        self._dtype = torch.promote_types(rows.inputs.dtype, torch.float32)
        self._bias = prior.shape[1] == d + 1
        self._rows = self._design(rows)
        self._targets, self._weights = rows.targets.to(self._dtype), rows.weights.to(self._dtype)[:, None]
        self._mass = float(as_float64(rows.weights).sum())
        self._scale = max(self.likelihood(self.null_weight(), rows) * self._mass, 1e-30)

    def _design(self, rows: Rows) -> Tensor:
        a = rows.inputs.to(self._dtype)
        return torch.cat([a, a.new_ones(len(a), 1)], 1) if self._bias else a

    def likelihood(self, weight: Tensor, rows: Rows) -> float:
        """Return the mean loss per unit of weight on other rows."""
        logits = self._design(rows) @ weight.to(self._dtype).T
        total = _losses(self.loss, logits, rows.targets.to(self._dtype)) * rows.weights
        return float(total.sum(dtype=torch.float64)) / float(rows.weights.sum(dtype=torch.float64))

    def null_weight(self) -> Tensor:
        """Return the weight of the layer that only knows how frequent each class is; zero without a bias."""
        weight = torch.zeros_like(self.prior)
        if self._bias:
            share = as_float64(self._weights * self._targets).sum(0) / self._mass
            floor = 1 / (2 * self._mass)  # of a class that no row shows: half a row
            share = share.clamp(floor, 1 - floor)
            weight[:, -1] = share.logit() if self.loss == "binary" else share.log()
        return weight

    def strongest_ridge(self) -> float:
        """Return the ridge to start a path with: ten times the mean curvature where only frequencies are known."""
        curvature = self._curvature(self.null_weight()).diagonal()
        return 10 * float(curvature[: len(curvature) - self._bias].mean())

    def solve(
        self, ridge: float, start: Tensor | None = None, tolerance: float = TOLERANCE, iterations: int = ITERATIONS
    ) -> Solution:
        """Return the solution for a ridge.

        Args:
            ridge (float): ρ, above 0.
            start (Tensor, optional): Where to start, of the prior's shape. None: at the prior.
            tolerance (float): Of the gap.
            iterations (int): At most; the solution then says that it has not converged.
        """
        weight = self.prior.clone() if start is None else as_float64(start).clone()
        invert = self._preconditioner(ridge, weight)
        value, gradient = self._objective(weight, ridge)
        evaluations, history, rounding = 1, _History(), torch.finfo(self._dtype).eps
        for _ in range(iterations):
            step = history.apply(gradient, invert)
            slope = float((gradient * step).sum())
            if slope <= 2 * tolerance * self._scale:
                break
            t = 1.0
            while True:  # backtracking; what is rounded off must not count as a rise
                new = weight - t * step
                new_value, new_gradient = self._objective(new, ridge)
                evaluations += 1
                if new_value <= value - 1e-4 * t * slope + rounding * abs(value) or t < 1e-6:
                    break
                t /= 2
            if t < 1e-6:  # rounding, not the tolerance, sets the limit
                break
            history.add(new - weight, new_gradient - gradient, invert)
            weight, value, gradient = new, new_value, new_gradient
        gap = float((gradient * history.apply(gradient, invert)).sum()) / 2 / self._scale
        return Solution(weight, ridge, gap, evaluations, gap <= tolerance)

    def _objective(self, weight: Tensor, ridge: float) -> tuple[float, Tensor]:
        logits = self._rows @ weight.to(self._dtype).T
        losses = _losses(self.loss, logits, self._targets)[:, None] * self._weights
        residual = (_probabilities(self.loss, logits) - self._targets) * self._weights
        away = weight - self.prior
        pull = away * self._ridges(ridge)
        value = float(losses.sum(dtype=torch.float64)) + float((pull * away).sum()) / 2
        return value, as_float64(residual.T @ self._rows) + pull

    def _ridges(self, ridge: float) -> Tensor:
        """Return the ridge of each column of ``[V b]``."""
        ridges = self.prior.new_full((self.prior.shape[1],), ridge)
        if self._bias:
            ridges[-1] = BIAS_RIDGE
        return ridges

    def _curvature(self, weight: Tensor) -> Tensor:
        p = _probabilities(self.loss, self._rows @ weight.to(self._dtype).T)
        largest = (p * (1 - p)).amax(1, keepdim=True)
        return as_float64(self._rows.T @ (self._rows * (largest * self._weights)))

    def _preconditioner(self, ridge: float, weight: Tensor) -> Callable[[Tensor], Tensor]:
        factor = torch.linalg.cholesky(self._curvature(weight) + torch.diag(self._ridges(ridge)))
        return lambda gradient: torch.cholesky_solve(gradient.T, factor).T


class _History:
    """The pairs of steps and changes of the gradient that L-BFGS multiplies with."""

    def __init__(self):
        self.pairs: list[tuple[Tensor, Tensor, float]] = []
        self.scale = 1.0

    def add(self, step: Tensor, change: Tensor, invert: Callable[[Tensor], Tensor]) -> None:
        """Keep a pair if it shows a positive curvature, as it does but for rounding."""
        curvature = float((step * change).sum())
        if curvature <= 1e-12 * float(step.norm() * change.norm()):
            return
        self.pairs = [*self.pairs[1 - MEMORY :], (step, change, 1 / curvature)]
        self.scale = curvature / float((change * invert(change)).sum())

    def apply(self, gradient: Tensor, invert: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the inverse Hessian times the gradient."""
        q, shares = gradient.clone(), []
        for step, change, inverse in reversed(self.pairs):
            shares.append(inverse * float((step * q).sum()))
            q -= shares[-1] * change
        q = self.scale * invert(q)
        for (step, change, inverse), share in zip(self.pairs, reversed(shares), strict=True):
            q += (share - inverse * float((change * q).sum())) * step
        return q


def fit_path(
    rows: Rows, others: Rows, prior: Tensor, loss: str = "binary", ridges: Sequence[float] | None = None
) -> RidgePath:
    """Fit a layer for ridges from strong to weak, each from the last solution, and choose by the loss on other rows.

    Args:
        rows (Rows): To fit on.
        others (Rows): Rows of other images, which the ridge is chosen by.
        prior (Tensor): ``[V b]₀`` ``(C, d + 1)``, which the ridge pulls towards; its bias is where the bias starts.
        loss (str): ``binary`` or ``softmax``.
        ridges (Sequence[float], optional): From strong to weak, at least one. None: half decades from ten times the
            mean curvature down, until the loss on the other rows rises or hardly falls any more.

    Returns:
        (RidgePath): The solutions' losses, and the best of them, to within the tolerance of comparisons, ``ROUGH``; of
            those that hardly differ the strongest.
    """
    problem = RidgeProblem(rows, prior, loss)
    if ridges is None:
        first = problem.strongest_ridge()
        ridges = [first * 10 ** (-STEP * i) for i in range(1 + round(DECADES / STEP))] if first > 0 else [1.0]
    null = problem.likelihood(problem.null_weight(), others)
    solutions: dict[float, Solution] = {}
    losses: dict[float, float] = {}
    last, least, limit, idle = None, math.inf, math.inf, 0
    for ridge in ridges:
        last = solutions[ridge] = problem.solve(ridge, None if last is None else last.weight, ROUGH)
        losses[ridge] = problem.likelihood(last.weight, others)
        idle = 0 if losses[ridge] < (1 - GAIN) * least else idle + 1
        least = min(least, losses[ridge])
        limit = least + ALIKE * max(null - least, 0.0)
        if idle == PATIENCE or losses[ridge] > limit:
            break
    best = next(solutions[ridge] for ridge in losses if losses[ridge] <= limit)
    return RidgePath(best, losses, null)


def _losses(loss: str, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each row, ``(n,)``."""
    linear = (targets * logits).sum(1)
    if loss == "binary":
        return nn.functional.softplus(logits).sum(1) - linear
    return logits.logsumexp(1) * targets.sum(1) - linear


def _probabilities(loss: str, logits: Tensor) -> Tensor:
    return logits.sigmoid() if loss == "binary" else logits.softmax(1)
