"""From Pascal VOC trees to YOLO data sets."""

from __future__ import annotations

import re
import shutil
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ultralytics.data import utils
from ultralytics.utils import LOGGER, YAML, checks, downloads
from ultralytics.utils import ROOT as ULTRALYTICS

from yolo_sos.data.convert import SplitCounts, convert_voc, yolo_box
from yolo_sos.data.voc import VOCObject, clipped_box, read_annotation

ROOT = Path(__file__).parents[2]
BCCD = ROOT.parent / "shared" / "data" / "BCCD"
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason=f"needs the BCCD data set in {BCCD}")
VOC07 = ROOT.parent / "shared" / "data" / "VOC07-320"
needs_voc07 = pytest.mark.skipif(not VOC07.is_dir(), reason=f"needs Pascal VOC 2007 in {VOC07}")


@pytest.fixture
def warnings(monkeypatch):
    """What is logged as a warning."""
    caught = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *_: caught.append(str(text)))
    return caught


def annotation_paths(data, split):
    """Return image id to XML file of one split."""
    return {p.stem: p for p in sorted((Path(data["path"]) / data["voc"] / split).glob("*.xml"))}


def labels(path):
    """Label file as (n, 5) floats."""
    return np.array([line.split() for line in path.read_text().splitlines()], float).reshape(-1, 5)


def corners(yolo, width, height):
    """YOLO box to VOC corners, from the definition: 1-based, inclusive."""
    cx, cy, w, h = np.asarray(yolo, float)[-4:] * (width, height, width, height)
    return cx - w / 2 + 1, cy - h / 2 + 1, cx + w / 2, cy + h / 2


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((1, 1, 10, 20), (0.5, 0.5, 1, 1)),  # the whole image
        ((1, 1, 5, 20), (0.25, 0.5, 0.5, 1)),  # its left half: pixels 1 to 5 of 10
        ((6, 1, 10, 20), (0.75, 0.5, 0.5, 1)),  # and its right half, which begins where the left one ends
        ((3, 5, 4, 8), (0.3, 0.3, 0.2, 0.2)),  # 2 x 4 pixels
        ((2.5, 1, 5.5, 20), (0.35, 0.5, 0.4, 1)),  # VOC2011 has fractions
        ((0, -3, 5, 8), (0.25, 0.2, 0.5, 0.4)),  # clipped to 1, 1
        ((9, 17, 30, 99), (0.9, 0.9, 0.2, 0.2)),  # clipped to 10, 20
        ((4, 4, 4, 4), None),  # a click without a drag
        ((4, 4, 4, 9), None),
        ((7, 4, 3, 9), None),  # reversed
        ((12, 1, 15, 5), None),  # outside
        ((-5, 1, 0, 5), None),
    ],
)
def test_boxes_worked_by_hand(box, expected):
    clipped = clipped_box(box, 10, 20)
    assert clipped is expected is None or yolo_box(clipped, 10, 20) == pytest.approx(expected, abs=1e-12)


@st.composite
def boxes(draw):
    width, height = draw(st.integers(2, 6000)), draw(st.integers(2, 6000))
    x = sorted(draw(st.lists(st.integers(1, width), min_size=2, max_size=2, unique=True)))
    y = sorted(draw(st.lists(st.integers(1, height), min_size=2, max_size=2, unique=True)))
    return (x[0], y[0], x[1], y[1]), width, height


@given(boxes())
def test_boxes_come_back_to_the_pixel(sample):
    box, width, height = sample
    yolo = yolo_box(clipped_box(box, width, height), width, height)
    assert corners(yolo, width, height) == pytest.approx(box, abs=1e-9 * max(width, height))
    assert 0 < min(yolo) <= max(yolo) <= 1


def test_round_trip_through_files(tree, tmp_path):
    rng = np.random.default_rng(0)
    source, expected = tree(), {}
    for i in range(10):
        size = tuple(int(v) for v in rng.integers(20, 900, 2))
        found = [[int(v) for v in np.sort(rng.choice(np.arange(1, s + 1), 2, replace=False))] for s in size * 5]
        found = [(x[0], y[0], x[1], y[1]) for x, y in zip(found[::2], found[1::2], strict=True)]
        source.add("train", f"r.{i}", [VOCObject("cat", box) for box in found], size)
        expected[f"r.{i}"] = size, found
    convert_voc(source.root, tmp_path / "out")
    for image_id, (size, found) in expected.items():
        back = [corners(line, *size) for line in labels(tmp_path / f"out/labels/train/{image_id}.txt")]
        np.testing.assert_allclose(back, found, rtol=0, atol=1e-4)


def test_difficult_objects_are_kept_aside(tree, tmp_path):
    source = tree()
    objects = [VOCObject("cat", (1, 1, 32, 48)), VOCObject("dog", (33, 1, 64, 24), difficult=True)]
    source.add("val", "mixed", objects).add("val", "bare")
    report = convert_voc(source.root, tmp_path / "out")
    assert report.names == ("cat", "dog")
    assert report.splits == {
        "train": SplitCounts(1, 1, 0),
        "val": SplitCounts(3, 2, 1),
        "test": SplitCounts(1, 1, 0),
    }
    out = tmp_path / "out"
    np.testing.assert_allclose(labels(out / "labels/val/mixed.txt"), [[0, 0.25, 0.5, 0.5, 1]])
    np.testing.assert_allclose(labels(out / "difficult/val/mixed.txt"), [[1, 0.75, 0.25, 0.5, 0.5]])
    assert (out / "labels/val/bare.txt").read_text() == ""
    assert [p.name for p in (out / "difficult").rglob("*.txt")] == ["mixed.txt"]

    data = utils.check_det_dataset(str(out / "data.yaml"))
    found = annotation_paths(data, "val")
    assert list(found) == ["VOC_val", "bare", "mixed"]
    assert [o.difficult for o in read_annotation(found["mixed"]).objects] == [False, True]


def test_degenerate_boxes_are_reported_and_left_out(tree, tmp_path, warnings):
    source = tree()
    bad = [VOCObject("cat", (5.0, 9.0, 5.0, 9.0)), VOCObject("dog", (9.0, 5.0, 2.0, 20.0), difficult=True)]
    source.add("train", "slip", [*bad, VOCObject("cat", (1, 1, 64, 48))])
    report = convert_voc(source.root, tmp_path / "out")
    xml = source.root / "Annotations/slip.xml"
    places = [f"{xml}, object {i} ({o.name}) {o.box}" for i, o in enumerate(bad, start=1)]
    assert report.noted == {"no area": tuple(places)}
    assert len(labels(tmp_path / "out/labels/train/slip.txt")) == 1
    assert report.splits["train"] == SplitCounts(2, 2, 0)
    assert warnings == [f"{source.root}: Boxes without area within their image are left out (2): {'; '.join(places)}."]


def test_repeated_objects_and_flags_in_words_are_told_once_per_set(tree, tmp_path, warnings):
    source = tree()
    for i in range(5):
        source.add("train", f"same{i}", [VOCObject("cat", (1, 1, 9, 9)), VOCObject("cat", (1, 1, 9, 9))])
        xml = source.root / f"Annotations/same{i}.xml"
        xml.write_text(xml.read_text().replace("<difficult>0<", "<difficult>Unspecified<", 1))
    report = convert_voc(source.root, tmp_path / "out")
    assert report.splits["train"].boxes == 11  # the lines of both: Ultralytics drops one when it reads them
    assert [len(report.noted[kind]) for kind in ("words", "twice")] == [5, 5]
    assert len(warnings) == 2
    assert (
        "Flags 'difficult' are words, of which true and yes count as 1, false, no and Unspecified as 0 (5): "
        in warnings[1]
    )
    assert warnings[0].count(".xml") == 3 and warnings[0].endswith("; ...")


def test_the_image_says_how_large_it_is(tree, tmp_path, warnings):
    source, object_ = tree(), [VOCObject("cat", (1, 1, 50, 50))]
    source.add("train", "unstated", object_, size=(100, 200), stated=(0, 0))
    source.add("train", "wrong", object_, size=(100, 200), stated=(200, 100))
    report = convert_voc(source.root, tmp_path / "out")
    for image_id in "unstated", "wrong":
        np.testing.assert_allclose(labels(tmp_path / f"out/labels/train/{image_id}.txt"), [[0, 0.25, 0.125, 0.5, 0.25]])
    assert [p.name for p in report.resized] == ["wrong.xml"]
    assert warnings == [f"Annotations state another size than their image has (1), such as {report.resized[0]}"]


def test_several_trees_make_one_set(tree, tmp_path, warnings):
    a, b = tree("VOC2007"), tree("VOC2012", ["train", "val"])
    splits = {"train": ["train", "val"], "val": "test", "test": "test"}
    report = convert_voc([a.root, b.root], tmp_path / "out", splits=splits)
    assert {k: v.images for k, v in report.splits.items()} == {"train": 4, "val": 1, "test": 1}
    assert warnings == ["splits: 1 images are both in 'val' and in 'test'"]
    with pytest.raises(ValueError, match=r"train: two images are called 'VOC2007_train': .*; rename one"):
        convert_voc([a.root, a.root], tmp_path / "twice")


def test_a_set_of_one_tree_among_several(tree, tmp_path, warnings):
    a, b = tree("VOC2007"), tree("VOC2012")
    splits = {"train": ["VOC2007/train", "val"], "val": "VOC2012/train", "test": "VOC2007/test"}
    convert_voc([a.root, b.root], tmp_path / "out", splits=splits)
    found = {split: sorted(p.stem for p in (tmp_path / "out/images" / split).iterdir()) for split in splits}
    assert found["train"] == ["VOC2007_train", "VOC2007_val", "VOC2012_val"]
    assert (found["val"], found["test"]) == (["VOC2012_train"], ["VOC2007_test"])
    assert warnings == []
    for wrong, error, message in [
        ("VOC2010/train", ValueError, "val: no tree is called 'VOC2010'; there are VOC2007, VOC2012"),
        ("VOC2012/minival", FileNotFoundError, r"VOC2012.*minival\.txt: no such image set"),
    ]:
        with pytest.raises(error, match=message):
            convert_voc([a.root, b.root], tmp_path / "bad", splits={**splits, "val": wrong})


def test_a_share_of_train_is_held_out_by_seed(tree, tmp_path):
    def split(order, **options):
        source = tree(f"VOC{len(list(tmp_path.iterdir()))}", ["test"])
        for image_id in order:
            source.add("train", f"{image_id:06d}", [VOCObject("cat", (1, 1, 9, 9))])
        out = tmp_path / source.root.name
        report = convert_voc(source.root, out, splits={"train": "train", "test": "test"}, **options)
        assert YAML.load(out / "data.yaml")["val"] == "images/val"
        held, kept = ({int(p.stem) for p in (out / "images" / part).iterdir()} for part in ("val", "train"))
        assert held | kept == set(order) and held.isdisjoint(kept)
        assert (report.splits["val"].images, report.splits["test"].images) == (len(held), 1)
        return held

    ids = list(range(40))
    held = split(ids, val_share=0.25)
    assert len(held) == 10 and held != set(ids[:10])
    assert split(ids[::-1], val_share=0.25) == held
    assert held != split(ids, val_share=0.25, seed=1)
    assert held < split(ids, val_share=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_share": 1.0}, "val_share=1.0: 'val' is a share of 'train'"),
        ({"val_share": 0.0}, "val_share=0.0: 'val' is a share of 'train'"),
        ({"val_share": 0.5, "splits": {"train": "train", "val": "val"}}, "val_share=0.5: .* or one of splits"),
        ({"val_share": 0.1}, "val_share=0.1: of 1 images, 0 would be in 'val'"),
    ],
)
def test_what_cannot_be_held_out(tree, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert_voc(tree().root, tmp_path / "out", **{"splits": {"train": "train", "test": "test"}, **options})
    assert not (tmp_path / "out").exists()


def test_classes_keep_the_order_they_are_given(tree, tmp_path):
    source = tree()
    report = convert_voc(source.root, tmp_path / "out", names={1: "cat", 0: "dog"})
    assert report.names == ("dog", "cat")
    assert labels(tmp_path / "out/labels/val/VOC_val.txt")[0, 0] == 1
    assert YAML.load(tmp_path / "out/data.yaml")["names"] == {0: "dog", 1: "cat"}
    for names, message in [
        (["dog"], r"VOC_\w+\.xml: class 'cat' is none of the given names: dog"),
        (["cat", "cat"], "names: a class name occurs twice"),
        ({1: "cat"}, "names: class indices must be 0 to 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert_voc(source.root, tmp_path / "bad", names=names)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        ("JPEGImages/VOC_val.jpg", FileNotFoundError, r"VOC_val\.jpg: missing, though image set 'val' lists it"),
        ("Annotations/VOC_val.xml", FileNotFoundError, r"VOC_val\.xml"),
        ("ImageSets/Main/test.txt", FileNotFoundError, r"test\.txt: no such image set; .* has: train, val"),
        ("JPEGImages", FileNotFoundError, "a Pascal VOC tree has its images there"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_left_behind(tree, tmp_path, spoil, error, message):
    source = tree()
    path = source.root / spoil
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(error, match=message):
        convert_voc(source.root, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_broken_images_and_doubtful_ids_are_named(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "check_requirements", lambda *_: None)  # Ultralytics would install a decoder for it
    source = tree()
    for content, reason in (b"no image", "it has no format that Pillow knows"), (b"", "the file is empty"):
        (source.root / "JPEGImages/VOC_val.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=rf"VOC_val\.jpg: not a readable image: {reason}"):
            convert_voc(source.root, tmp_path / "out")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # as of 20,000 x 20,000 pixels
    with pytest.raises(ValueError, match=r"VOC_train\.jpg: not a readable image: Image size \(3072 pixels\) exceeds"):
        convert_voc(source.root, tmp_path / "out")
    monkeypatch.undo()
    (source.root / "JPEGImages/VOC_val.png").touch()
    with pytest.raises(ValueError, match=r"two images have the id 'VOC_val': VOC_val\.jpg, VOC_val\.png"):
        convert_voc(source.root, tmp_path / "out")


@pytest.mark.parametrize("splits", [{"train": "train"}, {"train": "train", "val": "val", "dev": "val"}])
def test_splits_are_those_of_a_data_yaml(tree, tmp_path, splits):
    with pytest.raises(ValueError, match="splits: a data YAML has 'train', 'val'"):
        convert_voc(tree().root, tmp_path / "out", splits=splits)


def test_links_where_possible_and_copies_elsewhere(tree, tmp_path, monkeypatch):
    source = tree()
    convert_voc(source.root, tmp_path / "links")
    image = "images/val/VOC_val.jpg"
    assert (tmp_path / "links" / image).is_symlink()

    def refuse(*_, **__):
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    convert_voc(source.root, tmp_path / "copies")
    assert not (tmp_path / "copies" / image).is_symlink()
    assert (tmp_path / "copies" / image).read_bytes() == (tmp_path / "links" / image).read_bytes()


@needs_bccd
def test_bccd_as_ultralytics_downloads_it(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(utils, "DATASETS_DIR", tmp_path)
    monkeypatch.delenv("BCCD_ROOT", raising=False)
    yaml = str(ROOT / "cfg/datasets/bccd.yaml")
    with pytest.raises(FileNotFoundError, match=r"BCCD_ROOT: .*git clone https://github\.com/Shenggan/BCCD_Dataset"):
        utils.check_det_dataset(yaml)
    monkeypatch.setenv("BCCD_ROOT", str(BCCD))
    data = utils.check_det_dataset(yaml)

    n_boxes = 0
    for split, n in ("train", 205), ("val", 87), ("test", 72):
        images = sorted(Path(data[split]).iterdir())
        assert len(images) == n
        n_boxes += sum(len(labels(Path(p))) for p in utils.img2label_paths([str(image) for image in images]))
        assert list(annotation_paths(data, split)) == [p.stem for p in images]
    assert n_boxes == 4888 - 2
    (degenerate,) = [w for w in warnings if "are left out (2)" in w]
    for place in (
        r"00338\.xml, object \d+ \(RBC\) \(504\.0, 337\.0, 504",
        r"00343\.xml, object \d+ \(RBC\) \(181\.0, 329\.0, 181",
    ):
        assert re.search(f"BloodImage_{place}", degenerate)
    assert list(data["names"].values()) == ["Platelets", "RBC", "WBC"]


def voc_devkit(folder, tree):
    """Make a VOCdevkit folder as the archives of 2007 and 2012 hold it, difficult objects among them."""
    names = list(YAML.load(ROOT / "cfg/datasets/VOC-devkit.yaml")["names"].values())
    for year, prefix, sets in ("2007", "", {"trainval": 20, "test": 6}), ("2012", "2008_", {"trainval": 30}):
        source, numbers = tree(f"VOC{year}", []), count(1)
        for image_set, n_images in sets.items():
            for number in islice(numbers, n_images):
                difficult = VOCObject("person", (2, 2, 40, 40), difficult=True)
                objects = [VOCObject(names[number % 20], (11, 6, 30, 25)), *([difficult] if number % 2 else [])]
                source.add(image_set, f"{prefix}{number:06d}", objects)
        folder.mkdir(parents=True, exist_ok=True)
        source.root.rename(folder / f"VOC{year}")
    # The test images of VOC2012 may be there, but nobody has their annotations
    (folder / "VOC2012/ImageSets/Main/test.txt").write_text("2012_000001\n")


@pytest.mark.parametrize("given", [True, False], ids=["VOC_ROOT", "downloaded"])
@pytest.mark.parametrize(
    ("name", "years", "n_train", "n_val", "n_archives"),
    [("VOC-devkit", ("2007", "2012"), 45, 5, 3), ("VOC07", ("2007",), 18, 2, 2)],
)
def test_voc_as_ultralytics_prepares_it(name, years, n_train, n_val, n_archives, given, tree, tmp_path, monkeypatch):
    datasets, asked = tmp_path / "datasets", []

    def download(urls, dir, **_):
        asked.extend(urls)
        voc_devkit(Path(dir) / "VOCdevkit", tree)

    monkeypatch.setattr(utils, "DATASETS_DIR", datasets)
    monkeypatch.setattr(downloads, "download", download)
    monkeypatch.delenv("VOC_ROOT", raising=False)
    if given:
        voc_devkit(tmp_path / "elsewhere", tree)
        monkeypatch.setenv("VOC_ROOT", str(tmp_path / "elsewhere"))
    yaml = str(ROOT / f"cfg/datasets/{name}.yaml")
    data = utils.check_det_dataset(yaml)
    stock = YAML.load(ULTRALYTICS / "cfg/datasets/VOC.yaml")
    assert data["names"] == stock["names"]
    assert [url for url in asked if url.rsplit("/", 1)[1] not in stock["download"]] == []
    assert len(asked) == (0 if given else n_archives)

    root = tmp_path / "elsewhere" if given else datasets / "VOCdevkit"
    ids = {split: {p.stem for p in Path(data[split]).iterdir()} for split in ("train", "val", "test")}
    lists = [(root / f"VOC{year}/ImageSets/Main/trainval.txt").read_text().split() for year in years]
    assert ids["train"] | ids["val"] == set().union(*lists)
    assert (len(ids["train"]), len(ids["val"])) == (n_train, n_val)
    assert ids["test"] == set((root / "VOC2007/ImageSets/Main/test.txt").read_text().split())
    for split in ids:
        images = sorted(Path(data[split]).iterdir())
        for path, xml in zip(images, annotation_paths(data, split).values(), strict=True):
            objects = read_annotation(xml).objects
            (line,) = labels(Path(utils.img2label_paths([str(path)])[0]))  # what is difficult is no label
            assert data["names"][int(line[0])] == objects[0].name
            assert corners(line, 64, 48) == pytest.approx((11, 6, 30, 25), abs=1e-4)
            aside = datasets / name / "difficult" / split / f"{path.stem}.txt"
            assert aside.exists() == (len(objects) == 2)
    held = ids["val"]
    shutil.rmtree(datasets / name)
    monkeypatch.setenv("VOC_ROOT", str(root))
    assert {p.stem for p in Path(utils.check_det_dataset(yaml)["val"]).iterdir()} == held


@needs_voc07
@pytest.mark.slow
def test_voc07_has_the_counts_of_the_devkit(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "DATASETS_DIR", tmp_path)
    monkeypatch.setenv("VOC_ROOT", str(VOC07))
    data = utils.check_det_dataset(str(ROOT / "cfg/datasets/VOC07.yaml"))
    ids = {split: {p.stem for p in Path(data[split]).iterdir()} for split in ("train", "val", "test")}
    trainval = (VOC07 / "VOC2007/ImageSets/Main/trainval.txt").read_text().split()
    assert ids["train"] | ids["val"] == set(trainval) and not ids["train"] & ids["val"]
    assert {split: len(of_split) for split, of_split in ids.items()} == {"train": 4507, "val": 501, "test": 4952}
    objects = [o for xml in annotation_paths(data, "test").values() for o in read_annotation(xml).objects]
    assert (sum(not o.difficult for o in objects), sum(o.difficult for o in objects)) == (12032, 2944)
    files = [Path(p) for p in utils.img2label_paths([str(p) for p in Path(data["test"]).iterdir()])]
    assert sum(len(labels(path)) for path in files) == 12032
