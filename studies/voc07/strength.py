#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""How far a shift goes on a trained detector, by method and by the rise of the held-out loss that is allowed.

    python studies/voc07/strength.py --weights best.pt --data VOC07.yaml --split test --name n-3

writes studies/voc07/strength-<name>.json. For each method and each ``sos_guard`` the guard finds the strength, on
held-out training images; all shifts are then scored on the split, by Ultralytics' metrics, in one pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from yolo_sos.core import Method, as_float64, weight_matrix
from yolo_sos.files import as_json, write_text
from yolo_sos.versions import git_commit, versions
from yolo_sos.yolo.job import ShiftJob
from yolo_sos.yolo.score import headline

METHODS = ("loss", "expected", "budget", "principal")
GUARDS = (0.0025, 0.005, 0.01)
GUARD = 0.005  # of the ranks below, which the guard does not search for
SETTINGS = ("method", "floor", "rank", "budget", "guard")  # of a shift, as far as it has them
RANKS = (0.75, 0.375, 0.25)  # of loss, beside those that are searched for


def arguments(description: str) -> argparse.ArgumentParser:
    """Return the options of a study of one checkpoint."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--name", required=True, help="of the checkpoint, in the record")
    parser.add_argument("--imgsz", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the record goes")
    return parser


def score(job: ShiftJob, options: argparse.Namespace, rows: list[dict[str, Any]], weights: Sequence[Any]) -> Any:
    """Add to each shift's row its metrics and the change of the main one, and return those of the model as it is."""
    metrics, *shifted = job.score(weights, options.split).metrics
    main_metric = headline(metrics)
    for row, scores in zip(rows, shifted, strict=True):
        row |= {"metrics": scores, "change": scores[main_metric] - metrics[main_metric]}
        told = ", ".join(f"{k}={row[k]}" for k in SETTINGS if row.get(k) is not None)
        print(
            f"{told}: squared norm ×{row['squared_norm_ratio']:.3f}, held-out loss "
            f"{row['heldout_after'] / row['heldout_before'] - 1:+.2%}, {main_metric} {row['change']:+.4f}"
        )
    return metrics


def write(study: str, options: argparse.Namespace, **found: Any) -> None:
    """Write the record of a study of one checkpoint."""
    record = {"name": options.name, "data": Path(options.data).name, "split": options.split, **found}
    record |= {"versions": versions(), "git_commit": git_commit()}
    write_text(options.out / f"{study}-{options.name}.json", as_json(record))


def norm_of(weights: Mapping[str, Tensor]) -> float:
    """Return the squared norm of all layers, Σ‖V‖²."""
    return sum(float(as_float64(weight).square().sum()) for weight in weights.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one checkpoint."""
    parser = arguments(__doc__.split("\n", 1)[0])
    parser.add_argument("--images", type=int, default=512, help="training images to fit on")
    options = parser.parse_args(argv)
    job = ShiftJob(options.weights, options.data, imgsz=options.imgsz, images=options.images, device="cpu", val=False)
    trials = [(guard, Method(name)) for name in METHODS for guard in GUARDS]
    trials += [(GUARD, Method("loss", rank=rank)) for rank in RANKS]
    engine = job.fitted([(method, 0) for _, method in trials])
    heldout = engine.hold_out(job.images.batches("heldout"))
    rows: list[dict[str, Any]] = []
    weights: list[dict[str, Tensor]] = []
    norm = norm_of({layer.name: weight_matrix(layer.module) for layer in job.layers})
    for guard, method in trials:
        shift = engine.find(method, 0, heldout, guard)
        step, before, after = engine.accept(shift, heldout, guard)
        weights.append(shift.weights(step))
        rows.append(
            {
                **{"method": method.name, "guard": guard, "found": method.is_found},
                **{"rank": shift.method.rank, "budget": shift.method.budget, "step": step},
                "squared_norm_ratio": norm_of(weights[-1]) / norm,
                **{"heldout_before": before, "heldout_after": after},
            }
        )
    metrics = score(job, options, rows, weights)
    images = {name: len(of) for name, of in job.images.sets.items()}
    write("strength", options, images=images, metrics=metrics, shifts=rows)


if __name__ == "__main__":
    main()
