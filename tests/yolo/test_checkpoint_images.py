# yolo-sos, AGPL-3.0
"""The data set of a checkpoint: which images are taken, how they come, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from yolo_sos.yolo.checkpoint import Checkpoint
from yolo_sos.yolo.checkpoint_data import CheckpointData
from yolo_sos.yolo.images import split_sizes


@pytest.fixture
def checkpoint(trained):
    return Checkpoint(trained["best"])


@pytest.fixture
def dataset(digits, tmp_path):
    """``dataset(**edits)`` copies the data set, without Ultralytics' caches, and edits its YAML."""

    def copy(**edits) -> Path:
        root = tmp_path / "set"
        for folder in "images", "labels":
            shutil.copytree(digits.parent / folder, root / folder, ignore=shutil.ignore_patterns("*.cache"))
        data = {**yaml.safe_load(digits.read_text()), "path": str(root), **edits}
        (root / "data.yaml").write_text(yaml.safe_dump(data))
        return root / "data.yaml"

    return copy


def opened(checkpoint, data, *, imgsz=None, batch=None, splits=("val",)):
    return CheckpointData(checkpoint, data, imgsz=imgsz, batch=batch, device=torch.device("cpu"), splits=splits)


def sample(checkpoint, data, *, images=None, seed=0, **options):
    found = opened(checkpoint, data, **options)
    return found.sample(split_sizes(len(found.dataset), images), seed)


def test_fit_and_heldout_are_disjoint_and_all_that_there_is(checkpoint, digits):
    found = sample(checkpoint, digits)
    assert len(found.dataset) == 24
    assert len(found.sets["heldout"]) == 8  # a third
    assert sorted(found.sets["fit"] + found.sets["heldout"]) == list(range(24))


def test_a_seed_chooses_the_images(checkpoint, digits):
    everything, few = sample(checkpoint, digits), sample(checkpoint, digits, images=3)
    assert [len(few.sets[name]) for name in ("fit", "heldout")] == [3, 1]
    assert sample(checkpoint, digits).sets == everything.sets != sample(checkpoint, digits, seed=1).sets


def test_no_more_than_32_are_held_out(checkpoint, dataset):
    root = dataset().parent
    for folder, suffix in ("images", "jpg"), ("labels", "txt"):
        for i in range(5):
            for file in list((root / folder / "train").glob(f"train_*.{suffix}")):
                shutil.copy(file, file.with_name(f"copy{i}_{file.name}"))
    found = sample(checkpoint, root / "data.yaml", splits=()).sets
    assert (len(found["heldout"]), len(found["fit"])) == (32, 144 - 32)


def test_batches_are_those_of_a_validation(checkpoint, digits):
    found = sample(checkpoint, digits, images=10, batch=4)
    batches = list(found.batches("fit"))
    assert [len(b["img"]) for b in batches] == [4, 4, 2]
    assert all(b["img"].shape[1:] == (3, 64, 64) and b["img"].dtype == torch.float32 for b in batches)
    assert 0 <= min(float(b["img"].min()) for b in batches) < max(float(b["img"].max()) for b in batches) <= 1
    files = [file for b in batches for file in b["im_file"]]
    assert files == [found.dataset.im_files[i] for i in found.sets["fit"]]
    again = list(found.batches("fit"))
    assert all(torch.equal(a["img"], b["img"]) for a, b in zip(batches, again, strict=True))  # no augmentation
    assert all({"cls", "bboxes", "batch_idx"} <= set(b) for b in batches)


def test_size_and_batch_are_those_of_the_training(checkpoint, digits):
    assert (opened(checkpoint, digits).args["imgsz"], opened(checkpoint, digits).batch) == (64, 8)
    assert (opened(checkpoint, digits, imgsz=96).args["imgsz"], opened(checkpoint, digits, batch=3).batch) == (96, 3)
    checkpoint.args["batch"] = -1  # chosen by Ultralytics
    assert opened(checkpoint, digits).batch == 16


def test_the_data_set_of_the_training_is_the_default(checkpoint, seen):
    assert opened(checkpoint, None).args["data"] == str(seen)
    checkpoint.args["data"] = None
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        opened(checkpoint, None)


def names(**changed):
    return {"names": {**{i: str(i) for i in range(10)}, **{int(k[1:]): v for k, v in changed.items()}}}


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (names(_3="three"), "do not match: 10 and 10, and class 3 is '3' and 'three'"),
        (names(_10="ten"), "do not match: 10 and 11, and class 10 is None and 'ten'"),
        ({"names": ["0", "1"]}, "do not match: 10 and 2, and class 2 is '2' and None"),
    ],
)
def test_other_classes_are_refused(checkpoint, dataset, edits, message):
    with pytest.raises(ValueError, match=message):
        opened(checkpoint, dataset(**edits))


def test_numbers_of_classes_with_a_gap_are_refused(checkpoint, dataset):
    data = dataset(names={0: "0", 1: "1", 3: "3"})
    with pytest.raises(ValueError, match=rf"{data}: 3-class dataset requires class indices 0-2"):
        opened(checkpoint, data)


def test_a_model_of_one_class_takes_any_data_set(checkpoint, dataset):
    checkpoint.args["single_cls"] = True
    assert len(opened(checkpoint, dataset(names=["0", "1"])).dataset) == 24


def garble(file: Path):
    file.write_bytes(b"\xff\xd8\xff" + b"garbage" * 50)


def test_unreadable_images_are_named(checkpoint, dataset):
    data = dataset()
    files = sorted((data.parent / "images/train").glob("*.jpg"))
    garble(files[3])
    with pytest.raises(ValueError, match=rf"'train': .* leave 1 of 24 .*{files[3].name}: not a readable image"):
        opened(checkpoint, data)
    garble(files[5])
    with pytest.raises(ValueError, match=r"leave 2 of 24 images out .*train_0000.\.jpg: not a readable image"):
        opened(checkpoint, data)  # found again, though Ultralytics has cached that it skips them


def test_unreadable_images_to_score_are_named_too(checkpoint, dataset):
    data = dataset()
    garble(next((data.parent / "images/val").glob("*.jpg")))
    with pytest.raises(ValueError, match="val_0000"):
        opened(checkpoint, data)
    assert len(opened(checkpoint, data, splits=()).dataset) == 24


def test_nothing_but_unreadable_images(checkpoint, dataset):
    data = dataset()
    for file in (data.parent / "images/train").glob("*.jpg"):
        garble(file)
    with pytest.raises(ValueError, match="No valid images found") as told:
        opened(checkpoint, data)
    assert str(told.value).count(".jpg") == 1  # not every image with its reason


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_that_are_cut_short_too_small_or_wrongly_labelled_are_named(checkpoint, dataset, split):
    data = dataset()
    one, two, three = sorted((data.parent / "images" / split).glob("*.jpg"))[:3]
    whole = {file: file.read_bytes() for file in (one, two)}
    one.write_bytes(whole[one][: len(whole[one]) // 2])
    with pytest.raises(ValueError, match=rf"'{split}': .* leave 1 of .*{one.name}: not a readable image: image "):
        opened(checkpoint, data)
    one.write_bytes(whole[one])
    two.write_bytes(cv2.imencode(".jpg", np.zeros((9, 64, 3), np.uint8))[1].tobytes())
    with pytest.raises(ValueError, match=rf"{two.name}: of 64 x 9 pixels, where Ultralytics takes 10 x 10"):
        opened(checkpoint, data)
    two.write_bytes(whole[two])
    (data.parent / "labels" / split / f"{three.stem}.txt").write_text("0 7 7 7 7\n")
    with pytest.raises(ValueError, match=rf"{three.name}: its format or its labels are not valid"):
        opened(checkpoint, data)


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        ({"train": "images/none"}, FileNotFoundError, "images/none"),
        ({"val": "images/none"}, FileNotFoundError, "images/none"),
        ({"train": "labels"}, FileNotFoundError, "Error loading data from .*labels"),  # a folder without images
    ],
)
def test_missing_images_are_refused(checkpoint, dataset, edits, error, message):
    with pytest.raises(error, match=message):
        opened(checkpoint, dataset(**edits))


def test_a_split_that_is_to_be_scored_must_be_there(checkpoint, dataset):
    data = dataset(test=None)
    with pytest.raises(FileNotFoundError, match="no 'test' split"):
        opened(checkpoint, data, splits=("test",))
