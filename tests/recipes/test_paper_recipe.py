# yolo-sos, AGPL-3.0
"""The recipe of the paper: learning rate in steps, mixup, and the experiments that name them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import default_collate

from yolo_sos.arguments import with_file
from yolo_sos.builtin import CFG_DIR, resolve_cfg, resolve_model
from yolo_sos.config import SOSConfig, is_sos_key
from yolo_sos.recipes.mixup import Mixup
from yolo_sos.recipes.schedule import step_factor

ARMS = sorted(path.stem for path in (CFG_DIR / "experiments/cifar").glob("*.yaml"))


@pytest.mark.parametrize(
    ("epochs", "steps", "first"),  # the epochs, counted from 0, in which the learning rate is first divided
    [
        (300, [0.5, 0.75], [150, 225]),
        (10, [0.5, 0.75], [5, 8]),
        (10, [0.3, 0.7], [3, 7]),  # 0.3 · 10 and 0.7 · 10 are whole numbers
        (30, [0.1], [3]),  # but 0.1 · 30 is not, in floats
        (3, [0.5], [2]),
        (1, [0.5], []),
    ],
)
def test_the_learning_rate_falls_at_the_steps(epochs, steps, first):
    factors = [step_factor(epoch, epochs, steps) for epoch in range(epochs)]
    assert factors[0] == 1.0
    assert [e for e in range(1, epochs) if factors[e] != factors[e - 1]] == first
    assert factors[-1] == pytest.approx(10.0 ** -len(first))


def test_mixup_mixes_images_and_labels_alike():
    classes = 4
    items = [{"img": torch.full((3, 2, 2), float(c)), "cls": c} for c in [0, 1, 2, 3, 3, 1]]
    torch.manual_seed(0)
    shares = []
    for _ in range(200):
        batch = Mixup(1.0, classes)(items)
        assert batch["img"].shape == (6, 3, 2, 2) and batch["cls"].shape == (6, classes)
        assert torch.allclose(batch["cls"].sum(1), torch.ones(6))
        # The image of class c is c everywhere: a mixed one tells what it is made of.
        assert torch.allclose(batch["cls"] @ torch.arange(4.0), batch["img"][:, 0, 0, 0], atol=1e-6)
        shares.append(float(batch["cls"][0, 0]))
    # A share m of itself, and 1 − m of another image, which in 1 of 6 cases is itself: E[m] + E[1 − m] / 6.
    assert sum(shares) / len(shares) == pytest.approx(0.5 + 0.5 / 6, abs=0.07)
    torch.manual_seed(0)
    again = Mixup(1.0, classes)(items)
    torch.manual_seed(0)
    assert all(torch.equal(again[k], v) for k, v in Mixup(1.0, classes)(items).items())


def test_cross_entropy_of_mixed_labels_is_the_mix_of_cross_entropies():
    items = [{"img": torch.randn(3, 2, 2), "cls": c} for c in [0, 1, 2, 0]]
    torch.manual_seed(3)
    mixed = Mixup(0.4, 3)(items)
    logits = torch.randn(4, 3)
    expected = (mixed["cls"] * -logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(torch.nn.functional.cross_entropy(logits, mixed["cls"]), expected)
    assert default_collate(items)["cls"].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("arm", ARMS)
def test_each_experiment_is_the_recipe_and_its_own_difference(arm):
    settings = with_file({"cfg": f"cifar/{arm}.yaml", "seed": 3})
    recipe = {
        **{"task": "classify", "imgsz": 32, "epochs": 300, "batch": 64, "nbs": 64, "optimizer": "SGD", "lr0": 0.1},
        **{"momentum": 0.9, "weight_decay": 1e-4, "warmup_epochs": 0, "lr_steps": [0.5, 0.75], "seed": 3},
        **{"fliplr": 0.5, "scale": 0.0, "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0, "erasing": 0.0, "auto_augment": None},
    }
    assert settings | recipe == settings
    assert "cfg" not in settings
    config = SOSConfig.from_dict({k: v for k, v in settings.items() if is_sos_key(k)})
    assert config.sos == (arm not in {"default", "baseline", "mixup", "sam"})
    assert config.mixup_alpha == (1.0 if "mixup" in arm else None)
    assert config.sos_method == ("rows" if "rows" in arm else "principal" if config.sos else None)
    assert not config.stock


def test_arguments_take_precedence_over_a_file_and_a_file_over_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("epochs: 1\nbatch: 2\nlr0: 0.3\n")
    (tmp_path / "arm.yaml").write_text("cfg: base.yaml\nbatch: 4\nlr0: 0.4\n")
    settings = with_file({"cfg": str(tmp_path / "arm.yaml"), "lr0": 0.5})
    assert settings == {"epochs": 1, "batch": 4, "lr0": 0.5}
    (tmp_path / "base.yaml").write_text("epoch: 1\n")
    with pytest.raises(ValueError, match=r"'epoch' is not a valid argument\. Did you mean 'epochs'"):
        with_file({"cfg": str(tmp_path / "arm.yaml")})


def test_names_of_built_in_models_and_experiments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(CFG_DIR / "models/resnet18-cifar.yaml")
    assert resolve_model("resnet18-cifar.yaml") == resolve_model("resnet18-cifar") == model
    assert resolve_cfg("cifar/rows.yaml") == resolve_cfg("cifar/rows") == str(CFG_DIR / "experiments/cifar/rows.yaml")
    for other in ("resnet18-cifar.pt", "yolo11n-cls.yaml", "x/resnet18-cifar.yaml", "", None, model):
        assert resolve_model(other) == other
    (tmp_path / "resnet18-cifar.yaml").touch()  # a file of the user's goes first
    assert resolve_model("resnet18-cifar.yaml") == "resnet18-cifar.yaml"


def test_the_recipe_alone_is_no_setting_of_sos():
    for given in ({"sos_rank": 3}, {"sos_rank": 3, "lr_steps": [0.5]}):
        with pytest.raises(ValueError, match="without sos=true would train without SOS"):
            SOSConfig.of_training(given)
    assert SOSConfig.from_dict({}).stock and SOSConfig.from_dict({"sos_rank": 3}).stock
    for given in ({"sos": True}, {"lr_steps": [0.5]}, {"mixup_alpha": 0.2}):
        assert not SOSConfig.from_dict(given).stock
