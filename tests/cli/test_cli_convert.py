# yolo-sos, AGPL-3.0
"""``yolo-sos convert``: what it writes and prints, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from yolo_sos import cli
from yolo_sos.data.voc import VOCAnnotation, VOCObject, write_annotation

SHARED = Path(__file__).parents[3] / "shared" / "data"
CAT, DOG = VOCObject("cat", (11, 6, 30, 25)), VOCObject("dog", (1, 1, 64, 48), difficult=True)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A VOC tree: 8 images to train on, 2 to validate on, 1 to test on; a cat in each, and a difficult dog in test."""
    root = tmp_path / "pets"
    for folder in "Annotations", "ImageSets/Main", "JPEGImages":
        (root / folder).mkdir(parents=True)
    for split, count in ("train", 8), ("val", 2), ("test", 1):
        ids = [f"{split}{i}" for i in range(count)]
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(ids))
        for image_id in ids:
            Image.new("RGB", (64, 48)).save(root / "JPEGImages" / f"{image_id}.jpg")
            objects = (CAT, DOG) if split == "test" else (CAT,)
            write_annotation(
                root / "Annotations" / f"{image_id}.xml", VOCAnnotation(image_id, f"{image_id}.jpg", 64, 48, objects)
            )
    return root


def convert(*args) -> dict:
    """Convert into ``out=…`` and return the data YAML."""
    cli.main(["convert", *map(str, args)])
    out = next(arg for arg in map(str, args) if arg.startswith("out=")).removeprefix("out=")
    return yaml.safe_load((Path(out) / "data.yaml").read_text())


def ids(out: Path, split: str) -> list[str]:
    return sorted(p.stem for p in (out / "labels" / split).iterdir())


def test_without_more_the_tree_says_what_is_trained_on(tree, tmp_path):
    out = tmp_path / "out"
    data = convert(f"voc={tree}", f"out={out}")
    assert data == {"train": "images/train", "val": "images/val", "names": {0: "cat"}, "voc": "annotations"}
    assert ids(out, "train") == [f"train{i}" for i in range(8)] and ids(out, "val") == ["val0", "val1"]
    # Pixels 11 to 30 of 64 and 6 to 25 of 48, both included: centre 20 and 15, 20 × 20
    expected = [0, 20 / 64, 15 / 48, 20 / 64, 20 / 48]
    assert [float(v) for v in (out / "labels/val/val0.txt").read_text().split()] == pytest.approx(expected)
    assert (out / "images/train/train0.jpg").is_symlink()


def test_splits_names_and_copies_are_chosen(tree, tmp_path):
    out = tmp_path / "out"
    data = convert(
        f"voc={tree}", f"out={out}", "train=train,val", "val_share=0.2", "test=pets/test", "names=dog,cat", "copy"
    )
    assert data["names"] == {0: "dog", 1: "cat"} and data["test"] == "images/test"
    assert (len(ids(out, "train")), len(ids(out, "val")), ids(out, "test")) == (8, 2, ["test0"])
    assert (out / "labels/test/test0.txt").read_text().startswith("1 ")  # the cat; the dog is difficult
    assert (out / "difficult/test/test0.txt").read_text().startswith("0 ")
    assert not (out / "images/test/test0.jpg").is_symlink()
    again = tmp_path / "again"
    convert(f"voc={tree}", f"out={again}", "train=train,val", "val_share=0.2", "seed=1")
    assert ids(again, "val") != ids(out, "val")


def test_trees_are_separated_by_commas_and_class_names_may_be_numbers(tree, tmp_path):
    second = tree.rename(tree.with_name("old")), tmp_path / "new"
    for folder in "Annotations", "ImageSets/Main", "JPEGImages":
        (second[1] / folder).mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(second[1] / "JPEGImages/x.jpg")
    write_annotation(
        second[1] / "Annotations/x.xml", VOCAnnotation("x", "x.jpg", 64, 48, (VOCObject("7", (1, 1, 9, 9)),))
    )
    (second[1] / "ImageSets/Main/train.txt").write_text("x")
    out = tmp_path / "out"
    data = convert(f"voc={second[0]},{second[1]}", f"out={out}", "names=7,cat")
    assert data["names"] == {0: "7", 1: "cat"} and len(ids(out, "train")) == 9


def test_the_report_is_printed(tree, tmp_path, caplog):
    out = tmp_path / "out"
    convert(f"voc={tree}", f"out={out}", "test=test")
    text = caplog.text
    assert "| train |      8 |     8 |         0 |" in text and "| test  |      1 |     1 |         1 |" in text
    assert "2 classes: cat, dog" in text and f"wrote {out / 'data.yaml'}" in text


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["out=x"], "convert needs voc=…, such as voc=VOCdevkit/VOC2007"),
        (["voc={tree}"], "convert needs out=…"),
        (["voc={tree}", "out=x", "val_share=1.5"], "'val_share=1.5' is invalid: val_share must be a number above 0"),
        (["voc={tree}", "out=x", "val=val", "val_share=0.5"], "val_share=0.5: 'val' is a share of 'train'"),
        (["voc={tree}", "out=x", "seed=half"], "'seed=half' is invalid"),
        (["voc={tree}", "out=x", "copy=3"], "'copy=3' is invalid: copy must be true or false"),
        (["voc={tree}", "out=x", "train=trainval"], "trainval.txt: no such image set; "),
        (["voc={tree}", "out=x", "test=VOC2007/test"], "test: no tree is called 'VOC2007'; there are pets"),
        (["voc={tree}", "out=x", "names=dog"], "class 'cat' is none of the given names: dog"),
        (["voc={tree}/..", "out=x"], "not a Pascal VOC tree, it has no folder Annotations. Did you mean "),
        (["voc={tree}/nowhere", "out=x"], "not a Pascal VOC tree"),
        (["voc={tree}", "out={tree}"], "exists already and is not an empty folder"),
        (["voc={tree}", "out=x", "split=train"], "'split' is not a valid argument"),
    ],
)
def test_bad_input_is_refused_in_one_line(tree, tmp_path, monkeypatch, capsys, args, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        cli.main(["convert", *(arg.format(tree=tree) for arg in args)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and error.startswith("yolo-sos: ") and told in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pets"]  # nothing is left behind


@pytest.mark.skipif(not (SHARED / "BCCD").is_dir(), reason=f"needs the BCCD data set in {SHARED}")
def test_real_cells(tmp_path):
    """The counts that its card states: 364 images, 4 888 boxes, two of which have no area."""
    out = tmp_path / "cells"
    data = convert(f"voc={SHARED / 'BCCD'}", f"out={out}", "test=test")
    assert list(data["names"].values()) == ["Platelets", "RBC", "WBC"]
    assert [len(ids(out, split)) for split in ("train", "val", "test")] == [205, 87, 72]
    assert sum(len(p.read_text().splitlines()) for p in out.glob("labels/*/*.txt")) == 4886
