# yolo-sos, AGPL-3.0
"""The embedded data set: real handwritten digits on cluttered backgrounds, for detection without a download.

Its source is the set of 1 797 handwritten digits, 8 x 8 pixels each, that scikit-learn ships. Every image shows several
of them in different sizes, as stickers: ink on an outline of its own colour, over lines and blots. Later stickers may
lie over earlier ones; a digit of which more than half is hidden is difficult in the sense of Pascal VOC. Train, val
and test are drawn from disjoint digits, so no handwriting seen in training is tested on. On request some of the
training objects are labelled as another class, as annotators' mistakes are; val and test stay right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from ultralytics.utils import TQDM

from yolo_sos.data.convert import write_yolo
from yolo_sos.data.once import build_once
from yolo_sos.data.voc import VOCAnnotation, VOCObject, write_annotation
from yolo_sos.files import write_text

DRAWING = 1  # raise it when the same options give other images, so that sets of an earlier version are not reused
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}  # of the source digits
NAMES = tuple("0123456789")
DIFFICULT = 0.5  # hidden share of the ink above which a digit is difficult
HIDDEN_MOST = 0.8  # no digit is hidden further, or its box would hold nothing that could be recognised
SIZES = 0.16, 0.36  # side of a digit's 8 x 8 square as a share of the image's
INK = 0.45  # darkness above which an enlarged pixel is ink
PLACES = 20  # to try for one digit before it is left out


@dataclass(frozen=True)
class Digit:
    """A digit in a scene.

    `label` is 0 to 9, `source` its index among scikit-learn's digits, `box` xmin, ymin, xmax, ymax around all of its
    ink, hidden or not (pixels, 1-based, inclusive), `hidden` the share of its ink that later digits lie over.
    """

    label: int
    source: int
    box: tuple[int, int, int, int]
    hidden: float

    @property
    def difficult(self) -> bool:
        """Whether the digit is hidden too far to be asked for."""
        return self.hidden > DIFFICULT


@dataclass(frozen=True)
class Scene:
    """An image and what it shows.

    Attributes:
        image (np.ndarray): (imgsz, imgsz, 3) uint8, BGR.
        owner (np.ndarray): (imgsz, imgsz) int16, the digit whose ink a pixel shows, by its position in `digits`; -1
            for none.
        digits (tuple[Digit, ...]): The digits, the lowest first.
    """

    image: np.ndarray
    owner: np.ndarray
    digits: tuple[Digit, ...]


def build(
    path: str | Path,
    *,
    train: int = 400,
    val: int = 100,
    test: int = 100,
    imgsz: int = 160,
    digits: tuple[int, int] = (2, 6),
    seed: int = 0,
    label_noise: float = 0.0,
) -> Path:
    """Build the data set, as a Pascal VOC tree in ``{path}/voc`` and as the YOLO data set made from it.

    The same options give the same bytes. More images of a split begin with those of a smaller set. Where the set
    exists with these options already, nothing is done.

    Args:
        path (str | Path): The folder to make. It appears when it is complete.
        train (int): Number of images to train on.
        val (int): Number of images to validate on.
        test (int): Number of images to test on.
        imgsz (int): Side of the square images in pixels, at least 64.
        digits (tuple[int, int]): Fewest and most digits in an image.
        seed (int): Seed of the split of the source digits, of all images and of the label noise.
        label_noise (float): Probability, 0 to 1, with which an object of a training image is labelled as one of the
            nine other digits, each as likely (symmetric noise: Patrini et al., CVPR 2017). Images and boxes are those
            of the set without noise, and an object that is wrong with little noise is as wrong with more.

    Returns:
        (Path): The data YAML, ``{path}/data.yaml``.

    Raises:
        ValueError: If an option is out of range.
        FileExistsError: If `path` holds something else, be it the data set with other options.
        ImportError: If scikit-learn is missing.
    """
    path = Path(path)
    counts = {"train": train, "val": val, "test": test}
    options = {**counts, "imgsz": imgsz, "digits": list(digits), "seed": seed, "drawing": DRAWING}
    if label_noise:  # without, a set is what it was before there was such an option, and is reused
        options["label_noise"] = label_noise
    most = "fewest and most digits in an image, 1 to 20, in this order"
    for key, value, valid, right in (
        *((split, n, n >= 1, "a split needs at least 1 image") for split, n in counts.items()),
        ("imgsz", imgsz, imgsz >= 64, "at least 64 pixels, or the smallest digits cannot be read"),
        ("digits", digits, len(digits) == 2 and 1 <= digits[0] <= digits[1] <= 20, most),
        ("seed", seed, seed >= 0, "at least 0"),
        ("label_noise", label_noise, 0 <= label_noise <= 1, "a probability, 0 to 1"),
    ):
        if not valid:
            raise ValueError(f"{key}={value}: {right}")

    def fill(folder: Path) -> None:
        _write_voc(folder / "voc", counts, imgsz, digits, seed, label_noise)
        write_yolo(folder, folder / "voc", names=NAMES)

    build_once(path, "digits.json", options, fill)
    return path / "data.yaml"


@lru_cache(maxsize=1)
def source_digits() -> tuple[np.ndarray, np.ndarray]:
    """Load scikit-learn's handwritten digits.

    Returns:
        images (np.ndarray): (1797, 8, 8) float32, darkness of the ink, 0 to 1. Shared: do not write to it.
        labels (np.ndarray): (1797,) int64, which digit.

    Raises:
        ImportError: If scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ImportError(
            "The digits come with scikit-learn, which is not installed: pip install 'yolo-sos[digits]'"
        ) from e
    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target.astype(np.int64)


def split_source(seed: int = 0) -> dict[str, np.ndarray]:
    """Deal the source digits out to train, val and test in random order.

    Returns:
        (dict[str, np.ndarray]): Split to the indices of its source digits; disjoint, and together all of them.
    """
    order = np.random.default_rng(seed).permutation(len(source_digits()[1]))
    ends = np.cumsum([round(share * len(order)) for share in SHARES.values()])[:-1]
    return dict(zip(SHARES, np.split(order, ends), strict=True))


def draw_scene(rng: np.random.Generator, sources: Sequence[int] | np.ndarray, imgsz: int, count: int) -> Scene:
    """Draw one image.

    All choices come from ``rng``, also that of ``count`` source digits by their index. A digit that finds no place is
    left out, which takes a very full image.
    """
    images, labels = source_digits()
    image = _background(rng, imgsz)
    owner = np.full((imgsz, imgsz), -1, np.int16)
    ink: list[int] = []  # pixels of ink of each digit
    placed: list[tuple[int, tuple[int, int, int, int]]] = []  # source and box
    for source in rng.choice(sources, size=count, replace=False):
        side = round(rng.uniform(*SIZES) * imgsz)
        alpha, margin = _enlarge(images[source], side)
        outline = cv2.dilate((alpha > 0).astype(np.uint8), np.ones((2 * margin + 1,) * 2, np.uint8)) > 0
        spot = _find_place(rng, owner, outline, ink)
        if spot is None:
            continue
        _paint(rng, image[spot], alpha, outline)
        owner[spot][outline] = -1
        owner[spot][alpha > 0] = len(placed)
        rows, columns = np.nonzero(alpha)
        y, x = spot[0].start + 1, spot[1].start + 1  # 1-based
        left, top, right, bottom = x + columns.min(), y + rows.min(), x + columns.max(), y + rows.max()
        placed.append((int(source), (int(left), int(top), int(right), int(bottom))))
        ink.append(len(rows))
    image = np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)
    hidden = 1 - _visible(owner, len(ink)) / ink
    found = tuple(Digit(int(labels[s]), s, box, float(h)) for (s, box), h in zip(placed, hidden, strict=True))
    return Scene(image, owner, found)


def _write_voc(
    root: Path, counts: Mapping[str, int], imgsz: int, digits: tuple[int, int], seed: int, label_noise: float
) -> None:
    for folder in "Annotations", "ImageSets/Main", "JPEGImages":
        (root / folder).mkdir(parents=True)
    sources = split_source(seed)
    for number, (split, n) in enumerate(counts.items()):
        ids = [f"{split}_{i:05d}" for i in range(n)]
        for i, image_id in enumerate(TQDM(ids, desc=f"{split}: drawing")):
            rng = np.random.default_rng([seed, number, i])  # so an image does not depend on how many there are
            scene = draw_scene(rng, sources[split], imgsz, int(rng.integers(digits[0], digits[1], endpoint=True)))
            jpg = f"{image_id}.jpg"
            _, data = cv2.imencode(".jpg", scene.image, [cv2.IMWRITE_JPEG_QUALITY, 95])
            (root / "JPEGImages" / jpg).write_bytes(data.tobytes())
            labels = [d.label for d in scene.digits]
            if split == "train":
                labels = _mislabel(np.random.default_rng([seed, number, i, 1]), labels, label_noise)
            drawn = zip(labels, scene.digits, strict=True)
            objects = tuple(VOCObject(NAMES[label], d.box, d.difficult) for label, d in drawn)
            annotation = VOCAnnotation(image_id, jpg, imgsz, imgsz, objects)
            write_annotation(root / "Annotations" / f"{image_id}.xml", annotation)
        write_text(root / "ImageSets" / "Main" / f"{split}.txt", "\n".join(ids) + "\n")


def _mislabel(rng: np.random.Generator, labels: Sequence[int], share: float) -> list[int]:
    """Turn each label into one of the others with probability `share`. As many numbers are drawn whatever it is."""
    wrong = rng.random(len(labels)) < share
    return ((labels + wrong * rng.integers(1, len(NAMES), len(labels))) % len(NAMES)).tolist()


def _enlarge(digit: np.ndarray, side: int) -> tuple[np.ndarray, int]:
    """Enlarge an 8 x 8 digit to side x side pixels of ink, framed by room for the outline; also return its width."""
    margin = max(1, round(side / 18))
    alpha = np.clip(cv2.resize(digit, (side, side), interpolation=cv2.INTER_CUBIC), 0, 1)
    alpha[alpha <= INK] = 0  # a box around the ink then has ink in each of its outer rows and columns, and none beyond
    return np.pad(alpha, margin), margin


def _find_place(
    rng: np.random.Generator, owner: np.ndarray, outline: np.ndarray, ink: list[int]
) -> tuple[slice, slice] | None:
    """A place for a sticker within the image, such that no digit below it is hidden beyond what is allowed."""
    height, width = outline.shape
    for _ in range(PLACES):
        top, left = rng.integers(0, np.array(owner.shape) - outline.shape, endpoint=True)
        spot = slice(top, top + height), slice(left, left + width)
        covered = owner.copy()
        covered[spot][outline] = -1
        if np.all(_visible(covered, len(ink)) >= (1 - HIDDEN_MOST) * np.array(ink)):
            return spot
    return None


def _visible(owner: np.ndarray, count: int) -> np.ndarray:
    """Number of pixels of ink that each digit shows."""
    return np.bincount(owner[owner >= 0], minlength=count)


def _paint(rng: np.random.Generator, patch: np.ndarray, alpha: np.ndarray, outline: np.ndarray) -> None:
    """Paint a sticker: the outline in one colour, the ink over it in a colour of other brightness."""
    dark, light = rng.uniform(0, 80, 3), rng.uniform(170, 255, 3)
    ink, patch[outline] = (dark, light) if rng.random() < 0.5 else (light, dark)
    # Half strength where ink begins, full where it is twice as dark: solid strokes with soft edges.
    strength = np.minimum(alpha / (2 * INK), 1)[..., None]
    patch[:] = patch * (1 - strength) + ink * strength


def _background(rng: np.random.Generator, imgsz: int) -> np.ndarray:
    """Clouds of colour, and over them lines, arcs, boxes and blots about as wide and large as digits are."""
    clouds = rng.uniform(40, 215, (4, 4, 3)).astype(np.float32)
    image = cv2.resize(clouds, (imgsz, imgsz), interpolation=cv2.INTER_CUBIC)
    for _ in range(rng.integers(8, 20)):
        colour = rng.uniform(0, 255, 3).tolist()
        (x, y), (u, v) = rng.integers(0, imgsz, (2, 2)).tolist()
        width = int(rng.integers(1, max(3, imgsz // 30)))
        radii = rng.integers(imgsz // 40 + 1, imgsz // 7, 2).tolist()
        angle, arc = rng.integers(0, 360, 2).tolist()
        shape = rng.integers(4)
        if shape == 0:
            cv2.line(image, (x, y), (u, v), colour, width)
        elif shape == 1:
            cv2.ellipse(image, (x, y), radii, angle, 0, arc, colour, width)
        elif shape == 2:
            cv2.rectangle(image, (x, y), (x + radii[0], y + radii[1]), colour, width)
        else:
            cv2.ellipse(image, (x, y), radii, angle, 0, 360, colour, cv2.FILLED)
    return image
