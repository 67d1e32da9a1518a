# yolo-sos, AGPL-3.0
"""What a model says of the images of a split, beside what is true: for fitting a calibration and for judging one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yolo_sos.core import AffineMap, fit_logistic, fit_softmax
from yolo_sos.evaluate.boxes import GroundTruth
from yolo_sos.evaluate.calibration import (
    LEAST_SCORE,
    NEAREST,
    Reliability,
    classifier_reliability,
    reliability,
    samples_of,
    thresholds,
)
from yolo_sos.yolo.images import draw
from yolo_sos.yolo.recording import Pass, matches_of


class DetectorEvidence:
    """Detections of a split, matched to its objects.

    Args:
        truth (GroundTruth): The objects.
        records (list): The detections, see ``Recording``.
        task (str): ``detect``, ``segment``, ``pose`` or ``obb``.
        iou (float | str): What a hit is, see ``samples_of``.
        least (np.ndarray, optional): Least score of each class that takes part. None: ``LEAST_SCORE``.
    """

    def __init__(
        self,
        truth: GroundTruth,
        records: list[tuple[str, np.ndarray]],
        task: str,
        iou: float | str,
        least: np.ndarray | None = None,
    ):
        """Match the detections."""
        self.truth, self.images = truth, len(records)
        self.matches = matches_of(truth, records, task)
        self.samples = samples_of(self.matches, iou, least)

    def __len__(self) -> int:
        """Return the number of detections that take part."""
        return len(self.samples)

    def fit(self, per_class: bool, chosen: np.ndarray | slice = slice(None)) -> AffineMap:
        """Return the map that makes scores the probabilities of hits, fitted on all detections or on some."""
        s = self.samples[chosen]
        z, t, labels = logit(s.score), torch.from_numpy(s.target), torch.from_numpy(s.label)
        return fit_logistic(z, t, labels, len(self.truth.classes), per_class)

    def reliability(self) -> Reliability:
        """Judge the scores as they are."""
        return reliability(self.samples, self.truth.positives())

    def cross_fitted(self, per_class: bool, seed: int) -> Reliability:
        """Judge mapped scores, those of each half of the images by the map that was fitted on the other half."""
        half, score = halves(self.samples.image, seed), np.empty(len(self))
        for of in (half, ~half):
            mapping, s = self.fit(per_class, ~of), self.samples[of]
            score[of] = mapping(logit(s.score), torch.from_numpy(s.label)).sigmoid().numpy()
        return reliability(self.samples.scored(score), self.truth.positives())

    def least_mapped(self, mapping: AffineMap) -> np.ndarray:
        """Return what a map makes of ``LEAST_SCORE``, by class: with it, the same detections take part as before."""
        return mapping(logit(np.full(len(self.truth.classes), LEAST_SCORE))).sigmoid().numpy()

    def thresholds(self, precision: float) -> list[dict[str, float]]:
        """Return, by class, thresholds on the score of best F1 and of a wanted precision at an IoU of 0.5."""
        return thresholds(self.matches, precision)


class ClassifierEvidence:
    """Logits of a split's images, and their classes.

    Args:
        records (list): Logits and classes by batch, see ``Recording``.
    """

    def __init__(self, records: list[tuple[Tensor, Tensor]]):
        """Put the batches together."""
        self.logits, self.labels = (torch.cat(column) for column in zip(*records, strict=True))
        self.images = len(self.labels)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def fit(self, per_class: bool, chosen: np.ndarray | slice = slice(None)) -> AffineMap:
        """Return the map that makes scores probabilities, fitted on all images or on some."""
        return fit_softmax(self.logits[chosen], self.labels[chosen], per_class)

    def reliability(self) -> Reliability:
        """Judge the scores as they are."""
        return classifier_reliability(self.logits.double().softmax(1).numpy(), self.labels.numpy())

    def cross_fitted(self, per_class: bool, seed: int) -> Reliability:
        """Judge mapped scores, those of each half of the images by the map that was fitted on the other half."""
        half, p = halves(np.arange(len(self)), seed), np.empty(self.logits.shape)
        for of in (half, ~half):
            p[of] = self.fit(per_class, ~of)(self.logits[of]).softmax(1).numpy()
        return classifier_reliability(p, self.labels.numpy())

    def least_mapped(self, mapping: AffineMap) -> None:
        """Return None: every image takes part."""

    def thresholds(self, precision: float) -> list[dict[str, float]]:
        """Return an empty list: a classifier's first choice needs no threshold."""
        return []


Evidence = DetectorEvidence | ClassifierEvidence


def evidence(
    seen: Pass, which: int, truth: GroundTruth | None, task: str, iou: float | str, least: Any = None
) -> Evidence:
    """Return the evidence of one set of weights of a validation; ``truth`` is None for a classifier."""
    if truth is None:
        return ClassifierEvidence(seen.records[which])
    return DetectorEvidence(truth, seen.records[which], task, iou, least)


def logit(score: np.ndarray) -> Tensor:
    """Return z of scores σ(z) in float64; scores that float32 cannot tell from 0 or 1 stand for the nearest others."""
    return torch.from_numpy(np.asarray(score, np.float64)).clamp(NEAREST, 1 - NEAREST).logit()


def halves(image: np.ndarray, seed: int) -> np.ndarray:
    """Return which samples are in the first half of the images, drawn at random, bool, shape (n,)."""
    images: Sequence[int] = np.unique(image).tolist()
    if len(images) < 2:
        raise ValueError("All detections are in one image: a calibration cannot be judged on others. Take more images.")
    order = draw(len(images), None, seed)[: math.ceil(len(images) / 2)]
    return np.isin(image, [images[i] for i in order])
