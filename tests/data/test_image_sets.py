# yolo-sos, AGPL-3.0
"""Classification sets that come along: digits, and Fashion-MNIST from its IDX files."""

from __future__ import annotations

import gzip
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolo_sos.builtin import resolve_data
from yolo_sos.data import digits, digits_cls, fashion
from yolo_sos.data.image_folder import draw_split

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Digits ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def digits_set(tmp_path_factory) -> Path:
    return digits_cls.build(tmp_path_factory.mktemp("sets") / "digits")


def test_each_digit_stands_in_one_split_under_its_label(digits_set):
    images, labels = digits.source_digits()
    found = {}
    for split, index in digits.split_source().items():
        paths = sorted((digits_set / split).rglob("*.png"), key=lambda p: p.name)
        assert [int(p.parent.name) for p in paths] == labels[index].tolist()
        found[split] = len(paths)
        for path, i in list(zip(paths, index, strict=True))[:20]:
            grey = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            assert grey.shape == (32, 32) and grey.dtype == np.uint8
            small = cv2.resize(grey.astype(np.float32), (8, 8), interpolation=cv2.INTER_AREA) / 255
            assert np.corrcoef(small.ravel(), images[i].ravel())[0, 1] > 0.95
    assert found == {"train": 1078, "val": 359, "test": 360}


def test_the_same_options_give_the_same_bytes_and_others_are_refused(digits_set, tmp_path):
    assert files(digits_cls.build(tmp_path / "again")) == files(digits_set)
    times = {p: p.stat().st_mtime_ns for p in digits_set.rglob("*")}
    assert digits_cls.build(digits_set) == digits_set
    assert {p: p.stat().st_mtime_ns for p in digits_set.rglob("*")} == times
    with pytest.raises(FileExistsError, match="digits: exists already"):
        digits_cls.build(digits_set, seed=1)


def test_it_is_built_by_name_on_first_use(tmp_path, monkeypatch):
    import ultralytics.utils

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ultralytics.utils, "DATASETS_DIR", tmp_path / "sets")
    assert resolve_data("digits-cls") == str(tmp_path / "sets/digits-cls")
    assert (tmp_path / "sets/digits-cls/train/0").is_dir()
    (tmp_path / "digits-cls").mkdir()  # a folder of the user's goes first
    assert resolve_data("digits-cls") == "digits-cls"
    assert resolve_data("cifar100") == "cifar100"


# Splits ---------------------------------------------------------------------------------------------------------------
def test_splits_are_disjoint_and_each_class_has_its_share():
    labels = np.repeat(np.arange(4), [30, 25, 40, 50])
    drawn = draw_split(labels, {"train": 50, "val": 21}, np.random.default_rng(0))
    assert len(set(drawn["train"]) | set(drawn["val"])) == 71
    for split, count in (("train", 50), ("val", 21)):
        per_class = np.bincount(labels[drawn[split]], minlength=4)
        assert per_class.sum() == count and per_class.max() - per_class.min() <= 1
    again = draw_split(labels, {"train": 50, "val": 21}, np.random.default_rng(0))
    assert all((again[k] == drawn[k]).all() for k in drawn)
    assert not (draw_split(labels, {"train": 50}, np.random.default_rng(1))["train"] == drawn["train"]).all()
    with pytest.raises(ValueError, match="val=60: class 1 has 13 images left, and 15 are needed"):
        draw_split(labels, {"train": 48, "val": 60}, np.random.default_rng(0))


# Fashion-MNIST --------------------------------------------------------------------------------------------------------
def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def source(tmp_path) -> Path:
    """IDX files like Fashion-MNIST's, of 60 and 30 images; one of them is not compressed."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "idx"
    folder.mkdir()
    for name, n in (("train", 60), ("t10k", 30)):
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(rng.integers(0, 256, (n, 28, 28)))))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(n) % 10)))
    plain = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    (folder / "t10k-labels-idx1-ubyte").write_bytes(plain)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    return folder


def test_fashion_becomes_an_image_folder(source, tmp_path):
    out = fashion.build(source, tmp_path / "set", train=30, val=20, test=30)
    images, labels = fashion.load(source, "train")
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    seen = []
    for split, n in (("train", 3), ("val", 2), ("test", 3)):
        assert sorted(p.name for p in (out / split).iterdir()) == list(fashion.NAMES)
        for folder in (out / split).iterdir():
            assert len(list(folder.iterdir())) == n
            for path in folder.iterdir() if split != "test" else ():
                pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED).tobytes()  # PNG: to the last bit
                assert known[pixels] == int(folder.name[0])
                seen.append(pixels)
    assert len(set(seen)) == len(seen) == 50
    assert files(fashion.build(source, tmp_path / "twin", train=30, val=20, test=30)) == files(out)
    assert fashion.build(source, out, train=30, val=20, test=30) == out
    with pytest.raises(FileExistsError):
        fashion.build(source, out, train=30, val=20, test=20)


def test_names_are_in_the_order_in_which_folders_are_read():
    assert list(fashion.NAMES) == sorted(fashion.NAMES) and len(fashion.NAMES) == 10


def test_what_is_wrong_is_said(source, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.gz: no such file.*dataset-fashion-mnist"):
        fashion.build(tmp_path / "none", tmp_path / "set")
    with pytest.raises(ValueError, match="val=40: class 0 has 3 images left, and 4 are needed"):
        fashion.build(source, tmp_path / "set", train=30, val=40, test=10)
    with pytest.raises(ValueError, match="train=0"):
        fashion.build(source, tmp_path / "set", train=0)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda raw: gzip.compress(b"\x89PNG" + raw), "not an IDX file of unsigned bytes"),
        (lambda raw: gzip.compress(raw[:-1]), r"its head says \(60, 28, 28\), 47056 bytes in all, but it has 47055"),
        (lambda raw: gzip.compress(raw)[:-20], "not a whole gzip file"),
        (lambda raw: raw, "not a whole gzip file"),
        (lambda raw: gzip.compress(raw[:3]), "not an IDX file"),
        (
            lambda raw: gzip.compress(idx(np.zeros((9, 4, 4)))),
            r"images of shape \(9, 4, 4\) and labels of shape \(60,\)",
        ),
    ],
)
def test_damaged_files_are_refused(source, tmp_path, damage, match):
    path = source / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(gzip.decompress(path.read_bytes())))
    with pytest.raises(ValueError, match=match):
        fashion.build(source, tmp_path / "set", train=10, val=10, test=10)
    assert not (tmp_path / "set").exists()


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_files():
    for split, n in (("train", 60000), ("test", 10000)):
        images, labels = fashion.load(DEBIAN, split)
        assert images.shape == (n, 28, 28)
        assert np.bincount(labels).tolist() == [n // 10] * 10
    # Mean and standard deviation as the field quotes them
    images, _ = fashion.load(DEBIAN, "train")
    assert images.mean() / 255 == pytest.approx(0.2860, abs=1e-4)
    assert images.std() / 255 == pytest.approx(0.3530, abs=1e-4)
