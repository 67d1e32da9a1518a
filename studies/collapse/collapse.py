# yolo-sos, AGPL-3.0
"""What is left of a classifier after SOS, before and after neural collapse; and what SOS does while it trains.

A ResNet of 284 000 parameters on 5 000 images of Fashion-MNIST, without augmentation, trained past zero training error
("collapsed"), and seven epochs with the same schedule ("early"). Each is shifted post hoc by drawn rows and by the
spectral methods, at n = C, 3C and 10C. Test accuracy, test loss and expected calibration error stand beside those of
the unshifted model, all of them with and without temperature scaling: a gain in calibration that one scalar gives as
well is not the shift's. Then the same seeds are trained with SOS from the middle of the epochs on.

    python studies/collapse/collapse.py --data /usr/share/datasets/fashion-mnist   # Debian: dataset-fashion-mnist

It takes half an hour on a free CPU core, and writes studies/collapse/collapse.{md,csv,json,png}; text of collapse.md
outside the two marker lines stays. The committed records were made before rows were drawn by priority: the rows of a
class, all of equal weight, have the same distribution with other random numbers. ``norm_ratio`` is of squared norms.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from yolo_sos import __version__
from yolo_sos.analyze.collapse import Collapse
from yolo_sos.core import Engine, FinalLayer, Method, ModelTask, Moments, NoMapError, fit_softmax, shift_model
from yolo_sos.data.fashion import load
from yolo_sos.data.image_folder import draw_split
from yolo_sos.evaluate.calibration import classifier_reliability
from yolo_sos.files import atomic_path, write_text
from yolo_sos.markdown import markdown_table, mean_std

C = 10
MEAN, STD = 0.2860, 0.3530  # of Fashion-MNIST's training pixels, 0 to 1
MARKERS = "<!-- tables: written by studies/collapse/collapse.py -->", "<!-- end of tables -->"


@dataclass(frozen=True)
class Arm:
    """How a model is shifted while it trains."""

    method: Method
    guard: float | None

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.method.name} {self.method.rank}" + (", no guard" if self.guard is None else "")


ARMS = (
    *(Arm(Method(name, rank=3 * C), 0.01) for name in ("principal", "expected", "rows")),
    Arm(Method("rows", 3 * C), None),
)


@dataclass(frozen=True)
class Config:
    """Everything that decides on the figures."""

    data: str = "/usr/share/datasets/fashion-mnist"
    train: int = 5000
    val: int = 1000  # training images that are not trained on; temperatures are fitted on them
    test: int = 10000
    data_seed: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    widths: tuple[int, ...] = (16, 64, 128)
    epochs: int = 50
    early_epochs: int = 7
    batch: int = 64
    lr: float = 0.1
    lr_steps: tuple[float, ...] = (0.5, 0.75)  # the learning rate is divided by 10 at these fractions of the epochs
    momentum: float = 0.9
    weight_decay: float = 1e-4
    rows: tuple[int, ...] = (C, 3 * C, 10 * C)
    draws: int = 10
    fit_images: int = 256  # of the shifts while training
    heldout_images: int = 128
    sos_start: float = 0.5
    threads: int = 1
    arms: tuple[Arm, ...] = ARMS


@dataclass(frozen=True)
class Data:
    """Images ``(n, 1, H, W)`` and labels ``(n,)`` by split: train, val, test."""

    images: dict[str, Tensor]
    labels: dict[str, Tensor]


def read_data(config: Config) -> Data:
    """Draw the three disjoint sets; train and val come from the training images."""
    images, labels = load(config.data, "train")
    counts = {"train": config.train, "val": config.val}
    index = draw_split(labels, counts, np.random.default_rng(config.data_seed))
    parts = {name: (images[i], labels[i]) for name, i in index.items()}
    parts["test"] = tuple(part[: config.test] for part in load(config.data, "test"))
    return Data(
        {
            k: ((torch.tensor(x)[:, None] / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last)
            for k, (x, _) in parts.items()
        },
        {k: torch.tensor(y, dtype=torch.long) for k, (_, y) in parts.items()},
    )


def resnet(widths: tuple[int, ...]) -> nn.Sequential:
    """Return a ResNet with one block a stage, for small grey images; its final layer is its last module."""

    def stage(width: int, out: int, stride: int) -> BasicBlock:
        skip = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        return BasicBlock(width, out, stride, skip if stride > 1 or width != out else None)

    stem = (nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
    ins = (widths[0], *widths[:-1])
    stages = [stage(i, o, 1 + (k > 0)) for k, (i, o) in enumerate(zip(ins, widths, strict=True))]
    model = nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], C))
    return model.to(memory_format=torch.channels_last)


# Training -------------------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """A model on its way, with all that a twin needs to go on from here."""

    model: nn.Sequential
    optimizer: torch.optim.Optimizer
    epochs: int
    epoch: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)  # per epoch: loss and error while training, shift


def start(config: Config, seed: int, epochs: int) -> Run:
    """Return an untrained model."""
    torch.manual_seed(seed)
    model = resnet(config.widths)
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=True
    )
    return Run(model, optimizer, epochs)


def train(run: Run, until: int, config: Config, data: Data, seed: int, arm: Arm | None = None) -> Run:
    """Train on to the end of epoch ``until``, with a guarded shift at the end of each epoch if there is an ``arm``."""
    images, labels = data.images["train"], data.labels["train"]
    while run.epoch < until:
        begun = time.perf_counter()
        passed = sum(run.epoch >= step * run.epochs for step in config.lr_steps)
        for group in run.optimizer.param_groups:
            group["lr"] = config.lr / 10**passed
        # One generator per epoch, so that twins see the same batches.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 * seed + run.epoch))
        run.model.train()
        loss_sum, wrong = 0.0, 0
        for index in order.split(config.batch):
            output = run.model(images[index])
            loss = nn.functional.cross_entropy(output, labels[index])
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
            loss_sum += len(index) * loss.item()
            wrong += int((output.argmax(1) != labels[index]).sum())
        run.epoch += 1
        line = {"epoch": run.epoch, "loss": loss_sum / len(labels), "error": wrong / len(labels)}
        if arm is not None:
            line.update(shift_once(run, config, data, seed, arm))
        run.curve.append(line)
        print(
            f"seed {seed} {arm.name if arm else 'baseline':>17} epoch {run.epoch}/{run.epochs}: "
            + ", ".join(f"{k} {v:.4g}" for k, v in line.items() if k != "epoch")
            + f", {time.perf_counter() - begun:.1f} s",
            flush=True,
        )
    return run


def shift_once(run: Run, config: Config, data: Data, seed: int, arm: Arm) -> dict[str, float]:
    """Shift a model in training, as one does in a loop of one's own; both sets are training images."""
    number = 1000 * seed + run.epoch
    order = torch.randperm(config.train, generator=torch.Generator().manual_seed(500_000 + number))
    fit, heldout = order[: config.fit_images], order[config.fit_images :][: config.heldout_images]

    def batches(index: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(data.images["train"][i], data.labels["train"][i]) for i in index.split(config.batch)]

    report = shift_model(
        run.model, batches(fit), heldout=batches(heldout), method=arm.method, guard=arm.guard, seed=number
    )
    return {"t": report.step, "norm_ratio": report.squared_norm_ratio, "deviation": report.deviation}


# Measuring ------------------------------------------------------------------------------------------------------------
def features_of(model: nn.Sequential, data: Data) -> dict[str, Tensor]:
    """Return the final layer's inputs ``(n, d)``, float64, by split."""
    model.eval()
    with torch.no_grad():
        return {k: torch.cat([model[:-1](part) for part in x.split(500)]).double() for k, x in data.images.items()}


def nll(logits: Tensor, labels: Tensor) -> float:
    """Return the mean negative log-likelihood."""
    return float(nn.functional.cross_entropy(logits, labels))


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Return the expected calibration error with bins of equal width (Guo et al., ICML 2017)."""
    return classifier_reliability(logits.double().softmax(1).numpy(), labels.numpy()).ece


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the T that minimises the loss of ``logits / T``; 1 where the labels do not determine one."""
    try:
        return 1 / float(fit_softmax(logits, labels).scale[0])
    except NoMapError:
        return 1.0


def measure(weight: Tensor, bias: Tensor, old: Tensor, features: dict[str, Tensor], data: Data) -> dict[str, float]:
    """Return the figures of a final layer ``weight`` ``(C, d)`` in the place of ``old``."""
    logits = {k: a @ weight.T + bias for k, a in features.items()}
    temperature = fit_temperature(logits["val"], data.labels["val"])
    test, labels = logits["test"], data.labels["test"]
    a = features["train"]
    return {
        "norm_ratio": float(weight.square().sum() / old.square().sum()),
        "deviation": float((a @ (weight - old).T).norm() / (a @ old.T).norm()),
        "train_loss": nll(logits["train"], data.labels["train"]),
        "train_error": float((logits["train"].argmax(1) != data.labels["train"]).double().mean()),
        "test_accuracy": float((test.argmax(1) == labels).double().mean()),
        "test_loss": nll(test, labels),
        "ece": calibration_error(test, labels),
        "temperature": temperature,
        "test_loss_scaled": nll(test / temperature, labels),
        "ece_scaled": calibration_error(test / temperature, labels),
    }


def collapse(head: nn.Linear, features: Tensor, labels: Tensor) -> dict[str, float]:
    """Return how far the inputs of a head have collapsed: NC1, and the share of their second moment in C directions.

    All training images take part, so nothing but the training makes them uncertain. After collapse they are 0 and 1.
    """
    collapsed = Collapse(FinalLayer("head", head))
    collapsed.update(features, labels)
    energy = torch.linalg.eigvalsh(Moments(features.shape[1]).update(features).matrix).flip(0)
    return {"nc1": collapsed.measures()["nc1"].estimate, "top": float(energy[:C].sum() / energy.sum())}


def trials(config: Config, d: int, seed: int) -> list[tuple[Method, int]]:
    """Return the post hoc shifts: method and seed of the draw, which ends in the draw's number."""
    drawn = [
        (Method("rows", rank=n, weighting=weighting), 10_000 * seed + draw)
        for n in config.rows
        for weighting in ("balanced", "uniform")
        for draw in range(config.draws)
    ]
    return drawn + [(Method(name, rank=n), 0) for name in ("principal", "expected") for n in config.rows if n < d]


def posthoc(run: Run, config: Config, data: Data, seed: int, regime: str) -> list[dict[str, Any]]:
    """Return one line per shift of a trained model, the unshifted one first. The model stays as it is."""
    features, labels = features_of(run.model, data), data.labels["train"]
    head = copy.deepcopy(run.model[-1]).double()
    weight, bias = head.weight.detach(), head.bias.detach()
    key = {"regime": regime, "seed": seed}
    none = {"method": "none", "weighting": "", "n": 0, "draw": 0}
    measured = measure(weight, bias, weight, features, data) | collapse(head, features["train"], labels)
    lines = [{**key, **none, **measured}]
    chosen = trials(config, weight.shape[1], seed)
    engine = Engine(head, [FinalLayer("", head)], ModelTask(), chosen)
    engine.fit([(features["train"], labels)])
    for method, drawn in chosen:
        result = engine.solve(method, drawn).results[""]
        name = {"method": method.name, "weighting": method.weighting, "n": method.rank, "draw": drawn % 10_000}
        lines.append({**key, **name, **measure(result.weight, bias, weight, features, data)})
    return lines


def study(config: Config, data: Data, seed: int) -> dict[str, Any]:
    """Return all figures of one seed."""
    early = train(start(config, seed, config.early_epochs), config.early_epochs, config, data, seed)
    base = start(config, seed, config.epochs)
    first = max(1, math.ceil(config.sos_start * config.epochs))  # the epoch at whose end the first shift is due
    train(base, first - 1, config, data, seed)
    twins = [copy.deepcopy(base) for _ in config.arms]
    train(base, config.epochs, config, data, seed)
    lines = posthoc(early, config, data, seed, "early") + posthoc(base, config, data, seed, "collapsed")
    training = [trained(base, data, seed, "baseline")]
    for arm, twin in zip(config.arms, twins, strict=True):
        train(twin, config.epochs, config, data, seed, arm)
        training.append(trained(twin, data, seed, arm.name))
    curves = {"early": early.curve, "baseline": base.curve}
    curves |= {t["arm"]: twin.curve for t, twin in zip(training[1:], twins, strict=True)}
    return {"posthoc": lines, "training": training, "curves": {str(seed): curves}}


def trained(run: Run, data: Data, seed: int, arm: str) -> dict[str, Any]:
    """Return the figures of a model at the end of its training, and what its shifts did on the way."""
    head = run.model[-1]
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    features = features_of(run.model, data)
    steps = [line["t"] for line in run.curve if "t" in line]
    return {
        "arm": arm,
        "seed": seed,
        "norm2": float(weight.square().sum()),
        "mean_t": float(np.mean(steps)) if steps else None,
        "shifts_written": sum(t > 0 for t in steps),
        "shifts": len(steps),
        **measure(weight, bias, weight, features, data),
        **collapse(head, features["train"], data.labels["train"]),
    }


# Reporting ------------------------------------------------------------------------------------------------------------
Lines = list[dict[str, Any]]


def change(key: str) -> Callable[[Lines, dict[int, dict[str, Any]]], str]:
    """Return a column of paired differences to the unshifted model of the same seed."""
    return lambda group, before: mean_std([line[key] - before[line["seed"]][key] for line in group], ".4f")


def value(key: str, digits: int = 4) -> Callable[[Lines, dict[int, dict[str, Any]]], str]:
    """Return a column of values; a cell is empty where there is none."""

    def cell(group: Lines, before: dict[int, dict[str, Any]]) -> str:
        values = [line[key] for line in group]
        return "" if None in values else mean_std(values, f".{digits}f")

    return cell


def times(group: Lines, before: dict[int, dict[str, Any]]) -> str:
    """Return the training loss as a multiple of that of the unshifted model of the same seed."""
    return mean_std([line["train_loss"] / before[line["seed"]]["train_loss"] for line in group], ".2f")


def written(group: Lines, before: dict[int, dict[str, Any]]) -> str:
    """Return how many shifts the guard let through."""
    return f"{sum(line['shifts_written'] for line in group)} of {sum(line['shifts'] for line in group)}"


JUDGED = {
    "training loss": value("train_loss"),
    "training loss, × before": times,
    "test accuracy": value("test_accuracy"),
    "change": change("test_accuracy"),
    "test loss": value("test_loss"),
    "ECE": value("ece"),
    "test loss, T scaled": value("test_loss_scaled"),
    "change, T scaled": change("test_loss_scaled"),
    "ECE, T scaled": value("ece_scaled"),
}
POSTHOC = {"‖V*‖²/‖V‖²": value("norm_ratio", 3), "deviation": value("deviation", 3), **JUDGED}
TRAINING = {"‖V‖²": value("norm2", 2), "mean t": value("mean_t", 2), "shifts written": written, **JUDGED}


def table(lines: Lines, name: Callable[[dict[str, Any]], str], columns: dict[str, Any]) -> str:
    """Return a Markdown table with one row per name; the first is what the others are compared with."""
    groups: dict[str, Lines] = {}
    for line in lines:
        groups.setdefault(name(line), []).append(line)
    before = {line["seed"]: line for line in next(iter(groups.values()))}
    rows = [[n, *(f(group, before) for f in columns.values())] for n, group in groups.items()]
    return markdown_table([["", *columns], *rows]).rstrip()


def shift_name(line: dict[str, Any]) -> str:
    """Return what tables call a post hoc shift."""
    weighting = f", {line['weighting']}" if line["method"] == "rows" else ""
    return "unshifted" if line["method"] == "none" else f"{line['method']} {line['n']}{weighting}"


def tables(record: dict[str, Any]) -> str:
    """Return everything that the figures say, as Markdown."""
    lines, config = record["posthoc"], record["config"]
    seeds = len({line["seed"] for line in lines})
    out = []
    for regime, epochs in (("collapsed", config["epochs"]), ("early", config["early_epochs"])):
        base = [line for line in lines if line["regime"] == regime and line["method"] == "none"]
        out += [
            f"### Post hoc, {regime}: {epochs} epochs, {seeds} seeds\n",
            f"Unshifted: training error {mean_std([line['train_error'] for line in base], '.5f')}, "
            f"NC1 {mean_std([line['nc1'] for line in base], '.3f')}, second moment in {C} directions "
            f"{mean_std([line['top'] for line in base], '.4f')}, "
            f"temperature {mean_std([line['temperature'] for line in base], '.2f')}.\n",
            table([line for line in lines if line["regime"] == regime], shift_name, POSTHOC) + "\n",
        ]
    out += [
        f"### SOS during training, from {config['sos_start']:.0%} of {config['epochs']} epochs on\n",
        table(record["training"], lambda line: line["arm"], TRAINING) + "\n",
    ]
    return "\n".join(out)


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw what n rows keep, before and after collapse."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 4, figsize=(17, 4), tight_layout=True)
    keys = {"train_loss": "training loss", "test_accuracy": "test accuracy", "test_loss": "test loss", "ece": "ECE"}
    kinds = {"rows": "balanced", "principal": "balanced", "expected": "balanced"}
    for ax, (key, title) in zip(axes, keys.items(), strict=True):
        for regime, style in (("collapsed", "-"), ("early", "--")):
            lines = [line for line in record["posthoc"] if line["regime"] == regime]
            base = np.mean([line[key] for line in lines if line["method"] == "none"])
            ax.axhline(base, linestyle=style, color="gray", linewidth=1, label=f"unshifted, {regime}")
            for number, (method, weighting) in enumerate(kinds.items()):
                chosen = [x for x in lines if x["method"] == method and x["weighting"] == weighting]
                ns = sorted({x["n"] for x in chosen})
                values = [[x[key] for x in chosen if x["n"] == n] for n in ns]
                ax.errorbar(
                    ns,
                    [np.mean(v) for v in values],
                    [np.std(v) for v in values],
                    fmt=f"o{style}",
                    color=f"C{number}",
                    markersize=4,
                    capsize=2,
                    label=f"{method}, {regime}",
                )
        ax.set_xscale("log")
        ax.set_yscale("log" if key == "train_loss" else "linear")
        ax.set_title(title)
        ax.set_xlabel("n")
        ax.set_xticks(ns, [str(n) for n in ns], minor=False)
        ax.minorticks_off()
    axes[-1].legend(fontsize=7, handlelength=4)
    with atomic_path(path) as temporary:
        fig.savefig(temporary, dpi=120)
    plt.close(fig)


def write(record: dict[str, Any], folder: Path) -> None:
    """Write the record, its table and its picture; prose around the tables stays."""
    write_text(folder / "collapse.json", json.dumps(record, indent=1) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(record["posthoc"][0]), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(record["posthoc"])
    write_text(folder / "collapse.csv", text.getvalue())
    page = folder / "collapse.md"
    old = page.read_text(encoding="utf-8") if page.exists() else f"# Neural collapse\n\n{MARKERS[0]}\n{MARKERS[1]}\n"
    above, below = old.split(MARKERS[0], 1)[0], old.split(MARKERS[1], 1)[1]
    write_text(page, f"{above}{MARKERS[0]}\n\n{tables(record)}\n{MARKERS[1]}{below}")
    plot(record, folder / "collapse.png")


def run_study(config: Config, folder: Path) -> dict[str, Any]:
    """Run all seeds; the files are whole after each."""
    torch.set_num_threads(config.threads)
    data = read_data(config)
    versions = {"yolo_sos": __version__, "python": platform.python_version(), "numpy": np.__version__}
    versions |= {"torch": torch.__version__, "torchvision": torchvision.__version__, "machine": platform.machine()}
    record: dict[str, Any] = {"config": asdict(config), "versions": versions, "posthoc": [], "training": []}
    record |= {"curves": {}, "seconds": 0.0}
    begun = time.perf_counter()
    for seed in config.seeds:
        found = study(config, data, seed)
        record["posthoc"] += found["posthoc"]
        record["training"] += found["training"]
        record["curves"] |= found["curves"]
        record["seconds"] = round(time.perf_counter() - begun, 1)
        write(record, folder)
    return record


def main() -> None:
    """Run the study with the options given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", default=Config.data, help="folder with the IDX files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seeds", type=int, default=len(Config.seeds), help="number of seeds, counted from 0")
    parser.add_argument("--tables", action="store_true", help="only write tables and picture anew, from collapse.json")
    args = parser.parse_args()
    if args.tables:
        record = json.loads((args.out / "collapse.json").read_text(encoding="utf-8"))
        write(record, args.out)
    else:
        record = run_study(Config(data=args.data, seeds=tuple(range(args.seeds))), args.out)
    print(tables(record))


if __name__ == "__main__":
    main()
