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

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from yolo_sos.core import Method, as_float64, weight_matrix
from yolo_sos.files import write_text
from yolo_sos.versions import git_commit, versions
from yolo_sos.yolo.job import ShiftJob
from yolo_sos.yolo.score import headline

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "beyond"))
from beyond import by_ridge, filtered, loss_moments, norm2, spectra  # noqa: E402

GUARD = 0.005
IMAGES = (60, 512)  # three per class, which is the default, and as many as in strength.py
STEPS = 24  # of the bisection


def main() -> None:
    """Measure one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--name", required=True, help="of the checkpoint, in the record")
    parser.add_argument("--imgsz", type=int)
    options = parser.parse_args()
    shifts: list[dict[str, Any]] = []
    weights: list[dict[str, Tensor]] = []
    for images in IMAGES:
        job = ShiftJob(options.weights, options.data, imgsz=options.imgsz, images=images, device="cpu", val=False)
        engine = job.fitted([(Method(), 0)])
        heldout = engine.hold_out(job.images.batches("heldout"))
        before = {layer.name: as_float64(weight_matrix(layer.module)) for layer in job.layers}

        def keep(name: str, shifted: dict[str, Tensor]) -> None:
            shifts.append(
                {
                    "shift": name,
                    "images": images,  # noqa: B023
                    "squared_norm_ratio": norm2({k: as_float64(v) for k, v in shifted.items()}) / norm2(before),  # noqa: B023
                    "heldout_before": heldout.before,  # noqa: B023
                    "heldout_after": heldout.loss(shifted),  # noqa: B023
                }
            )
            weights.append(shifted)

        found = engine.find(Method(), 0, heldout, GUARD)
        step, *_ = engine.accept(found, heldout, GUARD)
        keep("expected", found.weights(step))
        for weighting, moments in loss_moments(job, 0).items():
            shifted = filtered(spectra(before, moments), by_ridge)
            low, high = 0.0, 1.0  # the norm, and with it how much of the loss is kept, grows from 0 to 1
            for _ in range(STEPS):
                middle = (low + high) / 2
                after = heldout.loss({k: v.float() for k, v in shifted(middle).items()})
                low, high = (low, middle) if after <= (1 + GUARD) * heldout.before else (middle, high)
            keep(f"loss, {weighting}", {k: v.float() for k, v in shifted(high).items()})
    metrics, _ = job.score(weights, options.split)
    main_metric = headline(metrics[0])
    for shift, scores in zip(shifts, metrics[1:], strict=True):
        shift |= {"metrics": scores, "change": scores[main_metric] - metrics[0][main_metric]}
        rise = shift["heldout_after"] / shift["heldout_before"] - 1
        print(
            f"{shift['shift']:<16} {shift['images']:>4} images: squared norm ×{shift['squared_norm_ratio']:.3f}, "
            f"held-out loss {rise:+.2%}, {main_metric} {shift['change']:+.4f}"
        )
    record = {
        **{"name": options.name, "data": Path(options.data).name, "split": options.split, "guard": GUARD},
        **{"metrics": metrics[0], "shifts": shifts, "versions": versions(), "git_commit": git_commit()},
    }
    write_text(HERE / f"loss-{options.name}.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
