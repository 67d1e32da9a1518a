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
    """

    def __init__(self, truth: GroundTruth, records: list[tuple[str, np.ndarray]], task: str, iou: float | str):
        """Match the detections."""
        self.truth, self.images, self.iou = truth, len(records), iou
        self.matches = matches_of(truth, records, task)
        self.samples = samples_of(self.matches, iou)

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

    def after(self, before: DetectorEvidence, mapping: AffineMap, conf: float) -> Reliability:
        """Judge the scores of a mapped model, of the same detections as before.

        These are the detections above what the map makes of ``LEAST_SCORE``. Some of them can be below the detector's
        least confidence now, so that it does not return them: they count with the score that the map gives them.

        Args:
            before (DetectorEvidence): The detections of the model as it was.
            mapping (AffineMap): The map.
            conf (float): Least confidence of a detection.
        """
        least = mapping(logit(np.full(len(self.truth.classes), LEAST_SCORE))).sigmoid().numpy()
        was = before.samples
        mapped = was.scored(mapping(logit(was.score), torch.from_numpy(was.label)).sigmoid().numpy())
        samples = samples_of(self.matches, self.iou, np.maximum(least, conf)) + mapped[mapped.score < conf]
        return reliability(samples, self.truth.positives())

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

    def after(self, before: ClassifierEvidence, mapping: AffineMap, conf: float) -> Reliability:
        """Judge the scores of a mapped model: every image takes part."""
        return self.reliability()

    def thresholds(self, precision: float) -> list[dict[str, float]]:
        """Return an empty list: a classifier's first choice needs no threshold."""
        return []


def evidence(seen: Pass, which: int, truth: GroundTruth | None, task: str, iou: float | str) -> Any:
    """Return the evidence of one set of weights of a validation, of a classifier where ``truth`` is None."""
    if truth is None:
        return ClassifierEvidence(seen.records[which])
    return DetectorEvidence(truth, seen.records[which], task, iou)


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
