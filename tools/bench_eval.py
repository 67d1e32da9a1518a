#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""Time the devkit metric against COCO evaluators on the same arrays: speed and memory, side by side, one thread.

    python tools/bench_eval.py                   # the shape of VOC2007 test, a minute
    python tools/bench_eval.py --images 500 --objects 1200 --detections 22000 --repeats 1

Every contender runs in a process of its own, so that peak memory is its own too, and makes the same synthetic data from
the seed. "load" is what it takes from arrays to the evaluator's own structures, "evaluate" the rest up to the numbers,
the best of the repeats. The devkit metric reads the arrays as they are.

Exit status: 0 if the devkit metric is at least 60 times as fast as pycocotools, no slower than hotcoco, and takes less
memory than pycocotools; 1 if not. What is not installed is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from yolo_sos.evaluate import Detections, GroundTruth, mean_ap, snap, voc_ap
from yolo_sos.evaluate.coco import BACKENDS, coco_evaluator

ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "RAYON")}
DEVKIT = "VOC devkit metric"
LEAST_SPEEDUP = 60  # over pycocotools


def synthetic(
    images: int, classes: int, objects: int, detections: int, seed: int = 0
) -> tuple[GroundTruth, Detections]:
    """Make objects of which 10 % are difficult, and detections of which a quarter lie near one and the rest anywhere.

    Args:
        images (int): Number of images, of 500 x 375 pixels.
        classes (int): Number of classes.
        objects (int): Number of objects, with sides of 20 to 300 pixels.
        detections (int): Number of detections; low scores prevail, as below a confidence threshold of 0.001.
        seed (int): Seed of everything.

    Returns:
        (tuple[GroundTruth, Detections]): The data set.
    """
    rng = np.random.default_rng(seed)
    image_size = np.array([500.0, 375.0])

    def boxes(n: int) -> np.ndarray:
        size = rng.uniform(20, 300, (n, 2))
        corner = rng.uniform(0, 1, (n, 2)) * (image_size - size)
        return np.hstack([corner, corner + size])

    truth = GroundTruth.build(
        classes=[f"class{k}" for k in range(classes)],
        images=[f"{i:06d}" for i in range(1, images + 1)],
        image=rng.integers(images, size=objects),
        label=rng.integers(classes, size=objects),
        boxes=snap(boxes(objects)),
        difficult=rng.random(objects) < 0.1,
    )
    near = rng.integers(objects, size=detections // 4)
    far = detections - len(near)
    moved = truth.boxes[near] + rng.normal(0, 12, (len(near), 4))
    moved = np.hstack([np.minimum(moved[:, :2], moved[:, 2:]), np.maximum(moved[:, :2], moved[:, 2:])])
    found = Detections.build(
        truth,
        image=np.concatenate([truth.image[near], rng.integers(images, size=far)]),
        label=np.concatenate([truth.label[near], rng.integers(classes, size=far)]),
        score=np.concatenate([rng.beta(2, 2, len(near)), rng.beta(0.3, 4, far)]),
        boxes=snap(np.vstack([moved, boxes(far)])),
    )
    return truth, found


def measure(contender: str, repeats: int, **shape: int) -> dict[str, Any]:
    """Run one contender in this process.

    Args:
        contender (str): `DEVKIT` or one of the COCO backends.
        repeats (int): How often to load and evaluate.
        **shape (int): Arguments of `synthetic`.

    Returns:
        (dict[str, Any]): Seconds to load and to evaluate, peak memory and what of it the data took in MB, and the mAP.
    """
    truth, found = synthetic(**shape)
    before = peak_memory()
    load, evaluate = contender_steps(contender, truth, found)
    seconds: list[tuple[float, float]] = []
    for _ in range(repeats):
        start = time.perf_counter()
        loaded = load()
        middle = time.perf_counter()
        result = evaluate(loaded)
        seconds.append((middle - start, time.perf_counter() - middle))
    loading, evaluating = (min(column) for column in zip(*seconds, strict=True))
    return {"load": loading, "evaluate": evaluating, "peak": peak_memory(), "data": before, "mAP": result}


def contender_steps(
    contender: str, truth: GroundTruth, found: Detections
) -> tuple[Callable[[], Any], Callable[[Any], float]]:
    """Return a contender's two steps: load, and evaluate what was loaded."""
    if contender == DEVKIT:
        return lambda: None, lambda _: mean_ap(voc_ap(truth, found).ap)

    def evaluate(evaluator: Any) -> float:
        evaluator.evaluate()
        evaluator.accumulate()
        precision = np.asarray(evaluator.eval["precision"])[0, :, :, 0, 2]  # IoU 0.5, all areas, 100 detections
        return float(precision[precision > -1].mean())

    return lambda: coco_evaluator(truth, found, contender), evaluate


def peak_memory() -> float:
    """Return the most memory this process has had, in MB."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Run all contenders one after the other, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4952, help="(%(default)s)")
    parser.add_argument("--classes", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--objects", type=int, default=12_000, help="(%(default)s)")
    parser.add_argument("--detections", type=int, default=220_000, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="the best counts; pycocotools runs once (%(default)s)")
    parser.add_argument("--contender", help=argparse.SUPPRESS)  # one run of its own process
    args = parser.parse_args(argv)
    shape = {k: getattr(args, k) for k in ("images", "classes", "objects", "detections", "seed")}
    if args.contender:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports every step
            result = measure(args.contender, args.repeats, **shape)
        print(json.dumps(result))
        return 0
    options = [f"--{k}={v}" for k, v in shape.items()]
    results = {}
    for contender in [DEVKIT, *(b for b, ((module, _), _) in BACKENDS.items() if find_spec(module.partition(".")[0]))]:
        repeats = 1 if contender == "pycocotools" else args.repeats
        command = [sys.executable, __file__, f"--contender={contender}", f"--repeats={repeats}", *options]
        out = subprocess.run(command, env={**os.environ, **ONE_THREAD}, check=True, stdout=subprocess.PIPE, text=True)
        results[contender] = json.loads(out.stdout.splitlines()[-1])
    show(results, shape)
    ours, reference = results[DEVKIT], results["pycocotools"]
    fast = reference["evaluate"] >= LEAST_SPEEDUP * ours["evaluate"]
    level = ours["evaluate"] <= results.get("hotcoco", {"evaluate": np.inf})["evaluate"]
    return 0 if fast and level and ours["peak"] < reference["peak"] else 1


def show(results: dict[str, dict[str, Any]], shape: dict[str, int]) -> None:
    """Print the results as a table in Markdown."""
    print(", ".join(f"{v} {k}" for k, v in shape.items() if k != "seed") + f", seed {shape['seed']}, one thread\n")
    print(f"| {'':17} | load s | evaluate s | times as fast | peak MB | of it data | mAP50  |")
    print(f"| {'-' * 17} | -----: | ---------: | ------------: | ------: | ---------: | -----: |")
    for name, r in results.items():
        speedup = results["pycocotools"]["evaluate"] / r["evaluate"]
        row = f"{r['load']:6.2f} | {r['evaluate']:10.3f} | {speedup:13.1f} | {r['peak']:7.0f} | {r['data']:10.0f}"
        print(f"| {name:17} | {row} | {r['mAP']:.4f} |")


if __name__ == "__main__":
    sys.exit(main())
