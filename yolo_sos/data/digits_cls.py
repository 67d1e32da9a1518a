# yolo-sos, AGPL-3.0
"""The embedded classification set: scikit-learn's 1 797 handwritten digits as an image folder, ``data=digits-cls``."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from yolo_sos.data.digits import NAMES, source_digits, split_source
from yolo_sos.data.image_folder import Split, build_image_folder

SIZE = 32  # pixels; Ultralytics takes no image below 10, and the digits have 8


def build(path: str | Path | None = None, *, seed: int = 0) -> Path:
    """Build the set: 1 078 images to train on, 359 to validate and 360 to test on, 32 × 32 pixels, each digit once.

    Train, val and test are the digits that the detection set ``digits.yaml`` of the same seed draws them from.

    Args:
        path (str | Path, optional): The folder to make. None: ``digits-cls`` in Ultralytics' datasets directory.
        seed (int): Seed of the split.

    Returns:
        (Path): The folder, which ``data=`` takes.

    Raises:
        FileExistsError: If something else stands there.
        ImportError: If scikit-learn is missing.
    """
    if path is None:
        from ultralytics.utils import DATASETS_DIR

        path = DATASETS_DIR / "digits-cls"

    def splits() -> dict[str, Split]:
        images, labels = source_digits()
        large = np.stack([cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for image in images])
        grey = (255 * np.clip(large, 0, 1)).round().astype(np.uint8)
        return {split: (grey[index], labels[index]) for split, index in split_source(seed).items()}

    return build_image_folder(path, {"set": "digits", "size": SIZE, "seed": seed}, splits, NAMES)
