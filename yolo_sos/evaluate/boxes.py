# yolo-sos, AGPL-3.0
"""Ground truth and detections as arrays, and the one convention of coordinates that they share.

A box is `(x1, y1, x2, y2)`, float64, in pixels, continuous: the image's corner is (0, 0) and the first pixel covers
[0, 1]. Width and height are `x2 - x1` and `y2 - y1`. What others write becomes

| format                | its box                                | here                              |
| --------------------- | -------------------------------------- | --------------------------------- |
| Pascal VOC            | xmin, ymin, xmax, ymax, 1-based, incl. | (xmin - 1, ymin - 1, xmax, ymax)  |
| COCO                  | x, y, w, h                             | (x, y, x + w, y + h)              |
| Ultralytics           | x1, y1, x2, y2                         | the same                          |

so a VOC box is `xmax - xmin + 1` pixels wide here too: the devkit's "+ 1" lies in the convention.

Readers round coordinates to multiples of 2^-20 pixel (`snap`). On that grid `x - 1`, `x + w` and `x2 - x1` are exact in
float64, so detections that are written in either format and read back are the same to the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

GRID = 2.0**20  # steps per pixel: float32 lies on it from 8 pixels on, and 2^32 pixels still fit a float64


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """The objects of a set of images.

    Attributes:
        classes (tuple[str, ...]): Names of the K classes.
        images (tuple[str, ...]): Ids of the images, those without objects included.
        image (np.ndarray): Index into `images` of each object's image, int64, shape (G,).
        label (np.ndarray): Index into `classes` of each object's class, int64, shape (G,).
        boxes (np.ndarray): Boxes, float64, shape (G, 4).
        difficult (np.ndarray): Objects that evaluation neither rewards nor punishes, bool, shape (G,).
        area (np.ndarray): Areas by which COCO sorts objects into small, medium and large, float64, shape (G,).
        category_ids (tuple[int | str, ...]): COCO's ids of the classes.
        stems (tuple[str, ...]): Names of the image files without folder and suffix.
        difficult_known (bool): False where the source has no such flag, so that `difficult` is all False.
        image_ids (tuple[int | str, ...]): COCO's ids of the images.
        remarks (tuple[str, ...]): Sentences on what is odd about the source, for whoever reads the numbers.
    """

    classes: tuple[str, ...]
    images: tuple[str, ...]
    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    difficult: np.ndarray
    area: np.ndarray
    category_ids: tuple[int | str, ...]
    stems: tuple[str, ...]
    difficult_known: bool = True
    image_ids: tuple[int | str, ...] = ()
    remarks: tuple[str, ...] = ()

    @classmethod
    def build(
        cls,
        classes: Sequence[str],
        images: Sequence[str],
        image: ArrayLike,
        label: ArrayLike,
        boxes: ArrayLike,
        difficult: ArrayLike | None = None,
        *,
        area: ArrayLike | None = None,
        category_ids: Sequence[int | str] | None = None,
        image_ids: Sequence[int | str] | None = None,
        stems: Sequence[str] | None = None,
        remarks: Sequence[str] = (),
        where: Callable[[int], str] = "object {}".format,
    ) -> GroundTruth:
        """Make a ground truth of anything array-like, and check it.

        The arguments are the attributes, array-like. `difficult` is None if the source has no such flags. By default,
        `area` is that of the boxes, `category_ids` are 1, 2, ..., as Ultralytics has it, and `image_ids` and `stems`
        are `images`. ``where(i)`` names the place of object i, for errors.

        Raises:
            ValueError: If there is no class or image, a name or id comes twice, an index is out of range, or a box is
                not finite or inside out.
        """
        for what, names in ("class", classes), ("image", images):
            if not len(names):
                raise ValueError(f"a ground truth has at least one {what}")
            if (twice := first_duplicate(names)) is not None:
                raise ValueError(f"{what} '{twice}' comes twice")
        checked = _boxes(boxes, where)
        n = len(checked)
        return cls(
            classes=tuple(classes),
            images=tuple(images),
            image=_index(image, n, len(images), "image", where),
            label=_index(label, n, len(classes), "class", where),
            boxes=checked,
            difficult=_column(np.zeros(n) if difficult is None else difficult, n, "difficult flags").astype(bool),
            area=_column(box_area(checked) if area is None else area, n, "areas"),
            category_ids=tuple(range(1, len(classes) + 1) if category_ids is None else category_ids),
            stems=tuple(images if stems is None else stems),
            difficult_known=difficult is not None,
            image_ids=tuple(images if image_ids is None else image_ids),
            remarks=tuple(remarks),
        )

    def repeated(self) -> np.ndarray:
        """Return which objects repeat class and box of an earlier one in their image that is as difficult, shape (G,).

        Ultralytics drops them from its labels; VOC's and COCO's metrics count each.
        """
        rows = np.column_stack([self.image, self.label, self.difficult, self.boxes])
        repeated = np.ones(len(rows), bool)
        repeated[np.unique(rows, axis=0, return_index=True)[1]] = False
        return repeated

    def positives(self) -> np.ndarray:
        """Count the objects of each class that are to be found, int64, shape (K,): difficult ones do not count."""
        return np.bincount(self.label[~self.difficult], minlength=len(self.classes))


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector found in the images of a ground truth. Their order breaks ties between equal scores.

    Attributes:
        image (np.ndarray): Index into the ground truth's `images`, int64, shape (D,).
        label (np.ndarray): Index into the ground truth's `classes`, int64, shape (D,).
        score (np.ndarray): Confidence, any finite number, float64, shape (D,).
        boxes (np.ndarray): Boxes, float64, shape (D, 4).
    """

    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    boxes: np.ndarray

    @classmethod
    def build(
        cls,
        truth: GroundTruth,
        image: ArrayLike,
        label: ArrayLike,
        score: ArrayLike,
        boxes: ArrayLike,
        where: Callable[[int], str] = "detection {}".format,
    ) -> Detections:
        """Make detections of anything array-like, and check them against the ground truth they belong to.

        The arguments are the attributes, array-like; the indices refer to the images and classes of `truth`.
        ``where(i)`` names the place of detection i, for errors.

        Raises:
            ValueError: If an index is out of range, a score is not finite, or a box is not finite or inside out.
        """
        checked = _boxes(boxes, where)
        n = len(checked)
        scores = _column(score, n, "scores")
        for i in np.flatnonzero(~np.isfinite(scores))[:1]:
            raise ValueError(f"{where(i)}: score is {scores[i]}; it must be a finite number")
        return cls(
            image=_index(image, n, len(truth.images), "image", where),
            label=_index(label, n, len(truth.classes), "class", where),
            score=scores,
            boxes=checked,
        )

    def __len__(self) -> int:
        """Return the number of detections."""
        return len(self.score)


def snap(boxes: ArrayLike) -> np.ndarray:
    """Round coordinates to the grid on which every conversion between formats is exact (see the module)."""
    return np.round(np.asarray(boxes, np.float64) * GRID) / GRID


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Return the areas of boxes of shape (N, 4) in square pixels, shape (N,)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def xywh(boxes: np.ndarray) -> np.ndarray:
    """Return boxes of shape (N, 4) as COCO writes them: x, y, width, height."""
    return np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])


def first_duplicate(names: Iterable[str]) -> str | None:
    """Return the first name that occurs more than once, or None."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _boxes(values: ArrayLike, where: Callable[[int], str]) -> np.ndarray:
    """Return boxes as float64, shape (N, 4), none of them inside out."""
    boxes = np.asarray(values, np.float64)
    if boxes.size and (boxes.ndim != 2 or boxes.shape[1] != 4):
        raise ValueError(f"boxes have shape (N, 4), not {boxes.shape}")
    boxes = boxes.reshape(-1, 4)
    # Written so that NaN fails too. Equal sides pass: a detector may clip a box to a line at the image's border.
    good = (boxes[:, 2] >= boxes[:, 0]) & (boxes[:, 3] >= boxes[:, 1]) & np.isfinite(boxes).all(1)
    for i in np.flatnonzero(~good)[:1]:
        x1, y1, x2, y2 = boxes[i]
        problem = "has x2 < x1 or y2 < y1" if np.isfinite(boxes[i]).all() else "is not finite"
        raise ValueError(f"{where(i)}: the box x1={x1:g}, y1={y1:g}, x2={x2:g}, y2={y2:g} (pixels, from 0) {problem}")
    return boxes


def _shaped(values: ArrayLike, n: int, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != (n,):
        raise ValueError(f"{what} have shape {array.shape}, but there are {n} boxes")
    return array


def _column(values: ArrayLike, n: int, what: str) -> np.ndarray:
    return _shaped(values, n, what).astype(np.float64)


def _index(values: ArrayLike, n: int, size: int, what: str, where: Callable[[int], str]) -> np.ndarray:
    """Return indices below `size` as int64, shape (n,)."""
    array = _shaped(values, n, f"{what} indices")
    if n and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{what} indices must be integers, not {array.dtype}")
    for i in np.flatnonzero((array < 0) | (array >= size))[:1]:
        raise ValueError(f"{where(i)}: {what} index {array[i]} is out of range; there are {size}")
    return array.astype(np.int64)
