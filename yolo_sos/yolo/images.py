# yolo-sos, AGPL-3.0
"""Images of an Ultralytics data set, as validation would see them, in disjoint random sets."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import torch
from ultralytics.data.utils import check_class_names, check_cls_dataset, check_det_dataset
from ultralytics.utils import LOGGER, NUM_THREADS

from yolo_sos.builtin import resolve_data
from yolo_sos.data.images import check_complete
from yolo_sos.yolo.checkpoint import Checkpoint

HELD_OUT = 32  # images at most: the inputs of their final layers stay in memory, 6 to 25 MB each at 640 pixels


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


class ImageSample:
    """Disjoint random sets of a data set's images, loaded in preprocessed batches.

    Args:
        dataset (Dataset): An Ultralytics data set with validation transforms.
        preprocess (Callable): Ultralytics' preprocessing of a batch, in place on a dictionary of its own.
        batch (int): Images in a batch.
        sizes (dict[str, int]): Set → number of images, see ``split_sizes``; they are taken in this order.
        seed (int): Chooses the images.
        labels (Sequence[int], optional): The class of each image, where an image has one: each class then has its share
            of every set, as far as the data set allows.
        keep (bool): Whether loaded images stay in memory, for several passes.
        order (Sequence[int], optional): Positions in the order in which the sets take them. None: a random one.

    Attributes:
        sets (dict[str, list[int]]): Set → positions of its images in the data set.
    """

    def __init__(
        self,
        dataset: Any,
        preprocess: Callable[[dict[str, Any]], dict[str, Any]],
        batch: int,
        sizes: dict[str, int],
        seed: int,
        labels: Sequence[int] | None = None,
        keep: bool = False,
        order: Sequence[int] | None = None,
    ):
        """Choose the images; they are loaded when first asked for."""
        self.dataset, self.batch = dataset, batch
        self._preprocess, self._keep = preprocess, keep
        left = iter(draw(len(dataset), labels, seed) if order is None else order)
        self.sets = {name: [next(left) for _ in range(size)] for name, size in sizes.items()}
        self._spare = left  # in place of images that cannot be read
        self._loaded: dict[str, list[dict[str, Any]]] = {}
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
        loaded = self._loaded.get(which) or self._load(self.sets[which][:images], batch or self.batch)
        kept = []
        for of in loaded:
            if self._keep:
                kept.append(of)
            yield self._preprocess(dict(of))
        if self._keep:
            self._loaded[which] = kept

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


class CheckpointData:
    """A data set opened for a checkpoint: checked, and its training images as validation would see them.

    Args:
        checkpoint (Checkpoint): The model that the images are for.
        data (str, optional): The data set as Ultralytics names it. None: the one that the model was trained on.
        imgsz (int, optional): Size of the images. None: that of the training.
        batch (int, optional): Images in a batch. None: that of the training.
        device (torch.device): Where batches go.
        splits (Sequence[str]): Splits that are scored later, to be checked now.

    Attributes:
        args (dict): Ultralytics' arguments for a validation on this data set.
        batch (int): Images in a batch.
        content (dict): The data set as Ultralytics describes it.
        dataset (Dataset): The training split.

    Raises:
        FileNotFoundError: If the data set, a split or its images are missing.
        ValueError: If classes differ from the model's, or images cannot be read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: str | Path | None,
        *,
        imgsz: int | None,
        batch: int | None,
        device: torch.device,
        splits: Sequence[str] = (),
    ):
        """Check the data set and open its splits."""
        trained = checkpoint.args
        if data is None and trained["data"] is None:
            raise ValueError(f"{checkpoint.path} does not say what it was trained on. Add data=…")
        self.batch = batch or (trained["batch"] if isinstance(trained["batch"], int) and trained["batch"] > 0 else 16)
        self.args = {
            "task": checkpoint.task,
            "data": str(resolve_data(data or trained["data"])),
            "imgsz": imgsz or trained["imgsz"],
            "batch": self.batch,
            "device": str(device),
            "single_cls": trained["single_cls"],
            "workers": trained["workers"],
            "plots": False,
            "verbose": False,
            "mode": "val",
        }
        self.content = self._read(checkpoint)
        with TemporaryDirectory() as folder:  # a validator makes a folder for its results as soon as it exists
            args = {**self.args, "overlap_mask": trained["overlap_mask"]}  # the masks that the training's loss takes
            self._validator = checkpoint.validator(args=args, save_dir=Path(folder))
        self._validator.device, self._validator.data = device, self.content
        self._validator.names = checkpoint.model.names
        self._validator.stride = max(int(checkpoint.model.stride.max()), 32)  # type: ignore[operator, union-attr]
        self.dataset = self._open("train")
        for split in splits:
            self._open(split)

    def sample(self, sizes: dict[str, int], seed: int) -> ImageSample:
        """Return random sets of the training images, see ``ImageSample``."""
        return ImageSample(self.dataset, self._validator.preprocess, self.batch, sizes, seed)

    def has(self, split: str) -> bool:
        """Tell whether the data set names a split."""
        return bool(self.content.get(split))

    def check(self, split: str) -> None:
        """Raise what opening a split raises, see the class."""
        self._open(split)

    def check_classes(self, checkpoint: Checkpoint) -> None:
        """Raise a ``ValueError`` if a checkpoint has other classes than the data set."""
        ours, theirs = check_class_names(checkpoint.model.names), check_class_names(self.content["names"])
        if not self.args["single_cls"] and ours != theirs:
            first = next(i for i in range(max(len(ours), len(theirs))) if ours.get(i) != theirs.get(i))
            raise ValueError(
                f"The classes of {checkpoint.path} and {self.args['data']} do not match: {len(ours)} and "
                f"{len(theirs)}, and class {first} is {ours.get(first)!r} and {theirs.get(first)!r}. Give the data set "
                "that the model was trained on."
            )

    def _read(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the data set as Ultralytics describes it, after comparing its classes with the model's."""
        name = self.args["data"]
        if checkpoint.task == "classify":
            if Path(name).is_absolute() and not Path(name).is_dir():  # Ultralytics would try to download it
                raise FileNotFoundError(f"{name}: there is no such folder of images.")
            self.content = check_cls_dataset(name)
        else:
            try:
                self.content = check_det_dataset(name)
            except KeyError as e:  # how Ultralytics says that the numbers of the classes have gaps
                raise ValueError(f"{name}: {e.args[0]}") from e
        self.check_classes(checkpoint)
        return self.content

    def _open(self, split: str) -> Any:
        """Return a split as Ultralytics reads it; images that it leaves out are an error."""
        path = self.content.get(split)
        if not path:
            raise FileNotFoundError(f"{self.args['data']} has no '{split}' split.")
        try:
            dataset = self._validator.build_dataset(path)
        except RuntimeError as e:  # how Ultralytics says that no image is left, and why for each of them
            raise ValueError(" ".join(str(e).splitlines()[:2])) from e
        if hasattr(dataset, "samples"):  # a classification data set
            listed, kept = [s[0] for s in dataset.base.samples], [s[0] for s in dataset.samples]
        else:
            listed, kept = dataset.get_img_files(dataset.img_path), dataset.im_files
        if not listed:
            raise FileNotFoundError(f"{path}: no images.")
        check_complete(listed, kept, f"{self.args['data']}, split '{split}'")
        return dataset
