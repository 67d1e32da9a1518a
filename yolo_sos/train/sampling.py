# yolo-sos, AGPL-3.0
"""A few training images, as validation would see them: no second data loader, and the run's random states untouched."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Any

import cv2
import numpy as np
import torch
from ultralytics.utils import LOGGER, NUM_THREADS
from ultralytics.utils.patches import override_configs

from yolo_sos.core.shift import HELD_OUT


def split_sizes(available: int, images: int, guarded: bool) -> tuple[int, int]:
    """Return how many images to fit on and how many others to hold out.

    Args:
        available (int): Images in the training set.
        images (int): Images asked for to fit on; half as many others are held out, at most ``HELD_OUT``.
        guarded (bool): Whether held-out images are needed at all.

    Returns:
        (tuple[int, int]): Sizes of two disjoint sets. A set that is too small is divided two to one.

    Raises:
        ValueError: If the set cannot be divided.
    """
    if not guarded:
        return min(images, available), 0
    if available < 2:
        raise ValueError(
            f"SOS needs at least 2 training images, one to fit on and one to hold out; there are {available}. "
            "Set sos_guard=none to shift without held-out images."
        )
    fit = min(images, max(1, 2 * available // 3))
    return fit, min(max(1, images // 2), HELD_OUT, available - fit)


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Put back the global random states: a run with SOS sees the same augmentations as one without."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def plain_view(dataset: Any, args: Any) -> Any:
    """Return a view of a YOLO training set with validation transforms; labels and cached images are shared.

    Args:
        dataset (YOLODataset): The training set.
        args (SimpleNamespace): The trainer's arguments.
    """
    view = copy(dataset)  # shallow: nothing is scanned or loaded again
    view.augment, view.rect = False, False
    view.transforms = view.build_transforms(hyp=args)
    return view


# Measured on a YOLOv5n of 3 classes: 8 images fit as well as 64 or 100, 2 to 4 less well (results/bccd/images.md).
IMAGES = 8
PER_CLASS = 3  # the paper draws 300 rows for the 100 classes of CIFAR-100


@dataclass(frozen=True)
class Source:
    """What shifts draw their images from.

    Attributes:
        view (Dataset): The training set with validation transforms; its ``collate_fn`` makes batches.
        images (int): Images to fit on, see ``split_sizes``.
        labels (Sequence[int], optional): The class of each image, where an image has one: each class then has its share
            of a sample, as far as the set allows.
    """

    view: Any
    images: int
    labels: Sequence[int] | None = None


def draw(count: int, labels: Sequence[int] | None, seed: int) -> list[int]:
    """Return 0 … count−1 in random order; with labels, every stretch of it holds each class about equally often.

    The first image of each class comes before the second of any, and so on, until a class runs out.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    if labels is None:
        return order
    seen: Counter[int] = Counter()
    turn = []
    for i in order:
        turn.append(seen[labels[i]])
        seen[labels[i]] += 1
    return [order[i] for i in sorted(range(count), key=turn.__getitem__)]  # stable: random within a turn


class ShiftSample:
    """The images of one shift: two disjoint random sets, loaded once, for as many models as are shifted.

    Args:
        trainer (BaseTrainer): Supplies the batch size and ``preprocess_batch``.
        view (Dataset): The training set with validation transforms; its ``collate_fn`` makes batches.
        images (int): Images to fit on, see ``split_sizes``.
        guarded (bool): Whether to hold images out.
        seed (int): Chooses the images.
        labels (Sequence[int], optional): See ``Source``.
    """

    def __init__(
        self, trainer: Any, view: Any, images: int, guarded: bool, seed: int, labels: Sequence[int] | None = None
    ):
        """Choose the images; they are loaded when first asked for."""
        fit, held = split_sizes(len(view), images, guarded)
        order = draw(len(view), labels, seed)
        self._trainer = trainer
        self._view = view
        self._chosen = {"fit": order[:fit], "heldout": order[fit : fit + held]}
        self._spare = iter(order[fit + held :])  # in place of images that cannot be read
        self._loaded: dict[str, list[dict[str, Any]]] = {}

    def batches(self, which: str) -> Iterator[dict[str, Any]]:
        """Yield the preprocessed batches of ``fit`` or ``heldout``, of the trainer's batch size."""
        if which not in self._loaded:
            with ThreadPool(NUM_THREADS) as pool:
                items = self._readable(pool.map(self._read, self._chosen[which]))
            size = max(self._trainer.batch_size // max(self._trainer.world_size, 1), 1)
            self._loaded[which] = [self._view.collate_fn(items[i : i + size]) for i in range(0, len(items), size)]
        for batch in self._loaded[which]:
            # preprocess_batch writes into the batch it gets, and would resize it at random under multi_scale
            with override_configs(self._trainer.args, {"multi_scale": 0.0}):
                preprocessed = self._trainer.preprocess_batch(dict(batch))
            yield preprocessed

    def _read(self, index: int) -> dict[str, Any] | Exception:
        """Return an image, or why it cannot be read."""
        try:
            return self._view[index]
        except (OSError, ValueError, cv2.error) as e:
            return e

    def _readable(self, items: list[dict[str, Any] | Exception]) -> list[dict[str, Any]]:
        """Return the items with others in place of errors, as long as there are others."""
        readable = [item for item in items if not isinstance(item, Exception)]
        errors = [item for item in items if isinstance(item, Exception)]
        for error in errors:  # grows by those of the images that take another's place
            LOGGER.warning(f"SOS: an image cannot be read, another one takes its place if there is one: {error}")
            if (index := next(self._spare, None)) is not None:
                item = self._read(index)
                (errors if isinstance(item, Exception) else readable).append(item)  # type: ignore[arg-type]
        if errors and not readable:
            raise OSError(f"None of the images for a shift can be read; the last error: {errors[-1]}") from errors[-1]
        return readable
