# yolo-sos, AGPL-3.0
"""Images of an Ultralytics data set, as validation would see them, in disjoint random sets."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from typing import Any

import cv2
import numpy as np
import torch
from ultralytics.utils import LOGGER, NUM_THREADS, TQDM

HELD_OUT = 32  # images at most: the inputs of their final layers stay in memory, 6 to 25 MB each at 640 pixels

IMAGES = 512  # to fit on by default: several of each class in most data sets


def split_sizes(available: int, images: int | None, *, guarded: bool = True, selection: bool = False) -> dict[str, int]:
    """Return how many images to fit on, and how many others to hold out.

    Args:
        available (int): Images in the training set.
        images (int, optional): Images asked for to fit on. None: all that are left.
        guarded (bool): Whether held-out images are necessary. Otherwise they are left out where there is one image.
        selection (bool): Whether as many again are needed to choose between candidates, which must not be judged on the
            images that they were chosen on.

    Returns:
        (dict[str, int]): Sizes of disjoint sets: ``heldout``, half as many as ``images``, but at most ``HELD_OUT`` and
            a third of the training set; ``selection``, as many or 0; and ``fit``.

    Raises:
        ValueError: If there are too few images.
    """
    sets = 2 + selection
    if available < sets and (guarded or selection):
        there = f"there {'is' if available == 1 else 'are'} {available}"
        raise ValueError(
            f"A shift needs at least {sets} training images, 1 to fit on and {sets - 1} to hold out; {there}."
        )
    half = HELD_OUT if images is None else max(1, images // 2)
    held = min(HELD_OUT, half, max(1, available // (3 + selection))) if available > 1 else 0
    rest = available - (1 + selection) * held
    return {"heldout": held, "selection": selection * held, "fit": rest if images is None else min(images, rest)}


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


def covering_order(classes: Sequence[Collection[int]], least: int, seed: int) -> list[int]:
    """Return 0 … n−1 in random order, after one image of each class, a second, and so on to ``least``, rare ones first.

    A class that has fewer comes with all of its images.

    Args:
        classes (Sequence[Collection[int]]): The classes that each of the n images shows.
        least (int): Images of each class.
        seed (int): Of the random order.
    """
    order = draw(len(classes), None, seed)
    of: dict[int, list[int]] = {}
    for i in order:
        for c in set(classes[i]):
            of.setdefault(c, []).append(i)
    first: dict[int, None] = {}
    for turn in range(1, least + 1):
        for c in sorted(of, key=lambda c: (len(of[c]), c)):
            have = sum(i in first for i in of[c])
            first |= dict.fromkeys([i for i in of[c] if i not in first][: max(0, turn - have)])
    return [*first, *(i for i in order if i not in first)]


def object_classes(dataset: Any) -> list[list[int]]:
    """Return the classes of the objects in each image of an Ultralytics data set."""
    if hasattr(dataset, "samples"):  # of a classifier
        return [[int(sample[1])] for sample in dataset.samples]
    return [label["cls"].reshape(-1).astype(int).tolist() for label in dataset.labels]


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore the global random states: a run with SOS sees the same augmentations as one without."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def counted(batches: Iterable[dict[str, Any]], bar: TQDM) -> Iterator[dict[str, Any]]:
    """Yield batches, and count their images in a progress bar when they have been used."""
    for batch in batches:
        yield batch
        bar.update(len(batch["img"]))


class ImageSample:
    """Disjoint sets of a data set's images, loaded in preprocessed batches.

    Args:
        dataset (Dataset): An Ultralytics data set with validation transforms.
        preprocess (Callable): Ultralytics' preprocessing of a batch, in place on a dictionary of its own.
        batch (int): Images in a batch.
        sizes (dict[str, int]): Set → number of images, see ``split_sizes``; they are taken in this order.
        order (Sequence[int]): All positions in the data set, in the order in which the sets take them; see ``draw`` and
            ``covering_order``. Those that are left stand in for images that cannot be read.
        keep (bool): Whether loaded images stay in memory, for several passes.

    Attributes:
        sets (dict[str, list[int]]): Set → positions of its images in the data set.
    """

    def __init__(
        self,
        dataset: Any,
        preprocess: Callable[[dict[str, Any]], dict[str, Any]],
        batch: int,
        sizes: dict[str, int],
        order: Sequence[int],
        keep: bool = False,
    ):
        """Choose the images; they are loaded when first asked for."""
        self.dataset, self.batch = dataset, batch
        self._preprocess, self._keep = preprocess, keep
        self._spare = iter(order)
        self.sets = {name: [next(self._spare) for _ in range(size)] for name, size in sizes.items()}
        self._loaded: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        # Classification data sets have no collate_fn of their own.
        self._collate = getattr(dataset, "collate_fn", None) or torch.utils.data.default_collate

    def batches(self, which: str, images: int | None = None, batch: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield the preprocessed batches of a set.

        Args:
            which (str): The set.
            images (int, optional): Its first so many images only.
            batch (int, optional): Images in a batch. None: as of the sample.

        Raises:
            OSError: If none of the images can be read.
        """
        asked = which, images, batch
        kept = []
        for of in self._loaded.get(asked) or self._load(self.sets[which][:images], batch or self.batch):
            if self._keep:
                kept.append(of)
            yield self._preprocess(dict(of))
        if self._keep:
            self._loaded[asked] = kept

    def _load(self, indices: list[int], size: int) -> Iterator[dict[str, Any]]:
        read = 0
        with ThreadPool(NUM_THREADS) as pool:
            for i in range(0, len(indices), size):
                items = self._readable(pool.map(self._read, indices[i : i + size]), read)
                read += len(items)
                if items:
                    yield self._collate(items)

    def _read(self, index: int) -> dict[str, Any] | Exception:
        """Return an image, or why it cannot be read."""
        try:
            return self.dataset[index]
        except (OSError, ValueError, cv2.error) as e:
            return e

    def _readable(self, items: list[Any], read: int) -> list[dict[str, Any]]:
        """Return the items with others in place of errors, as long as there are others."""
        readable = [item for item in items if not isinstance(item, Exception)]
        errors = [item for item in items if isinstance(item, Exception)]
        for error in errors:  # grows by those of the images that take another's place
            LOGGER.warning(f"SOS: an image cannot be read, another one takes its place if there is one: {error}")
            if (index := next(self._spare, None)) is not None:
                item = self._read(index)
                (errors if isinstance(item, Exception) else readable).append(item)  # type: ignore[arg-type]
        if errors and not readable and not read:
            raise OSError(f"None of the images can be read; the last error: {errors[-1]}") from errors[-1]
        return readable
