# yolo-sos, AGPL-3.0
"""Calibration: an affine map on class scores that makes them probabilities, and its fold into a final layer.

A detector's score is σ(z). ``fit_logistic`` finds the map ``z → a·z + b`` of least negative log-likelihood of hits
(Platt, *Probabilistic Outputs for Support Vector Machines*, 1999), for all classes together or for each;
``fit_softmax`` finds that of a classifier, whose scores are softmax(z): one temperature, or a scale and a shift per
class (Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017). As the last layer is linear, ``fold`` puts
the map into its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Hits, and misses, that a class needs for a map of its own: ten of the rarer outcome for each of the two parameters
# (Peduzzi et al., A Simulation Study of the Number of Events per Variable in Logistic Regression Analysis, 1996).
ENOUGH = 20
ITERATIONS = 100  # of Newton's method, which takes five to ten where there is a minimum
PRECISION = 1e-13  # of the mean log-likelihood: the fit ends where a Newton step promises no more
OWN_MAP, SHARED = "own", "shared"


class NoMapError(ValueError):
    """There is no calibration map: none that is finite, or none that rises with the score."""


@dataclass(frozen=True)
class AffineMap:
    """A map ``z → a·z + b`` of each class's logits.

    Attributes:
        scale (Tensor): a, float64, shape (C,), all above 0.
        shift (Tensor): b, float64, shape (C,).
        scale_error (Tensor): Standard error of a, from the inverse information, shape (C,). It takes the samples for
            independent; detections in one image are not quite.
        shift_error (Tensor): Standard error of b, shape (C,).
        status (tuple[str, ...]): For each class ``own``, if its map was fitted on its samples alone, or ``shared``,
            with the reason after a colon where a map of its own was asked for.
    """

    scale: Tensor
    shift: Tensor
    scale_error: Tensor
    shift_error: Tensor
    status: tuple[str, ...]

    def __call__(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return mapped logits in float64.

        Args:
            logits (Tensor): ``(n,)``, each of the class in ``labels``, or ``(n, C)``.
            labels (Tensor, optional): Class of each logit, ``(n,)``. None: logits of all classes.
        """
        scale, shift = (self.scale, self.shift) if labels is None else (self.scale[labels], self.shift[labels])
        return scale * logits.double() + shift


def fit_logistic(logits: Tensor, targets: Tensor, labels: Tensor, classes: int, per_class: bool = False) -> AffineMap:
    """Return the map of least negative log-likelihood ``−Σ t log σ(az + b) + (1 − t) log σ(−az − b)``.

    Args:
        logits (Tensor): z of each detection, ``(n,)``.
        targets (Tensor): 1 for a hit, 0 for a miss, or a number between, ``(n,)``.
        labels (Tensor): Class of each detection, ``(n,)``.
        classes (int): Number of classes C.
        per_class (bool): Whether each class has a map of its own. One with less than ``ENOUGH`` hits or misses, or
            without a map that is finite and rises, takes the map of all detections together.

    Raises:
        NoMapError: If all are hits or all misses, the scores do not rise with them, or separate them.
        ValueError: If there are no detections, or a number is not finite or a target outside [0, 1].
    """
    z, t = _checked(logits, targets)
    (a, b), errors = _logistic(z, t)
    scale, shift = torch.full((classes,), a, dtype=z.dtype), torch.full((classes,), b, dtype=z.dtype)
    scale_error, shift_error = torch.full_like(scale, errors[0]), torch.full_like(scale, errors[1])
    status = [SHARED] * classes
    for c in range(classes if per_class else 0):
        of = labels == c
        hits, misses = float(t[of].sum()), float((1 - t[of]).sum())
        if min(hits, misses) < ENOUGH:
            status[c] = f"{SHARED}: {hits:.4g} hits and {misses:.4g} misses, fewer than {ENOUGH} of one"
            continue
        try:
            (scale[c], shift[c]), (scale_error[c], shift_error[c]) = _logistic(z[of], t[of])
            status[c] = OWN_MAP
        except NoMapError as e:
            status[c] = f"{SHARED}: {e}"
    return AffineMap(scale, shift, scale_error, shift_error, tuple(status))


def fit_softmax(logits: Tensor, labels: Tensor, per_class: bool = False) -> AffineMap:
    """Return the map of least cross-entropy ``−Σ log softmax(a∘z + b)`` of a classifier.

    Args:
        logits (Tensor): z of each image, ``(n, C)``.
        labels (Tensor): Its class, ``(n,)``.
        per_class (bool): False: one temperature, ``z → z / T``, with a = 1 / T and b = 0. True: vector scaling, a and b
            of each class that at least ``ENOUGH`` images belong to; other classes keep the temperature. The mean of b
            over the classes with a map of their own, which no probability depends on, is 0.

    Raises:
        NoMapError: If no finite map with positive scales has the least cross-entropy: every image is recognized, or
            the scores of a class do not rise with its probability.
        ValueError: If there are no images, or a logit is not finite.
    """
    if not len(logits):
        raise ValueError("There are no images to fit a calibration on.")
    if not logits.isfinite().all():
        raise ValueError("Logits are not finite (NaN or Inf): there is nothing to fit a calibration on.")
    z, (n, c) = logits.double(), logits.shape
    if bool((z.gather(1, labels[:, None])[:, 0] >= z.amax(1)).all()):
        raise NoMapError("every image is recognized, so the likelihood rises with the scale without end")
    rows = torch.arange(n, device=z.device)

    def temperature(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = (x * z).log_softmax(1)
        mean = (log_p.exp() * z).sum(1)
        curvature = ((log_p.exp() * z.square()).sum(1) - mean.square()).mean()
        return -log_p[rows, labels].mean(), (mean - z[rows, labels]).mean()[None], curvature[None, None]

    x, error = _minimum(temperature, torch.ones(1, dtype=z.dtype, device=z.device), n)
    _check_rising(x, error)
    scale, shift, scale_error = x.repeat(c), z.new_zeros(c), error.repeat(c)
    shift_error, status = z.new_zeros(c), [SHARED] * c
    counts = torch.bincount(labels, minlength=c)
    free = (counts >= ENOUGH).nonzero()[:, 0] if per_class else counts[:0].long()
    if per_class:
        status = [OWN_MAP if m >= ENOUGH else f"{SHARED}: {m} images, fewer than {ENOUGH}" for m in counts.tolist()]
    if len(free) > 1:
        one_hot = torch.nn.functional.one_hot(labels, c).double()[:, free]
        zf, k = z[:, free], len(free)

        def vector(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            u = scale * z
            u[:, free] = x[:k] * zf + x[k:]
            log_p = u.log_softmax(1)
            p = log_p[:, free].exp()
            rest = p - one_hot
            both = torch.cat([p * zf, p], 1)
            blocks = [(p * zf.square()).mean(0), (p * zf).mean(0), p.mean(0)]
            curvature = -both.T @ both / n
            for i, j, block in ((0, 0, blocks[0]), (0, k, blocks[1]), (k, 0, blocks[1]), (k, k, blocks[2])):
                curvature[i : i + k, j : j + k].diagonal().add_(block)
            return -log_p[rows, labels].mean(), torch.cat([(rest * zf).mean(0), rest.mean(0)]), curvature

        x, error = _minimum(vector, torch.cat([scale[free], shift[free]]), n)
        _check_rising(x[:k], error[:k])
        if k == c:
            x[k:] -= x[k:].mean()
        scale[free], shift[free], scale_error[free], shift_error[free] = x[:k], x[k:], error[:k], error[k:]
    return AffineMap(scale, shift, scale_error, shift_error, tuple(status))


def fold(weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return ``[V b]`` of a layer whose outputs are mapped: ``V ← aV``, ``b ← a·b + b'``, each row its own.

    Args:
        weight (Tensor): ``[V b]``, ``(out, d + 1)``.
        scale (Tensor): a of each output, ``(out,)``.
        shift (Tensor): b' of each output, ``(out,)``.

    Returns:
        (Tensor): In the dtype and on the device of ``weight``; computed in float64.
    """
    scale, shift = scale.to(weight.device), shift.to(weight.device)
    folded = scale[:, None] * weight.double()
    folded[:, -1] += shift
    return folded.to(weight.dtype)


def _checked(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if not len(logits):
        raise ValueError("There are no detections to fit a calibration on.")
    z, t = logits.double(), targets.double()
    if not z.isfinite().all():
        raise ValueError("Scores are not finite (NaN or Inf): there is nothing to fit a calibration on.")
    if not ((t >= 0) & (t <= 1)).all():
        raise ValueError("Targets must lie in [0, 1]: 1 for a hit, 0 for a miss.")
    return z, t


def _logistic(z: Tensor, t: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return (a, b) of least negative log-likelihood, and their standard errors."""
    if bool((t == t[0]).all()):
        what = {0.0: "all detections are misses", 1.0: "all detections are hits"}
        raise NoMapError(what.get(float(t[0]), "all targets are the same"))
    low, high = z[t > 0], z[t < 1]  # scores of what is a hit, wholly or in part, and of what is a miss
    if low.min() >= high.max() or high.min() >= low.max():
        raise NoMapError("one score separates hits and misses, so the likelihood rises with the scale without end")
    rows = torch.stack([z, torch.ones_like(z)], 1)

    def objective(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = rows @ x
        p = u.sigmoid()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(u, t)
        return loss, rows.T @ (p - t) / len(t), (rows * (p * (1 - p))[:, None]).T @ rows / len(t)

    x, error = _minimum(objective, torch.tensor([1.0, 0.0], dtype=z.dtype, device=z.device), len(t))
    if not x[0] > 0:
        raise NoMapError(f"hits do not become more frequent as the score rises: the scale is {float(x[0]):.3g}")
    return (float(x[0]), float(x[1])), (float(error[0]), float(error[1]))


def _check_rising(scale: Tensor, error: Tensor) -> None:
    """Raise a ``NoMapError`` unless scales are positive and determined by the data."""
    worst = int((scale - error).argmin())
    if not bool((scale > error).all()):  # where classes are separable, scale and error grow without end
        raise NoMapError(
            f"the scale of class {worst} is {float(scale[worst]):.3g} ± {float(error[worst]):.2g}: the data do not "
            "determine a map that rises with the score"
        )


def _minimum(objective: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the minimum of a convex function by Newton's method with a line search, and its standard errors.

    Args:
        objective (Callable): Returns the mean negative log-likelihood at x, its gradient and its Hessian.
        x (Tensor): Where to start, ``(p,)``.
        n (int): Number of samples.
    """
    loss, gradient, curvature = objective(x)
    for _ in range(ITERATIONS):
        inverse = torch.linalg.pinv(curvature, hermitian=True)  # a shift of all logits alike changes no softmax
        step = inverse @ gradient
        promised = float(gradient @ step)
        if promised <= PRECISION:
            return x, (inverse.diagonal().clamp_min(0) / n).sqrt()
        t = 1.0
        while not (new := objective(x - t * step))[0] <= loss - 1e-4 * t * promised and t > 1e-12:
            t /= 2
        if t <= 1e-12:  # the rest is rounding
            return x, (inverse.diagonal().clamp_min(0) / n).sqrt()
        x, (loss, gradient, curvature) = x - t * step, new
    raise NoMapError(f"the likelihood has no maximum that {ITERATIONS} steps of Newton's method reach")
