# yolo-sos, AGPL-3.0
"""Streaming, weighted second-moment matrix of a layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = {"cpu": 1 << 11, "cuda": 1 << 14}  # 5 MB at d = 320, which a cache can hold, and 42 MB, worth a kernel's start


def chunk_size(x: Tensor) -> int:
    """Return how many rows turn into float64 at once."""
    return CHUNK.get(x.device.type, CHUNK["cpu"])


def as_float64(x: Tensor) -> Tensor:
    """Return ``x`` in float64, on the CPU where its device has none (MPS)."""
    x = x.detach() if x.requires_grad else x  # a view costs small systems more than the view itself
    return (x.cpu() if x.device.type == "mps" else x).double()


class Gram:
    """The weighted second-moment matrix ``G = Σ wᵢ aᵢᵀaᵢ`` of rows aᵢ that arrive in pieces.

    Memory is O(d²) whatever the number of rows. Two accumulators of the same d add up with ``+``.

    Args:
        d (int): Length of a row.

    Attributes:
        matrix (Tensor): ``(d, d)`` float64, on the device of the first update (the CPU before it, and for MPS, which
            has no float64).
        rows (int): Rows seen, those of weight zero included.
        mass (float): Sum of the weights.
    """

    def __init__(self, d: int):
        """Start at zero."""
        if d < 1:
            raise ValueError(f"d={d} is the length of a row; it must be at least 1.")
        self.d = d
        self.matrix = torch.zeros(d, d, dtype=torch.float64)
        self.rows = 0
        self.mass = 0.0

    def update(self, features: Tensor, weights: Tensor | None = None) -> Gram:
        """Add rows.

        Args:
            features (Tensor): ``(n, d)``, any float dtype and device.
            weights (Tensor, optional): ``(n,)`` non-negative weights; 1 each if None.

        Returns:
            (Gram): Itself.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if features.ndim != 2 or features.shape[1] != self.d:
            raise ValueError(f"features has shape {tuple(features.shape)}; expected (n, {self.d}).")
        if weights is not None and weights.shape != features.shape[:1]:
            raise ValueError(f"weights has shape {tuple(weights.shape)}; expected ({features.shape[0]},).")
        chunk = chunk_size(features)
        for i in range(0, len(features), chunk):
            a = as_float64(features[i : i + chunk])
            self.matrix = self.matrix.to(a.device)
            if weights is None:
                self.matrix += a.T @ a
            else:
                w = as_float64(weights[i : i + chunk]).to(a.device)
                self.matrix += (a * w[:, None]).T @ a
                self.mass += float(w.sum())
        self.rows += len(features)
        self.mass += float(len(features)) if weights is None else 0.0
        return self

    def mean(self) -> Gram:
        """Return the weighted mean second moment, ``G / Σ wᵢ``, as an accumulator of mass 1 (zero if no mass)."""
        out = Gram(self.d)
        out.matrix, out.rows, out.mass = self.matrix / (self.mass or 1.0), self.rows, float(self.mass > 0)
        return out

    def __add__(self, other: Gram) -> Gram:
        """Merge two accumulators, as if one had seen the rows of both."""
        if self.d != other.d:
            raise ValueError(f"Cannot add a Gram of d={self.d} and one of d={other.d}.")
        out = Gram(self.d)
        out.matrix = self.matrix + other.matrix.to(self.matrix.device)
        out.rows, out.mass = self.rows + other.rows, self.mass + other.mass
        return out
