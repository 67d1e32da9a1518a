# yolo-sos, AGPL-3.0
"""CIFAR-100 with ResNet-18 on all images, for a GPU: rows shifted while training, as the paper has it, and at the end.

    python studies/cifar/resnet18.py --data CIFAR-100 --seeds 0 --arms baseline rows

The recipe is the paper's with 30 epochs instead of 300, see cifar.md. Each arm is a training of its own: ``baseline``,
and ``rows``, 300 rows, three of each class, after every epoch of the second half, unguarded. Copies of the baseline are
shifted at the end, as in cifar.py, which this script shares its parts with. Records go to studies/cifar/resnet18.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cifar import HERE, Config, Split, features_of, measure, read_data, study, train
from torch import nn
from torchvision.models import resnet18

from yolo_sos.core import SOS
from yolo_sos.files import as_json, write_text
from yolo_sos.versions import git_commit, versions
from yolo_sos.yolo.images import draw


@dataclass(frozen=True)
class Recipe(Config):
    """The paper's recipe, but for the number of epochs and 2,000 images that temperatures and guards take."""

    train: int = 48_000
    epochs: int = 30
    rows: int = 300
    drawn_from: int = 3_000  # training images that the rows of a shift are drawn from


def network(config: Config, classes: int) -> nn.Sequential:
    """Return ResNet-18 for images of 32 × 32, whose last module is the final layer: a stem of 3 × 3 and no pooling."""
    net = resnet18(num_classes=classes)
    stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    stages = net.layer1, net.layer2, net.layer3, net.layer4
    model = nn.Sequential(stem, net.bn1, net.relu, *stages, net.avgpool, nn.Flatten(), net.fc)
    return model.to(memory_format=torch.channels_last)


def run(config: Recipe, data: dict[str, Split], arm: str, seed: int, file: Path) -> dict[str, Any]:
    """Train one arm and return what its record holds."""
    images = data["train"]
    labels = images.labels.cpu()

    def shift(model: nn.Sequential, epoch: int) -> dict[str, Any]:
        settings = {"method": "rows", "rank": config.rows, "weighting": "balanced", "interval": 1, "guard": None}
        drawn = torch.tensor(draw(len(labels), labels.tolist(), seed + 1000 * epoch))[: config.drawn_from]
        report = SOS(model, model[-1], seed=seed, **settings).step(epoch, config.epochs, images.batches(drawn))
        return {"squared_norm_ratio": report.squared_norm_ratio, "rank": report.rank} if report else {}

    begun = time.perf_counter()
    classes = int(labels.max()) + 1
    hook = {"after_epoch": shift} if arm == "rows" else {}
    model, curve = train(config, images, classes, seed, file, network, **hook)
    seconds = round(time.perf_counter() - begun)
    if arm == "baseline":
        return {"curve": curve, "seconds": seconds, "arms": study(model, config, data, seed)}
    norm = float(model[-1].weight.detach().double().pow(2).sum())
    figures = {"squared_norm": norm, **measure(model[-1], features_of(model, data), data)}
    return {"curve": curve, "seconds": seconds, "arms": {"rows while training": figures}}


def main() -> None:
    """Run the arms and seeds that have no record yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/<class>/*.png and test/<class>")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=["baseline", "rows"], choices=["baseline", "rows"])
    parser.add_argument("--models", type=Path, default=Path("runs/cifar-resnet18"), help="where models are kept")
    parser.add_argument("--out", type=Path, default=HERE / "resnet18", help="where records go")
    args = parser.parse_args()
    config = Recipe()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data: dict[str, Split] = {}
    for seed in args.seeds:
        for arm in args.arms:
            file = args.out / f"{arm}-{seed}.json"
            if file.exists():
                continue
            data = data or {k: v.to(device) for k, v in read_data(args.data, config).items()}
            made = {"seed": seed, "config": asdict(config)}
            made |= {"versions": versions(), "commit": git_commit(), "device": str(device)}
            made |= run(config, data, arm, seed, args.models / f"{arm}-{seed}.pt")
            write_text(file, as_json(made))


if __name__ == "__main__":
    main()
