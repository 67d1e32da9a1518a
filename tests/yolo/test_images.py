# yolo-sos, AGPL-3.0
"""A few training images as validation would see them, without any effect on the run."""

from __future__ import annotations

import random
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_sos.core import SOS
from yolo_sos.trainers import SOSDetectionTrainer
from yolo_sos.yolo.images import draw, preserve_rng, split_sizes

PROPERTY = settings(derandomize=True, max_examples=200, deadline=None, database=None)


@pytest.fixture(scope="module")
def trainer(digits, tiny, tmp_path_factory):
    """A trainer that is ready to train."""
    trainer = SOSDetectionTrainer(
        overrides={
            **{"model": str(tiny), "data": str(digits), "epochs": 2, "imgsz": 64, "batch": 8, "device": "cpu"},
            **{"plots": False, "project": str(tmp_path_factory.mktemp("runs")), "multi_scale": 0.5},
            **{"sos": True, "sos_images": 10, "sos_guard": 1.0},
        }
    )
    trainer._setup_train()
    trainer.epoch = 0
    trainer.model.criterion = trainer.model.init_criterion()  # as the first training batch does
    return trainer


@pytest.fixture(scope="module")
def dataset(trainer):
    return trainer.train_loader.dataset


def make_sample(trainer, images, seed=0):
    """Return a sample of the training set, with images held out."""
    return trainer.sample_images(split_sizes(len(trainer.train_loader.dataset), images), seed)


def names(batches):
    return [Path(file).name for batch in batches for file in batch["im_file"]]


# Sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("available", "images", "fit", "held"),
    [
        (1000, 64, 64, 32),
        (96, 64, 64, 32),
        (95, 64, 64, 31),
        (80, 64, 54, 26),
        (30, 64, 20, 10),
        (3, 64, 2, 1),
        (2, 64, 1, 1),
        (1000, 1, 1, 1),
        (2, 1, 1, 1),
        (1000, 7, 7, 3),
        (1000, 300, 300, 32),
        (330, 300, 298, 32),
        (1000, None, 968, 32),
        (24, None, 16, 8),
        (2, None, 1, 1),
    ],
)
def test_sizes(available, images, fit, held):
    assert split_sizes(available, images) == {"heldout": held, "selection": 0, "fit": fit}


@PROPERTY
@given(available=st.integers(3, 500), images=st.none() | st.integers(1, 300), selection=st.booleans())
def test_all_sets_have_images_and_together_no_more_than_there_are(available, images, selection):
    sizes = split_sizes(available, images, selection=selection)
    held = 32 if images is None else max(1, images // 2)
    assert 1 <= sizes["fit"] <= (images or available)
    assert 1 <= sizes["heldout"] <= min(32, held)
    assert sizes["selection"] == sizes["heldout"] * selection
    assert sum(sizes.values()) <= available
    if available >= 3 * max(images or available, 1):
        assert (sizes["fit"], sizes["heldout"]) == (images, min(32, held))
    if images is None:
        assert sum(sizes.values()) == available


def test_one_image_cannot_be_divided():
    assert split_sizes(1, 64, guarded=False) == {"heldout": 0, "selection": 0, "fit": 1}
    with pytest.raises(ValueError, match=r"at least 2 training images, 1 to fit on and 1 to hold out; there is 1"):
        split_sizes(1, 64)
    with pytest.raises(ValueError, match=r"at least 3 training images, 1 to fit on and 2 to hold out; there are 2"):
        split_sizes(2, 64, selection=True)


# Images -------------------------------------------------------------------------------------------------------------


def test_fit_and_held_out_images_are_apart_and_chosen_by_the_seed(trainer, dataset):
    def chosen(seed, images=10):
        sample = make_sample(trainer, images, seed)
        return names(sample.batches("fit")), names(sample.batches("heldout"))

    fit, held = chosen(seed=5)
    assert (len(set(fit)), len(set(held))) == (10, 5)
    assert not set(fit) & set(held)
    assert chosen(seed=5) == (fit, held)
    assert chosen(seed=6) != (fit, held)
    all_fit, all_held = chosen(seed=5, images=100)
    assert sorted(all_fit + all_held) == sorted(Path(file).name for file in dataset.im_files)


@PROPERTY
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), seed=st.integers(0, 1000))
def test_where_images_have_classes_each_gets_its_share(labels, seed):
    order = draw(len(labels), labels, seed)
    assert sorted(order) == list(range(len(labels)))
    counts = [labels.count(c) for c in range(5)]
    for end in range(len(order) + 1):
        taken = [[labels[i] for i in order[:end]].count(c) for c in range(5)]
        for c in range(5):  # no class is behind another by more than one, unless it has run out
            assert taken[c] >= min(max(taken) - 1, counts[c])
    assert draw(len(labels), labels, seed) == order


def test_without_classes_the_order_is_random():
    assert sorted(draw(50, None, 0)) == list(range(50)) != draw(50, None, 0)
    assert draw(50, None, 0) == draw(50, None, 0) != draw(50, None, 1)
    assert draw(50, [0] * 50, 0) == draw(50, None, 0)


def test_batches_are_of_the_trainers_size_and_come_again(trainer, dataset):
    sample = make_sample(trainer, 10)
    assert [len(batch["img"]) for batch in sample.batches("fit")] == [8, 2]
    once, again = list(sample.batches("fit")), list(sample.batches("fit"))
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a["img"], b["img"]) and torch.equal(a["bboxes"], b["bboxes"])


def test_images_are_those_of_the_files_without_augmentation(trainer, dataset):
    sample = make_sample(trainer, 24)
    for which in "fit", "heldout":
        for batch in sample.batches(which):
            for i, file in enumerate(batch["im_file"]):
                pixels = cv2.imread(file)[..., ::-1].transpose(2, 0, 1).copy()
                torch.testing.assert_close(batch["img"][i], torch.from_numpy(pixels).float() / 255)
                mine = batch["batch_idx"] == i
                label = Path(file).parents[2] / "labels/train" / Path(file).with_suffix(".txt").name
                expected = np.loadtxt(label, ndmin=2)
                found = torch.cat([batch["cls"][mine], batch["bboxes"][mine]], 1).numpy()
                np.testing.assert_allclose(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)], atol=1e-5)


def test_the_view_gives_the_same_image_twice_and_the_training_set_does_not(trainer, dataset):
    view, _ = trainer.plain_images()
    assert torch.equal(view[3]["img"], view[3]["img"])
    assert not torch.equal(dataset[3]["img"], dataset[3]["img"])


def test_images_keep_their_size_under_multi_scale(trainer, dataset):
    sample = make_sample(trainer, 24)
    assert {batch["img"].shape[2:] for _ in range(5) for batch in sample.batches("fit")} == {(64, 64)}
    assert trainer.args.multi_scale == 0.5


# What must not change -----------------------------------------------------------------------------------------------


def test_the_training_set_keeps_its_own_transforms_and_images(trainer, dataset):
    dataset[0]  # fills the buffer of mosaic
    before = (dataset.transforms, dataset.augment, dataset.rect, list(dataset.buffer), deepcopy(dataset.labels))
    images = [None if image is None else image.copy() for image in dataset.ims]
    view, _ = trainer.plain_images()
    sample = make_sample(trainer, 24)
    assert len(names(sample.batches("fit"))) == 16
    assert dataset.transforms is before[0] and dataset.augment is before[1] is True and dataset.rect is before[2]
    assert dataset.buffer == before[3]
    assert view.augment is False and view.transforms is not dataset.transforms
    for now, was in zip(dataset.labels, before[4], strict=True):
        np.testing.assert_equal(now, was)
    for now, was in zip(dataset.ims, images, strict=True):
        np.testing.assert_equal(now, was)


def random_states():
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), (kind, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()


def test_a_shift_leaves_the_random_states_of_the_process(trainer):
    before = random_states()
    reports = trainer._shift_everywhere({"ema": trainer.ema.ema, "model": trainer.model})
    assert random_states() == before
    assert set(reports) == {"ema", "model"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_shift_that_fails_half_way_leaves_them_too(trainer, monkeypatch, error):
    def fail(sos, batches, *_, **__):
        next(iter(batches))
        use_up()
        raise error("half way")

    monkeypatch.setattr(SOS, "shift", fail)
    before = random_states()
    with pytest.raises(error, match="half way"):
        trainer._shift_everywhere({"ema": trainer.ema.ema, "model": trainer.model})
    assert random_states() == before
    assert trainer.args.multi_scale == 0.5


def test_the_arguments_come_back_when_a_batch_cannot_be_prepared(trainer, dataset, monkeypatch):
    def fail(batch):
        assert trainer.args.multi_scale == 0
        raise RuntimeError("half way")

    monkeypatch.setattr(trainer, "preprocess_batch", fail)
    sample = make_sample(trainer, 4)
    with pytest.raises(RuntimeError, match="half way"):
        next(sample.batches("fit"))
    assert trainer.args.multi_scale == 0.5


def use_up():
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_random_states_come_back():
    with preserve_rng():
        inside = use_up()
    assert use_up() == inside
    before = random_states()
    with pytest.raises(RuntimeError), preserve_rng():
        use_up()
        raise RuntimeError
    assert random_states() == before
