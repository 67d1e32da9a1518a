# yolo-sos, AGPL-3.0
"""The study of CIFAR-100 at the size of a test: its records, what is not made again, and what goes on after a break."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

CLASSES = 4


@pytest.fixture(scope="module")
def tool(load_study):
    return load_study("cifar")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of noise on a colour of each class."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("cifar")
    for split, count in (("train", 40), ("test", 10)):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 200, (32, 32, 3)) + 14 * np.array(
                    [label & 1, label >> 1, 0]
                )  # blue, green, red
                cv2.imwrite(str(folder / split / f"class{label}" / f"{i}.png"), image.astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def config(tool):
    arms = {
        "rows": tool.Arm({"method": "rows", "rank": 8, "weighting": "balanced", "guard": None}, 60, 20),
        "default": tool.Arm({}, 60, 20),
        "unseen": tool.Arm({}, 60, 20, unseen=True),
    }
    sizes = {"train": 80, "heldout": 40, "scaling": 40}
    return tool.Config(**sizes, widths=(4, 8, 16), d=24, epochs=3, batch=16, arms=arms)


@pytest.fixture(scope="module")
def data(tool, images, config):
    return tool.read_data(images, config)


def test_the_sets_are_balanced_and_disjoint(data):
    assert {name: len(split.labels) for name, split in data.items()} == dict(train=80, heldout=40, scaling=40, test=40)
    for split in data.values():
        assert split.labels.bincount().tolist() == [len(split.labels) // CLASSES] * CLASSES
    drawn = torch.cat([data[name].images for name in ("train", "heldout", "scaling")])
    assert len(drawn.flatten(1).unique(dim=0)) == 160
    train = data["train"]
    means = torch.stack([train.images[train.labels == k].double().mean((0, 2, 3)) for k in range(CLASSES)])
    expected = torch.tensor([[0, 0, 0], [0, 0, 14], [0, 14, 0], [0, 14, 14]]).double()  # red, green, blue
    torch.testing.assert_close(means - means[0], expected, atol=4, rtol=0)


def test_records_say_what_the_models_do(tool, images, data, config, tmp_path, monkeypatch):
    models, out = tmp_path / "models", tmp_path / "out"
    records = tool.run_study(images, config, 2, models, out)
    assert [record["seed"] for record in records] == [0, 1] and str(tmp_path) not in str(records)
    for record in records:
        assert len(record["curve"]) == 3
        baseline, rows, default, unseen = record["arms"].values()
        assert baseline["squared_norm_ratio"] == 1 and 0 < rows["squared_norm_ratio"] < 1
        assert rows["rank"] == 8 and rows["step"] == 1
        for guarded in (default, unseen):
            assert guarded["heldout_after"] <= 1.005 * guarded["heldout_before"]
            assert guarded["squared_norm_ratio"] <= 1 and guarded["temperature"] > 0

        # The trained model of the file, by a loop of its own
        model = tool.network(config, CLASSES)
        model.load_state_dict(torch.load(models / f"seed-{record['seed']}.pt", weights_only=True)["model"])
        model.eval()
        with torch.no_grad():
            outputs = [
                (model(x[None]), y) for batch in data["test"].batches(size=7) for x, y in zip(*batch, strict=True)
            ]
        right = [int(logits.argmax()) == int(y) for logits, y in outputs]
        losses = [-float(logits.double().log_softmax(1)[0, y]) for logits, y in outputs]
        assert baseline["test_accuracy"] == pytest.approx(np.mean(right))
        assert baseline["test_loss"] == pytest.approx(np.mean(losses), rel=1e-4)

    page = (out / "cifar.md").read_text(encoding="utf-8")
    line = re.search(r"^\| rows +\|(.*)\|$", page, re.MULTILINE)[1].split("|")
    change = [r["arms"]["rows"]["test_loss"] - r["arms"]["baseline"]["test_loss"] for r in records]
    assert line[3].strip() == f"{np.mean(change):+.4f} ± {np.std(change, ddof=1):.4f}"

    monkeypatch.setattr(tool, "read_data", None)
    (out / "cifar.md").write_text("# Mine\n\n" + page.split("\n", 2)[2] + "\nand this\n", encoding="utf-8")
    assert tool.run_study(images, config, 2, models, out) == records  # nothing runs again
    again = (out / "cifar.md").read_text(encoding="utf-8")
    assert again.startswith("# Mine\n") and again.endswith("and this\n") and line[3] in again
    with pytest.raises(ValueError, match=r"seed-0.json: made with other settings"):
        tool.run_study(images, replace(config, epochs=4), 2, models, out)


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tool, data, config, tmp_path, monkeypatch):
    def trained(name):
        return tool.train(config, data["train"], CLASSES, 0, tmp_path / name)

    model, curve = trained("whole.pt")
    batches, epochs = tool.Split.batches, iter(range(3))

    def interrupted(self, index=None, size=500):
        if next(epochs) == 2:
            raise KeyboardInterrupt
        return batches(self, index, size)

    monkeypatch.setattr(tool.Split, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained("broken.pt")
    monkeypatch.setattr(tool.Split, "batches", batches)
    torch.rand(7)  # what happens in between does not matter
    other, again = trained("broken.pt")
    assert [line["loss"] for line in again] == [line["loss"] for line in curve]
    states = model.state_dict(), other.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    with pytest.raises(ValueError, match=r"broken.pt: trained with other settings"):
        tool.train(replace(config, lr=0.2), data["train"], CLASSES, 0, tmp_path / "broken.pt")


def test_a_folder_without_images_is_named(tool, config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train: there are no images <class>/\*.png"):
        tool.read_data(tmp_path, config)


@pytest.mark.parametrize("arm", ["baseline", "rows"])
def test_resnet18(load_study, tool, data, config, tmp_path, monkeypatch, arm):
    """With another network: a shift after each epoch of the second half, and none in the baseline."""
    monkeypatch.setitem(sys.modules, "cifar", tool)  # as the script imports it
    resnet18 = load_study("cifar", "resnet18")
    model = resnet18.network(config, CLASSES)
    assert isinstance(model[-1], torch.nn.Linear) and model[-1].weight.shape == (CLASSES, 512)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, CLASSES)
    monkeypatch.setattr(resnet18, "network", tool.network)
    recipe = resnet18.Recipe(**{**vars(config), "rows": 8, "drawn_from": 40})
    record = resnet18.run(recipe, data, arm, 0, tmp_path / f"{arm}.pt")
    assert len(record["curve"]) == config.epochs
    shifted = [0 < epoch["squared_norm_ratio"] < 1 for epoch in record["curve"] if "squared_norm_ratio" in epoch]
    assert shifted == ([] if arm == "baseline" else [True] * 2)  # of three epochs
    figures = record["arms"]["baseline" if arm == "baseline" else "rows while training"]
    model = tool.network(config, CLASSES)
    model.load_state_dict(torch.load(tmp_path / f"{arm}.pt", weights_only=True)["model"])
    model.eval()
    with torch.no_grad():
        right = [float((model(x).argmax(1) == y).double().mean()) for x, y in data["test"].batches(size=40)]
    assert figures["test_accuracy"] == pytest.approx(np.mean(right))
