# yolo-sos, AGPL-3.0
"""Whether scores are probabilities: calibration errors, the reliability curve, and thresholds, of matched detections.

A detection has a score p and a target t. At ``iou=0.5`` t is 1 if it is a true positive by the rules of the VOC devkit
(see `voc`) at that IoU, else 0; with ``iou="soft"`` t is the mean of that over the IoUs 0.5, 0.55, ..., 0.95. What
belongs to a difficult object does not count. Only detections with ``p >= LEAST_SCORE`` take part: a detector returns
hundreds of boxes per image below it, nearly all of them misses with a score near 0, in which any error would drown.

- ECE: detections of all classes in ``BINS`` bins of equal width, ``Σ_bins (n_bin / n) |mean p − mean t|`` (Guo et al.,
  *On Calibration of Modern Neural Networks*, ICML 2017; for detections Küppers et al., *Multivariate Confidence
  Calibration for Object Detection*, CVPR workshops 2020).
- LaECE: the same for each class, in ``LA_BINS`` bins, with the IoU with its object as the target of a true positive,
  then the mean over the classes with objects and detections (LaECE₀ of Kuzucu et al., *On Calibration of Object
  Detectors*, ECCV 2024: every detection with an object of its class to itself is a true positive, whatever their IoU).
  They match as COCO does, where a detection may take the second best object if the best is taken; here it belongs to
  the best. They leave out detections below a threshold of each detector's own; here ``LEAST_SCORE`` is that of all.
- Brier: ``mean (p − t)²``. NLL: ``mean −t log p − (1 − t) log(1 − p)``, p no nearer to 0 and 1 than ``NEAREST``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from yolo_sos.evaluate.voc import Curve, Matches, voc_result

LEAST_SCORE = 0.01
BINS = 15
LA_BINS = 25
NEAREST = 2.0**-24  # where float32 no longer tells a score from 0 or 1
NOT_JUDGED = f"scores are not between 0 and 1, or none is at least {LEAST_SCORE:g}."
SOFT_IOUS = tuple(0.5 + 0.05 * i for i in range(10))


@dataclass(frozen=True, eq=False)
class Samples:
    """What calibration is judged on: scores, and what they should have been.

    Attributes:
        score (np.ndarray): p of each detection or image, float64, shape (n,).
        target (np.ndarray): t, in [0, 1], shape (n,).
        label (np.ndarray): Index of the class, int64, shape (n,).
        image (np.ndarray): Index of the image, int64, shape (n,).
        overlap (np.ndarray): Target of LaECE: IoU with the object that a detection has to itself, else 0, shape (n,);
            NaN where there are no boxes.
    """

    score: np.ndarray
    target: np.ndarray
    label: np.ndarray
    image: np.ndarray
    overlap: np.ndarray

    def __len__(self) -> int:
        """Return the number of detections or images."""
        return len(self.score)

    def __getitem__(self, chosen: np.ndarray) -> Samples:
        """Return some of them, by index or by mask."""
        return Samples(*(column[chosen] for column in vars(self).values()))

    def __add__(self, other: Samples) -> Samples:
        """Return both together."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Samples(*(np.concatenate(pair) for pair in pairs))

    def scored(self, score: np.ndarray) -> Samples:
        """Return the same with other scores."""
        return Samples(**{**vars(self), "score": score})


@dataclass(frozen=True, eq=False)
class Reliability:
    """Calibration errors, and the curve that shows them; see the module for their definitions.

    Attributes:
        samples (int): Detections or images that took part.
        ece (float): Expected calibration error.
        laece (float): Localization-aware expected calibration error; NaN where there are no boxes.
        brier (float): Brier score.
        nll (float): Negative log-likelihood.
        score (np.ndarray): Mean score of each of the ``BINS`` bins, NaN for an empty one.
        target (np.ndarray): Mean target of each bin.
        count (np.ndarray): Detections or images in each bin.
    """

    samples: int
    ece: float
    laece: float
    brier: float
    nll: float
    score: np.ndarray
    target: np.ndarray
    count: np.ndarray

    def errors(self) -> dict[str, float]:
        """Return the four errors by name."""
        return {"ECE": self.ece, "LaECE": self.laece, "NLL": self.nll, "Brier": self.brier}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        curve = {"score": self.score.tolist(), "target": self.target.tolist(), "count": self.count.tolist()}
        return {"samples": self.samples, **self.errors(), "curve": curve}


def samples_of(matches: Matches, iou: float | str = 0.5, least: np.ndarray | None = None) -> Samples:
    """Return the detections that count, with their targets.

    Args:
        matches (Matches): Detections, of any score.
        iou (float | str): Least IoU of a hit, or ``soft``.
        least (np.ndarray, optional): Least score of each class that takes part, shape (K,). None: ``LEAST_SCORE``.
    """
    judged = [matches.judge(at) for at in (SOFT_IOUS if iou == "soft" else (float(iou),))]
    target = np.mean([true for true, _ in judged], axis=0)
    counts = ~judged[0][1] & (matches.score >= (LEAST_SCORE if least is None else least[matches.label]))
    overlap = np.where(matches.judge(0.0)[0], matches.overlap, 0.0)
    return Samples(matches.score, target, matches.label, matches.image, overlap)[counts]


def reliability(samples: Samples, classes: np.ndarray | None = None) -> Reliability:
    """Judge scores.

    Args:
        samples (Samples): Scores and targets.
        classes (np.ndarray, optional): Objects of each class, shape (K,), for LaECE, which counts the classes that have
            any. None: all classes that occur among the samples.

    Raises:
        ValueError: If there are no samples.
    """
    n = len(samples)
    if not n:
        raise ValueError(f"no detection has a score of at least {LEAST_SCORE:g}: there is no calibration to judge")
    p, t = samples.score, samples.target
    count, score, target = _binned(p, t, BINS)
    per_class = []
    for k in np.unique(samples.label) if classes is None else np.flatnonzero(classes):
        of = samples.label == k
        if of.any():
            bins = _binned(p[of], samples.overlap[of], LA_BINS)
            per_class.append(_expected_error(*bins))
    q = np.clip(p, NEAREST, 1 - NEAREST)
    return Reliability(
        samples=n,
        ece=_expected_error(count, score, target),
        laece=float(np.mean(per_class)) if per_class else math.nan,
        brier=float(np.mean((p - t) ** 2)),
        nll=float(-np.mean(t * np.log(q) + (1 - t) * np.log1p(-q))),
        score=score,
        target=target,
        count=count,
    )


def classifier_reliability(probabilities: np.ndarray, labels: np.ndarray) -> Reliability:
    """Judge a classifier: ECE and the curve of its first choice, NLL and Brier score of all classes.

    Args:
        probabilities (np.ndarray): Of each image, shape (n, C).
        labels (np.ndarray): Its class, int64, shape (n,).
    """
    rows = np.arange(len(labels))
    p, first = np.asarray(probabilities, np.float64), np.argmax(probabilities, 1)
    samples = Samples(p[rows, first], (first == labels).astype(float), first, rows, np.full(len(rows), np.nan))
    found = reliability(samples, np.zeros(0))
    one_hot = np.zeros_like(p)
    one_hot[rows, labels] = 1.0
    nll = -np.log(np.maximum(p[rows, labels], NEAREST)).mean()
    return replace(found, nll=float(nll), brier=float(((p - one_hot) ** 2).sum(1).mean()))


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `yolo-sos eval` says of scores as probabilities.

    Attributes:
        reliability (Reliability): Errors and curve.
        thresholds (list[dict[str, float]]): See ``thresholds``.
    """

    reliability: Reliability
    thresholds: list[dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**self.reliability.to_dict(), "thresholds": self.thresholds}


def calibration_of(matches: Matches, iou: float, precision: float) -> Calibration | None:
    """Judge detections as they are; None if ``NOT_JUDGED`` is true of them."""
    if len(matches) and (matches.score.min() < 0 or matches.score.max() > 1):
        return None
    samples = samples_of(matches, iou)
    if not len(samples):
        return None
    return Calibration(reliability(samples, matches.truth.positives()), thresholds(matches, precision, iou))


def thresholds(matches: Matches, precision: float, iou: float = 0.5) -> list[dict[str, float]]:
    """Return, by class, the threshold on the score of ``best_f1`` with its ``f1``, and that of ``threshold_of``.

    The latter is called ``precision``, and comes with its ``recall``. Detections of any score take part.
    """
    found = []
    for curve in voc_result(matches, iou).curves:
        (at_f1, f1), (at_precision, recall) = best_f1(curve), threshold_of(curve, precision)
        found.append({"best_f1": at_f1, "f1": f1, "precision": at_precision, "recall": recall})
    return found


def best_f1(curve: Curve) -> tuple[float, float]:
    """Return the threshold on the score of the best F1, and that F1; NaN for a class without objects or detections.

    Of equal ones, the highest threshold. A detection takes part if its score is at least the threshold.
    """
    ends = _steps(curve)
    with np.errstate(invalid="ignore"):
        f1 = 2 * curve.precision[ends] * curve.recall[ends] / (curve.precision[ends] + curve.recall[ends])
    if not len(f1) or np.isnan(curve.recall).any():
        return math.nan, math.nan
    best = int(np.argmax(np.nan_to_num(f1)))
    return float(curve.score[ends][best]), float(np.nan_to_num(f1)[best])


def threshold_of(curve: Curve, precision: float) -> tuple[float, float]:
    """Return the lowest threshold on the score at which a class has a wanted precision, and its recall there.

    NaN where no threshold gives it.
    """
    ends = _steps(curve)
    enough = np.flatnonzero(curve.precision[ends] >= precision)
    if not len(enough):
        return math.nan, math.nan
    return float(curve.score[ends][enough[-1]]), float(curve.recall[ends][enough[-1]])


def _steps(curve: Curve) -> np.ndarray:
    """Return the last position of each run of equal scores: no threshold can part them."""
    return np.flatnonzero(np.diff(curve.score, append=-np.inf))


def _binned(p: np.ndarray, t: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return count, mean p and mean t of bins of equal width: (0, 1/bins], (1/bins, 2/bins], ...; 0 is in the first."""
    index = np.clip(np.ceil(p * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        return count, *(np.bincount(index, weights=x, minlength=bins) / count for x in (p, t))


def _expected_error(count: np.ndarray, score: np.ndarray, target: np.ndarray) -> float:
    return float(np.nansum(count * np.abs(score - target)) / count.sum())
