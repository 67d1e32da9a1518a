#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""Would a shift that keeps the loss, and not the outputs, take more from a trained detector than the default does?

    python studies/voc07/loss.py --weights best.pt --data VOC07.yaml --split test --name n-3-seed0

writes studies/voc07/loss-<name>.json. ``loss`` is the least norm at a given second-order rise of the loss: a ridge on
second moments that are weighted by the loss's curvature, or by its squared slopes, in each output, with one strength
for all layers (``studies/beyond``). Its strength, and that of the default, ``expected``, is the largest at which the
loss of held-out images rises by no more than 0.5 %. Both are fitted on few images, as ``sos=true`` draws them, and on
many.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from yolo_sos.core import HeldOut, Method, as_float64, weight_matrix
from yolo_sos.yolo.job import ShiftJob

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "beyond")]
from beyond import by_ridge, filtered, in_float32, loss_moments, norm2, spectra  # noqa: E402
from strength import arguments, score, write  # noqa: E402

GUARD = 0.005
IMAGES = (60, 512)  # three per class, which is the default, and as many as in strength.py
STEPS = 24  # of the bisection


def strongest(shifted: Callable[[float], dict[str, Tensor]], heldout: HeldOut) -> dict[str, Tensor]:
    """Return the strongest shift that the guard allows; its norm grows with the setting, from 0 to 1."""
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        allowed = heldout.allows(heldout.loss(in_float32(shifted(middle))), GUARD)
        low, high = (low, middle) if allowed else (middle, high)
    return in_float32(shifted(high))


def shifts(job: ShiftJob, images: int) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
    """Return a row and the weights of each shift that is fitted on the images of a job."""
    engine = job.fitted([(Method(), 0)])
    heldout = engine.hold_out(job.images.batches("heldout"))
    before = {layer.name: as_float64(weight_matrix(layer.module)) for layer in job.layers}
    default = engine.find(Method(), 0, heldout, GUARD)
    found = {"expected": default.weights(engine.accept(default, heldout, GUARD)[0])}
    for weighting, moments in loss_moments(job, 0).items():
        found[f"loss, {weighting}"] = strongest(filtered(spectra(before, moments), by_ridge), heldout)
    rows = [
        {
            "shift": name,
            "images": images,
            "squared_norm_ratio": norm2({k: as_float64(v) for k, v in weights.items()}) / norm2(before),
            "heldout_before": heldout.before,
            "heldout_after": heldout.loss(weights),
        }
        for name, weights in found.items()
    ]
    return rows, list(found.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one checkpoint."""
    options = arguments(__doc__.split("\n", 1)[0]).parse_args(argv)
    rows: list[dict[str, Any]] = []
    weights: list[dict[str, Tensor]] = []
    for images in IMAGES:
        job = ShiftJob(options.weights, options.data, imgsz=options.imgsz, images=images, device="cpu", val=False)
        more_rows, more_weights = shifts(job, images)
        rows += more_rows
        weights += more_weights
    metrics = score(job, options, rows, weights)
    write("loss", options, guard=GUARD, metrics=metrics, shifts=rows)


if __name__ == "__main__":
    main()
