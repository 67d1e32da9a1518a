# yolo-sos, AGPL-3.0
"""Mixup for classifiers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate


class Mixup:
    """Collates a batch and mixes it with itself: ``x ← m x + (1−m) x'``, labels alike, m drawn from Beta(α, α).

    Source: Zhang, Cissé, Dauphin, Lopez-Paz, *mixup: Beyond Empirical Risk Minimization*, ICLR 2018.

    Args:
        alpha (float): α, above 0.
        classes (int): C.
    """

    def __init__(self, alpha: float, classes: int):
        """Keep the settings."""
        self.alpha = alpha
        self.classes = classes

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return ``img`` ``(B, 3, H, W)`` and ``cls`` ``(B, C)``, rows of which sum to 1: targets of cross-entropy."""
        batch = default_collate(items)
        share = float(torch.distributions.Beta(self.alpha, self.alpha).sample())
        other = torch.randperm(len(items))
        targets = nn.functional.one_hot(batch["cls"], self.classes).to(batch["img"].dtype)
        return {
            **batch,
            "img": share * batch["img"] + (1 - share) * batch["img"][other],
            "cls": share * targets + (1 - share) * targets[other],
        }
