# yolo-sos, AGPL-3.0
"""The smallest weights with the same outputs: one linear layer, one system.

Source: Zhou, Li, Feng, Huang, *Improving Generalization of Deep Neural Networks by Optimum Shifting*, AAAI 2025
(arXiv 2405.14111). A final layer computes ``Z = A Vᵀ + b``. Of all V with the same Z on the rows of A, the one of least
Frobenius norm is ``V* = V P`` with P the orthogonal projector on the row space of A. ``minimum_norm_shift`` computes it
from rows; the spectral shifts generalise it to ``V* = V U diag(f) Uᵀ`` with U the eigenvectors of the rows' second
moment ``G = Σ w aᵀa`` and a filter f of its eigenvalues.

Everything is computed in float64, whatever comes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from yolo_sos.core import checks
from yolo_sos.core.method import SOLVERS, Method
from yolo_sos.core.moments import Moments, RowSample, as_float64

OK, NON_FINITE, RANK_ZERO = "ok", "non-finite", "rank-zero"  # ShiftResult.status
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class ShiftResult:
    """What a shift does to one weight matrix.

    Attributes:
        weight (Tensor): V* ``(out, d)``, dtype and device of the weight that came in; that very tensor unless status is
            ok.
        rank (float): Dimension of the subspace kept: numerical (an integer), or effective, Σf, for smooth filters.
        norm_before (float): Frobenius norm of V.
        norm_after (float): Frobenius norm of V*, in float64, before it is rounded to the weight's dtype.
        deviation (float): Relative change of the outputs without bias, ``‖A(V*−V)ᵀ‖_F / ‖AVᵀ‖_F``, rows weighted as in
            G. 0 where there is no output to change.
        status (str): ``ok``; ``non-finite``: NaN or Inf in the input, or an overflow; ``rank-zero``: the rows span
            nothing.
        transform (Tensor | None): ``(d, d)`` float64, on the solver's device, with ``V* = V transform``, or one for
            each row of V, ``(out, d, d)``; None unless status is ok.
    """

    weight: Tensor
    rank: float
    norm_before: float
    norm_after: float
    deviation: float = 0.0
    status: str = OK
    transform: Tensor | None = field(default=None, repr=False, compare=False)

    def apply(self, tensor: Tensor, step: float = 1.0) -> Tensor:
        """Return what a step t of the shift makes of a tensor whose matrix form is ``(k, d)``: ``x + t (x P − x)``."""
        if self.transform is None or step == 0.0:
            return tensor
        x = as_float64(tensor.flatten(1)).to(self.transform.device)
        moved = x + step * (_times(x, self.transform) - x)
        return _like(moved, tensor).view_as(tensor)


def _like(x: Tensor, tensor: Tensor) -> Tensor:
    """Return a float64 tensor in another's dtype and on its device; MPS gets no float64 on the way."""
    return x.to("cpu" if tensor.device.type == "mps" else tensor.device, tensor.dtype).to(tensor.device)


def unchanged(weight: Tensor, status: str) -> ShiftResult:
    """Return a result that says why ``weight`` stays as it is."""
    norm = float(as_float64(weight).norm())
    return ShiftResult(weight, 0.0, norm, norm, status=status)


def solved(weight: Tensor, transform: Tensor, rank: float, deviation: float) -> ShiftResult:
    """Return a result with ``V* = V transform``, or one that says why not where that is not finite."""
    v = as_float64(weight).to(transform.device)
    shifted = _times(v, transform)
    norm_before, norm_after = float(v.norm()), float(shifted.norm())
    new = _like(shifted, weight)
    # The new weight too: an entry of V* can be larger than any of V, more than float16 holds.
    if not (math.isfinite(norm_before) and math.isfinite(norm_after) and new.isfinite().all()):
        return unchanged(weight, NON_FINITE)
    return ShiftResult(new, float(rank), norm_before, norm_after, deviation, transform=transform)


def _times(x: Tensor, transform: Tensor) -> Tensor:
    return x @ transform if transform.ndim == 2 else torch.einsum("kd,kde->ke", x, transform)


def _ratio(change: Tensor, size: Tensor) -> float:
    """Return ``change / size``, 0 where there is nothing to change."""
    return float(change) / float(size) if size > 0 else 0.0


# One linear system ----------------------------------------------------------------------------------------------------
def minimum_norm_shift(
    features: Tensor, weight: Tensor, *, rtol: float | None = None, solver: str = "svd"
) -> ShiftResult:
    """Return the weight of least norm that gives the same outputs on every row of ``features``.

    Args:
        features (Tensor): A ``(n, d)``, any float dtype and device.
        weight (Tensor): V ``(out, d)``, any float dtype and device.
        rtol (float, optional): Singular values (``gauss``: pivots) of A, each row scaled to length 1, up to ``rtol``
            times the largest count as zero. None: ``max(n, d) · eps`` of the dtype of ``features``, taken as float32
            for the half precisions, whose own eps would drop directions that carry signal.
        solver (str): ``svd``: singular value decomposition of A. ``gauss``: Algorithm 1 of the paper.

    Returns:
        (ShiftResult): ``rank`` is the numerical rank of A.

    Raises:
        ValueError: If shapes do not fit, ``solver`` is unknown or ``rtol`` is not in [0, 1).
    """
    if features.ndim != 2 or weight.ndim != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"features {tuple(features.shape)} and weight {tuple(weight.shape)} do not fit: "
            "expected (n, d) and (out, d)."
        )
    checks.choice(*SOLVERS)("solver", solver)
    if rtol is None:
        eps = torch.finfo(features.dtype if features.dtype == torch.float64 else torch.float32).eps
        rtol = min(max(features.shape) * eps, 0.5)
    if not 0.0 <= rtol < 1.0:
        raise ValueError(f"rtol={rtol} must be at least 0 and less than 1.")
    a = as_float64(features)
    v = as_float64(weight).to(a.device)
    if not (a.isfinite().all() and v.isfinite().all()):
        return unchanged(weight, NON_FINITE)
    if not a.any():  # no rows, or all of them zero: V* would be 0, and nothing is known about V
        return unchanged(weight, RANK_ZERO)
    # The span does not depend on the rows' lengths, nor should the cut-off. Twice: squares of 1e200 are not finite.
    tiny = torch.finfo(a.dtype).tiny
    unit = normalize(normalize(a, math.inf, dim=1, eps=tiny), dim=1, eps=tiny)
    transform, rank = (_gauss if solver == "gauss" else _svd)(unit, rtol)
    if rank == 0:
        return unchanged(weight, RANK_ZERO)
    rows = a / a.abs().max()  # the deviation is relative
    deviation = _ratio((rows @ (v @ transform - v).T).norm(), (rows @ v.T).norm())
    return solved(weight, transform, rank, deviation)


def _svd(a: Tensor, rtol: float) -> tuple[Tensor, int]:
    _, s, basis = torch.linalg.svd(a, full_matrices=False)  # basis (min(n, d), d), rows orthonormal
    rank = int((s > rtol * s[0]).sum())  # not >=: with rtol=0 a singular value of exactly zero must not count
    return basis[:rank].T @ basis[:rank], rank


def _gauss(a: Tensor, rtol: float) -> tuple[Tensor, int]:
    """Algorithm 1: row-echelon form A' of A, zero rows dropped, then ``P = A'ᵀ(A'A'ᵀ)⁻¹A'``."""
    n, d = a.shape
    a, rank = a.clone(), 0
    while rank < n:
        # Complete pivoting: the largest entry left, in any column. Only it reveals the rank reliably; the pivots'
        # columns, in their order, are those of the row-echelon form.
        rest = a[rank:].abs()
        pivot, column = divmod(int(rest.argmax()), d)
        if float(rest[pivot, column]) <= rtol:
            break  # what elimination leaves of rows that are zero in exact arithmetic
        pivot += rank
        a[[rank, pivot]] = a[[pivot, rank]]
        factors = a[rank + 1 :, column] / a[rank, column]
        a[rank + 1 :] -= torch.outer(factors, a[rank])
        a[rank + 1 :, column] = 0.0
        rank += 1
    a = a[:rank]  # the rest are the zero rows
    lu, pivots = torch.linalg.lu_factor(a @ a.T)
    x = a.T @ torch.linalg.lu_solve(lu, pivots, a)
    # The normal equations square the condition number; one step of iterative refinement restores those digits.
    return x + a.T @ torch.linalg.lu_solve(lu, pivots, a - a @ x), rank


# Spectral shifts ------------------------------------------------------------------------------------------------------
def principal_shift(moments: Moments, weight: Tensor, *, rank: int | None = None) -> ShiftResult:
    """Keep the part of V in the ``rank`` leading eigenvectors of G: f = 1 for the largest eigenvalues, 0 for the rest.

    Args:
        moments (Moments): Second moment of the layer's inputs, of size d.
        weight (Tensor): V ``(out, d)``, any float dtype and device.
        rank (int, optional): Dimensions kept, 1 to d. None, or more than the numerical rank of G: the numerical rank,
            which is OS over all rows: the outputs stay, only null directions go.

    Returns:
        (ShiftResult): ``rank`` is the number of eigenvectors kept.

    Raises:
        ValueError: If ``rank`` is not in 1 … d, or sizes do not fit.
    """
    if rank is not None and rank not in range(1, moments.d + 1):  # not 2.5 either
        raise ValueError(f"rank={rank} must be an integer from 1 to d={moments.d}.")

    def leading(eigenvalues: Tensor, energy: Tensor) -> Tensor:
        f = torch.ones_like(eigenvalues)
        if rank is not None:
            f[int(rank) :] = 0.0
        return f

    return _spectral_shift(moments, weight, leading)


def expected_shift(moments: Moments, weight: Tensor, *, rows: float) -> ShiftResult:
    """Take the expectation of row-sampled SOS: f = λ/(λ+μ) with Σf = ``rows``.

    When n rows are drawn by a determinantal process with kernel AAᵀ/μ, the projector P_S on their span has the
    expectation ``E[P_S] = G(G+μI)⁻¹``, and ``E[n] = tr G(G+μI)⁻¹`` (Dereziński & Mahoney, *Determinantal Point
    Processes in Randomized Numerical Linear Algebra*, Notices of the AMS 68, 2021).

    Args:
        moments (Moments): Second moment of the layer's inputs, of size d.
        weight (Tensor): V ``(out, d)``, any float dtype and device.
        rows (float): Expected number of rows, the effective rank, above 0. From the numerical rank of G on, the full
            shift: more is not attainable.

    Returns:
        (ShiftResult): ``rank`` is Σf, equal to ``rows`` to 1e-6 where attainable.

    Raises:
        ValueError: If ``rows`` is not a positive number, or sizes do not fit.
    """
    if not (math.isfinite(rows) and rows > 0):
        raise ValueError(f"rows={rows} must be a positive number: the expected number of rows.")

    def expected(eigenvalues: Tensor, energy: Tensor) -> Tensor:
        return ridge_of_rank(eigenvalues, rows)

    return _spectral_shift(moments, weight, expected)


def budgeted_shift(moments: Moments, weight: Tensor, *, budget: float) -> ShiftResult:
    """Take the least norm within an output budget: f = λ/(λ+μ) with ``‖A(V*−V)ᵀ‖_F = budget · ‖AVᵀ‖_F``.

    It is the exact solution of ``min ‖V*‖_F`` under that constraint; μ is its inverse Lagrange multiplier.

    Args:
        moments (Moments): Second moment of the layer's inputs, of size d.
        weight (Tensor): V ``(out, d)``, any float dtype and device.
        budget (float): ε, at least 0 and less than 1. 0 is the full shift.

    Returns:
        (ShiftResult): ``deviation`` is ``budget`` to 1e-6.

    Raises:
        ValueError: If ``budget`` is outside [0, 1), or sizes do not fit.
    """
    checks.budget("budget", budget)

    def budgeted(eigenvalues: Tensor, energy: Tensor) -> Tensor:
        outputs = eigenvalues * energy
        if budget == 0.0 or not outputs.any():
            return torch.ones_like(eigenvalues)
        total = float(outputs.sum())
        return _ridge(eigenvalues, lambda f: float((outputs * (1 - f) ** 2).sum()) > budget**2 * total)

    return _spectral_shift(moments, weight, budgeted)


def ridge_of_rank(eigenvalues: Tensor, rank: float) -> Tensor:
    """Return f = λ/(λ+μ) for λ > 0 with Σf = ``rank``; 1 where there are no more eigenvalues than that."""
    if rank >= len(eigenvalues):
        return torch.ones_like(eigenvalues)
    # Σf falls from the number of eigenvalues at μ = 0 to 0 at μ = ∞.
    return _ridge(eigenvalues, lambda f: float(f.sum()) < rank)


def _ridge(eigenvalues: Tensor, too_much: Callable[[Tensor], bool]) -> Tensor:
    """Return f = λ/(λ+μ) for λ > 0 at the μ where ``too_much``, monotone in μ, turns true: bisection on log μ."""
    low = math.log(float(eigenvalues.min())) - 45.0  # f = 1 to the last bit there, for every λ
    high = math.log(float(eigenvalues.max())) + 45.0  # and f < 1e-19 there
    for _ in range(200):  # ends when the interval cannot be halved in float64
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if too_much(_soft(eigenvalues, middle)) else (middle, high)
    return _soft(eigenvalues, low)


def _soft(eigenvalues: Tensor, log_mu: float) -> Tensor:
    return torch.sigmoid(eigenvalues.log() - log_mu)  # λ/(λ+μ), with no overflow at either end


def _spectral_shift(
    moments: Moments, weight: Tensor, spectral_filter: Callable[[Tensor, Tensor], Tensor]
) -> ShiftResult:
    """Return ``V U diag(f) Uᵀ``.

    ``spectral_filter`` gets the r non-zero eigenvalues, descending, and the energies ``‖V u‖²`` of V along their
    eigenvectors; it returns f ``(r,)``. Null directions always go.
    """
    if weight.ndim != 2 or weight.shape[1] != moments.d:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit Moments of d={moments.d}: expected (out, d).")
    g = moments.matrix
    v = as_float64(weight).to(g.device)
    peak = float(g.abs().max())
    if not (math.isfinite(peak) and v.isfinite().all()):
        return unchanged(weight, NON_FINITE)
    if peak == 0.0:
        return unchanged(weight, RANK_ZERO)
    # Divided: eigenvalues in a range where neither squares nor logarithms overflow.
    eigenvalues, vectors = torch.linalg.eigh(g / peak)
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)  # descending
    # Rounding of the sum leaves eigenvalues of d·eps·λ_max where exact arithmetic has zeros.
    rank = int((eigenvalues > moments.d * EPS * eigenvalues[0]).sum())
    eigenvalues, vectors = eigenvalues[:rank], vectors[:, :rank]
    energy = (v @ vectors).square().sum(0)
    # On the CPU: finding μ takes a hundred comparisons of scalars.
    f = spectral_filter(eigenvalues.cpu(), energy.cpu()).to(v.device)
    # ‖A X‖_F² = tr(Xᵀ G X): the outputs' norm without the rows
    outputs = eigenvalues * energy
    return solved(weight, (vectors * f) @ vectors.T, float(f.sum()), filtered_deviation(f, outputs))


def filtered_deviation(f: Tensor, outputs: Tensor) -> float:
    """Return the relative change of outputs with the squared norms ``outputs`` along the directions that f shrinks."""
    return _ratio(((1 - f) ** 2 * outputs).sum().sqrt(), outputs.sum().sqrt())


def solve(method: Method, rows: Moments | RowSample, weight: Tensor) -> ShiftResult:
    """Return the shift of ``weight`` ``(out, d)`` by a method, for the rows that were accumulated for it."""
    if method.name == "rows":
        assert isinstance(rows, RowSample)
        sample = rows.take(method.rank_of(rows.d))
        return minimum_norm_shift(sample.to(weight.device), weight, solver=method.solver)
    moments = rows.moments if isinstance(rows, RowSample) else rows
    if method.name == "expected":
        return expected_shift(moments, weight, rows=method.rank_of(moments.d))
    if method.name == "budget":
        return budgeted_shift(moments, weight, budget=method.at().budget)  # type: ignore[arg-type]
    return principal_shift(moments, weight, rank=None if method.name == "full" else method.rank_of(moments.d))
