"""The embedded data set."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from ultralytics.data import utils
from ultralytics.data.dataset import YOLODataset
from ultralytics.utils import YAML as UltralyticsYAML

from yolo_sos.data import digits
from yolo_sos.data.digits import build, draw_scene, source_digits, split_source
from yolo_sos.data.voc import read_annotation, read_image_set

YAML = Path(__file__).parents[2] / "cfg/datasets/digits.yaml"
SMALL = {"train": 4, "val": 2, "test": 2}

pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'yolo-sos[digits]'")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The data set as Ultralytics makes it, on first use, from its YAML."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "DATASETS_DIR", folder)
        return utils.check_det_dataset(str(YAML))


def annotation_paths(data, split):
    """Return image id to XML file of one split."""
    return {p.stem: p for p in sorted((data["path"] / data["voc"] / split).glob("*.xml"))}


def content(root):
    """Every file's bytes, and every link's target, by relative path."""
    return {
        p.relative_to(root).as_posix(): os.readlink(p) if p.is_symlink() else p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


def test_ultralytics_builds_it_and_reads_every_label(data):
    for split, n in ("train", 400), ("val", 100), ("test", 100):
        dataset = YOLODataset(img_path=data[split], data=data, task="detect", imgsz=160, augment=False, rect=False)
        objects = [o for p in annotation_paths(data, split).values() for o in read_annotation(p).objects]
        plain = [o for o in objects if not o.difficult]
        assert len(dataset) == n
        assert sum(len(x["cls"]) for x in dataset.labels) == len(plain)
        assert 2 * n <= len(objects) <= 6 * n
        assert {o.name for o in plain} == set(digits.NAMES)
        assert 0.02 < 1 - len(plain) / len(objects) < 0.15  # enough difficult ones to matter, not more
    assert data["names"] == dict(enumerate(digits.NAMES))


def test_labels_and_annotations_say_the_same(data):
    for image_id, path in annotation_paths(data, "test").items():
        lines = {True: [], False: []}
        for o in read_annotation(path).objects:
            xmin, ymin, xmax, ymax = o.box
            box = [(xmin - 1 + xmax) / 320, (ymin - 1 + ymax) / 320, (xmax - xmin + 1) / 160, (ymax - ymin + 1) / 160]
            lines[o.difficult].append([int(o.name), *box])
        for difficult, folder in (False, "labels"), (True, "difficult"):
            file = data["path"] / folder / "test" / f"{image_id}.txt"
            found = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
            np.testing.assert_allclose(np.array(found, float), np.array(lines[difficult]), atol=1e-7)


def test_it_is_a_voc_tree_as_well(data):
    voc = data["path"] / "voc"
    for split in "train", "val", "test":
        ids = read_image_set(voc, split)
        assert ids == sorted(p.stem for p in Path(data[split]).iterdir())
        assert read_annotation(voc / "Annotations" / f"{ids[0]}.xml").width == 160
        assert cv2.imread(str(voc / "JPEGImages" / f"{ids[0]}.jpg")).shape == (160, 160, 3)


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_share_no_handwriting(seed, tmp_path, monkeypatch):
    sources = split_source(seed)
    assert sorted(np.concatenate(list(sources.values()))) == list(range(1797))
    assert [len(s) for s in sources.values()] == [1078, 359, 360]

    drawn = []
    monkeypatch.setattr(digits, "draw_scene", lambda *args: drawn.append(draw_scene(*args)) or drawn[-1])
    build(tmp_path / "set", **SMALL, seed=seed)
    for split, scenes in ("train", drawn[:4]), ("val", drawn[4:6]), ("test", drawn[6:]):
        assert {d.source for s in scenes for d in s.digits} <= set(sources[split].tolist())


def test_the_source_is_what_it_says():
    images, labels = source_digits()
    assert images.shape == (1797, 8, 8)
    assert (images.min(), images.max()) == (0, 1)
    assert np.bincount(labels).min() > 170


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("imgsz", [64, 320])
def test_boxes_and_flags_are_those_of_the_ink(seed, imgsz, monkeypatch):
    stickers, find_place, enlarge = [], digits._find_place, digits._enlarge

    def record_ink(*args):
        result = enlarge(*args)
        stickers.append([result[0] > 0])
        return result

    def record_place(rng, owner, outline, ink):
        spot = find_place(rng, owner, outline, ink)
        stickers[-1] += [outline, spot]
        return spot

    monkeypatch.setattr(digits, "_enlarge", record_ink)
    monkeypatch.setattr(digits, "_find_place", record_place)
    scene = draw_scene(np.random.default_rng(seed), split_source()["train"], imgsz, 12)

    masks = []
    for ink, outline, spot in stickers:
        if spot is not None:
            full = np.zeros((2, imgsz, imgsz), bool)
            full[0][spot], full[1][spot] = ink, outline
            masks.append(full)
    assert len(masks) == len(scene.digits) > 8
    assert any(d.hidden > 0 for d in scene.digits)
    for i, (digit, (ink, _)) in enumerate(zip(scene.digits, masks, strict=True)):
        rows, columns = np.nonzero(ink)
        assert digit.box == (columns.min() + 1, rows.min() + 1, columns.max() + 1, rows.max() + 1)
        later = np.any([outline for _, outline in masks[i + 1 :]], axis=0)
        hidden = (ink & later).sum() / ink.sum()
        assert digit.hidden == pytest.approx(hidden)
        assert digit.difficult == (hidden > 0.5)
        assert hidden <= 0.8 + 1e-9
        np.testing.assert_array_equal(scene.owner == i, ink & ~later)


def test_the_same_options_give_the_same_bytes(tmp_path):
    build(tmp_path / "a", **SMALL)
    build(tmp_path / "b", **SMALL)
    a = content(tmp_path / "a")
    assert a == content(tmp_path / "b")
    build(tmp_path / "more", **{**SMALL, "train": 6})
    more = content(tmp_path / "more")
    assert [k for k in a if a[k] != more[k]] == ["digits.json", "voc/ImageSets/Main/train.txt"]
    build(tmp_path / "other", **SMALL, seed=1)
    jpgs = [k for k in a if k.startswith("voc/JPEGImages/")]
    assert all(a[k] != v for k, v in content(tmp_path / "other").items() if k in jpgs)


def objects_of(root, split):
    return [read_annotation(root / f"voc/Annotations/{i}.xml").objects for i in read_image_set(root / "voc", split)]


def test_label_noise_changes_classes_of_training_objects_and_nothing_else(tmp_path):
    counts = {"train": 60, "val": 10, "test": 10, "imgsz": 64}
    for name, noise in ("clean", 0.0), ("some", 0.2), ("again", 0.2), ("more", 0.5), ("all", 1.0):
        build(tmp_path / name, **counts, label_noise=noise)
    clean, some = (content(tmp_path / name) for name in ("clean", "some"))
    assert some == content(tmp_path / "again") and "label_noise" in some["digits.json"].decode()
    changed = {k for k in clean if clean[k] != some[k]} - {"digits.json"}
    assert changed and all(k.startswith(("voc/Annotations/train", "labels/train", "difficult/train")) for k in changed)

    wrong = {}
    for name in "some", "more", "all":
        pairs = []
        for before, after in zip(
            objects_of(tmp_path / "clean", "train"), objects_of(tmp_path / name, "train"), strict=True
        ):
            assert [(o.box, o.difficult) for o in before] == [(o.box, o.difficult) for o in after]
            pairs += [(o.name, p.name) for o, p in zip(before, after, strict=True)]
        wrong[name] = {(i, new) for i, (old, new) in enumerate(pairs) if old != new}
    assert len(wrong["all"]) == len(pairs)
    assert len(wrong["some"]) == pytest.approx(0.2 * len(pairs), abs=4 * (0.16 * len(pairs)) ** 0.5)
    assert wrong["some"] < wrong["more"] < wrong["all"]
    offsets = [(int(new) - int(old)) % 10 for old, new in pairs]
    np.testing.assert_allclose(np.bincount(offsets, minlength=10)[1:] / len(pairs), 1 / 9, atol=0.09)


def test_sets_made_before_there_was_label_noise_are_reused(tmp_path, monkeypatch):
    yaml = build(tmp_path / "set", **SMALL)
    assert "label_noise" not in (tmp_path / "set/digits.json").read_text()
    monkeypatch.setattr(digits, "draw_scene", None)
    assert build(tmp_path / "set", **SMALL, label_noise=0) == yaml


def test_the_noisy_set_differs_from_the_clean_one_in_its_noise_alone():
    clean, noisy = (UltralyticsYAML.load(YAML.with_name(f"{name}.yaml")) for name in ("digits", "digits-noisy"))
    assert noisy.pop("path") == "digits-noisy" and clean.pop("path") == "digits"
    assert noisy.pop("download") == clean.pop("download").replace(")", ", label_noise=0.2)")
    assert noisy == clean


def test_it_can_be_moved(tmp_path):
    yaml = build(tmp_path / "a", **SMALL)
    (tmp_path / "a").rename(tmp_path / "b")
    data = utils.check_det_dataset(str(tmp_path / "b" / yaml.name))
    assert [cv2.imread(str(p)) is not None for p in Path(data["val"]).iterdir()] == [True] * 2


def test_a_finished_set_is_reused_and_another_is_not_overwritten(tmp_path, monkeypatch):
    yaml = build(tmp_path / "set", **SMALL)
    before = content(tmp_path / "set")
    monkeypatch.setattr(digits, "draw_scene", None)
    assert build(tmp_path / "set", **SMALL) == yaml
    with pytest.raises(FileExistsError, match="set: exists already"):
        build(tmp_path / "set", **SMALL, seed=1)
    assert content(tmp_path / "set") == before


def test_two_processes_at_once_agree(tmp_path, monkeypatch):
    write_yolo = digits.write_yolo

    def overtaken(*args, **kwargs):
        monkeypatch.setattr(digits, "write_yolo", write_yolo)
        build(tmp_path / "set", **SMALL)
        return write_yolo(*args, **kwargs)

    monkeypatch.setattr(digits, "write_yolo", overtaken)
    assert build(tmp_path / "set", **SMALL).is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "write_yolo", interrupt)  # when the VOC tree is complete
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "set", **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option",
    [
        {"val": 0},
        {"imgsz": 63},
        {"digits": (3, 2)},
        {"digits": (0, 2)},
        {"digits": (1, 21)},
        {"seed": -1},
        {"label_noise": 1.1},
    ],
)
def test_options_out_of_range_are_named(tmp_path, option):
    with pytest.raises(ValueError, match=f"^{next(iter(option))}="):
        build(tmp_path / "set", **option)
    assert not list(tmp_path.iterdir())


def test_scikit_learn_missing_says_what_to_install(tmp_path, monkeypatch):
    digits.source_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'yolo-sos\[digits\]'"):
        build(tmp_path / "set", **SMALL)
    assert not list(tmp_path.iterdir())
