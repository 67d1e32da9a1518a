#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""Time a fit against plain forward passes over the same images, side by side.

    python tools/bench_fit.py --model yolov8n.pt --data VOC07.yaml --imgsz 320

Plain passes and fits take turns, each with images that are in memory. With more classes than the data set has, each of
its classes is split by the number of the object. Results go to docs/bench/.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench_common import save, table, told

from yolo_sos.core import Engine
from yolo_sos.yolo.class_fit import fit_classes, fit_sizes
from yolo_sos.yolo.classes import resized
from yolo_sos.yolo.fit import CheckpointFit
from yolo_sos.yolo.heads import YoloTask


class Split:
    """Images whose classes are split into more."""

    def __init__(self, images: Any, parts: int):
        """Load the images."""
        self.sets, self._images, self._parts = images.sets, images, parts
        images._keep = True

    def batches(self, name: str, images: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield the batches of a set, its first ``images`` alone."""
        for batch in self._images.batches(name):
            if images is not None and images <= 0:
                return
            images = None if images is None else images - len(batch["img"])
            part = torch.arange(len(batch["cls"])).view(-1, 1) % self._parts
            yield {**batch, "cls": batch["cls"] * self._parts + part}


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 4], help="of each class of the data set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="fit")
    args = parser.parse_args()
    rows, records = [], {}
    with TemporaryDirectory() as folder:
        weights = shutil.copy(args.model, Path(folder) / "model.pt")
        job = CheckpointFit(weights, args.data, images=args.images, imgsz=args.imgsz, batch=16, device="cpu", val=False)
        sizes = fit_sizes(len(job.data.dataset), args.images)
        for parts in args.parts:
            images: Any = Split(job.data.sample(sizes, 0), parts)
            classes = len(job.data.names) * parts
            model = resized(job.checkpoint.model, {k: f"class {k}" for k in range(classes)}, 0)
            model.args = job.checkpoint.model.args
            task = YoloTask(model)
            plain, fits, phases = [], [], []
            for turn in range(args.rounds + 1):  # the first one loads the images and warms up
                start = time.perf_counter()
                for name in ("fit", "selection"):
                    Engine(model, task.layers, task).run(images.batches(name), lambda *_: None)
                middle = time.perf_counter()
                report = fit_classes(model, images, {}, None, 0).report
                if turn:
                    plain.append(middle - start)
                    fits.append(time.perf_counter() - middle)
                    phases.append(report.milliseconds)
            ratios = [f / p for f, p in zip(fits, plain, strict=True)]
            solve = [p["solve"] / 1e3 for p in phases]
            rows.append([classes, told(plain), told(fits), told(ratios), f"{median(solve):.2f}"])
            records[str(classes)] = {"plain": plain, "fit": fits, "phases": phases}
    header = ["classes", "forward passes, s", "fit, s", "fit / forward passes", "solve, s"]
    body = (
        f"{args.images} images of {args.imgsz} pixels, batch 16; the fit runs a quarter of them twice, and "
        f"{sizes['heldout']} others for the guard. Medians (least–largest) of {args.rounds} turns.\n\n"
        + table(header, rows)
    )
    save(args.name, f"A fit against forward passes: {Path(args.model).stem} on {Path(args.data).stem}", body, records)


if __name__ == "__main__":
    main()
