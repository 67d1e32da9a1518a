#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""What a shift by the loss does to objects that the images fitted on do not show, by the floor under the curvature.

    python studies/voc07/floor.py --weights best.pt --data VOC07.yaml --split val --name n-3-seed0

writes studies/voc07/floor-<name>.json. The shift is fitted on images without a large object, up to 512 of them, at one
rank and without a guard, and scored on a split that has them; beside it are shifts by ``expected``.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from yolo_sos.core import Curvature, Method, weight_matrix
from yolo_sos.yolo.job import ShiftJob

sys.path.append(str(Path(__file__).parent))
from strength import arguments, norm_of, score, write

LARGE = 0.3  # of the image's width or height
FLOORS = (0.0, 0.0001, 0.001, 0.003, 0.01)
RANK = 0.8  # of loss: what the guard finds on VOC07
RANKS = (0.5, 0.8, 0.9)  # of expected


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one checkpoint."""
    parser = arguments(__doc__.split("\n", 1)[0])
    parser.add_argument("--images", type=int, default=512, help="images to fit on, at most")
    options = parser.parse_args(argv)
    job = ShiftJob(options.weights, options.data, imgsz=options.imgsz, images=options.images, device="cpu", val=False)
    held = set(job.images.sets["heldout"])
    small = [
        i
        for i, label in enumerate(job.data.dataset.labels)
        if i not in held and len(label["bboxes"]) and label["bboxes"][:, 2:].max() < LARGE
    ]
    random.Random(0).shuffle(small)
    job.images.sets["fit"] = small[: options.images]
    trials = [(Method("expected", rank=rank), 0) for rank in RANKS]
    engine = job.fitted(trials)
    heldout = engine.hold_out(job.images.batches("heldout"))
    found: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
    curvatures = [Curvature(job.task, job.layers, job.task.layers, 0, floor) for floor in FLOORS]

    def add(*seen: Any) -> None:
        for curvature in curvatures:
            curvature.add(*seen)

    engine.run(job.images.batches("fit"), add)
    for curvature in curvatures:
        weights = {name: result.weight for name, result in curvature.solve(Method(rank=RANK).rank_of).items()}
        found.append(({"method": "loss", "floor": curvature.floor, "rank": RANK}, weights))
    for method, seed in trials:
        found.append(({"method": method.name, "rank": method.rank}, engine.solve(method, seed).weights()))
    before = norm_of({layer.name: weight_matrix(layer.module) for layer in job.layers})
    rows = [
        {
            **row,
            "squared_norm_ratio": norm_of(weights) / before,
            "heldout_before": heldout.before,
            "heldout_after": heldout.loss(weights),
        }
        for row, weights in found
    ]
    metrics = score(job, options, rows, [weights for _, weights in found])
    images = {"with small objects alone": len(small), "fit": len(job.images.sets["fit"]), "heldout": len(held)}
    write("floor", options, large=LARGE, images=images, metrics=metrics, shifts=rows)


if __name__ == "__main__":
    main()
