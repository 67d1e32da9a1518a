# yolo-sos, AGPL-3.0
"""Compare checkpoints: curvature, neural collapse, spectra of the final layers' inputs, and slices of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ultralytics.utils import LOGGER, TQDM, colorstr

from yolo_sos.analyze.collapse import Collapse, class_layers, collect
from yolo_sos.analyze.estimate import Estimate
from yolo_sos.analyze.figures import collapse_figure, landscape_figure, spectrum_figure, trace_figure
from yolo_sos.analyze.hessian import BLOCKS, Subject, Trace, largest_eigenvalue, traces
from yolo_sos.analyze.landscape import interpolation, loss_at, slices
from yolo_sos.analyze.material import Material
from yolo_sos.analyze.report import write_report
from yolo_sos.analyze.settings import check_integer, save_dir, versions
from yolo_sos.analyze.spectrum import Inputs
from yolo_sos.core import InputCapture, Method, evaluation
from yolo_sos.core.layers import weight_matrix
from yolo_sos.yolo.memory import with_fewer

PREFIX = colorstr("analyze: ")
PASS = 8  # images at a time whose features are read; also a block of the jackknife
RADIUS, LINE, PLANE = 0.2, 21, 9  # of the landscape
STEPS = [i / 8 for i in range(-4, 13)]  # t of the interpolation


class Comparison:
    """A comparison of checkpoints, checked and ready to ``run``. See ``analyze_checkpoints``."""

    def __init__(
        self,
        model: str | Path | Sequence[str | Path],
        data: str | Path | None = None,
        *,
        scope: str = "all",
        probes: int = 24,
        stderr: float | None = None,
        images: int = 8,
        landscape: bool = True,
        weighting: str = "balanced",
        imgsz: int | None = None,
        batch: int | None = None,
        fraction: float | None = None,
        device: str | int | None = None,
        seed: int = 0,
        project: str | None = None,
        name: str | None = None,
        exist_ok: bool = False,
    ):
        """Check the options, the checkpoints and the data, in this order."""
        if scope not in BLOCKS:
            raise ValueError(f"'scope={scope}' is invalid: scope must be one of {', '.join(BLOCKS)}.")
        least = {"probes": 2, "images": 1, "seed": 0, "imgsz": 32, "batch": 1}
        for key, count in {"probes": probes, "images": images, "seed": seed, "imgsz": imgsz, "batch": batch}.items():
            check_integer(key, count, least[key])
        for key, share in (("stderr", stderr), ("fraction", fraction)):
            if share is not None and not (isinstance(share, (int, float)) and 0 < share <= 1):
                raise ValueError(f"'{key}={share}' is invalid: {key} must be a number above 0 and at most 1, or none.")
        for key, flag in (("landscape", landscape), ("exist_ok", exist_ok)):
            if not isinstance(flag, bool):
                raise ValueError(f"'{key}={flag}' is invalid: {key} must be true or false.")
        self.method = Method("principal", rank=0.5, weighting=weighting)  # the default shift, for the interpolation
        if isinstance(model, (str, Path)):
            model = str(model).split(",")
        paths = [str(path).strip() for path in model]
        if not all(paths):
            raise ValueError("'model' names no checkpoint: model=best.pt, or several with commas between them.")
        self.material = Material(paths, data, imgsz=imgsz, batch=batch, fraction=fraction, device=device, seed=seed)
        if len(self.material.classes) < 2:
            LOGGER.warning(
                f"{PREFIX}{Path(self.material.data).name} has one class: neural collapse is about the means of several "
                "classes, and is left out."
            )
        self.blocks, self.probes, self.stderr, self.seed = BLOCKS[scope], probes, stderr, seed
        self.images, self.landscape = images, landscape
        self.folder = save_dir(self.material.task, project, name, exist_ok)
        self.config = {
            "model": [Path(p).name for p in paths],
            "data": Path(self.material.data).name,
            "task": self.material.task,
            "scope": scope,
            "probes": probes,
            "stderr": stderr,
            "images": images,
            "fraction": fraction,
            "imgsz": self.material.imgsz,
            "batch": self.material.batch,
            "weighting": weighting,
            "landscape": landscape,
            "seed": seed,
        }

    def run(self) -> dict[str, Any]:
        """Measure, and write ``analysis.json``, the figures and ``report.html``.

        Returns:
            (dict): What ``analysis.json`` holds.
        """
        subjects = self.material.subjects
        (sampled, eigenvalues, losses), images = with_fewer(self.images, self._curvature, "images for the curvature")
        read = [self._read(subject) for subject in subjects]
        slow = self._landscapes(images, [inputs for inputs, _ in read]) if self.landscape else None
        models = []
        for i, (subject, (inputs, collapses)) in enumerate(zip(subjects, read, strict=True)):
            final = [float(weight_matrix(layer.module).double().square().sum()) for layer in subject.layers]
            models.append(
                {
                    "name": subject.name,
                    "loss": losses[i],
                    "weight_norm": {
                        **{b: _norm(subject.parameters(b)) for b in self.blocks},
                        "final_weights": math.sqrt(sum(final)),
                    },
                    "trace": _with_all(sampled[i]),
                    "samples": {block: asdict(trace) for block, trace in sampled[i].items()},
                    "largest_eigenvalue": {b: asdict(e) for b, e in eigenvalues[i].items()},
                    "collapse": [
                        {
                            "layer": c.layer.name,
                            "scale": c.layer.scale,
                            "features": c.features,
                            "classes": c.classes,
                            **{k: asdict(e) for k, e in c.measures().items()},
                        }
                        for c in collapses
                    ],
                    "spectrum": [s.to_dict() for s in inputs.spectra()],
                    **(slow[i] if slow else {}),
                }
            )
        result = {
            "config": self.config,
            "seed": self.seed,
            "versions": versions(self.material.device),
            "classes": list(self.material.classes.values()),
            "images": {"curvature": images, "features": self.material.features},
            "models": models,
            "differences": differences([s.name for s in subjects], sampled),
        }
        render(result, self.folder)
        LOGGER.info(f"{PREFIX}wrote {self.folder / 'report.html'} and analysis.json")
        return result

    def _curvature(self, images: int) -> tuple[list[dict[str, Trace]], list[dict[str, Estimate]], list[float]]:
        """Return traces, largest eigenvalues and losses of all models on the same images."""
        subjects = self.material.subjects
        batches = list(self.material.batches(images, min(images, self.material.batch)))
        steps = len(subjects) * len(self.blocks) * len(batches) * self.probes
        with TQDM(total=steps, desc="trace", unit="probe") as bar:
            sampled = traces(
                subjects,
                batches,
                self.blocks,
                probes=self.probes,
                stderr=self.stderr,
                seed=self.seed,
                progress=bar.update,
            )
        eigenvalues: list[dict[str, Estimate]] = []
        with TQDM(total=len(subjects) * len(self.blocks), desc="largest eigenvalue", unit="block") as bar:
            for subject in subjects:
                found = {}
                for block in self.blocks:
                    found[block] = largest_eigenvalue(subject, batches, block, seed=self.seed)
                    bar.update(1)
                eigenvalues.append(found)
        return sampled, eigenvalues, [loss_at(subject, batches, {}) for subject in subjects]

    def _read(self, subject: Subject) -> tuple[Inputs, list[Collapse]]:
        """Return the second moments and the collapse of a model's features, from one pass over the images."""

        def run(size: int) -> tuple[Inputs, list[Collapse]]:
            inputs = Inputs(subject.task, subject.layers, self.method.weighting)
            several = len(self.material.classes) > 1
            collapses = [Collapse(layer, self.seed) for layer in class_layers(subject.layers) if several]
            bar = TQDM(total=self.material.features, desc=f"features of {subject.name}", unit="img")
            with evaluation(subject.model), InputCapture(subject.layers) as capture, bar:
                for batch in self.material.batches(self.material.features, size):
                    output = subject.task.forward(subject.model, batch)
                    taken = capture.take()
                    inputs.update(taken, batch)
                    if collapses:
                        collect(collapses, subject.task, output, taken, batch)
                    bar.update(subject.task.size(batch))
            return inputs, collapses

        return with_fewer(min(PASS, self.material.batch), run, "images at a time")[0]

    def _landscapes(self, images: int, inputs: Sequence[Inputs]) -> list[dict[str, Any]]:
        subjects, found = self.material.subjects, []
        with TQDM(total=len(subjects) * (LINE + PLANE**2), desc="landscape", unit="point") as bar:
            for subject, of in zip(subjects, inputs, strict=True):
                batches = list(self.material.batches(images, min(PASS, self.material.batch)))
                around = slices(
                    subject,
                    batches,
                    radius=RADIUS,
                    line=LINE,
                    plane=PLANE,
                    seed=self.seed,
                    progress=bar.update,
                )
                towards = interpolation(subject, batches, of.shifts(self.method), STEPS)
                found.append({"landscape": around, "interpolation": towards})
        return found


def render(result: dict[str, Any], folder: Path) -> None:
    """Draw the figures of a result and write ``analysis.json`` and ``report.html``."""
    sections = [trace_figure(result, folder), collapse_figure(result, folder)]
    sections += [spectrum_figure(model, folder, i) for i, model in enumerate(result["models"])]
    if all("landscape" in model for model in result["models"]):
        sections.append(landscape_figure(result, folder))
    write_report(folder, result, sections)


def differences(names: Sequence[str], sampled: Sequence[dict[str, Trace]]) -> list[dict[str, Any]]:
    """Return the difference of every model's traces from the first's, probe by probe, with its own standard error.

    Each holds ``estimate``, ``stderr``, ``samples``, ``relative`` (to the size of the first model's trace),
    ``resolved`` (at least three standard errors from zero) and ``unpaired``: the standard error that independent probes
    would have given.
    """
    found = []
    for name, of in zip(names[1:], sampled[1:], strict=True):
        blocks: dict[str, dict[str, Any]] = {}
        for block, (a, b) in _pairs(sampled[0], of).items():
            ours, theirs = a.estimates(), b.estimates()
            blocks[block] = {
                key: {
                    **asdict(change),
                    "relative": change.estimate / abs(ours[key].estimate) if ours[key].estimate else math.nan,
                    "resolved": change.resolved,
                    "unpaired": math.hypot(ours[key].stderr, theirs[key].stderr),
                }
                for key, change in (b - a).estimates().items()
            }
        found.append({"model": name, "against": names[0], "trace": blocks})
    return found


def _pairs(first: dict[str, Trace], other: dict[str, Trace]) -> dict[str, tuple[Trace, Trace]]:
    return {block: (a, _add_all(other)[block]) for block, a in _add_all(first).items()}


def _add_all(blocks: dict[str, Trace]) -> dict[str, Trace]:
    if len(blocks) < 2:
        return blocks
    before, final = blocks.values()
    return {**blocks, "all": before + final}


def _with_all(blocks: dict[str, Trace]) -> dict[str, dict[str, Any]]:
    return {b: {k: asdict(e) for k, e in trace.estimates().items()} for b, trace in _add_all(blocks).items()}


def _norm(parameters: Sequence[torch.Tensor]) -> float:
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in parameters))


def analyze_checkpoints(
    model: str | Path | Sequence[str | Path], data: str | Path | None = None, **options: Any
) -> dict[str, Any]:
    """Compare trained checkpoints, and write ``analysis.json``, figures and ``report.html`` into ``project/name``.

    Args:
        model (str | Path | Sequence): The checkpoints, of one task and one set of classes; a string may hold several
            with commas between them. Differences are taken from the first.
        data (str | Path, optional): The data set. None: the one that the first model was trained on.
        **options (Any): ``scope`` (str): parameters of the curvature: ``all``, ``before`` the final layers or
            ``final``; ``probes`` (int): 24 by default, and ``stderr`` (float): a standard error relative to each trace;
            whichever is reached first ends the sampling; ``images`` (int): for curvature and landscape, 8 by default;
            ``landscape`` (bool): whether to draw it; ``weighting`` (str): of the spectra; ``fraction`` (float): share
            of the training images whose features are read, at most 256 images by default; ``imgsz``, ``batch`` (int):
            those of the training by default; ``device`` (str), ``seed`` (int), ``project``, ``name`` (str),
            ``exist_ok`` (bool).

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
