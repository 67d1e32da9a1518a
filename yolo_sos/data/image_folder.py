# yolo-sos, AGPL-3.0
"""Classification sets as Ultralytics reads them: ``{split}/{class}/{image}.png``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from yolo_sos.data.once import build_once

Split = tuple[np.ndarray, np.ndarray]  # images (n, H, W) uint8, labels (n,)


def build_image_folder(
    path: str | Path, options: Mapping[str, object], splits: Callable[[], Mapping[str, Split]], names: Sequence[str]
) -> Path:
    """Write a classification set, unless it is there already.

    Args:
        path (str | Path): The folder to make. It appears when it is complete.
        options (Mapping): What the set was made from and how, as JSON can hold it; kept in ``{path}/options.json``.
        splits (Callable): Returns the grey images ``(n, H, W)`` uint8 and labels ``(n,)`` of each split.
        names (Sequence[str]): Name of each class, the folder that its images lie in. Folders are read in alphabetical
            order, so the names must be in it for labels to stay as they are.

    Returns:
        (Path): The folder, which ``data=`` takes.

    Raises:
        FileExistsError: If `path` holds something else, be it the set with other options.
    """

    def fill(folder: Path) -> None:
        for split, (images, labels) in splits().items():
            for name in names:
                (folder / split / name).mkdir(parents=True)
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                _, data = cv2.imencode(".png", image)
                (folder / split / names[label] / f"{i:05d}.png").write_bytes(data.tobytes())

    build_once(Path(path), "options.json", options, fill)
    return Path(path)


def draw_split(labels: np.ndarray, counts: Mapping[str, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw disjoint splits at random, each with an equal share of every class as far as its size divides.

    Args:
        labels (np.ndarray): ``(n,)``, class of each image to choose from.
        counts (Mapping[str, int]): Split to its number of images.
        rng (np.random.Generator): Where all choices come from.

    Returns:
        (dict[str, np.ndarray]): Split to the indices of its images, in random order.

    Raises:
        ValueError: If a class has not enough images.
    """
    classes = np.unique(labels)
    waiting = {c: rng.permutation(np.flatnonzero(labels == c)) for c in classes}
    drawn: dict[str, np.ndarray] = {}
    for split, count in counts.items():
        share, rest = divmod(count, len(classes))
        extra = set(rng.permutation(classes)[:rest].tolist())
        chosen = []
        for c in classes:
            n = share + (c in extra)
            if n > len(waiting[c]):
                raise ValueError(f"{split}={count}: class {c} has {len(waiting[c])} images left, and {n} are needed")
            part, waiting[c] = np.split(waiting[c], [n])
            chosen.append(part)
        drawn[split] = rng.permutation(np.concatenate(chosen))
    return drawn
