# yolo-sos, AGPL-3.0
"""Classifiers that train with SOS."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections import Counter

import pytest
import torch
from PIL import Image
from torch import nn
from ultralytics import YOLO
from ultralytics.data.augment import classify_transforms
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.utils.patches import torch_load

from yolo_sos.config import SOSConfig
from yolo_sos.core import SOS
from yolo_sos.trainers import SOSClassificationTrainer
from yolo_sos.yolo.images import draw

REAL_SHIFT = SOS.shift
ROWS = {"sos": True, "sos_method": "rows", "sos_rank": 30, "sos_interval": 1, "sos_start": 0.01, "sos_guard": 1e9}


class Watched(SOSClassificationTrainer):
    """Takes notes of what it trains on."""

    def __init__(self, *args, **kwargs):
        self.trained = []
        super().__init__(*args, **kwargs)

    def preprocess_batch(self, batch):
        batch = super().preprocess_batch(batch)
        self.trained.append({k: v.clone() for k, v in batch.items()})
        return batch


def run(classifier_settings, trainer=Watched, callbacks=None, **settings):
    """Train, and return the trainer and, for each model of each shift, the batches to fit on and to hold out."""
    shifts = []
    trainer = trainer(overrides=classifier_settings(**settings))
    for event, callback in (callbacks or {}).items():
        trainer.add_callback(event, callback)

    def shift(sos, batches, heldout=(), **kwargs):
        seen = {"fit": list(batches), "heldout": list(heldout), "off": []}
        drops = [m for m in sos.model.modules() if isinstance(m, nn.Dropout)]
        handles = [m.register_forward_hook(lambda m, _, out: seen["off"].append(not m.training)) for m in drops]
        seen["report"] = REAL_SHIFT(sos, seen["fit"], seen["heldout"], **kwargs)
        for handle in handles:
            handle.remove()
        shifts.append(seen)
        return seen["report"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SOS, "shift", shift)
        trainer.train()
    return trainer, shifts


def results(trainer) -> list[dict[str, str]]:
    with open(trainer.csv, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def shifted(classifier_settings):
    return run(classifier_settings, dropout=0.9, pretrained=False, **ROWS)


def test_it_shifts_each_epoch_and_reports_it(shifted):
    trainer, shifts = shifted
    assert len(shifts) == 4  # EMA and live model, two epochs
    for line in results(trainer):
        # Fresh features differ little: fewer than 30 dimensions of 30 rows stand out from rounding.
        assert 1 < float(line["sos/rank"]) <= 30 and 0 < float(line["sos/squared_norm_ratio"]) < 0.6
        assert float(line["sos/heldout_after"]) > 0 and float(line["sos/t"]) == 1
        assert float(line["sos/deviation"]) < 1e-3  # all 30 rows were drawn
    with open(trainer.save_dir / "sos.csv", encoding="utf-8", newline="") as f:
        assert {(row["model"], row["kind"], row["d"], row["rows"]) for row in csv.DictReader(f)} == {
            ("ema", "linear", "1280", "30"),
            ("model", "linear", "1280", "30"),
        }


def test_each_class_has_three_images_and_no_image_is_augmented_or_used_twice(shifted, few_digits):
    trainer, shifts = shifted
    transform = classify_transforms(size=32)
    plain = {}
    for path, label, *_ in trainer.train_loader.dataset.samples:
        plain[transform(Image.open(path).convert("RGB")).numpy().tobytes()] = (path, label)
    drawn = []
    for seen in shifts:
        images = {}
        for which in "fit", "heldout":
            x = torch.cat([batch["img"] for batch in seen[which]])
            y = torch.cat([batch["cls"] for batch in seen[which]])
            images[which] = [plain[image.numpy().tobytes()] for image in x]
            assert [label for _, label in images[which]] == y.tolist()
        assert Counter(label for _, label in images["fit"]) == dict.fromkeys(range(10), 3)
        assert len(images["heldout"]) == 15 and not set(images["fit"]) & set(images["heldout"])
        drawn.append(images)
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3] != drawn[0]  # both models alike, each epoch anew


def test_dropout_is_off_while_features_are_captured(shifted):
    trainer, shifts = shifted
    assert trainer.model.model[-1].drop.p == 0.9
    for seen in shifts:
        assert len(seen["off"]) == 2 + 1 and all(seen["off"])  # 30 and 15 images in batches of 20


def test_weights_that_are_saved_are_shifted_ones(shifted):
    trainer, shifts = shifted
    ckpt = torch_load(trainer.last, map_location="cpu")
    assert ckpt["sos"]["settings"] == trainer.sos.to_dict()
    weight = ckpt["model"].model[-1].linear.weight.double()
    assert torch.linalg.matrix_rank(weight) == 10
    assert float(weight.norm()) == pytest.approx(shifts[-2]["report"].layers[0].norm_after, rel=1e-3)
    assert YOLO(trainer.last).val(data=trainer.args.data, imgsz=32, device="cpu", plots=False).top1 >= 0


def test_sos_false_is_the_stock_trainer(classifier_settings):
    ours, _ = run(classifier_settings, sos=False, sos_rank=3)
    stock, _ = run(classifier_settings, trainer=ClassificationTrainer)
    a, b = (torch_load(t.last, map_location="cpu")["model"].state_dict() for t in (ours, stock))
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert {p.name for p in ours.save_dir.iterdir()} == {p.name for p in stock.save_dir.iterdir()}
    assert list(results(ours)[0]) == list(results(stock)[0])
    assert "sos" not in torch_load(ours.last, map_location="cpu")


# How many images, and which -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ready(classifier_settings):
    trainer = SOSClassificationTrainer(overrides=classifier_settings(sos=True))
    trainer._setup_train()
    return trainer


@pytest.mark.parametrize(
    ("settings", "images"),
    [
        ({"sos_method": "budget"}, 30),  # three per class
        ({"sos_method": "full", "sos_images": 31}, 31),
        ({"sos_method": "rows", "sos_rank": 10}, 30),
        ({"sos_method": "rows", "sos_rank": 100}, 100),  # the paper's two settings for CIFAR-100, one number each
        ({"sos_method": "rows", "sos_rank": 300}, 300),
        ({"sos_method": "principal", "sos_rank": 0.5}, 640),
        ({"sos_method": "expected", "sos_rank": 48}, 48),
        ({"sos_method": "principal", "sos_rank": 5000}, 1280),
    ],
)
def test_there_are_rows_enough(ready, monkeypatch, settings, images):
    monkeypatch.setattr(ready, "sos", SOSConfig.from_dict({"sos": True, **settings}))
    assert ready.shift_images() == images
    assert Counter(ready.plain_images()[1]) == {0: 12, 1: 4, **dict.fromkeys(range(2, 8), 6), 8: 5, 9: 3}


@pytest.mark.parametrize(("rank", "warned"), [(9, True), (10, False), (0.005, True), (0.5, False)])
def test_a_rank_below_the_number_of_classes_warns(classifier_settings, monkeypatch, rank, warned):
    said = []
    trainer = SOSClassificationTrainer(overrides=classifier_settings(sos=True, sos_rank=rank))
    monkeypatch.setattr("yolo_sos.trainers.LOGGER.warning", said.append)
    trainer._setup_train()
    ours = [line for line in said if "sos_rank" in line]  # Ultralytics' logger is one: it may warn of slow disks, too
    assert [f"sos_rank={rank} keeps" in line and "fewer than the 10 classes" in line for line in ours] == [
        True
    ] * warned


def test_classes_take_turns():
    labels = [0] * 50 + [1] * 5 + [2] * 20
    order = draw(75, labels, seed=3)
    assert sorted(order) == list(range(75))
    for n in range(1, 16):
        counts = Counter(labels[i] for i in order[:n])
        assert max(counts.values()) - min(counts[c] for c in range(3)) <= 1
    assert Counter(labels[i] for i in order[:45]) == {0: 20, 1: 5, 2: 20}  # as far as there are any
    assert order == draw(75, labels, seed=3) != draw(75, labels, seed=4)
    assert draw(75, None, seed=3) == torch.randperm(75, generator=torch.Generator().manual_seed(3)).tolist()


# The recipe -----------------------------------------------------------------------------------------------------------
def rates(trainer) -> list[float]:
    return [float(line["lr/pg0"]) for line in results(trainer)]


@pytest.fixture(scope="module")
def recipe():
    return {"epochs": 4, "lr0": 0.1, "lr_steps": [0.5, 0.75], "mixup_alpha": 1.0}


def test_the_recipe_without_sos(classifier_settings, recipe):
    trainer, shifts = run(classifier_settings, plots=True, **recipe)
    assert rates(trainer) == pytest.approx([0.1, 0.1, 0.01, 0.001])
    assert not shifts and "sos/t" not in results(trainer)[0]
    assert len(trainer.trained) == 12
    for batch in trainer.trained:
        assert batch["cls"].shape == (20, 10) and torch.allclose(batch["cls"].sum(1), torch.ones(20))
    assert not all(((b["cls"] == 0) | (b["cls"] == 1)).all() for b in trainer.trained)
    assert (trainer.save_dir / "train_batch0.jpg").stat().st_size
    saved = torch_load(trainer.last, map_location="cpu")["sos"]["settings"]
    assert SOSConfig.from_dict(saved) == trainer.sos and not saved["sos"]


def test_shifts_see_neither_mixed_images_nor_mixed_labels(classifier_settings):
    trainer, shifts = run(classifier_settings, mixup_alpha=1.0, **ROWS)
    mixed = [batch for batch in trainer.trained if batch["cls"].ndim == 2]
    assert len(mixed) == 6 and len(shifts) == 4
    assert all(b["cls"].ndim == 1 and not b["cls"].is_floating_point() for s in shifts for b in s["fit"] + s["heldout"])


@pytest.mark.parametrize("sos", [False, True])
def test_the_recipe_survives_a_resume(classifier_settings, recipe, sos):
    def interrupt(trainer):
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    settings = {**recipe, **(ROWS if sos else {"sos": False})}
    with pytest.raises(KeyboardInterrupt):
        broken = Watched(overrides=classifier_settings(**settings))
        broken.add_callback("on_train_epoch_start", interrupt)
        broken.train()
    resumed = Watched(overrides={"resume": str(broken.last), "device": "cpu"})
    assert resumed.sos == broken.sos
    resumed.train()
    assert rates(resumed) == pytest.approx([0.1, 0.1, 0.01, 0.001])
    assert len(resumed.trained) >= 6 and resumed.trained[0]["cls"].ndim == 2


def test_a_run_without_sos_but_with_the_recipe_cannot_be_resumed_with_sos(classifier_settings, recipe):
    def interrupt(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    broken = Watched(overrides=classifier_settings(**recipe))
    broken.add_callback("on_train_epoch_start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    with pytest.raises(ValueError, match="was trained without SOS"):
        Watched(overrides={"resume": str(broken.last), "device": "cpu", "sos": True})


@pytest.mark.parametrize("method", ["sam", "asam", "gnp"])
@pytest.mark.slow
def test_the_peers_with_the_recipe_and_dropout(classifier_settings, recipe, method):
    trainer, shifts = run(
        classifier_settings, **{**recipe, **ROWS}, dropout=0.5, sharpness_aware=method, swa=0.5, nbs=20
    )
    plain, _ = run(classifier_settings, **recipe, dropout=0.5, nbs=20)
    assert [m.p for m in trainer.model.modules() if isinstance(m, nn.Dropout)] == [0.5]
    assert len(shifts) == 8 and trainer._averaged == 3
    trained = [b for b in trainer.trained if b["cls"].ndim == 2]
    assert len(trained) == len(plain.trained) == 12
    assert all(torch.equal(a["img"], b["img"]) for a, b in zip(trained, plain.trained, strict=True))
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_mixup_is_for_classifiers(digits, tiny, tmp_path):
    from yolo_sos.trainers import SOSDetectionTrainer

    with pytest.raises(ValueError, match=r"mixup_alpha=0.5 is for task=classify; for task=detect there is mixup"):
        SOSDetectionTrainer(
            overrides={"model": str(tiny), "data": str(digits), "project": str(tmp_path), "mixup_alpha": 0.5}
        )


def test_a_failed_shift_leaves_the_model_alone(classifier_settings):
    trainer = SOSClassificationTrainer(overrides=classifier_settings(**ROWS))
    trainer._setup_train()
    trainer.epoch = 0
    trainer.model.criterion = trainer.model.init_criterion()
    linear = trainer.ema.ema.model[-1].linear
    with torch.no_grad():
        linear.weight[0, 0] = math.nan
    before = linear.weight.clone()
    report = trainer._shift_models({"ema": trainer.ema.ema})["ema"]
    assert report.status.startswith("non-finite") and torch.equal(linear.weight.nan_to_num(), before.nan_to_num())
    assert dataclasses.asdict(report)["step"] == 0
