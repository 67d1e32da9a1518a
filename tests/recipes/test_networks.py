# yolo-sos, AGPL-3.0
"""Every classifier: those of Ultralytics, and the networks for 32 × 32 images that come along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models
from ultralytics import YOLO
from ultralytics.nn.modules import Classify
from ultralytics.nn.tasks import ClassificationModel

from yolo_sos.builtin import CFG_DIR, resolve_model
from yolo_sos.core import SOS, Method
from yolo_sos.recipes.networks import set_head
from yolo_sos.trainers import SOSClassificationTrainer
from yolo_sos.yolo.heads import YoloTask, final_layers

STOCK = ["yolov8n-cls.yaml", "yolo11n-cls.yaml", "yolo12n-cls.yaml", "yolo26n-cls.yaml"]
OURS = {"vgg16bn-cifar": 512, "resnet18-cifar": 512, "densenet121-cifar": 1024, "vit-cifar": 192}  # d


def build(name: str, nc: int = 10) -> ClassificationModel:
    torch.manual_seed(0)
    model = ClassificationModel(resolve_model(name), nc=nc, verbose=False)
    set_head(model)
    return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_every_yaml_is_listed_here():
    assert sorted(OURS) == sorted(path.stem for path in (CFG_DIR / "models").glob("*.yaml"))


@pytest.mark.parametrize("name", [*STOCK, *OURS])
def test_a_shift_keeps_the_outputs_of_its_images(name):
    model = build(name)
    if name in OURS:
        assert final_layers(model)[0].module.weight.shape == (10, OURS[name])
    # Labels and images that differ, or an untrained network would not tell them apart
    x, y = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    model.train()
    for _ in range(3):  # statistics of BatchNorm
        model(x)
    model.eval()
    batch = {"img": x, "cls": y}
    with torch.no_grad():
        before = model(x)
    (layer,) = final_layers(model)
    assert (layer.kind, type(layer.module)) == ("linear", nn.Linear)
    norm = layer.module.weight.detach().norm()
    report = SOS(model, [layer], task=YoloTask(model), method=Method("rows", rank=10), guard=1e-2).shift(
        [batch], [batch]
    )
    with torch.no_grad():
        after = model(x)
    assert report.status == "ok" and report.layers[0].rank <= 6
    assert layer.module.weight.norm() < 0.5 * norm
    for a, b in zip(before, after, strict=True):  # probabilities and logits
        assert torch.allclose(a, b, atol=1e-2)
    assert report.heldout_before == pytest.approx(nn.functional.cross_entropy(before[1], y).item(), rel=1e-5)
    assert report.heldout_after == pytest.approx(nn.functional.cross_entropy(after[1], y).item(), rel=1e-4)


def test_sizes_are_those_of_the_field():
    # What the widely used implementation for CIFAR-10 has (github.com/kuangliu/pytorch-cifar): ResNet-18 11 173 962
    # parameters; VGG-16 14 728 266, of which 4 224 are biases of convolutions that BatchNorm follows.
    assert parameters(build("resnet18-cifar")) == 11_173_962
    assert parameters(build("vgg16bn-cifar")) == 14_728_266 - 4_224
    # DenseNet-121 and ViT: TorchVision's, less what the smaller images make smaller
    dense = models.densenet121(num_classes=10)
    assert parameters(build("densenet121-cifar")) == parameters(dense) - 64 * 3 * (7 * 7 - 3 * 3)
    vit = models.VisionTransformer(32, 4, 9, 12, 192, 384, num_classes=10)
    layer = 4 * 192**2 + 2 * 192 * 384 + (4 + 1 + 2 + 4) * 192  # attention, MLP, biases, two norms
    by_hand = 3 * 4 * 4 * 192 + 192 + (64 + 1 + 1) * 192 + 9 * layer + 2 * 192 + 10 * 192 + 10
    assert parameters(build("vit-cifar")) == parameters(vit) == by_hand


@pytest.mark.parametrize("name", OURS)
def test_the_network_sees_the_whole_resolution(name):
    """Features of 32 × 32 pixels, as far as the network keeps a map: ImageNet's stem would leave one pixel."""
    model = build(name).eval()
    sizes = {}
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_hook(lambda *a: sizes.update(first=tuple(a[2].shape[2:])))
    model.model[-1].register_forward_pre_hook(lambda _, args: sizes.update(last=tuple(args[0].shape[2:])))
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert sizes["first"] == ((8, 8) if name == "vit-cifar" else (32, 32))
    assert sizes["last"] == ((4, 4) if name in {"resnet18-cifar", "densenet121-cifar"} else (1, 1))


def test_the_backbone_is_torchvisions_own():
    """The same weights give what TorchVision's own forward gives."""
    for name, whole, last in (
        ("densenet121-cifar", models.get_model("densenet121_cifar", num_classes=10), "classifier"),
        ("resnet18-cifar", models.get_model("resnet18_cifar", num_classes=10), "fc"),
        ("vit-cifar", models.get_model("vit_cifar", num_classes=10), "heads"),
    ):
        model = build(name)
        theirs = {k: v for k, v in whole.state_dict().items() if not k.startswith(last)}
        # In the order of their making; the final layer is the last of both.
        ours = dict(
            zip(model.state_dict(), [*theirs.values(), *getattr(whole, last).state_dict().values()], strict=True)
        )
        model.load_state_dict(ours)
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.allclose(model.eval()(x)[1], whole.eval()(x), atol=1e-5), name


def test_the_head_is_changed_only_where_the_yaml_asks_for_it():
    model = ClassificationModel("yolo11n-cls.yaml", nc=10, verbose=False)
    conv = model.model[-1].conv
    assert not set_head(model) and model.model[-1].conv is conv
    model = ClassificationModel(resolve_model("resnet18-cifar"), nc=7, verbose=False)
    assert set_head(model) and not set_head(model)  # twice is once
    assert isinstance(model.model[-1], Classify) and model.model[-1].linear.weight.shape == (7, 512)


@pytest.fixture(scope="module")
def trained(classifier_settings):
    """A ViT that was trained for an epoch on 20 images."""
    trainer = SOSClassificationTrainer(
        overrides=classifier_settings(
            **{"model": "vit-cifar.yaml", "epochs": 1, "fraction": 20, "batch": 10, "val": False},
            **{"sos": True, "sos_method": "rows", "sos_rank": 10, "sos_guard": None},
        )
    )
    trainer.train()
    return trainer


def test_fine_tuning_takes_the_final_layer_along(trained, classifier_settings):
    trainer = SOSClassificationTrainer(overrides=classifier_settings(model=str(trained.last), sos=True))
    trainer.setup_model()
    ours = trainer.model.state_dict()
    saved = YOLO(trained.last).model.state_dict()
    assert list(ours) == list(saved)
    assert all(torch.equal(ours[k].float(), saved[k].float()) for k in ours)
    fresh = SOSClassificationTrainer(overrides=classifier_settings(model=str(trained.last), pretrained=False))
    fresh.setup_model()
    assert not torch.equal(fresh.model.model[-1].linear.weight, saved["model.2.linear.weight"].float())


def test_a_vit_names_the_size_that_it_takes(classifier_settings):
    trainer = SOSClassificationTrainer(overrides=classifier_settings(model="vit-cifar.yaml", imgsz=64))
    with pytest.raises(ValueError, match=r"imgsz=64: .*vit-cifar.yaml takes imgsz=32 and no other"):
        trainer.setup_model()


def test_its_checkpoint_needs_no_yolo_sos(trained, tmp_path):
    code = f"""
import sys
sys.modules["yolo_sos"] = None  # an import of it would fail
import torch
from ultralytics import YOLO
model = YOLO({str(trained.last)!r})
image = {str(next(Path(trained.args.data).rglob("val/3/*.png")))!r}
(result,) = model.predict(image, imgsz=32, device="cpu", verbose=False, save=False)
assert abs(float(result.probs.data.sum()) - 1) < 1e-4, result.probs
metrics = model.val(data={str(trained.args.data)!r}, imgsz=32, device="cpu", plots=False, project={str(tmp_path)!r})
assert metrics.top1 >= 0
path = model.export(format="torchscript", imgsz=32, device="cpu")
x = torch.rand(1, 3, 32, 32)
assert torch.allclose(torch.jit.load(path)(x), model.model.float().eval()(x)[0], atol=1e-4)
assert not [m for m in sys.modules if m.startswith("yolo_sos.")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True)
