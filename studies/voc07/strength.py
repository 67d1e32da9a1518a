#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""How far a shift goes on a trained detector, by method and by the rise of the held-out loss that is allowed.

    python studies/voc07/strength.py --weights best.pt --data VOC07.yaml --split test --name n-3

writes studies/voc07/strength-<name>.json. For each method and each ``sos_guard`` the guard finds the strength, on
held-out training images; all shifts are then scored on the split, by Ultralytics' metrics, in one pass.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from yolo_sos.core import Method
from yolo_sos.files import write_text
from yolo_sos.versions import git_commit, versions
from yolo_sos.yolo.job import ShiftJob
from yolo_sos.yolo.score import headline

METHODS = ("expected", "budget", "principal")
GUARDS = (0.0025, 0.005, 0.01)


def main() -> None:
    """Measure one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--name", required=True, help="of the checkpoint, in the record")
    parser.add_argument("--imgsz", type=int)
    parser.add_argument("--images", type=int, default=512, help="training images to fit on")
    options = parser.parse_args()
    job = ShiftJob(options.weights, options.data, imgsz=options.imgsz, images=options.images, device="cpu", val=False)
    trials = [(Method(name), 0) for name in METHODS]
    engine = job.fitted(trials)
    heldout = engine.hold_out(job.images.batches("heldout"))
    rows, weights = [], []
    for guard in GUARDS:
        for method, seed in trials:
            shift = engine.find(method, seed, heldout, guard)
            step, before, after = engine.accept(shift, heldout, guard)
            rows.append(
                {
                    "method": method.name,
                    "guard": guard,
                    "rank": shift.method.rank,
                    "budget": shift.method.budget,
                    "step": step,
                    "squared_norm_ratio": shift.squared_norm_ratio,
                    "heldout_before": before,
                    "heldout_after": after,
                }
            )
            weights.append(shift.weights(step))
    metrics = job.score(weights, options.split).metrics
    main_metric = headline(metrics[0])
    for row, scores in zip(rows, metrics[1:], strict=True):
        row |= {"metrics": scores, "change": scores[main_metric] - metrics[0][main_metric]}
        print(
            f"{row['method']:<10} guard {row['guard']:<7} squared norm ×{row['squared_norm_ratio']:.3f}, held-out loss "
            f"{row['heldout_after'] / row['heldout_before'] - 1:+.2%}, {main_metric} {row['change']:+.4f}"
        )
    record = {
        "name": options.name,
        "data": Path(options.data).name,
        "split": options.split,
        "images": {name: len(of) for name, of in job.images.sets.items()},
        "metrics": metrics[0],
        "shifts": rows,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    write_text(Path(__file__).with_name(f"strength-{options.name}.json"), json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
