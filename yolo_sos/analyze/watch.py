# yolo-sos, AGPL-3.0
"""What a training measures of itself every few epochs: a trace and the neural collapse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

from torch import nn

from yolo_sos.analyze.collapse import NAMES, Collapse, class_layers, collect, mean_measures
from yolo_sos.analyze.hessian import Subject, traces
from yolo_sos.analyze.report import digits
from yolo_sos.core import InputCapture
from yolo_sos.core.shift import evaluation
from yolo_sos.heads import HostTask, final_layers, head_of
from yolo_sos.memory import with_fewer

PROBES = 8
CURVATURE = 8  # images
FEATURES = 64  # images
# Without "loss" and "metric" in their names: the host plots columns that have them into results.png.
COLUMNS = ("trace", "trace_stderr", "gauss_newton", "gauss_newton_stderr", *NAMES)


def columns(measured: dict[str, float] | None = None) -> dict[str, float]:
    """Return the ``sos/*`` columns of an epoch; nan where nothing was measured."""
    return {f"sos/{name}": (measured or {}).get(name, math.nan) for name in COLUMNS}


def log_line(measured: dict[str, float]) -> str:
    """Return one line that tells what was measured."""
    traces = [
        f"{title} {digits(measured[key], 4)} ± {digits(measured[f'{key}_stderr'], 2)}"
        for key, title in (("trace", "Hessian trace"), ("gauss_newton", "Gauss-Newton trace"))
    ]
    return ", ".join([*traces, *(f"{name} {digits(measured[name], 3)}" for name in NAMES)])


def measure(
    model: nn.Module, batches: Callable[[int], Iterable[Any]], *, probes: int = PROBES, seed: int = 0
) -> dict[str, float]:
    """Measure a model of the host: traces before the final layers, and NC1 to NC4 as the mean over class layers.

    Args:
        model (nn.Module): The model; a copy is measured.
        batches (Callable): ``batches(n)`` returns preprocessed batches of the same first n training images each time.
        probes (int): For the traces.
        seed (int): Of the probes.

    Returns:
        (dict[str, float]): By the names of ``COLUMNS``.
    """
    copied = deepcopy(model).float()
    # A validation leaves anchor points there that were made in inference mode: no gradient may meet them.
    head_of(copied).shape = None  # type: ignore[assignment]
    subject = Subject("model", copied, HostTask(copied), final_layers(copied))

    def curvature(images: int):
        return traces([subject], list(batches(images)), ["before"], probes=probes, seed=seed)[0]["before"]

    found = with_fewer(CURVATURE, curvature, "images for the curvature")[0].estimates()
    collapses = [Collapse(layer, seed) for layer in class_layers(subject.layers)]
    with evaluation(copied), InputCapture(subject.layers) as capture:
        for batch in batches(FEATURES):
            output = subject.task.forward(copied, batch)
            collect(collapses, subject.task, output, capture.take(), batch)
    return {
        "trace": found["hessian"].estimate,
        "trace_stderr": found["hessian"].stderr,
        "gauss_newton": found["gauss_newton"].estimate,
        "gauss_newton_stderr": found["gauss_newton"].stderr,
        **mean_measures(collapses),
    }
