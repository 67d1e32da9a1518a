#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""What flatness brings beside mAP: the models of an experiment under conditions that they were not trained for.

It takes every arm and seed of an experiment of detectors, with the settings of its record, where it was trained:

    python studies/robustness/robustness.py bccd --runs runs/experiments --split test --arms baseline,principal,rows,end

mAP50-95 by Ultralytics' own validation

- of the model as it is ("clean");
- with the head's final layers in 8, 6 and 4 bits: weights per output channel, symmetric, their inputs per tensor, by
  the least and the greatest value in some training images (Krishnamoorthi, arXiv:1806.08342, 2018). Simulated in
  float32, as in quantization-aware training: biases and all other layers stay as they are;
- with Gaussian noise on the weights, a share of each tensor's root mean square; biases and BatchNorm stay (as in the
  filter-wise directions of Li et al., NeurIPS 2018). The mean loss of mAP over draws is a direct measure of flatness;
- of corrupted images: Gaussian noise, Gaussian blur, contrast and brightness as ImageNet-C defines them, at the size
  that the model sees (Hendrycks and Dietterich, ICLR 2019).

And the expected calibration error of detections: confidence against precision at IoU 0.5, by the devkit's rules
(Küppers et al., CVPR workshops 2020; confidence only), as they come and after temperature scaling of the class logits
with one temperature that minimises the loss on val. NMS goes by the order of confidences, which it does not change.

It writes robustness-<experiment>.md, .csv and .json to this folder: mean ± std over seeds, and the differences to the
baseline of the same seed with 95 % interval and exact sign-flip p. All draws take --seed, the same for every model. The
committed records are of models that an earlier version shifted, in which ``balanced`` counted a row in every class by
its probability; now a row belongs to its most probable class.
"""

from __future__ import annotations

import argparse
import math
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils.torch_utils import select_device

from yolo_sos.builtin import resolve_data
from yolo_sos.core import Engine, write_weight
from yolo_sos.evaluate import Detections, GroundTruth, voc_ap
from yolo_sos.evaluate.detections import detect, read_data_set
from yolo_sos.experiment.judge import quiet
from yolo_sos.experiment.record import Record
from yolo_sos.experiment.statistics import least_p
from yolo_sos.experiment.table import BASELINE, ResultTable, Row
from yolo_sos.files import as_csv, as_json, finite, write_text
from yolo_sos.markdown import markdown_table
from yolo_sos.versions import git_commit, versions
from yolo_sos.yolo.checkpoint import Checkpoint
from yolo_sos.yolo.checkpoint_data import CheckpointData
from yolo_sos.yolo.heads import YoloTask, final_layers

METRIC = "metrics/mAP50-95(B)"
BITS = (8, 6, 4)
SIGMAS = (0.02, 0.05)  # of a weight tensor's root mean square
SEVERITIES = (1, 3)
LEAST = 0.05  # confidence above which a detection is counted for calibration, before and after scaling
BINS = 15
AGREEMENT = 0.005  # of the clean mAP with the record's; devices and versions round differently
CALIBRATION = ("ECE", "ECE, T scaled", "temperature")

Ranges = Mapping[str, tuple[float, float]]
Corruption = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Settings:
    """What the figures depend on beside the models."""

    split: str = "test"
    draws: int = 3  # of the weights' noise
    images: int = 32  # training images that the ranges of the final layers' inputs come from
    seed: int = 0
    device: str = ""


# Weights and activations ----------------------------------------------------------------------------------------------
def input_ranges(model: nn.Module, batches: Iterable[Any]) -> dict[str, tuple[float, float]]:
    """Return the least and the greatest input of every final layer over some batches, zero included."""
    task = YoloTask(model)
    ranges = {layer.name: (0.0, 0.0) for layer in task.layers}

    def add(batch: Any, output: Any, inputs: dict[str, Tensor]) -> None:
        for name, x in inputs.items():
            low, high = ranges[name]
            ranges[name] = min(low, float(x.min())), max(high, float(x.max()))

    Engine(model, task.layers, task).run(batches, add)
    return ranges


def quantize(model: nn.Module, ranges: Ranges, bits: int) -> None:
    """Round weights and inputs of the final layers to ``bits`` bits, in float; the model keeps doing so."""
    most = 2 ** (bits - 1) - 1
    for layer in final_layers(model):
        weight = layer.module.weight.detach().flatten(1)
        scale = (weight.abs().amax(1) / most).clamp_min(torch.finfo(weight.dtype).tiny)
        zero = torch.zeros(len(scale), dtype=torch.int32, device=weight.device)
        write_weight(layer.module, torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -most, most))
        layer.module.register_forward_pre_hook(partial(_round_input, ranges[layer.name], 2**bits - 1))


def _round_input(bounds: tuple[float, float], most: int, _: nn.Module, args: tuple[Tensor]) -> Tensor:
    low, high = bounds
    scale = max((high - low) / most, torch.finfo(torch.float32).tiny)
    return torch.fake_quantize_per_tensor_affine(args[0], scale, round(-low / scale), 0, most)


def add_noise(model: nn.Module, sigma: float, seed: int) -> None:
    """Add Gaussian noise to every weight tensor, of ``sigma`` times its root mean square."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ".dfl." not in name:  # Ultralytics' DFL is a constant, not a weight
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter += sigma * parameter.square().mean().sqrt() * noise


# Images ---------------------------------------------------------------------------------------------------------------
def gaussian_noise(image: np.ndarray, rng: np.random.Generator, severity: int) -> np.ndarray:
    """Add noise to each pixel and channel."""
    return image + rng.normal(scale=(0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1], size=image.shape)


def gaussian_blur(image: np.ndarray, rng: np.random.Generator, severity: int) -> np.ndarray:
    """Blur, the border being repeated."""
    return cv2.GaussianBlur(image, (0, 0), (1, 2, 3, 4, 6)[severity - 1], borderType=cv2.BORDER_REPLICATE)


def contrast(image: np.ndarray, rng: np.random.Generator, severity: int) -> np.ndarray:
    """Draw all pixels towards the mean colour."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    return (image - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] + mean


def brightness(image: np.ndarray, rng: np.random.Generator, severity: int) -> np.ndarray:
    """Raise the value of HSV."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 2] = np.minimum(hsv[..., 2] + (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1], 1)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


CORRUPTIONS = (gaussian_noise, gaussian_blur, contrast, brightness)


def corrupted(image: np.ndarray, rng: np.random.Generator, corruption: Corruption) -> np.ndarray:
    """Return a corrupted image ``(H, W, 3)``, RGB, uint8 as the image is; corruptions take float32, 0 to 1."""
    return np.rint(corruption(image.astype(np.float32) / 255, rng).clip(0, 1) * 255).astype(np.uint8)


class Validator(DetectionValidator):
    """Ultralytics' validator, with corrupted images if there is a ``corruption``. Its grey borders stay as they are."""

    corruption: Corruption | None = None
    seed = 0

    def preprocess(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Corrupt each image by itself, seeded by its name: whatever batch it is in."""
        if self.corruption:
            for i, image in enumerate(batch["img"]):  # (3, H, W) uint8
                (height, width), (ratios, (left, top)) = batch["ori_shape"][i], batch["ratio_pad"][i]
                rows = slice(top, top + round(height * ratios[0]))
                columns = slice(left, left + round(width * ratios[1]))
                rng = np.random.default_rng([self.seed, zlib.crc32(Path(batch["im_file"][i]).name.encode())])
                content = image[:, rows, columns].permute(1, 2, 0).contiguous().numpy()
                new = torch.from_numpy(corrupted(content, rng, self.corruption))
                image[:, rows, columns] = new.permute(2, 0, 1)
        return super().preprocess(batch)


# Calibration ----------------------------------------------------------------------------------------------------------
def hits(truth: GroundTruth, found: Detections) -> tuple[np.ndarray, np.ndarray]:
    """Return the confidences above `LEAST`, and which of these detections are true; difficult objects are neutral.

    Returns:
        confidence (np.ndarray): (n,) float64.
        true (np.ndarray): (n,) float64, 1 for a true positive at IoU 0.5 by the devkit's rules, 0 for a false one.
    """
    confidences, true = [np.empty(0)], [np.empty(0)]
    for curve in voc_ap(truth, found).curves:
        count = np.rint(curve.precision * np.arange(1, len(curve.score) + 1))
        confidences.append(curve.score)
        true.append(np.diff(count, prepend=0))
    confidence = np.concatenate(confidences)
    kept = confidence > LEAST
    return confidence[kept], np.concatenate(true)[kept]


def calibration_error(confidence: np.ndarray, true: np.ndarray) -> float:
    """Return ``Σ |D_m|/|D| · |precision(m) − confidence(m)|`` over bins of equal width; nan without detections."""
    if not len(confidence):
        return math.nan
    bins = np.clip(np.ceil(confidence * BINS).astype(int), 1, BINS) - 1  # bin m holds ((m−1)/M, m/M]
    return float(np.abs(np.bincount(bins, confidence - true)).sum() / len(confidence))


def scaled(confidence: np.ndarray, temperature: float) -> np.ndarray:
    """Return ``σ(z / T)`` of confidences ``σ(z)``."""
    p = np.clip(confidence, 1e-12, 1 - 1e-7)  # float32 has no 1 − 1e-12
    return 1 / (1 + (1 / p - 1) ** (1 / temperature))


def fit_temperature(confidence: np.ndarray, true: np.ndarray) -> float:
    """Return the T, 0.01 to 100, of the least cross-entropy: the root of its derivative in 1/T, which is monotone.

    Source: Guo et al., On calibration of modern neural networks, ICML 2017. nan without detections.
    """
    if not len(confidence):
        return math.nan
    p = np.clip(confidence, 1e-12, 1 - 1e-7)
    logits = np.log(p / (1 - p))
    low, high = math.log(1e-2), math.log(1e2)
    for _ in range(60):
        middle = (low + high) / 2  # log of T
        slope = np.sum(logits * (scaled(confidence, math.exp(middle)) - true))  # above 0 where 1/T is too large
        low, high = (middle, high) if slope > 0 else (low, middle)
    return math.exp((low + high) / 2)


# Measuring ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Condition:
    """Something that is done to a model or to its images. All draws of one condition share its name."""

    name: str
    alter: Callable[[nn.Module], None] | None = None
    corruption: Corruption | None = None


def conditions(ranges: Ranges, settings: Settings) -> list[Condition]:
    """Return all conditions for a model whose final layers have inputs of these ranges."""
    return [
        *(Condition(f"head, {bits} bits", partial(quantize, ranges=ranges, bits=bits)) for bits in BITS),
        *(
            Condition(f"weight noise {sigma:.0%}", partial(add_noise, sigma=sigma, seed=1000 * settings.seed + draw))
            for sigma in SIGMAS
            for draw in range(settings.draws)
        ),
        *(
            Condition(f"{kind.__name__.replace('_', ' ')} {severity}", None, partial(kind, severity=severity))
            for kind in CORRUPTIONS
            for severity in SEVERITIES
        ),
    ]


def score(model: nn.Module, args: dict[str, Any], condition: Condition, seed: int = 0) -> float:
    """Return the model's mAP50-95 under a condition. The model stays as it is."""
    if condition.alter:
        model = deepcopy(model)
        condition.alter(model)
    with quiet(), TemporaryDirectory() as folder:  # Ultralytics makes one for plots, which are not made
        validator = Validator(args=args, save_dir=Path(folder))
        validator.corruption, validator.seed = condition.corruption, seed
        return float(validator(model=model)[METRIC])


def measure(path: Path, config: Mapping[str, Any], settings: Settings) -> dict[str, list[float]]:
    """Return all figures of one model by name, one for each draw, the clean mAP first.

    Args:
        path (Path): The checkpoint.
        config (Mapping): What it was trained with: ``data``, ``imgsz`` and ``batch`` are used.
        settings (Settings): How to measure.
    """
    data, split = str(resolve_data(config["data"])), settings.split
    size = {"imgsz": config["imgsz"], "batch": config["batch"]}
    with quiet():
        found = {}
        for name in dict.fromkeys((split, "val")):
            truth = read_data_set(data, name).truth()
            run = detect(path, truth, data=data, split=name, device=settings.device, verbose=False, **size)
            found[name] = run.metrics[METRIC], hits(truth, run.found)
        checkpoint = Checkpoint(path)
        device = select_device(settings.device, verbose=False)
        model = checkpoint.model.to(device)
        opened = CheckpointData(checkpoint, data, device=device, splits=(split,), **size)
        images = opened.sample({"fit": min(settings.images, len(opened.dataset))}, settings.seed)
        ranges = input_ranges(model, images.batches("fit"))
    figures: dict[str, list[float]] = {"clean": [found[split][0]]}
    args = {**opened.args, "split": split, "rect": True}  # rect: as YOLO.val has it
    for condition in conditions(ranges, settings):
        figures.setdefault(condition.name, []).append(score(model, args, condition, settings.seed))
    confidence, true = found[split][1]
    temperature = fit_temperature(*found["val"][1])
    errors = (calibration_error(confidence, true), calibration_error(scaled(confidence, temperature), true))
    return figures | {name: [value] for name, value in zip(CALIBRATION, (*errors, temperature), strict=True)}


# Reporting ------------------------------------------------------------------------------------------------------------
Figures = dict[str, dict[int, dict[str, list[float]]]]  # arm → seed → name → a value for each draw


def rows(figures: Figures, split: str) -> list[Row]:
    """Return a row per figure and arm, and for each mAP its change from the clean one."""
    means = {
        arm: {seed: {k: float(np.mean(v)) for k, v in of_seed.items()} for seed, of_seed in of_arm.items()}
        for arm, of_arm in figures.items()
    }
    for of_seed in (of_seed for of_arm in means.values() for of_seed in of_arm.values()):
        of_seed |= {
            f"{k}, change": v - of_seed["clean"] for k, v in of_seed.items() if k not in ("clean", *CALIBRATION)
        }
    names = next(iter(next(iter(means.values())).values()))
    found = []
    for name in names:
        for arm, of_arm in means.items():
            values = {seed: of_seed[name] for seed, of_seed in of_arm.items()}
            base = {seed: of_seed[name] for seed, of_seed in means[BASELINE].items()}
            differences = {s: v - base[s] for s, v in values.items() if s in base and arm != BASELINE}
            found.append(Row(split, name, arm, values, differences, math.nan))
    return found


def markdown(table: Sequence[Row]) -> str:
    """Return two tables: mAP50-95 by condition and arm, and the calibration."""
    by_name: dict[str, dict[str, Row]] = {}
    for row in table:
        by_name.setdefault(row.metric, {})[row.arm] = row
    maps = [name for name in by_name if name not in CALIBRATION and not name.endswith(", change")]
    compared = ("mean ± std", "Δ [95% CI]", "p")
    lines = [["condition", "arm", *compared, "Δ of the change from clean [95% CI]", "p"]]
    for name in maps:
        for arm, row in by_name[name].items():
            change = _compared(by_name[f"{name}, change"][arm]) if name != "clean" else ("", "")
            lines.append([name, arm, _mean(row), *_compared(row), *change])
    calibration = [["figure", "arm", *compared]]
    for name in CALIBRATION:
        calibration += [[name, arm, _mean(row), *_compared(row)] for arm, row in by_name[name].items()]
    return (
        f"## mAP50-95\n\n{markdown_table(lines, texts=2)}\n"
        f"## Calibration of detections\n\n{markdown_table(calibration, texts=2)}".rstrip()
    )


def _mean(row: Row) -> str:
    std = "" if math.isnan(row.figures["std"]) else f" ± {row.figures['std']:.4f}"
    return f"{row.figures['mean']:.4f}{std}"


def _compared(row: Row) -> tuple[str, str]:
    f = row.figures
    if not row.differences:
        return "", ""
    interval = "" if math.isnan(f["low"]) else f" [{f['low']:+.4f}, {f['high']:+.4f}]"
    return f"{f['diff']:+.4f}{interval}", f"{f['p']:.3g} ({least_p(len(row.differences)):.3g})"


def write(folder: Path, experiment: str, command: str, settings: Settings, figures: Figures, seconds: float) -> str:
    """Write the three files, and return the Markdown."""
    table = rows(figures, settings.split)
    stem = folder / f"robustness-{experiment.replace('/', '-')}"
    models = sum(map(len, figures.values()))
    note = " The temperatures were fitted on the split that is judged here." if settings.split == "val" else ""
    text = "\n\n".join(
        (
            f"# Robustness: {experiment}, {settings.split}",
            f"    {command}",
            f"{models} models, {seconds / models:.0f} s each. "
            + ", ".join(f"{name} {version}" for name, version in versions().items())
            + f", commit {git_commit() or 'unknown'}.",
            f"±: standard deviation over seeds. Δ: mean difference to the {BASELINE} of the same seed with its "
            "t-interval. p: exact two-sided sign-flip test over the pairs; in parentheses the least that so many pairs "
            "can give; not corrected for the number of comparisons. The change from clean tells robustness from a "
            f"model that is better anyway. Weight noise: mean of {settings.draws} draws. Ranges of the final layers' "
            f"inputs: {settings.images} training images. Numbers behind corruptions: severity of ImageNet-C. ECE: "
            f"detections of a confidence above {LEAST}, {BINS} bins.{note} Seed {settings.seed}.",
            markdown(table),
        )
    )
    lines = [{k: v for k, v in row.figures.items() if k != "p_holm"} for row in table]
    record = {
        **{"experiment": experiment, "command": command, "metric": METRIC, "settings": asdict(settings)},
        **{"bits": BITS, "sigmas": SIGMAS, "severities": SEVERITIES, "least": LEAST, "bins": BINS},
        **{"versions": versions(), "git_commit": git_commit(), "seconds": round(seconds, 1), "figures": figures},
        "rows": [{**line, "differences": row.differences} for line, row in zip(lines, table, strict=True)],
    }
    write_text(stem.with_name(f"{stem.name}.md"), text + "\n")
    write_text(stem.with_name(f"{stem.name}.csv"), as_csv(finite(lines)))
    write_text(stem.with_name(f"{stem.name}.json"), as_json(record))
    return text


def find_models(
    experiment: str, runs: Path, results: Path, arms: Sequence[str]
) -> dict[str, list[tuple[Record, Path]]]:
    """Return record and checkpoint of every model by arm, the baseline's first.

    Raises:
        FileNotFoundError: If records or a checkpoint are missing.
        ValueError: If records do not go together, an arm has none, or the models are no detectors.
    """
    recorded = ResultTable(experiment, results).arms
    if lacking := [arm for arm in arms if arm not in recorded]:
        raise ValueError(
            f"--arms: there are no records of '{lacking[0]}' in {results / experiment}: {', '.join(recorded)}"
        )
    models = {}
    for arm in dict.fromkeys((BASELINE, *arms)):
        models[arm] = [(r, runs / experiment / f"{arm}-{r.seed}" / "weights" / "best.pt") for r in recorded[arm]]
        for record, path in models[arm]:
            if record.config.get("task") != "detect":
                raise ValueError(f"{record.path}: 'task' is {record.config.get('task')}; the study is one of detectors")
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such checkpoint; --runs is the experiment's 'project'")
    return models


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="its name, such as bccd or bccd/screen")
    parser.add_argument(
        "--arms", default="baseline,principal,rows,end", help="the arms to compare; the baseline always"
    )
    parser.add_argument("--split", default=Settings.split, choices=("val", "test"), help="what to judge on")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="where the trainings are")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the records are")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the files go")
    parser.add_argument("--draws", type=int, default=Settings.draws, help="draws of the weights' noise")
    parser.add_argument("--images", type=int, default=Settings.images, help="training images for the inputs' ranges")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of noise, corruptions and choice of images")
    parser.add_argument("--device", default=Settings.device, help="as Ultralytics takes it")
    args = parser.parse_args(argv)
    for name in "draws", "images":
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1")
    settings = Settings(args.split, args.draws, args.images, args.seed, args.device)
    models = find_models(args.experiment, args.runs, args.results, args.arms.split(","))
    given = [f"--arms {','.join(models)} --split {args.split}"]
    given += [f"--{k} {v}" for k, v in asdict(settings).items() if k != "split" and v != getattr(Settings, k)]
    command = f"python studies/robustness/robustness.py {args.experiment} {' '.join(given)}"

    figures: Figures = {arm: {} for arm in models}
    begun = time.perf_counter()
    for arm, of_arm in models.items():
        for record, path in of_arm:
            start = time.perf_counter()
            figures[arm][record.seed] = measure(path, record.config, settings)
            clean = figures[arm][record.seed]["clean"][0]
            if abs(clean - record.metrics.get(args.split, {}).get(METRIC, clean)) > AGREEMENT:
                told = record.metrics[args.split][METRIC]
                raise ValueError(
                    f"{path}: mAP50-95 is {clean:.4f}, but {record.path} says {told:.4f}; is it that run's?"
                )
            print(f"{arm}-{record.seed}: clean {clean:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    print(write(args.out, args.experiment, command, settings, figures, time.perf_counter() - begun))


if __name__ == "__main__":
    main()
