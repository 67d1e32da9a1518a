# yolo-sos, AGPL-3.0
"""The metric of the Pascal VOC devkit: average precision at one IoU threshold, difficult objects neutral.

The rules are those of the devkit's `VOCevaldet.m` and `VOCap.m` (Everingham et al., *The Pascal Visual Object Classes
Challenge: A Retrospective*, IJCV 2015; VOC2007 and VOC2012 development kits):

1. The detections of a class are visited by descending score. **Ties** keep the order in which the detections came, as
   MATLAB's stable `sort` does (NumPy ports of the devkit that call `argsort` leave it to chance).
2. A detection belongs to the object of its class and image that it overlaps most, whether that object is taken or not;
   of equally overlapped objects, to the first. Overlap is intersection over union of boxes that include their last
   pixel: `xmax - xmin + 1` wide, which is `x2 - x1` in this package's coordinates (see `boxes`).
3. Overlap below the threshold: false positive. Object difficult: the detection does not count. Object not taken yet:
   true positive, and it is taken. Otherwise: a duplicate, false positive.
4. Difficult objects do not count as positives. A class without positives has no AP (NaN) and stays out of the mean.

Which object a detection belongs to depends on no other detection (rule 2), so whole arrays do: one sort, then the first
detection of each object is its true positive.

**Recall thresholds of VOC07.** AP07 averages, over recalls 0, 0.1, ..., 1, the highest precision at that recall or
beyond. Here threshold k asks for `10 · TP ≥ k · positives`, in integers: 3 of 10 objects reach 0.3. In floating point
`0:0.1:1` and `np.arange(0, 1.1, 0.1)` hold 0.30000000000000004 and so miss it (NumPy's also 0.6 and 0.7), which is an
accident of rounding, not a rule; ports with those thresholds print a lower AP07 where a recall lands on them exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from yolo_sos.evaluate.boxes import Detections, GroundTruth, box_area

PAIRS = 2**18  # pairs of detection and object compared at a time: some 30 MB, however crowded the images


@dataclass(frozen=True, eq=False)
class Curve:
    """Precision and recall of one class as the score threshold falls, one entry per detection that counts.

    Attributes:
        score (np.ndarray): Scores, descending, shape (n,).
        recall (np.ndarray): Recall down to that score, shape (n,); NaN for a class without positives.
        precision (np.ndarray): Precision down to that score, shape (n,).
    """

    score: np.ndarray
    recall: np.ndarray
    precision: np.ndarray


@dataclass(frozen=True, eq=False)
class VOCResult:
    """Average precision by the devkit's rules.

    Attributes:
        iou (float): The threshold used.
        ap (np.ndarray): VOC2010 and later, area under the monotone envelope, shape (K,); NaN without positives.
        ap07 (np.ndarray): VOC2007 to 2009, mean of eleven interpolated precisions, shape (K,); NaN without positives.
        positives (np.ndarray): Objects that are not difficult, int64, shape (K,).
        curves (tuple[Curve, ...]): Precision and recall of each class.
    """

    iou: float
    ap: np.ndarray
    ap07: np.ndarray
    positives: np.ndarray
    curves: tuple[Curve, ...]


@dataclass(frozen=True, eq=False)
class Matches:
    """Detections, and the object that each of them belongs to: rule 2, which depends on no threshold.

    Attributes:
        truth (GroundTruth): G objects of K classes.
        image (np.ndarray): Index of each detection's image, int64, shape (D,).
        label (np.ndarray): Index of its class, int64, shape (D,).
        score (np.ndarray): Its confidence, float64, shape (D,). The order breaks ties.
        owner (np.ndarray): The object of its class and image that it overlaps most, int64, shape (D,); -1 for none.
        overlap (np.ndarray): Their intersection over union, float64, shape (D,).
    """

    truth: GroundTruth
    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    owner: np.ndarray
    overlap: np.ndarray

    @classmethod
    def of(cls, truth: GroundTruth, found: Detections) -> Matches:
        """Match detections to the objects of a ground truth."""
        return cls(truth, found.image, found.label, found.score, *best_objects(truth, found))

    def __len__(self) -> int:
        """Return the number of detections."""
        return len(self.score)

    def __getitem__(self, chosen: np.ndarray) -> Matches:
        """Return some of the detections, by index or by mask."""
        columns = (self.image, self.label, self.score, self.owner, self.overlap)
        return Matches(self.truth, *(column[chosen] for column in columns))

    def judge(self, iou: float) -> tuple[np.ndarray, np.ndarray]:
        """Apply rule 3.

        Args:
            iou (float): Least intersection over union of a true positive.

        Returns:
            true (np.ndarray): Which detections are true positives, bool, shape (D,).
            neutral (np.ndarray): Which do not count, as they belong to a difficult object, bool, shape (D,).
        """
        hit = (self.owner >= 0) & (self.overlap >= iou)
        neutral = np.zeros(len(self), bool)
        neutral[hit] = self.truth.difficult[self.owner[hit]]
        taking = np.flatnonzero(hit & ~neutral)
        taking = taking[np.argsort(-self.score[taking], kind="stable")][::-1]
        first = np.full(len(self.truth.boxes), -1)  # the detection that takes each object
        first[self.owner[taking]] = taking  # backwards: the best is written last, and stays
        true = np.zeros(len(self), bool)
        true[first[first >= 0]] = True
        return true, neutral


def voc_ap(truth: GroundTruth, detections: Detections, iou: float = 0.5) -> VOCResult:
    """Evaluate detections by the rules of the VOC devkit (see the module).

    Args:
        truth (GroundTruth): G objects of K classes.
        detections (Detections): D detections, in any order; their order breaks ties between equal scores.
        iou (float): Least intersection over union of a true positive, in (0, 1].

    Raises:
        ValueError: If `iou` is out of range.
    """
    return voc_result(Matches.of(truth, detections), iou)


def voc_result(matches: Matches, iou: float = 0.5) -> VOCResult:
    """Evaluate detections that are matched already, as `voc_ap` does."""
    if not 0 < iou <= 1:
        raise ValueError(f"the IoU threshold must be above 0 and at most 1, not {iou}")
    true, neutral = matches.judge(iou)
    order = np.lexsort((-matches.score, matches.label))  # by class, then score, then as they came: it is stable
    order = order[~neutral[order]]
    true = true[order]

    positives = matches.truth.positives()
    ap, ap07 = np.full(len(positives), np.nan), np.full(len(positives), np.nan)
    curves = []
    ends = np.cumsum(np.bincount(matches.label[order], minlength=len(positives)))
    for k, (start, end) in enumerate(pairwise([0, *ends])):
        found = np.cumsum(true[start:end])
        precision = found / np.arange(1, end - start + 1)
        recall = np.full(end - start, np.nan)
        if npos := int(positives[k]):
            recall = found / npos
            ap[k], ap07[k] = _average_precision(true[start:end], found, precision, npos)
        curves.append(Curve(matches.score[order[start:end]], recall, precision))
    return VOCResult(iou=iou, ap=ap, ap07=ap07, positives=positives, curves=tuple(curves))


def best_objects(truth: GroundTruth, detections: Detections) -> tuple[np.ndarray, np.ndarray]:
    """Find the object of its class and image that each detection overlaps most.

    Returns:
        owner (np.ndarray): Index of the object, int64, shape (D,); of equally overlapped ones the first; -1 for none.
        overlap (np.ndarray): Their intersection over union, float64, shape (D,); 0 for none or for two empty boxes.
    """
    owner, overlap = np.full(len(detections), -1), np.zeros(len(detections))
    group = truth.label * len(truth.images) + truth.image  # objects that a detection may belong to
    by_group = np.argsort(group, kind="stable")
    groups, starts, counts = np.unique(group[by_group], return_index=True, return_counts=True)
    if not len(groups):
        return owner, overlap
    wanted = detections.label * len(truth.images) + detections.image
    slot = np.minimum(np.searchsorted(groups, wanted), len(groups) - 1)
    starts, counts = starts[slot], counts[slot]
    for rows in _chunks(np.flatnonzero(groups[slot] == wanted), counts):
        n = counts[rows]
        first = np.cumsum(n) - n  # of each detection's pairs
        pair = np.repeat(rows, n)
        candidate = by_group[np.arange(len(pair)) + np.repeat(starts[rows] - first, n)]
        ious = _iou(detections.boxes[pair], truth.boxes[candidate])
        overlap[rows] = np.maximum.reduceat(ious, first)
        top = np.flatnonzero(ious == overlap[pair])[::-1]
        owner[pair[top]] = candidate[top]  # backwards: of equal ones the first is written last, and stays
    return owner, overlap


def mean_ap(ap: np.ndarray) -> float:
    """Average AP over the classes that have one, shape (K,); NaN if none has."""
    defined = ap[~np.isnan(ap)]
    return math.fsum(defined) / len(defined) if len(defined) else math.nan  # exact, so in any order of the classes


def _average_precision(true: np.ndarray, found: np.ndarray, precision: np.ndarray, npos: int) -> tuple[float, float]:
    """Return (AP, AP07) from what was true at each rank, its running count, and the precision, each of shape (n,)."""
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)  # the 0 stands for recalls not reached
    least = -(-np.arange(11) * npos // 10)  # true positives that recall k/10 takes, rounded up
    return float(envelope[:-1][true].sum() / npos), float(envelope[np.searchsorted(found, least)].sum() / 11)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the intersection over union of each pair of boxes, both (N, 4), shape (N,); 0 if both are empty."""
    sides = np.maximum(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0)
    intersection = sides[:, 0] * sides[:, 1]
    union = box_area(a) + box_area(b) - intersection
    return np.divide(intersection, union, out=np.zeros(len(a)), where=union > 0)


def _chunks(rows: np.ndarray, counts: np.ndarray) -> Iterator[np.ndarray]:
    """Split detections into runs of about PAIRS pairs, given each one's number of candidate objects."""
    total = np.cumsum(counts[rows])
    cuts = np.searchsorted(total, np.arange(PAIRS, total[-1] if len(total) else 0, PAIRS))
    return (part for part in np.split(rows, cuts) if len(part))
