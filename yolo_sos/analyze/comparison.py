# yolo-sos, AGPL-3.0
"""Compare checkpoints: curvature, neural collapse, spectra of the final layers' inputs, and slices of the loss."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from ultralytics.utils import LOGGER, TQDM, colorstr
from ultralytics.utils.torch_utils import select_device

from yolo_sos.analyze.collapse import Collapse, collect
from yolo_sos.analyze.estimate import Estimate
from yolo_sos.analyze.figures import collapse_figure, landscape_figure, spectrum_figure, trace_figure
from yolo_sos.analyze.hessian import Subject, Trace, largest_eigenvalue, traces
from yolo_sos.analyze.landscape import interpolation, loss_at, slices
from yolo_sos.analyze.options import SCOPES, AnalyzeOptions
from yolo_sos.analyze.report import labels, save_dir, write_report
from yolo_sos.analyze.spectrum import layer_spectrum, spectrum_methods
from yolo_sos.analyze.verdict import verdict
from yolo_sos.arguments import several
from yolo_sos.core import Engine, Method, as_float64, weight_matrix
from yolo_sos.versions import versions
from yolo_sos.yolo.checkpoint import Checkpoint
from yolo_sos.yolo.checkpoint_data import CheckpointData
from yolo_sos.yolo.heads import CLASS_KINDS, YoloTask, layers_of_kinds
from yolo_sos.yolo.memory import with_fewer

PREFIX = colorstr("analyze: ")
FEATURES = 256  # images whose features are read if fraction is not given: a minute on a laptop
PASS = 8  # images at a time whose features are read; also a block of the jackknife
RADIUS, LINE, PLANE = 0.2, 21, 9  # of the landscape
STEPS = [i / 8 for i in range(-4, 13)]  # t of the interpolation


class Comparison:
    """A comparison of checkpoints, checked and ready to ``run``. See ``analyze_checkpoints``."""

    def __init__(self, model: str | Path | Sequence[str | Path], data: str | Path | None = None, **options: Any):
        """Check the options, the checkpoints and the data, in this order."""
        self.options = o = AnalyzeOptions(**options)
        paths = several("checkpoints")("model", model)
        checkpoints = [Checkpoint(path) for path in paths]
        first = checkpoints[0]
        names = labels([c.path for c in checkpoints])
        _check_alike(checkpoints)
        self.device = select_device("" if o.device is None else o.device, verbose=False)
        data_set = CheckpointData(first, data, imgsz=o.imgsz, batch=o.batch, device=self.device)
        for checkpoint in checkpoints[1:]:
            data_set.check_classes(checkpoint)
        self.classes: dict[int, str] = first.model.names  # type: ignore[assignment]
        if len(self.classes) < 2:
            LOGGER.warning(
                f"{PREFIX}{Path(data_set.args['data']).name} has one class: neural collapse is about the means of "
                "several classes, and is left out."
            )
        available = len(data_set.dataset)
        self.images = min(o.images, available)
        self.features = min(available, FEATURES) if o.fraction is None else max(1, round(o.fraction * available))
        self.batch = data_set.batch
        self.sample = data_set.sample({"train": max(self.images, self.features)}, o.seed)  # the same for all models
        self.subjects = [
            Subject(name, c.model.to(self.device), YoloTask(c.model), c.layers)
            for name, c in zip(names, checkpoints, strict=True)
        ]
        self.blocks = SCOPES[o.scope]
        self.folder = save_dir(first.task, o.project, o.name, o.exist_ok)
        about = {"model": [Path(p).name for p in paths], "data": Path(data_set.args["data"]).name, "task": first.task}
        used = {"imgsz": data_set.args["imgsz"], "batch": self.batch}
        places = ("device", "project", "name", "exist_ok")
        self.config = {**about, **{k: v for k, v in asdict(o).items() if k not in places}, **used}

    def run(self) -> dict[str, Any]:
        """Measure, and write ``analysis.json``, the figures and ``report.html``.

        Returns:
            (dict): What ``analysis.json`` holds.
        """
        (sampled, curvatures), images = with_fewer(self.images, self._curvature, "images for the curvature")
        models = [
            {"name": subject.name, **curvature, **self._features(subject, images)}
            for subject, curvature in zip(self.subjects, curvatures, strict=True)
        ]
        result = {
            "config": self.config,
            "seed": self.options.seed,
            "versions": {**versions(), "device": str(self.device)},
            "classes": list(self.classes.values()),
            "images": {"curvature": images, "features": self.features},
            "models": models,
            "differences": differences([s.name for s in self.subjects], sampled),
        }
        render(result, self.folder)
        LOGGER.info(f"{PREFIX}wrote {self.folder / 'report.html'} and analysis.json")
        return result

    def _curvature(self, images: int) -> tuple[list[dict[str, Trace]], list[dict[str, Any]]]:
        """Return the traces of all models on the same images, by block, and what the report holds of each model."""
        o, subjects = self.options, self.subjects
        batches = list(self.sample.batches("train", images, min(images, self.batch)))
        with TQDM(total=len(subjects) * len(self.blocks) * len(batches) * o.probes, desc="trace", unit="probe") as bar:
            budget: dict[str, Any] = {"probes": o.probes, "stderr": o.stderr, "seed": o.seed}
            sampled = traces(subjects, batches, self.blocks, **budget, progress=bar.update)
        eigenvalues: list[dict[str, Estimate]] = [{} for _ in subjects]
        with TQDM(total=len(subjects) * len(self.blocks), desc="largest eigenvalue", unit="block") as bar:
            for subject, of in zip(subjects, eigenvalues, strict=True):
                for block in self.blocks:
                    of[block] = largest_eigenvalue(subject, batches, block, seed=o.seed)
                    bar.update(1)
        found = [
            {
                "loss": loss_at(subject, batches, {}),
                "parameter_norm": {block: _norm(subject.parameters(block)) for block in self.blocks},
                "weight_norm": _norm([weight_matrix(layer.module) for layer in subject.layers]),
                "trace": {b: _plain(t.estimates()) for b, t in _with_all(blocks).items()},
                "samples": {block: asdict(trace) for block, trace in blocks.items()},
                "largest_eigenvalue": _plain(values),
            }
            for subject, blocks, values in zip(subjects, sampled, eigenvalues, strict=True)
        ]
        return sampled, found

    def _features(self, subject: Subject, images: int) -> dict[str, Any]:
        """Return collapse and spectra of a model, from one pass over the images, and slices of its loss."""
        o = self.options

        def read(size: int) -> tuple[Engine, list[Collapse]]:
            engine = Engine(subject.model, subject.layers, subject.task, spectrum_methods(o.weighting))
            layers = layers_of_kinds(subject.layers, CLASS_KINDS) if len(self.classes) > 1 else []
            collapses = [Collapse(layer, o.seed) for layer in layers]
            with TQDM(total=self.features, desc=f"features of {subject.name}", unit="img") as bar:

                def observe(batch: Any, output: Any, inputs: dict[str, Tensor]) -> None:
                    if collapses:
                        collect(collapses, subject.task, output, inputs, batch)
                    bar.update(subject.task.size(batch))

                engine.fit(self.sample.batches("train", self.features, size), observe)
            return engine, collapses

        (engine, collapses), _ = with_fewer(min(PASS, self.batch), read, "images at a time")
        found: dict[str, Any] = {
            "collapse": [
                {
                    "layer": c.layer.name,
                    "level": c.layer.level,
                    "features": c.features,
                    "classes": c.classes,
                    **_plain(c.measures()),
                }
                for c in collapses
            ],
            "spectrum": [layer_spectrum(engine, layer, o.weighting) for layer in subject.layers],
        }
        shift = engine.solve(Method("principal", rank=0.5, weighting=o.weighting))
        if o.landscape:
            batches = list(self.sample.batches("train", images, min(PASS, self.batch)))
            with TQDM(total=LINE + PLANE**2, desc=f"landscape of {subject.name}", unit="point") as bar:
                found["landscape"] = slices(
                    subject, batches, radius=RADIUS, line=LINE, plane=PLANE, seed=o.seed, progress=bar.update
                )
            found["interpolation"] = interpolation(engine, shift, batches, STEPS)
        return found


def _check_alike(checkpoints: Sequence[Checkpoint]) -> None:
    first, *others = checkpoints
    for other in others:
        for key, ours, theirs in (
            ("task", first.task, other.task),
            ("single_cls", bool(first.args["single_cls"]), bool(other.args["single_cls"])),
        ):
            if ours != theirs:
                raise ValueError(
                    f"{first.path} was trained with {key}={ours} and {other.path} with {key}={theirs}: their losses "
                    "cannot be compared."
                )


def render(result: dict[str, Any], folder: Path) -> None:
    """Draw the figures of a result and write ``analysis.json`` and ``report.html``."""
    sections = [trace_figure(result, folder), collapse_figure(result, folder)]
    sections += [spectrum_figure(model, folder, i) for i, model in enumerate(result["models"])]
    if all("landscape" in model for model in result["models"]):
        sections.append(landscape_figure(result, folder))
    write_report(folder, result, verdict(result), sections)


def differences(names: Sequence[str], sampled: Sequence[dict[str, Trace]]) -> list[dict[str, Any]]:
    """Return the difference of every model's traces from the first's, probe by probe, with its own standard error.

    Each holds ``estimate``, ``stderr``, ``samples``, ``relative`` (to the size of the first model's trace),
    ``resolved`` (at least three standard errors from zero) and ``unpaired``: the standard error that independent probes
    would have given.
    """
    first = _with_all(sampled[0])
    found = []
    for name, of in zip(names[1:], sampled[1:], strict=True):
        blocks: dict[str, dict[str, Any]] = {}
        for block, trace in _with_all(of).items():
            ours, theirs = first[block].estimates(), trace.estimates()
            blocks[block] = {
                key: {
                    **asdict(change),
                    "relative": change.estimate / abs(ours[key].estimate) if ours[key].estimate else math.nan,
                    "resolved": change.resolved,
                    "unpaired": math.hypot(ours[key].stderr, theirs[key].stderr),
                }
                for key, change in trace.combined(operator.sub, first[block]).estimates().items()
            }
        found.append({"model": name, "against": names[0], "trace": blocks})
    return found


def _with_all(blocks: dict[str, Trace]) -> dict[str, Trace]:
    """Return the traces by block, and where there are two blocks that of all parameters."""
    if len(blocks) < 2:
        return blocks
    return {**blocks, "all": blocks["before"].combined(operator.add, blocks["final"])}


def _plain(estimates: dict[str, Estimate]) -> dict[str, dict[str, Any]]:
    return {name: asdict(estimate) for name, estimate in estimates.items()}


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(as_float64(x).square().sum()) for x in tensors))


def analyze_checkpoints(
    model: str | Path | Sequence[str | Path], data: str | Path | None = None, **options: Any
) -> dict[str, Any]:
    """Compare trained checkpoints, and write ``analysis.json``, figures and ``report.html`` into ``project/name``.

    Args:
        model (str | Path | Sequence): The checkpoints, of one task and one set of classes; a string may hold several
            with commas between them. Differences are taken from the first.
        data (str | Path, optional): The data set. None: the one that the first model was trained on.
        **options (Any): See ``AnalyzeOptions``: ``scope``, ``probes``, ``stderr``, ``images``, ``landscape``,
            ``weighting``, ``fraction``, ``imgsz``, ``batch``, ``device``, ``seed``, ``project``, ``name`` and
            ``exist_ok``.

    Returns:
        (dict): What ``analysis.json`` holds.

    Raises:
        FileNotFoundError: If a checkpoint, the data set or its images are missing.
        TypeError: If a file is no checkpoint, or of a model without final linear layers.
        ValueError: If an option is wrong, the models do not fit each other, or the data do not fit them.

    Examples:
        >>> result = analyze_checkpoints("best.pt,best-sos.pt", "VOC.yaml", images=16)
        >>> result["differences"][0]["trace"]["before"]["gauss_newton"]["relative"]
    """
    return Comparison(model, data, **options).run()
