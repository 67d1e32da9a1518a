#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""What every shift does to trained checkpoints: squared norm ratio, held-out loss, and the metric on val and test.

Every method at several ranks or budgets, with every weighting; drawn rows as mean ± std of ten draws:

    python studies/shift/shift.py runs/bccd/weights/best.pt=bccd.yaml runs/digits/weights/best.pt=digits.yaml

writes studies/shift/shift.csv, a line per model, method, setting, weighting and draw, and studies/shift/shift.md, a
table per model. All points of a model come from one pass over its images and one validation per split; 200 points of a
YOLOv5n take four minutes on one CPU core.

The committed records were made when ``balanced`` counted a row in every class by its probability (now: in its most
probable class alone) and rows were drawn by exponential keys (now: by priority); their ``norm_ratio`` is what is
``squared_norm_ratio`` now.
"""

from __future__ import annotations

import argparse
import csv
import io
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from yolo_sos import __version__
from yolo_sos.core import WEIGHTINGS
from yolo_sos.files import write_text
from yolo_sos.markdown import markdown_table, mean_std
from yolo_sos.yolo.checkpoint_data import CheckpointData
from yolo_sos.yolo.job import ShiftJob
from yolo_sos.yolo.score import headline
from yolo_sos.yolo.sweep import cost, trace, trials_of
from yolo_sos.yolo.sweep_report import Point

RANKS = (0.125, 0.25, 0.375, 0.5, 0.75)  # fractions of d; at 1.0 every method but the budget is `full`
SPLITS = ("val", "test")


def prepare(model: str, data: str, images: int | None, seed: int) -> ShiftJob:
    """Return the work on one checkpoint, checked; what is missing is said before the first image is read."""
    job = ShiftJob(model, data, images=images or "all", seed=seed)
    CheckpointData(job.checkpoint, data, imgsz=None, batch=None, device=job.device, splits=SPLITS)
    return job


def study(job: ShiftJob, draws: int) -> tuple[list[Point], str]:
    """Return the points of one checkpoint, the baseline first, and a line on what they were made from."""
    points, seconds = trace(job, trials_of(WEIGHTINGS, ranks=RANKS, draws=draws, seed=job.seed), SPLITS)
    sizes = {name: len(images) for name, images in job.images.sets.items()}
    return points, (
        f"{sizes['fit']} training images to fit on and {sizes['heldout']} others held out, {job.data.args['imgsz']} "
        f"px, seed {job.seed}, {draws} draws. {len(points) - 1} points: {cost(seconds)}."
    )


def markdown(points: Sequence[Point]) -> str:
    """Return a table: a line per method, setting and weighting; the metrics' change against the baseline."""
    baseline, *rest = points
    names = {split: headline(metrics) for split, metrics in baseline.metrics.items()}
    measured = ("squared norm ratio", "deviation, held-out", "held-out loss")
    lines = [
        ["method", "setting", "weighting", *measured, *(f"{s} {n.removeprefix('metrics/')}" for s, n in names.items())],
        [
            *("baseline", "", "", "1", "0", f"{baseline.heldout_loss:.4f}"),
            *(f"{baseline.metrics[s][n]:.4f}" for s, n in names.items()),
        ],
    ]
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for p in rest:
        groups.setdefault((p.method, "" if p.method == "full" else f"{p.setting:g}", p.weighting), []).append(p)
    for key, group in groups.items():
        cells = [
            mean_std([p.squared_norm_ratio for p in group], ".3f"),
            mean_std([p.deviation_heldout for p in group], ".3f"),
            mean_std([p.heldout_loss for p in group], ".3f"),
            *(mean_std([p.metrics[s][n] - baseline.metrics[s][n] for p in group], "+.4f") for s, n in names.items()),
        ]
        lines.append([*key, *cells])
    return markdown_table(lines, texts=3).rstrip()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="MODEL=DATA", help="a checkpoint and its data set")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where shift.csv and shift.md go")
    parser.add_argument("--draws", type=int, default=10, help="drawings of rows at each rank")
    parser.add_argument("--images", type=int, help="training images to fit on; all if not given")
    parser.add_argument("--seed", type=int, default=0, help="chooses the images and the first drawing")
    args = parser.parse_args(argv)
    versions = f"yolo_sos {__version__}, ultralytics {version('ultralytics')}, torch {version('torch')}"
    text = [
        "# Shifting trained checkpoints",
        "Written by studies/shift/shift.py. Full steps, no guard, final weights rounded to half precision. Metrics of "
        "shifted models are changes against the baseline; ± is the standard deviation over draws.",
        f"{versions}, Python {platform.python_version()}, {platform.machine()}. Made by",
        f"    {shlex.join(['python', 'studies/shift/shift.py', *(sys.argv[1:] if argv is None else argv)])}",
    ]
    pairs = [tuple(pair.rpartition("=")[::2]) for pair in args.pairs]
    if malformed := [pair for pair, (model, _) in zip(args.pairs, pairs, strict=True) if not model]:
        parser.error(f"'{malformed[0]}' is not MODEL=DATA")
    rows = []
    jobs = [prepare(model, data, args.images, args.seed) for model, data in pairs]
    for job, (model, data) in zip(jobs, pairs, strict=True):
        points, note = study(job, args.draws)
        rows += [{"model": model, "data": data, **point.row()} for point in points]
        text.append(f"## {model} on {data}\n\n{note}\n\n{markdown(points)}")
        print(text[-1])
    table = io.StringIO()
    names = list(dict.fromkeys(key for row in rows for key in row))  # tasks have metrics of their own
    writer = csv.DictWriter(table, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(args.out / "shift.csv", table.getvalue())
    write_text(args.out / "shift.md", "\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
