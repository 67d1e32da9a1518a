#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""Beyond the norm of the outputs: shifts of a trained detector that keep its loss, or lower its curvature.

    python studies/beyond/beyond.py --weights runs/bccd/weights/best.pt --data bccd.yaml

writes studies/beyond/beyond-<data>.json and prints its tables. Three questions.

**Whose outputs matter, by the loss?** With ``h_ik`` the loss's sensitivity to output k of row i, output k has a second
moment of its own, ``G_k = Σᵢ h_ik aᵢᵀaᵢ``: squared slopes ``(∂L/∂z_ik)²`` (empirical Fisher) or the diagonal of ∂²L/∂z²
(Gauss-Newton, by probes). To second order a change ΔV costs ``½ Σ_k Δv_k G_k Δv_kᵀ``. All filters are set to the same
norms, those of ``principal``, and compared by held-out loss and val mAP; ``scaling`` does nothing but shrink V.

**What does a shift before the first epoch keep?** With ``--pretrained``: how much the leading subspaces of the
untrained head's inputs have in common with those of the trained one.

**Can a shift lower the curvature itself?** The Gauss-Newton trace of the layers before V goes as ``tr(V M Vᵀ)`` with
``M = Σᵢ wᵢ JᵢJᵢᵀ``, J the Jacobian of the inputs of V in the parameters before it. ``oblique`` keeps V on the span U of
the leading eigenvectors of the balanced second moment, as ``principal`` does, and chooses the rest to be the least in
M: ``V* = V U (Uᵀ M⁻¹ U)⁻¹ Uᵀ M⁻¹``. ``ridge-M`` weighs the two, ``V*_k = V_k G_k (G_k + μM)⁻¹``. The trace is then
measured, with the same probes on the same images for all.

The committed records were made when ``balanced`` counted a row in every class by its probability (now: in its most
probable class alone). ``norm_ratio`` in them, as in what this script writes, is a ratio of squared norms.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import TQDM

from yolo_sos.analyze.estimate import Estimate
from yolo_sos.analyze.hessian import Subject, differentiable, traces
from yolo_sos.core import (
    Engine,
    Method,
    as_float64,
    input_rows,
    layer_outputs,
    weight_matrix,
    write_weight,
)
from yolo_sos.files import write_text
from yolo_sos.markdown import markdown_table, mean_std
from yolo_sos.versions import versions
from yolo_sos.yolo.heads import YoloTask, head_of
from yolo_sos.yolo.job import ShiftJob, deviations, heldout_moments
from yolo_sos.yolo.score import headline

BALANCED = Method()  # its weighting is the one that shifts use by default
RANKS = (0.125, 0.25, 0.5, 0.75)  # of principal; its norms are those that all filters are set to
CURVED = (0.25, 0.5)  # those at which curvature is measured
PROBES = 8  # for the diagonal of ∂²L/∂z², exact in the class scores with one
SecondMoments = dict[str, Tensor]  # layer name → (out or 1, d, d): one second moment per output, or one for all
Weights = dict[str, Tensor]  # layer name → (out, d), float64


# What matters ---------------------------------------------------------------------------------------------------------
def sensitivities(
    task: YoloTask, output: Any, inputs: dict[str, Tensor], batch: Any, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return squared slopes and curvature of the loss in each layer's outputs: layer name → ``(n, out)``, ≥ 0."""
    outputs = {name: z.detach().requires_grad_() for name, z in layer_outputs(task.layers, {}, inputs).items()}
    size = task.size(batch)  # the loss is a mean over images: each image's own slopes are as many times larger
    batch, state = task.replay_state(batch, output)
    with torch.enable_grad():
        leaves = list(outputs.values())
        loss = size * task.loss(task.replay(state, outputs), batch)
        slopes = torch.autograd.grad(loss, leaves, create_graph=True)
        curvature = [torch.zeros_like(z) for z in leaves]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(PROBES):
            probes = [torch.randint(2, z.shape, generator=generator).to(z) * 2 - 1 for z in leaves]
            products = torch.autograd.grad(slopes, leaves, probes, retain_graph=True)
            curvature = [h + v * p / PROBES for h, v, p in zip(curvature, products, probes, strict=True)]
    pairs = list(zip(task.layers, slopes, curvature, strict=True))
    return (
        {layer.name: input_rows(layer.module, slope.detach().square()) for layer, slope, _ in pairs},
        {layer.name: input_rows(layer.module, h.clamp(min=0)) for layer, _, h in pairs},
    )


def balanced_moments(model: nn.Module, task: YoloTask, batches: Iterable[Any]) -> SecondMoments:
    """Return the second moments of the default shift."""
    engine = Engine(model, task.layers, task, [(BALANCED, 0)])
    engine.fit(batches)
    return {layer.name: engine.moments(layer, BALANCED).matrix[None] for layer in task.layers}


def loss_moments(job: ShiftJob, seed: int) -> dict[str, SecondMoments]:
    """Return second moments weighted by the loss's ``slope`` and by its ``curvature``, one for each output."""
    found: dict[str, SecondMoments] = {"slope": {}, "curvature": {}}
    seeds = itertools.count(seed)  # one per batch

    def add(batch: Any, output: Any, inputs: dict[str, Tensor]) -> None:
        sensitive = sensitivities(job.task, output, inputs, batch, next(seeds))
        for layer in job.layers:
            rows = input_rows(layer.module, inputs[layer.name])
            for of, h in zip(found.values(), sensitive, strict=True):
                some = h[layer.name].any(1)  # boxes are judged where there is an object
                a, w = as_float64(rows[some]), as_float64(h[layer.name][some])
                g = torch.stack([(a * column[:, None]).T @ a for column in w.T])  # (out, d, d)
                of[layer.name] = of.get(layer.name, 0) + g

    Engine(job.model, job.layers, job.task).run(job.images.batches("fit"), add)
    return found


# Filters --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues ``(out, d)``, descending, eigenvectors ``(out, d, d)`` in columns, and V in them ``(out, d)``."""

    values: Tensor
    vectors: Tensor
    parts: Tensor


def spectra(weights: Weights, moments: SecondMoments) -> dict[str, Spectrum]:
    """Return the spectrum of each output of each layer."""
    found = {}
    for name, v in weights.items():
        values, vectors = torch.linalg.eigh(moments[name].expand(len(v), -1, -1))
        values, vectors = values.flip(1).clamp(min=0), vectors.flip(2)
        found[name] = Spectrum(values, vectors, torch.einsum("kd,kde->ke", v, vectors))
    return found


def by_rank(values: Tensor, setting: float) -> Tensor:
    """Return f = 1 for ``setting · d`` eigenvalues of each output, and a part of the next one."""
    places = torch.arange(values.shape[1], dtype=values.dtype).expand_as(values)
    return (setting * values.shape[1] - places).clamp(0, 1)


def by_expectation(values: Tensor, setting: float) -> Tensor:
    """Return f = λ/(λ+μ) with Σf = ``setting · d`` for each output, as far as its eigenvalues allow it."""
    low = torch.full_like(values[:, :1], -60.0)
    high = torch.full_like(values[:, :1], 60.0)
    scaled = values / values.amax(1, keepdim=True).clamp(min=1e-300)
    for _ in range(80):
        middle = (low + high) / 2
        fewer = (scaled / (scaled + middle.exp())).sum(1, keepdim=True) < setting * values.shape[1]
        low, high = torch.where(fewer, low, middle), torch.where(fewer, middle, high)
    return scaled / (scaled + low.exp())


def by_layer_rank(values: Tensor, setting: float) -> Tensor:
    """Return f = 1 for ``setting · out · d`` eigenvalues, the largest of all outputs of a layer."""
    return by_rank(values.reshape(1, -1).sort(descending=True).values, setting)[
        0, values.flatten().argsort(descending=True).argsort()
    ].view_as(values)


def by_layer_expectation(values: Tensor, setting: float) -> Tensor:
    """Return f = λ/(λ+μ) with one μ for all outputs of a layer and Σf = ``setting · out · d``."""
    return by_expectation(values.reshape(1, -1), setting).view_as(values)


def by_threshold(values: Tensor, setting: float) -> Tensor:
    """Return f = 1 for eigenvalues above a threshold that all outputs and layers share: ``10^(40 − 80 · setting)``."""
    return (values > 10 ** (40 - 80 * setting)).to(values)


def by_ridge(values: Tensor, setting: float) -> Tensor:
    """Return f = λ/(λ+μ) with one μ for all outputs and layers: the least norm at a given second-order rise."""
    return values / (values + 10 ** (40 - 80 * setting))


def norm2(weights: Weights) -> float:
    """Return ``Σ‖V‖²``."""
    return sum(float(v.square().sum()) for v in weights.values())


def set_to(ratio: float, before: Weights, shifted: Callable[[float], Weights]) -> Weights:
    """Return ``shifted(s)`` at the s in [0, 1] where its squared norm, which grows, is ``ratio`` of what it was."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if norm2(shifted(middle)) < ratio * norm2(before) else (low, middle)
    return shifted(high)


def filtered(
    found: dict[str, Spectrum], spectral_filter: Callable[[Tensor, float], Tensor]
) -> Callable[[float], Weights]:
    """Return the function from a filter's setting to the weights."""
    return lambda setting: {
        name: torch.einsum("ke,kde->kd", s.parts * spectral_filter(s.values, setting), s.vectors)
        for name, s in found.items()
    }


FILTERS = {
    **{"rank": by_rank, "expected": by_expectation},  # each output by itself
    **{"layer-rank": by_layer_rank, "layer-expected": by_layer_expectation},  # the outputs of a layer together
    **{"threshold": by_threshold, "ridge": by_ridge},  # all layers together
}
TRIALS = (  # weighting and filter; a threshold for all layers needs moments in units of the loss
    *(("balanced", name) for name in ("rank", "expected")),
    *((weighting, name) for weighting in ("slope", "curvature") for name in FILTERS),
)


MEASURED = (  # of these the curvature too
    *(("balanced", "rank"), ("balanced", "expected"), ("curvature", "layer-rank"), ("curvature", "ridge")),
    *(("", "scaling"), ("uniform", "oblique"), ("curvature", "oblique"), ("curvature", "ridge-M")),
)


# Curvature ------------------------------------------------------------------------------------------------------------
def jacobian_moments(subject: Subject, batch: Any, seed: int) -> dict[str, dict[str, Tensor]]:
    """Return each layer's ``M = Σᵢ wᵢ JᵢJᵢᵀ`` ``(d, d)``, by ``uniform`` rows and by their ``curvature`` ``Σ_k h_ik``.

    ``Σᵢ √wᵢ sᵢ aᵢ`` with signs s drawn at random has the Jacobian g with ``E[g gᵀ] = M``: one backward pass per entry.
    """
    layers, task = subject.layers, subject.task
    found: dict[str, dict[str, Tensor]] = {"uniform": {}, "curvature": {}}
    generator = torch.Generator().manual_seed(seed)
    with differentiable(subject, "before") as parameters, torch.enable_grad():
        kept: dict[str, Tensor] = {}
        handles = [
            layer.module.register_forward_pre_hook(lambda _, args, name=layer.name: kept.update({name: args[0]}))
            for layer in layers
        ]
        try:
            output = task.run(subject.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        detached = {name: a.detach() for name, a in kept.items()}
        _, curvature = sensitivities(task, output, detached, batch, seed)
        for layer in TQDM(layers, desc="Jacobians"):
            a = input_rows(layer.module, kept[layer.name])
            for weighting in found:
                w = curvature[layer.name].sum(1).sqrt() if weighting == "curvature" else torch.ones(len(a))
                signs = torch.randint(2, (len(a),), generator=generator) * 2 - 1
                summed = (w * signs) @ a  # (d,)
                slopes = []
                for entry in summed:
                    g = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
                    slopes.append(torch.cat([x.flatten() for x in g if x is not None]))
                jacobian = torch.stack(slopes)
                if not jacobian.any():
                    raise ValueError(f"--images: no object on the level of {layer.name}, so there is no M; give more.")
                found[weighting][layer.name] = (jacobian @ jacobian.T).double()
    return found


def oblique(weights: Weights, moments: SecondMoments, metric: dict[str, Tensor], rank: float) -> Weights:
    """Return V as it was on the leading eigenvectors U, and the least in M of all that agree with it there."""
    found = {}
    for name, v in weights.items():
        d = v.shape[1]
        u = torch.linalg.eigh(moments[name][0]).eigenvectors.flip(1)[:, : max(1, round(rank * d))]
        m = metric[name] + 1e-6 * metric[name].trace() / d * torch.eye(d, dtype=v.dtype)
        across = torch.linalg.solve(m, u)  # M⁻¹U
        found[name] = v @ u @ torch.linalg.solve(u.T @ across, across.T)
    return found


def ridge_m(weights: Weights, moments: SecondMoments, metric: dict[str, Tensor]) -> Callable[[float], Weights]:
    """Return the function from s to ``V_k G_k (G_k + μM)⁻¹``, μ = ``10^(40 − 80s)``."""

    def shifted(setting: float) -> Weights:
        mu = 10 ** (40 - 80 * setting)
        return {
            name: torch.linalg.solve(moments[name] + mu * metric[name], (moments[name] @ v[:, :, None]))[:, :, 0]
            for name, v in weights.items()
        }

    return shifted


def size_in(weights: Weights, metric: dict[str, Tensor]) -> float:
    """Return ``Σ tr(V M Vᵀ)``."""
    return sum(float((v @ metric[name] * v).sum()) for name, v in weights.items())


def subject_of(name: str, job: ShiftJob, weights: Weights) -> Subject:
    """Return a copy of the model with other weights."""
    model = deepcopy(job.model)
    head_of(model).shape = None  # a validation leaves anchor points that cannot take part in a graph
    task = YoloTask(model)
    for layer in task.layers:
        if layer.name in weights:
            write_weight(layer.module, weights[layer.name].float())
    return Subject(name, model, task, task.layers)


def one_batch(job: ShiftJob, which: str, images: int) -> Any:
    """Return the first images of ``fit`` or ``heldout`` as one batch."""
    return next(job.images.batches(which, images, images))


# Before the first epoch -----------------------------------------------------------------------------------------------
def start(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return what a shift before the first epoch keeps of an untrained head on the backbone of ``--pretrained``.

    ``overlap`` of two leading subspaces of half of the dimensions is ``tr(P Q) / r``: 1 for the same, ½ by chance.
    """
    job = ShiftJob(args.weights, args.data, images=32, imgsz=args.imgsz, batch=args.batch, seed=seed, val=False)
    torch.manual_seed(seed)
    model = DetectionModel(job.model.yaml, nc=len(job.model.names), verbose=False)
    model.load(YOLO(args.pretrained).model, verbose=False)
    model.args, model.names = job.model.args, job.model.names
    task, batches = YoloTask(model), list(job.images.batches("fit"))
    widths = [[weight_matrix(layer.module).shape for layer in layers] for layers in (task.layers, job.layers)]
    if widths[0] != widths[1]:
        raise ValueError(f"--pretrained {args.pretrained} gives another head than that of {args.weights}.")
    trained = balanced_moments(job.model, job.task, batches)
    untrained = balanced_moments(model, task, batches)
    before = {layer.name: as_float64(weight_matrix(layer.module)) for layer in task.layers}
    shifted = filtered(spectra(before, untrained), by_rank)(0.5)
    found = {"norm_ratio": norm2(shifted) / norm2(before), "untrained_trained": overlap(untrained, trained)}
    for module in model.modules():  # as an epoch of training would leave the statistics, with no step taken
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over batches
            module.train()
    with torch.no_grad():
        for batch in batches:
            model(batch["img"])
    measured = balanced_moments(model, task, batches)
    return {
        **{"seed": seed, "images": len(job.images.sets["fit"]), **found},
        **{"untrained_statistics": overlap(untrained, measured), "statistics_trained": overlap(measured, trained)},
    }


def overlap(a: SecondMoments, b: SecondMoments) -> dict[str, float]:
    """Return how much the leading halves of two spectra have in common, by layer."""
    found = {}
    for name in a:
        u, v = (torch.linalg.eigh(x[name][0]).eigenvectors.flip(1)[:, : x[name].shape[-1] // 2] for x in (a, b))
        found[name] = float((u.T @ v).square().sum()) / u.shape[1]
    return found


# The study ------------------------------------------------------------------------------------------------------------
def study(args: argparse.Namespace, seed: int, curved: bool) -> dict[str, Any]:
    """Return the records of one choice of images; with the second question if ``curved``."""
    job = ShiftJob(args.weights, args.data, images=args.fit or "all", imgsz=args.imgsz, batch=args.batch, seed=seed)
    heldout = Engine(job.model, job.layers, job.task).hold_out(job.images.batches("heldout"))
    before = {layer.name: as_float64(weight_matrix(layer.module)) for layer in job.layers}
    balanced = balanced_moments(job.model, job.task, job.images.batches("fit"))
    found = {"balanced": balanced, **loss_moments(job, seed)}
    principal = filtered(spectra(before, found["balanced"]), by_rank)
    ratios = {rank: norm2(principal(rank)) / norm2(before) for rank in RANKS}
    points: dict[tuple[str, str, float], Weights] = {}
    for weighting, name in TRIALS:
        shifted = filtered(spectra(before, found[weighting]), FILTERS[name])
        points |= {(weighting, name, rank): set_to(ratio, before, shifted) for rank, ratio in ratios.items()}
    for rank, ratio in ratios.items():
        points["", "scaling", rank] = {name: v * ratio**0.5 for name, v in before.items()}

    metrics: dict[str, dict[str, Tensor]] = {}
    if curved:
        metrics = jacobian_moments(subject_of("", job, {}), one_batch(job, "fit", args.images), seed)
        for rank in CURVED:
            for weighting, metric in metrics.items():
                points[weighting, "oblique", rank] = oblique(before, found["balanced"], metric, rank)
            metric = metrics["curvature"]
            aim = size_in(principal(rank), metric) / size_in(before, metric)
            shifted = ridge_m(before, found["curvature"], metric)
            points["curvature", "ridge-M", rank] = lowered(before, metric, aim, shifted)

    scores = job.score([in_float32(weights) for weights in points.values()], "val").metrics
    key = headline(scores[0])
    base = {"weighting": "", "filter": "none", "rank": 1.0, "norm_ratio": 1.0}
    rows = [{**base, "loss": heldout.before, "map": scores[0][key]}]
    of_heldout = heldout_moments(job.layers, heldout)
    for ((weighting, name, rank), weights), score in zip(points.items(), scores[1:], strict=True):
        changes = deviations(job.layers, of_heldout, in_float32(weights))
        rows.append(
            {
                **{"weighting": weighting, "filter": name, "rank": rank, "norm_ratio": norm2(weights) / norm2(before)},
                **{f"tr_vmv_{of}": size_in(weights, m) / size_in(before, m) for of, m in metrics.items()},
                "deviation": mean(changes.values()),
                "loss": heldout.loss(in_float32(weights)),
                "map": score[key],
            }
        )
    spread = {name: {layer: spread_of(m) for layer, m in of.items()} for name, of in metrics.items()}
    sizes = {name: len(images) for name, images in job.images.sets.items() if name != "selection"}
    record = {"seed": seed, **sizes, "points": rows}
    if curved:
        record |= {"largest_over_median_of_M": spread, "curvature": measured_curvature(args, job, points, seed)}
    return record


def in_float32(weights: Weights) -> Weights:
    """Return weights in the model's own precision."""
    return {name: v.float() for name, v in weights.items()}


def lowered(before: Weights, metric: dict[str, Tensor], aim: float, shifted: Callable[[float], Weights]) -> Weights:
    """Return the weights whose ``tr(V M Vᵀ)`` is ``aim`` of what it was; it grows with the setting."""
    low, high = 0.3, 0.7  # μ from 1e16 to 1e-16
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if size_in(shifted(middle), metric) < aim * size_in(before, metric) else (low, middle)
        )
    return shifted(high)


def spread_of(matrix: Tensor) -> float:
    """Return the largest eigenvalue over the median."""
    values = torch.linalg.eigvalsh(matrix)
    return float(values[-1] / values.median())


def measured_curvature(
    args: argparse.Namespace, job: ShiftJob, points: dict[tuple[str, str, float], Weights], seed: int
) -> list[dict[str, Any]]:
    """Return traces before the final layers, and their paired changes, on held-out images."""
    chosen = {key: weights for key, weights in points.items() if key[2] in CURVED and key[:2] in MEASURED}
    subjects = [subject_of("", job, {}), *(subject_of(str(key), job, w) for key, w in chosen.items())]
    batch = one_batch(job, "heldout", args.images)
    with TQDM(total=args.probes * len(subjects), desc="traces") as bar:
        found = [
            of["before"]
            for of in traces(subjects, [batch], ("before",), probes=args.probes, seed=seed, progress=bar.update)
        ]
    rows = []
    for key, subject, of in zip([("", "none", 1.0), *chosen], subjects, found, strict=True):
        row = dict(zip(("weighting", "filter", "rank"), key, strict=True))
        for name in ("hessian", "gauss_newton"):
            own, base = getattr(of, name), getattr(found[0], name)
            row[name] = as_pair(Estimate.mean(own))
            row[f"change_{name}"] = as_pair(Estimate.mean([a - b for a, b in zip(own, base, strict=True)]))
        rows.append({**row, "output_curvature": output_curvature(subject, batch, seed)})
    return rows


def output_curvature(subject: Subject, batch: Any, seed: int) -> float:
    """Return the sum of ∂²L/∂z² over the outputs of the final layers, per image."""
    found = []

    def add(batch: Any, output: Any, inputs: dict[str, Tensor]) -> None:
        _, curvature = sensitivities(subject.task, output, inputs, batch, seed)
        found.append(sum(float(h.sum()) for h in curvature.values()))

    Engine(subject.model, subject.layers, subject.task).run([batch], add)
    return found[0] / subject.task.size(batch)


def as_pair(estimate: Estimate) -> list[float]:
    """Return a number and its standard error, to six digits."""
    return [float(f"{x:.6g}") for x in (estimate.estimate, estimate.stderr)]


def tables(records: Sequence[dict[str, Any]]) -> str:
    """Return two Markdown tables: mean ± std over the choices of images."""
    measured = ("norm² left", "deviation", "held-out loss", "val mAP50-95")
    filters = [["weighting", "filter", "at the norm of principal", *measured]]
    base = [r["points"][0] for r in records]
    filters.append(["", "none", "", "1", "0", mean_std([p["loss"] for p in base], ".4f"), f"{base[0]['map']:.4f}"])
    for points in by_point(records):
        changes = {k: [p[k] - b[k] for p, b in zip(points, base, strict=False)] for k in ("loss", "map")}  # paired
        filters.append(
            [
                *(points[0]["weighting"], points[0]["filter"], str(points[0]["rank"])),
                *(mean_std([p[key] for p in points], ".3f") for key in ("norm_ratio", "deviation")),
                *(mean_std(changes[key], "+.4f") for key in ("loss", "map")),
            ]
        )
    changed = ("tr VMVᵀ", "Gauss-Newton trace, change", "Hessian trace, change", "Σ∂²L/∂z²")
    curvature = [["seed", "weighting", "filter", "at", *changed]]
    for record in [r for r in records if "curvature" in r]:
        whole = record["curvature"][0]
        size = {(p["weighting"], p["filter"], p["rank"]): p.get("tr_vmv_curvature", 1.0) for p in record["points"]}
        for row in record["curvature"]:
            gn, hessian = (
                [100 * x / abs(whole[k][0]) for x in row[f"change_{k}"]] for k in ("gauss_newton", "hessian")
            )
            outputs = row["output_curvature"] / whole["output_curvature"]
            ratio = size[row["weighting"], row["filter"], row["rank"]]
            curvature.append(
                [
                    *(str(record["seed"]), row["weighting"], row["filter"], str(row["rank"]), f"{ratio:.3f}"),
                    *(f"{gn[0]:+.2f} ± {gn[1]:.2f} %", f"{hessian[0]:+.1f} ± {hessian[1]:.1f} %", f"{outputs:.3f}"),
                ]
            )
    return f"{markdown_table(filters, texts=2)}\n{markdown_table(curvature, texts=3)}".rstrip()


def by_point(records: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the points of all choices of images by weighting, filter and setting, but the first, the baseline."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        for point in record["points"][1:]:
            found.setdefault((point["weighting"], point["filter"], point["rank"]), []).append(point)
    return list(found.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="a trained detector, .pt")
    parser.add_argument("--data", required=True, help="its data set")
    parser.add_argument("--imgsz", type=int, help="size of the images; that of the training if not given")
    parser.add_argument("--pretrained", help="a checkpoint that the training started from, to look at its first shift")
    parser.add_argument("--batch", type=int, default=16, help="images in a batch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each chooses images and probes")
    parser.add_argument("--fit", type=int, help="images to fit on; all but 32 if not given")
    parser.add_argument("--images", type=int, default=8, help="images for Jacobians, and others for traces")
    parser.add_argument("--probes", type=int, default=16, help="probes of the traces, of the first seed")
    parser.add_argument("--name", help="of the record; that of the data set if not given")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the record goes")
    args = parser.parse_args(argv)
    name = args.name or (Path(args.data).stem if Path(args.data).stem != "data" else Path(args.data).parent.name)
    first = {"start": [start(args, seed) for seed in args.seeds]} if args.pretrained else {}
    records = [study(args, seed, curved=seed == args.seeds[0]) for seed in args.seeds]
    record = {
        "config": {**{k: v for k, v in vars(args).items() if k not in {"out", "weights", "pretrained"}}, "data": name},
        "versions": versions(),
        "seeds": records,
        **first,
    }
    write_text(args.out / f"beyond-{name}.json", json.dumps(record, indent=1) + "\n")
    print(tables(records))


if __name__ == "__main__":
    main()
