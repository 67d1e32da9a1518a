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
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import multi_dot, vector_norm
from torch.nn.functional import normalize

from yolo_sos.core.gram import Gram, as_float64

OK, NON_FINITE, RANK_ZERO = "ok", "non-finite", "rank-zero"  # ShiftResult.status
EPS = torch.finfo(torch.float64).eps
ACCURACY = 2e-9  # of outputs, where speed costs digits: far below the 6e-8 to which float32 rounds the weights
SHORT = 1e-140  # of a row: its square is still far from the end of float64's range
Map = Callable[[Tensor], Tensor]  # of tensors (k, d) in float64
Solved = tuple[Tensor, int, Map, Callable[[], float]]  # V*, the rank of the rows, the map to V*, the deviation


@dataclass(frozen=True)
class ShiftResult:
    """What a shift did to one weight matrix.

    Attributes:
        weight (Tensor): ``(out, d)``, dtype and device of the weight that came in; that very tensor unless status is
            ok.
        rank (float): Dimension of the subspace kept: numerical (an integer), or effective, Σf, for smooth filters.
        norm_before (float): Frobenius norm of V.
        norm_after (float): Frobenius norm of V*, in float64, before it is rounded to the weight's dtype.
        status (str): ``ok``; ``non-finite``: NaN or Inf in the input, or an overflow on the way; ``rank-zero``: the
            rows span nothing.
        linear (Callable): The linear map that took V to V*, for other tensors ``(k, d)`` in float64 and on the solver's
            device; the identity unless status is ok. It can read the rows, where they came in float64: write over them
            only afterwards.
        measure (Callable): Computes ``deviation``.
    """

    weight: Tensor
    rank: float
    norm_before: float
    norm_after: float
    status: str = OK
    linear: Map = field(default=lambda x: x, repr=False, compare=False)
    measure: Callable[[], float] = field(default=lambda: 0.0, repr=False, compare=False)

    @cached_property
    def deviation(self) -> float:
        """Relative change of the outputs without bias, ``‖A(V*−V)ᵀ‖_F / ‖AVᵀ‖_F``, rows weighted as in G.

        0 where there is no output to change. Computed when first asked for: from drawn rows it takes a third of the
        time of a solve.
        """
        return self.measure()


def unchanged(weight: Tensor, status: str) -> ShiftResult:
    """Return a result that says why ``weight`` stays as it is."""
    norm = float(as_float64(weight).norm())
    return ShiftResult(weight, 0.0, norm, norm, status)


# One linear system ----------------------------------------------------------------------------------------------------
def minimum_norm_shift(
    features: Tensor, weight: Tensor, *, rtol: float | None = None, method: str = "qr"
) -> ShiftResult:
    """Return the weight of least norm that gives the same outputs on every row of ``features``.

    Args:
        features (Tensor): A ``(n, d)``, any float dtype and device.
        weight (Tensor): V ``(out, d)``, any float dtype and device.
        rtol (float, optional): Singular values (``gauss``: pivots) of A, each row scaled to length 1, up to ``rtol``
            times the largest count as zero. None: ``max(n, d) · eps`` of the dtype of ``features``, taken as float32
            for the half precisions, whose own eps would throw away directions that carry signal.
        method (str): ``qr``: orthogonalisation of the shorter side of A, by the Cholesky factor of its products where A
            is surely well conditioned, else by Householder reflections; where A is not surely of full rank, the SVD of
            the triangular factor decides. ``svd``: singular value decomposition of A. ``gauss``: Algorithm 1 of the
            paper.

    Returns:
        (ShiftResult): ``rank`` is the numerical rank of A.

    Raises:
        ValueError: If shapes do not fit, ``method`` is unknown or ``rtol`` is not in [0, 1).
    """
    if features.ndim != 2 or weight.ndim != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"features {tuple(features.shape)} and weight {tuple(weight.shape)} do not fit: "
            "expected (n, d) and (out, d)."
        )
    if method not in _METHODS:
        raise ValueError(f"method='{method}' is unknown. Choose one of {', '.join(_METHODS)}.")
    if rtol is None:
        eps = torch.finfo(features.dtype if features.dtype == torch.float64 else torch.float32).eps
        rtol = min(max(features.shape) * eps, 0.5)
    if not 0.0 <= rtol < 1.0:
        raise ValueError(f"rtol={rtol} must be at least 0 and less than 1.")
    a = as_float64(features)
    v = as_float64(weight).to(a.device)
    norm_before = float(vector_norm(v))
    if not math.isfinite(norm_before):
        return unchanged(weight, NON_FINITE)
    solved = (_quick(a, v, rtol) if method == "qr" else None) or _careful(a, v, rtol, method)
    if isinstance(solved, str):
        return unchanged(weight, solved)
    shifted, rank, linear, measure = solved
    return _result(weight, shifted, rank, norm_before, float(vector_norm(shifted)), linear, measure)


def _quick(a: Tensor, v: Tensor, rtol: float) -> Solved | None:
    """Solve by the products of rows; None where A is not surely of full rank, or too ill conditioned for them.

    They square the condition number. What it is surely not above, with rows of length 1, follows from ``σ_max ≤ ‖A‖_F``
    and ``σ_min ≥ 1 / ‖A⁺‖_F`` at a fraction of an SVD. NaN is not below anything.
    """
    n, d = a.shape
    products = a @ a.T if n < d else a.T @ a
    factor, failed = torch.linalg.cholesky_ex(products, upper=True)
    if failed or not min(n, d):
        return None
    inverse = torch.cholesky_inverse(factor, upper=True)
    if n < d:
        lengths2 = products.diagonal().clamp(min=SHORT**2)
        condition2, accuracy = n * float(torch.dot(lengths2, inverse.diagonal())), ACCURACY
    else:  # V* = V, whatever the products lose, as long as the bound itself is right
        longest = max(float(vector_norm(a, dim=1).max()), SHORT)
        condition2, accuracy = n * longest**2 * float(inverse.trace()), 1e-3
    if not condition2 * max(rtol**2, EPS / accuracy) < 1.0:
        return None
    if n >= d:
        return v.clone(), d, torch.clone, lambda: 0.0
    outputs = v @ a.T

    def measure() -> float:  # A V*ᵀ = (A Aᵀ)(A Aᵀ)⁻¹ (A Vᵀ) takes neither A nor V, which may be written over by then
        z = outputs / (_largest(outputs) or 1.0)
        return _ratio((z @ inverse @ products - z).norm(), z.norm())

    # The sizes decide in which order to multiply.
    return multi_dot([outputs, inverse, a]), n, lambda x: multi_dot([x @ a.T, inverse, a]), measure


def _careful(a: Tensor, v: Tensor, rtol: float, method: str) -> Solved | str:
    """Solve by ``method`` whatever A is; the status where that is impossible."""
    longest = _largest(a) if a.numel() else 0.0
    if not math.isfinite(longest):
        return NON_FINITE
    if longest == 0.0:  # no rows, or all of them zero: V* would be 0, and nothing is known about V
        return RANK_ZERO
    # The span does not know how long a row is; nor should "zero" depend on it. Twice: squares of 1e200 are not finite.
    tiny = torch.finfo(a.dtype).tiny
    linear, rank = _METHODS[method](normalize(normalize(a, math.inf, dim=1, eps=tiny), dim=1, eps=tiny), rtol)
    if rank == 0:
        return RANK_ZERO
    shifted, rows, v = linear(v), a / longest, v.clone()  # rows: what is measured is relative
    return shifted, rank, linear, lambda: _ratio((rows @ (shifted - v).T).norm(), (rows @ v.T).norm())


def _largest(x: Tensor) -> float:
    """Return the largest magnitude; NaN and Inf come through."""
    low, high = x.aminmax()
    return max(-float(low), float(high))


def _ratio(change: Tensor, size: Tensor) -> float:
    return float(change) / float(size) if size > 0 else 0.0


def _result(
    weight: Tensor,
    shifted: Tensor,
    rank: float,
    norm_before: float,
    norm_after: float,
    linear: Map,
    measure: Callable[[], float],
) -> ShiftResult:
    new = shifted.to(weight.device if weight.device.type != "mps" else "cpu", weight.dtype).to(weight.device)
    # The new weight too: an entry of V* can be larger than any of V, more than float16 holds.
    largest = norm_after if norm_after < torch.finfo(new.dtype).max else _largest(new)
    if not (math.isfinite(norm_after) and math.isfinite(largest)):
        return unchanged(weight, NON_FINITE)
    return ShiftResult(new, float(rank), norm_before, norm_after, linear=linear, measure=measure)


def _onto(basis: Tensor) -> Map:
    """Return the projection on the span of a basis ``(rank, d)``, rows orthonormal."""
    return lambda x: x @ basis.T @ basis


def _svd(a: Tensor, rtol: float) -> tuple[Map, int]:
    _, s, basis = torch.linalg.svd(a, full_matrices=False)  # basis (min(n, d), d), rows orthonormal
    # Not >=: with rtol=0 a singular value of exactly zero must not count.
    rank = int((s > rtol * s[0]).sum())
    return _onto(basis[:rank]), rank


def _qr(a: Tensor, rtol: float) -> tuple[Map, int]:
    n, d = a.shape
    if n >= d:
        r = torch.linalg.qr(a, mode="r").R  # A = QR: A and R (d, d) have the same row space
        return (torch.clone, d) if _condition(r) * rtol < 1.0 else _svd(r, rtol)
    q, r = torch.linalg.qr(a.T)  # Aᵀ = QR with Q (d, n), R (n, n)
    if _condition(r) * rtol < 1.0:
        return _onto(q.T), n
    u, s, _ = torch.linalg.svd(r)
    rank = int((s > rtol * s[0]).sum())
    return _onto((q @ u[:, :rank]).T), rank


def _condition(r: Tensor) -> float:
    """Return what the condition number of an upper triangular matrix is surely not above: ``‖R‖_F ‖R⁻¹‖_F``.

    Its diagonal does not tell. A zero there gives NaN, which is not below anything.
    """
    inverse = torch.linalg.solve_triangular(r, torch.eye(len(r), dtype=r.dtype, device=r.device), upper=True)
    return float(vector_norm(r)) * float(vector_norm(inverse))


def _gauss(a: Tensor, rtol: float) -> tuple[Map, int]:
    """Algorithm 1: row-echelon form A' of A, zero rows dropped, then V*ᵀ = A'ᵀ(A'A'ᵀ)⁻¹Z' with Z' = A'Vᵀ."""
    n, d = a.shape
    a, rank = a.clone(), 0
    while rank < n:
        # Complete pivoting: the largest entry left, in any column. Only it tells the rank reliably; the pivots'
        # columns, in their order, are those of the row-echelon form.
        rest = a[rank:].abs()
        pivot, column = divmod(int(rest.argmax()), d)
        if float(rest[pivot, column]) <= rtol:
            break  # what elimination left of rows that are zero in exact arithmetic
        pivot += rank
        a[[rank, pivot]] = a[[pivot, rank]]
        factors = a[rank + 1 :, column] / a[rank, column]
        a[rank + 1 :] -= torch.outer(factors, a[rank])
        a[rank + 1 :, column] = 0.0
        rank += 1
    a = a[:rank]  # the rest are the zero rows
    lu, pivots = torch.linalg.lu_factor(a @ a.T)

    def linear(v: Tensor) -> Tensor:
        z = a @ v.T
        x = a.T @ torch.linalg.lu_solve(lu, pivots, z)  # V*ᵀ (d, out)
        # The normal equations square the condition number; one step of iterative refinement gives those digits back.
        return (x + a.T @ torch.linalg.lu_solve(lu, pivots, z - a @ x)).T

    return linear, rank


_METHODS: dict[str, Callable[[Tensor, float], tuple[Map, int]]] = {"svd": _svd, "qr": _qr, "gauss": _gauss}
SOLVERS = tuple(_METHODS)


# Spectral shifts ------------------------------------------------------------------------------------------------------
def principal_shift(gram: Gram, weight: Tensor, *, rank: int | None = None) -> ShiftResult:
    """Keep the part of V in the ``rank`` leading eigenvectors of G: f = 1 for the largest eigenvalues, 0 for the rest.

    Args:
        gram (Gram): Second moment of the layer's inputs, of size d.
        weight (Tensor): V ``(out, d)``, any float dtype and device.
        rank (int, optional): Dimensions kept, 1 to d. None, or more than the numerical rank of G: the numerical rank,
            which is OS over all rows: the outputs stay, only null directions go.

    Returns:
        (ShiftResult): ``rank`` is the number of eigenvectors kept.

    Raises:
        ValueError: If ``rank`` is not in 1 … d, or sizes do not fit.
    """
    if rank is not None and rank not in range(1, gram.d + 1):  # not 2.5 either
        raise ValueError(f"rank={rank} must be an integer from 1 to d={gram.d}.")

    def leading(eigenvalues: Tensor, energy: Tensor) -> Tensor:
        f = torch.ones_like(eigenvalues)
        if rank is not None:
            f[int(rank) :] = 0.0
        return f

    return _spectral_shift(gram, weight, leading)


def expected_shift(gram: Gram, weight: Tensor, *, rows: float) -> ShiftResult:
    """Take the expectation of row-sampled SOS: f = λ/(λ+μ) with Σf = ``rows``.

    When n rows are drawn by a determinantal process with kernel AAᵀ/μ, the projector P_S on their span has the
    expectation ``E[P_S] = G(G+μI)⁻¹``, and ``E[n] = tr G(G+μI)⁻¹`` (Dereziński & Mahoney, *Determinantal Point
    Processes in Randomized Numerical Linear Algebra*, Notices of the AMS 68, 2021).

    Args:
        gram (Gram): Second moment of the layer's inputs, of size d.
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
        if rows >= len(eigenvalues):
            return torch.ones_like(eigenvalues)
        # Σf falls from the rank at μ = 0 to 0 at μ = ∞.
        return _ridge(eigenvalues, lambda f: float(f.sum()) < rows)

    return _spectral_shift(gram, weight, expected)


def budgeted_shift(gram: Gram, weight: Tensor, *, budget: float) -> ShiftResult:
    """Take the least norm within an output budget: f = λ/(λ+μ) with ``‖A(V*−V)ᵀ‖_F = budget · ‖AVᵀ‖_F``.

    It is the exact solution of ``min ‖V*‖_F`` under that constraint; μ is its inverse Lagrange multiplier.

    Args:
        gram (Gram): Second moment of the layer's inputs, of size d.
        weight (Tensor): V ``(out, d)``, any float dtype and device.
        budget (float): ε, at least 0 and less than 1. 0 is the full shift.

    Returns:
        (ShiftResult): ``deviation`` is ``budget`` to 1e-6.

    Raises:
        ValueError: If ``budget`` is outside [0, 1), or sizes do not fit.
    """
    if not 0.0 <= budget < 1.0:
        raise ValueError(f"budget={budget} must be at least 0 and less than 1: a fraction of the outputs' norm.")

    def budgeted(eigenvalues: Tensor, energy: Tensor) -> Tensor:
        outputs = eigenvalues * energy
        if budget == 0.0 or not outputs.any():
            return torch.ones_like(eigenvalues)
        total = float(outputs.sum())
        return _ridge(eigenvalues, lambda f: float((outputs * (1 - f) ** 2).sum()) > budget**2 * total)

    return _spectral_shift(gram, weight, budgeted)


def _ridge(eigenvalues: Tensor, too_much: Callable[[Tensor], bool]) -> Tensor:
    """Return f = λ/(λ+μ) at the μ where ``too_much``, monotone in μ, turns true: bisection on log μ."""
    low = math.log(float(eigenvalues[-1])) - 45.0  # f = 1 to the last bit there, for every λ
    high = math.log(float(eigenvalues[0])) + 45.0  # and f < 1e-19 there
    for _ in range(200):  # ends when the interval cannot be halved in float64
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if too_much(_soft(eigenvalues, middle)) else (middle, high)
    return _soft(eigenvalues, low)


def _soft(eigenvalues: Tensor, log_mu: float) -> Tensor:
    return torch.sigmoid(eigenvalues.log() - log_mu)  # λ/(λ+μ), with no overflow at either end


def _spectral_shift(gram: Gram, weight: Tensor, spectral_filter: Callable[[Tensor, Tensor], Tensor]) -> ShiftResult:
    """Return ``V U diag(f) Uᵀ``.

    ``spectral_filter`` gets the r non-zero eigenvalues, descending, and the energies ``‖V u‖²`` of V along their
    eigenvectors; it returns f ``(r,)``. Null directions always go.
    """
    if weight.ndim != 2 or weight.shape[1] != gram.d:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit a Gram of d={gram.d}: expected (out, {gram.d}).")
    g = gram.matrix
    v = as_float64(weight).to(g.device)
    peak, norm_before = _largest(g), float(v.norm())
    if not (math.isfinite(peak) and math.isfinite(norm_before)):
        return unchanged(weight, NON_FINITE)
    if peak == 0.0:
        return unchanged(weight, RANK_ZERO)
    # Divided: eigenvalues in a range where neither squares nor logarithms can run out.
    eigenvalues, vectors = torch.linalg.eigh(g / peak)
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)  # descending
    # Rounding of the sum leaves eigenvalues of d·eps·λ_max where exact arithmetic has zeros.
    rank = int((eigenvalues > gram.d * EPS * eigenvalues[0]).sum())
    eigenvalues, vectors = eigenvalues[:rank], vectors[:, :rank]
    projected = v @ vectors  # (out, r)
    energy = projected.square().sum(0)
    # On the CPU: finding μ takes a hundred comparisons of scalars.
    f = spectral_filter(eigenvalues.cpu(), energy.cpu()).to(v.device)
    kept = int(f.count_nonzero())
    basis, f_kept = vectors[:, :kept], f[:kept]
    return _result(
        weight,
        (projected[:, :kept] * f_kept) @ basis.T,
        float(f.sum()),
        norm_before,
        float((f**2 * energy).sum().sqrt()),
        linear=lambda x: (x @ basis * f_kept) @ basis.T,
        # ‖A X‖_F² = tr(Xᵀ G X): the outputs' norm without the rows
        measure=lambda: _ratio(((1 - f) ** 2 * eigenvalues * energy).sum().sqrt(), (eigenvalues * energy).sum().sqrt()),
    )
