# yolo-sos, AGPL-3.0
"""CIFAR-100, the paper's recipe shortened for a CPU: what a shift at the end of training does to a classifier.

A narrow ResNet of 684 000 parameters, with as many inputs to its final layer as ResNet-18 has (d = 512), is trained on
10 000 of the 50 000 training images, 40 epochs instead of 300, in bfloat16. The training is the same whether a shift
follows or not, so each seed is trained once, and copies of the model are shifted.

    python studies/cifar/cifar.py --data CIFAR-100   # with train/<class>/*.png and test/<class>/*.png

Models go to runs/cifar and records to studies/cifar/records, one file per seed: what is there is not made again, and an
interrupted training goes on from its last epoch. Then the table in studies/cifar/cifar.md is written anew; its text
outside the two marker lines stays.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from yolo_sos.core import ShiftReport, shift_model
from yolo_sos.data.image_folder import draw_split
from yolo_sos.files import as_json, atomic_path, read_json, write_text
from yolo_sos.markdown import markdown_table, mean_std
from yolo_sos.versions import git_commit, versions
from yolo_sos.yolo.images import draw

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "collapse"))
from collapse import calibration_error, fit_temperature, nll  # noqa: E402

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of CIFAR-100's training pixels, 0 to 1
MARKERS = "<!-- table: written by studies/cifar/cifar.py -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Arm:
    """A shift at the end of training.

    Attributes:
        settings (dict): Of ``shift_model``; what is missing has the package's defaults.
        fit (int): Images to fit on, of those that the model was trained on.
        heldout (int): Other images, which the guard judges on: trained on, too, as in ``sos=true``.
        unseen (bool): Whether the held-out images are such as the model was not trained on.
    """

    settings: dict[str, Any]
    fit: int
    heldout: int
    unseen: bool = False


def rows(weighting: str) -> Arm:
    """Return the published shift: 300 rows, no guard; ``balanced``: three of each class."""
    return Arm({"method": "rows", "rank": 300, "weighting": weighting, "guard": None}, 9000, 1000)


ARMS = {
    "rows 300, uniform": rows("uniform"),
    "rows 300, balanced": rows("balanced"),
    "default, as `sos=true` draws": Arm({}, 300, 32),  # three images per class to fit on, see sos_images
    "default, more images": Arm({}, 9000, 1000),
    "default, unseen images held out": Arm({}, 9000, 1000, unseen=True),
}


@dataclass(frozen=True)
class Config:
    """Everything that decides on the figures."""

    train: int = 10_000
    heldout: int = 1_000  # training images that are not trained on: for the guard of one arm
    scaling: int = 1_000  # others: temperatures are fitted on them
    data_seed: int = 0
    widths: tuple[int, ...] = (16, 32, 64, 192)  # of stages with one block each, where ResNet-18 has two
    d: int = 512  # inputs of the final layer
    epochs: int = 40
    batch: int = 64
    lr: float = 0.1
    lr_steps: tuple[float, ...] = (0.5, 0.75)  # the learning rate is divided by 10 at these fractions of the epochs
    momentum: float = 0.9
    weight_decay: float = 1e-4
    arms: dict[str, Arm] = field(default_factory=lambda: ARMS)


@dataclass(frozen=True)
class Split:
    """Images ``(n, 3, H, W)`` uint8 and labels ``(n,)``."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Split:
        """Return the split on a device."""
        return Split(self.images.to(device), self.labels.to(device))

    def batches(self, index: Tensor | None = None, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images and labels, in the order of ``index`` if there is one."""
        device = self.labels.device
        index = torch.arange(len(self.labels)) if index is None else index
        mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))
        for part in index.to(device).split(size):
            images = (self.images[part] / 255 - mean) / std
            yield images.contiguous(memory_format=torch.channels_last), self.labels[part]


def read_data(folder: Path, config: Config) -> dict[str, Split]:
    """Return the sets: train, heldout and scaling, disjoint, all of the training images; and all test images.

    Raises:
        FileNotFoundError: If a folder is missing or holds no image.
    """

    def files_of(split: str) -> tuple[list[Path], np.ndarray]:
        files = sorted((folder / split).glob("*/*.png"))
        if not files:
            raise FileNotFoundError(f"{folder / split}: there are no images <class>/*.png; --data names the folder")
        return files, np.unique([file.parent.name for file in files], return_inverse=True)[1]

    def read(files: list[Path], labels: np.ndarray) -> Split:
        images = [cv2.imread(str(file))[..., ::-1] for file in files]
        return Split(torch.tensor(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))

    files, labels = files_of("train")
    sizes = {"train": config.train, "heldout": config.heldout, "scaling": config.scaling}
    drawn = draw_split(labels, sizes, np.random.default_rng(config.data_seed))
    splits = {name: read([files[i] for i in index], labels[index]) for name, index in drawn.items()}
    return splits | {"test": read(*files_of("test"))}


def network(config: Config, classes: int) -> nn.Sequential:
    """Return a narrow ResNet whose last module is the final layer.

    Its stem halves the image, which ResNet-18 for 32 × 32 does not, and a 1 × 1 convolution to d channels precedes the
    pooling, as in Ultralytics' head for classification.
    """

    def convolution(width: int, out: int, size: int, stride: int) -> tuple[nn.Module, ...]:
        layer = nn.Conv2d(width, out, size, stride, size // 2, bias=False)
        return layer, nn.BatchNorm2d(out), nn.ReLU()

    def stage(width: int, out: int, stride: int) -> BasicBlock:
        skip = nn.Sequential(*convolution(width, out, 1, stride)[:2]) if width != out else None
        return BasicBlock(width, out, stride, skip)

    first, *others = config.widths
    stages = [stage(first, first, 1)]
    stages += [stage(width, out, 2) for width, out in zip(config.widths[:-1], others, strict=True)]
    last = convolution(config.widths[-1], config.d, 1, 1)
    model = nn.Sequential(
        *convolution(3, first, 3, 2),
        *stages,
        *last,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(config.d, classes),
    )
    return model.to(memory_format=torch.channels_last)


def train(
    config: Config,
    data: Split,
    classes: int,
    seed: int,
    file: Path,
    build: Callable[[Config, int], nn.Sequential] = network,
    after_epoch: Callable[[nn.Sequential, int], dict[str, Any]] = lambda *_: {},
) -> tuple[nn.Sequential, list[Any]]:
    """Return a trained model and its curve: loss and accuracy while training, by epoch.

    Every epoch is kept in a file, from which an interrupted training goes on as if it had not been interrupted.

    Args:
        config (Config): The recipe.
        data (Split): Images to train on; the model is trained on their device.
        classes (int): C.
        seed (int): Of the first weights, of the order of the images and of their flips.
        file (Path): Where the epochs are kept.
        build (Callable): ``build(config, classes)`` returns the network.
        after_epoch (Callable): ``after_epoch(model, epoch)`` is called after each epoch, counted from 0, and returns
            what the curve tells besides.

    Raises:
        ValueError: If the file is of a training with other settings.
    """
    torch.manual_seed(seed)
    device = data.labels.device
    model = build(config, classes).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=True
    )
    milestones = [round(step * config.epochs) for step in config.lr_steps]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    settings = {key: value for key, value in asdict(config).items() if key != "arms"}
    curve: list[Any] = []
    if file.exists():
        found = torch.load(file, map_location="cpu", weights_only=True)
        if found["config"] != settings:
            raise ValueError(f"{file}: trained with other settings; remove it, or name another folder by --models")
        curve = found["curve"]
        torch.set_rng_state(found["rng"])
        for name, part in parts.items():
            part.load_state_dict(found[name])
    n = len(data.labels)
    while len(curve) < config.epochs:
        begun = time.process_time()
        total, right = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        model.train()
        for images, labels in data.batches(torch.randperm(n), config.batch):
            flipped = (torch.rand(len(images), 1, 1, 1) < 0.5).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                output = model(torch.where(flipped, images.flip(3), images))
                loss = nn.functional.cross_entropy(output, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += len(labels) * loss.detach().double()
            right += (output.argmax(1) == labels).sum()
        schedule.step()
        told = {"loss": float(total) / n, "accuracy": float(right) / n}
        told |= after_epoch(model, len(curve)) | {"cpu_seconds": round(time.process_time() - begun, 1)}
        curve.append(told)
        print(f"seed {seed}, epoch {len(curve)}/{config.epochs}: {curve[-1]}", flush=True)
        states = {name: part.state_dict() for name, part in parts.items()}
        with atomic_path(file) as temporary:
            torch.save({"config": settings, "curve": curve, "rng": torch.get_rng_state(), **states}, temporary)
    return model.eval(), curve


def shift(model: nn.Module, arm: Arm, data: dict[str, Split], seed: int) -> ShiftReport:
    """Shift a model in place; images to fit on and to hold out are drawn with equal shares of the classes."""
    order = torch.tensor(draw(len(data["train"].labels), data["train"].labels.tolist(), seed))
    fit = data["train"].batches(order[arm.heldout :][: arm.fit])
    heldout = data["heldout"].batches() if arm.unseen else data["train"].batches(order[: arm.heldout])
    return shift_model(model, fit, heldout, seed=seed, **arm.settings)


def features_of(model: nn.Sequential, data: dict[str, Split]) -> dict[str, Tensor]:
    """Return the inputs ``(n, d)`` of a model's final layer, by set."""
    with torch.no_grad():
        return {name: torch.cat([model[:-1](images) for images, _ in of.batches()]) for name, of in data.items()}


def measure(head: nn.Linear, features: dict[str, Tensor], data: dict[str, Split]) -> dict[str, float]:
    """Return the figures of a final layer on the features ``(n, d)`` of each set."""
    with torch.no_grad():
        logits = {name: head(rows).double().cpu() for name, rows in features.items()}
    labels, scaling = data["test"].labels.cpu(), data["scaling"].labels.cpu()
    temperature = fit_temperature(logits["scaling"], scaling)
    scaled = logits["test"] / temperature
    return {
        "train_accuracy": accuracy(logits["train"], data["train"].labels.cpu()),
        "train_loss": nll(logits["train"], data["train"].labels.cpu()),
        "test_accuracy": accuracy(logits["test"], labels),
        "test_loss": nll(logits["test"], labels),
        "ece": calibration_error(logits["test"], labels),
        "temperature": temperature,
        "test_loss_scaled": nll(scaled, labels),
        "ece_scaled": calibration_error(scaled, labels),
    }


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose largest logit is that of their class."""
    return float((logits.argmax(1) == labels).double().mean())


def study(model: nn.Sequential, config: Config, data: dict[str, Split], seed: int) -> dict[str, dict[str, Any]]:
    """Return the figures of the trained model (``baseline``) and of a shifted copy for each arm."""
    features = features_of(model, data)
    found = {"baseline": {"squared_norm_ratio": 1.0, **measure(model[-1], features, data)}}
    for name, arm in config.arms.items():
        copy = deepcopy(model)
        report = shift(copy, arm, data, seed)
        print(f"seed {seed}, {name}: {report}", flush=True)
        keys = "squared_norm_ratio", "rank", "deviation", "step", "status", "heldout_before", "heldout_after"
        found[name] = {key: getattr(report, key) for key in keys} | measure(copy[-1], features, data)
    return found


COLUMNS = {
    "squared_norm_ratio": ("squared norm left", ".3f"),
    "train_loss": ("training loss", ".4f"),
    "test_accuracy": ("test accuracy", ".4f"),
    "test_loss": ("test loss", ".4f"),
    "ece": ("ECE", ".4f"),
    "test_loss_scaled": ("test loss, scaled", ".4f"),
    "ece_scaled": ("ECE, scaled", ".4f"),
}


def table(records: list[dict[str, Any]]) -> str:
    """Return the figures over the seeds as Markdown: values of the baseline, below it changes to it seed by seed."""
    lines = [["", *(title for title, _ in COLUMNS.values())]]
    for name in records[0]["arms"]:
        line = [name]
        for key, (_, form) in COLUMNS.items():
            changes = name != "baseline" and key != "squared_norm_ratio"
            values = [r["arms"][name][key] - changes * r["arms"]["baseline"][key] for r in records]
            line.append(mean_std(values, "+" * changes + form))
        lines.append(line)
    return markdown_table(lines)


def run_study(folder: Path, config: Config, seeds: int, models: Path, out: Path) -> list[dict[str, Any]]:
    """Run the seeds that have no record yet, each to its own file, and write the table of all.

    Raises:
        ValueError: If a record was made with other settings.
    """
    files = [out / "records" / f"seed-{seed}.json" for seed in range(seeds)]
    settings = json.loads(json.dumps(asdict(config)))
    data: dict[str, Split] = {}
    for seed, file in enumerate(files):
        if file.exists():
            if read_json(file)["config"] != settings:
                raise ValueError(f"{file}: made with other settings; remove it, or name another folder by --out")
            continue
        data = data or read_data(folder, config)
        classes = int(data["train"].labels.max()) + 1
        model, curve = train(config, data["train"], classes, seed, models / f"seed-{seed}.pt")
        made = {"seed": seed, "config": settings, "versions": versions(), "commit": git_commit(), "curve": curve}
        write_text(file, as_json(made | {"arms": study(model, config, data, seed)}))
    records = [read_json(file) for file in files]
    page = out / "cifar.md"
    old = page.read_text(encoding="utf-8") if page.exists() else f"# CIFAR-100\n\n{MARKERS[0]}\n{MARKERS[1]}\n"
    above, below = old.split(MARKERS[0], 1)[0], old.split(MARKERS[1], 1)[1]
    write_text(page, f"{above}{MARKERS[0]}\n\n{table(records)}\n{MARKERS[1]}{below}")
    return records


def main() -> None:
    """Run the study with the options given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/<class>/*.png and test/<class>")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, counted from 0")
    parser.add_argument("--models", type=Path, default=Path("runs/cifar"), help="where trained models are kept")
    parser.add_argument("--out", type=Path, default=HERE, help="where records and cifar.md go")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the records were made so; another number changes the last digits
    print(table(run_study(args.data, Config(), args.seeds, args.models, args.out)))


if __name__ == "__main__":
    main()
