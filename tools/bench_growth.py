#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""How the cost of a shift grows: with the size of the model, of the image, with classes, the batch and the method.

    python tools/bench_growth.py                        # six minutes on two CPU cores
    python tools/bench_growth.py --device=0 --imgsz=640 --name=growth-gpu

One shift and one training step (on a GPU in mixed precision), in turn, on random images with untrained models: neither
the pixels nor the weights matter to the time. Each axis changes one thing and leaves the others at what --model,
--imgsz, --classes, --batch and --method say, everything else at its default. A shift is told in images: how many
images' worth of training step (forward, backward, update) it costs. That does not depend on the data set. It is
measured on the default number of images (8, or 3 per class if that is more), but no more than 64: sampling, forward
pass and rows of the images to fit on are proportional to them, the rest is not. What the default number adds to
training on N, for the two models that are shifted, is

    2 · images' worth, scaled up so / (N · epochs)

with one shift in 100 epochs, as by default, or one every sos_interval epochs.

Peak memory of the two stands beside it, that of one process per model. Results go to docs/bench/growth.*.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from bench_common import BENCH, Peak, save, spread, table, told

from yolo_sos.core import METHODS

AXES: dict[str, tuple[Any, ...]] = {
    "model": ("yolov5n", "yolov5s", "yolov5m", "yolov5l", "yolov5x"),
    "imgsz": (160, 320, 640),
    "classes": (3, 20, 80, 1000),
    "batch": (4, 8, 16, 32),
    "method": METHODS,
}
OBJECTS = 5  # per image
N = 10_000  # training images that the shares are of
EPOCHS = 100  # epochs of a run that shifts once
MOST = 64  # images that are measured: by then rows are sampled, and memory does not grow any more


def measure(model: str, imgsz: int, classes: int, batch: int, method: str, repeats: int, device: str) -> dict[str, Any]:
    """Return times, memory and counts of a shift and of a training step, measured in this process."""
    import torch
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    from yolo_sos.config import SOSConfig
    from yolo_sos.core import SOS, ShiftReport
    from yolo_sos.yolo.heads import YoloTask, final_layers
    from yolo_sos.yolo.images import HELD_OUT
    from yolo_sos.yolo.shifting import IMAGES, PER_CLASS

    torch.manual_seed(0)
    place = torch.device("cpu" if device == "cpu" else f"cuda:{device}")
    net = DetectionModel(f"{model}.yaml", nc=classes, verbose=False).to(place)
    net.args = get_cfg()
    config = SOSConfig.from_dict({"sos": True, "sos_method": method})
    default = config.sos_images or max(IMAGES, PER_CLASS * classes)
    images = min(default, MOST)
    heldout = min(images // 2, HELD_OUT)

    def batches(count: int) -> list[dict[str, Any]]:
        sizes = [min(batch, count - i) for i in range(0, count, batch)]
        return [
            {
                "img": torch.rand(size, 3, imgsz, imgsz, device=place),
                "cls": torch.randint(classes, (size * OBJECTS, 1), device=place).float(),
                "bboxes": torch.rand(size * OBJECTS, 4, device=place) * 0.3 + 0.3,
                "batch_idx": torch.arange(size, device=place).repeat_interleave(OBJECTS).float(),
            }
            for size in sizes
        ]

    (train,), fit, held = batches(batch), batches(images), batches(heldout)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)
    peak = Peak(device)
    sos = SOS(net, final_layers(net), method=config.method, guard=config.sos_guard, task=YoloTask(net))

    def step() -> None:
        net.train()
        optimizer.zero_grad()
        with torch.autocast("cuda", enabled=peak.cuda):  # as Ultralytics trains on a GPU
            loss = net(train)[0].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimizer.step()

    reports: list[ShiftReport] = []

    def shift() -> None:
        reports.append(sos.shift(fit, held))

    seconds: dict[str, list[float]] = {"step": [], "shift": []}
    peaks: dict[str, list[float]] = {"step": [], "shift": []}
    for repeat in range(repeats + 1):
        for name, run in (("step", step), ("shift", shift)):
            peak.reset()
            if peak.cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if peak.cuda:
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
                peaks[name].append(peak.mb)
    phases = {p: median([r.milliseconds[p] for r in reports[1:]]) for p in reports[0].milliseconds}
    total = sum(phases.values())
    one_pass = phases["forward"] * heldout / (images + heldout)  # of the held-out images
    growing = phases["sample"] + phases["forward"] - one_pass + phases["rows"]
    return {
        "images": images,
        "heldout": heldout,
        "default_images": default,
        "scaled_up": 1 + growing / total * (default / images - 1),
        "step_s": spread(seconds["step"]),
        "shift_s": spread(seconds["shift"]),
        "worth": [batch * b / a for a, b in zip(seconds["step"], seconds["shift"], strict=True)],
        "phases_ms": phases,
        "guard_of_forward": phases["guard"] / one_pass,
        "rows_of_forward": phases["rows"] / (phases["forward"] - one_pass),
        "step_mb": median(peaks["step"]),
        "shift_mb": median(peaks["shift"]),
    }


def figure(name: str, axis: str, points: dict[str, dict[str, Any]]) -> None:
    """Draw one axis into NAME-AXIS.png: images' worth with its spread, and its phases as bars."""
    from matplotlib.figure import Figure

    from yolo_sos.files import atomic_path

    fig = Figure(figsize=(6, 3.6), layout="constrained")
    ax = fig.subplots()
    bottom = [0.0] * len(points)
    for phase in ("forward", "rows", "solve", "guard"):
        values = [median(p["worth"]) * p["phases_ms"][phase] / sum(p["phases_ms"].values()) for p in points.values()]
        ax.bar(list(points), values, bottom=bottom, label=phase, width=0.6)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    middle = [median(p["worth"]) for p in points.values()]
    low = [m - min(p["worth"]) for m, p in zip(middle, points.values(), strict=True)]
    high = [max(p["worth"]) - m for m, p in zip(middle, points.values(), strict=True)]
    ax.errorbar(list(points), middle, yerr=[low, high], fmt="k.", capsize=3, label="median, least, largest")
    ax.set(xlabel=axis, ylabel="one shift of one model,\nin training images", ylim=(0, None))
    ax.legend(fontsize="small")
    with atomic_path(BENCH / f"{name}-{axis}.png") as path:
        fig.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every point in a process of its own, and write the record and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="yolov5n", help="for the other axes (%(default)s)")
    parser.add_argument("--imgsz", type=int, default=160, help="(%(default)s)")
    parser.add_argument("--classes", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--method", default="expected", choices=AXES["method"], help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, or the number of a GPU (%(default)s)")
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES, help="(all)")
    parser.add_argument("--name", default="growth", help="of the files in docs/bench (%(default)s)")
    parser.add_argument("--point", help=argparse.SUPPRESS)  # a worker
    args = parser.parse_args(argv)
    if args.point:
        print(json.dumps(measure(**json.loads(args.point), repeats=args.repeats, device=args.device)))
        return
    base = {axis: getattr(args, axis) for axis in AXES}
    data: dict[str, dict[str, dict[str, Any]]] = {}
    seen: dict[str, dict[str, Any]] = {}  # the base point stands on every axis
    for axis in args.axes:
        data[axis] = {}
        for value in AXES[axis]:
            point = json.dumps({**base, axis: value})
            if point not in seen:
                options = [f"--point={point}", f"--repeats={args.repeats}", f"--device={args.device}"]
                worker = [sys.executable, __file__, *options]
                out = subprocess.run(worker, check=True, stdout=subprocess.PIPE, text=True).stdout
                seen[point] = json.loads(out.splitlines()[-1])
            data[axis][str(value)] = seen[point]
            print(axis, value, told(seen[point]["worth"]), flush=True)
        figure(args.name, axis, data[axis])

    from yolo_sos.config import SOSConfig

    interval = SOSConfig.from_dict({}).sos_interval
    head = [
        "",
        "step, ms",
        "shift, ms",
        "worth, images",
        "images",
        "default",
        f"once in {EPOCHS} epochs",
        f"every {interval} epochs",
        "rows / forward",
        "guard / forward",
        "MB, step",
        "MB, shift",
    ]
    parts = []
    for axis, points in data.items():
        rows = [
            [
                value,
                told([1e3 * p["step_s"][k] for k in ("min", "median", "max")]),
                told([1e3 * p["shift_s"][k] for k in ("min", "median", "max")]),
                told(p["worth"]),
                f"{p['images']} + {p['heldout']}",
                p["default_images"],
                *(f"{2e2 * median(p['worth']) * p['scaled_up'] / (N * epochs):.2g} %" for epochs in (EPOCHS, interval)),
                f"{p['rows_of_forward']:.2f}",
                f"{p['guard_of_forward']:.2f}",
                f"{p['step_mb']:.0f}",
                f"{p['shift_mb']:.0f}",
            ]
            for value, p in points.items()
        ]
        parts.append(f"## {axis}\n\n" + table(head, rows) + f"\n\n![{axis}]({args.name}-{axis}.png)")
    body = (
        f"One shift of one model against a training step; medians (least–largest) of {args.repeats}. worth: images of "
        "training step that a shift costs. images: how many were fitted on and held out; default: how many are fitted "
        f"on by default. “once in {EPOCHS} epochs”, the default, and “every {interval} epochs”: what shifting both "
        f"models, on the default number of images, adds to training on {N} images. rows / forward: of the images "
        "fitted on; guard / forward: of the held-out images. Unless it is the axis: "
        + ", ".join(f"{k}={v}" for k, v in base.items())
        + ".\n\n"
        + "\n\n".join(parts)
    )
    save(args.name, "How the cost of a shift grows", body, {"base": base, "axes": data}, argv)


if __name__ == "__main__":
    main()
