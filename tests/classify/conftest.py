# yolo-sos, AGPL-3.0
"""A tiny real set, and a trainer on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

TINY = """\
# 65 000 parameters: an epoch of 60 images takes no time
nc: 10
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [-1, 1, Classify, [nc]]
"""


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory) -> Path:
    """60 + 20 + 20 handwritten digits as an image folder, 32 × 32 pixels; classes of different size in train."""
    from yolo_sos.data.digits import source_digits
    from yolo_sos.data.image_folder import build_image_folder

    images, labels = source_digits()
    large = (255 * np.kron(images, np.ones((4, 4)))).astype(np.uint8)
    waiting = {c: list(np.flatnonzero(labels == c)) for c in range(10)}

    def take(counts):
        index = np.array([waiting[c].pop() for c, n in enumerate(counts) for _ in range(n)])
        return large[index], labels[index]

    splits = {"train": take([12, 4, *[6] * 6, 5, 3]), "val": take([2] * 10), "test": take([2] * 10)}
    path = tmp_path_factory.mktemp("sets") / "few"
    return build_image_folder(path, {}, lambda: splits, [str(c) for c in range(10)])


@pytest.fixture(scope="session")
def overrides(few_digits, tmp_path_factory):
    """``overrides(**settings)`` returns what a trainer of two tiny epochs takes."""
    model = tmp_path_factory.mktemp("models") / "tiny-cls.yaml"
    model.write_text(TINY)

    def overrides(**settings):
        return {
            **{"data": str(few_digits), "model": str(model), "imgsz": 32, "epochs": 2, "batch": 20},
            **{"device": "cpu", "workers": 0, "plots": False, "project": str(tmp_path_factory.mktemp("runs"))},
            **{"optimizer": "SGD", "lr0": 0.02, "warmup_epochs": 0},
            **settings,
        }

    return overrides
