# yolo-sos, AGPL-3.0
"""Fashion-MNIST: 70 000 grey images, 28 × 28, of 10 kinds of clothing, from its IDX files.

Debian and Ubuntu have them (``apt install dataset-fashion-mnist``, then ``/usr/share/datasets/fashion-mnist``), and so
has https://github.com/zalandoresearch/fashion-mnist, MIT license. Source of the format: the MNIST database's page
(LeCun, Cortes, Burges), "The IDX file format".
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from yolo_sos.data.image_folder import Split, build_image_folder, draw_split

# By label, 0 to 9. With the digit in front: folders are read in alphabetical order.
NAMES = (
    *("0-t-shirt", "1-trouser", "2-pullover", "3-dress", "4-coat"),
    *("5-sandal", "6-shirt", "7-sneaker", "8-bag", "9-ankle-boot"),
)
WHERE = "apt install dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist"


def build(
    source: str | Path, path: str | Path, *, train: int = 5000, val: int = 1000, test: int = 10000, seed: int = 0
) -> Path:
    """Write an image folder for ``data=`` from the IDX files.

    Train and val are drawn from the 60 000 training images, test from the 10 000 test images; each class has an equal
    share. The same options give the same files.

    Args:
        source (str | Path): The folder with the four IDX files, gzipped or not.
        path (str | Path): The folder to make. It appears when it is complete.
        train (int): Images to train on.
        val (int): Images to validate on, disjoint from those.
        test (int): Images to test on.
        seed (int): Seed of the draw.

    Returns:
        (Path): ``path``.

    Raises:
        FileNotFoundError: If an IDX file is missing.
        ValueError: If a file is not IDX, or there are not as many images.
        FileExistsError: If `path` holds something else.

    Examples:
        >>> build("/usr/share/datasets/fashion-mnist", "datasets/fashion-5k", train=5000)
    """
    for name, count in (("train", train), ("val", val), ("test", test)):
        if count < 1:
            raise ValueError(f"{name}={count}: a split needs at least 1 image")

    def splits() -> dict[str, Split]:
        images, labels = load(source, "train")
        chosen = draw_split(labels, {"train": train, "val": val}, np.random.default_rng(seed))
        parts = {name: (images[index], labels[index]) for name, index in chosen.items()}
        images, labels = load(source, "test")
        index = draw_split(labels, {"test": test}, np.random.default_rng([seed, 1]))["test"]
        return {**parts, "test": (images[index], labels[index])}

    options = {"set": "fashion-mnist", "train": train, "val": val, "test": test, "seed": seed}
    return build_image_folder(path, options, splits, NAMES)


def load(source: str | Path, split: str) -> Split:
    """Read the ``train`` or ``test`` part of Fashion-MNIST (or of MNIST, which has the same files).

    Returns:
        images (np.ndarray): ``(n, 28, 28)`` uint8.
        labels (np.ndarray): ``(n,)`` uint8.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is not IDX, or images and labels do not fit.
    """
    images, labels = (read_idx(_find(Path(source), split, kind)) for kind in ("images-idx3", "labels-idx1"))
    if images.ndim != 3 or labels.shape != images.shape[:1] or (labels.size and labels.max() >= len(NAMES)):
        raise ValueError(
            f"{source}: {split} has images of shape {images.shape} and labels of shape {labels.shape}; expected "
            "(n, H, W) and (n,), labels 0 to 9"
        )
    return images, labels


def read_idx(path: str | Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in ``.gz``, in the shape that its header gives.

    Raises:
        ValueError: If it is not such a file, or not a whole one.
    """
    try:
        data = gzip.decompress(Path(path).read_bytes()) if str(path).endswith(".gz") else Path(path).read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise ValueError(f"{path}: not a whole gzip file ({e})") from e
    # Two zero bytes, the type (8: unsigned bytes), the number of dimensions, and each as 4 bytes, big-endian.
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes, which begins with the bytes 00 00 08")
    start = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    size = int(np.prod(shape, dtype=np.int64))
    if len(data) != start + size:
        raise ValueError(f"{path}: its head says {shape}, {start + size} bytes in all, but it has {len(data)}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _find(source: Path, split: str, kind: str) -> Path:
    plain = source / f"{'t10k' if split == 'test' else split}-{kind}-ubyte"
    zipped = plain.with_name(f"{plain.name}.gz")
    for path in zipped, plain:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{zipped}: no such file. The IDX files of Fashion-MNIST: {WHERE}")
