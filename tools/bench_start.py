#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""What SOS costs before the first shift: import, help, and the way to the first training step.

    python tools/bench_start.py --data=digits.yaml      # two minutes on two CPU cores

Fresh processes in turn. From the times of "import yolo_sos" and of the help, that of an empty interpreter is
subtracted. The way to the first training step runs from the trainer's construction to the end of the first batch, for
stock Ultralytics, for our trainer with sos=false and with sos=true. As starts differ by more than 1 % from one to the
next, what our trainer does beside Ultralytics' is timed by itself too: the time within its constructor, its model's and
its training's set-up less the time within Ultralytics'. Results go to docs/bench/start.*.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from bench_common import save, table, told

ARMS = ("stock", "sos=false", "sos=true")
SNIPPETS = {
    "empty": "pass",
    "import yolo_sos": "import yolo_sos",
    "yolo-sos help": "from yolo_sos.cli import main; main(['help'])",
}
STEPS = ("__init__", "setup_model", "_setup_train")  # in which our trainer has something to do


def timed(base: type, seconds: dict[str, float], key: str) -> type:
    """Return a subclass that adds the time within its set-up, each step counted once, to ``seconds[key]``."""

    def wrap(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            outermost = key not in running
            running.append(key)
            start = time.perf_counter()
            try:
                return getattr(base, name)(self, *args, **kwargs)
            finally:
                running.pop()
                if outermost:
                    seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - start

        return method

    running: list[str] = []
    return type("Timed", (base,), {name: wrap(name) for name in STEPS})


def first_step(arm: str, data: str, model: str) -> dict[str, float]:
    """Return seconds to the end of the first batch, and those that our trainer spent beside Ultralytics'."""
    from ultralytics.models.yolo.detect import DetectionTrainer

    from yolo_sos.trainers import SOSMixin

    class Reached(Exception):
        pass

    def stop(trainer: Any) -> None:
        raise Reached

    seconds: dict[str, float] = {}
    stock = timed(DetectionTrainer, seconds, "stock")
    trainer_class = stock if arm == "stock" else timed(type("Ours", (SOSMixin, stock), {}), seconds, "ours")
    with tempfile.TemporaryDirectory(prefix="bench-start-") as folder:
        options = {"data": data, "model": model, "imgsz": 160, "batch": 16, "epochs": 10, "workers": 0}
        options.update(device="cpu", plots=False, project=folder, seed=0)
        start = time.perf_counter()
        trainer = trainer_class(overrides={**options, **({"sos": True} if arm == "sos=true" else {})})
        trainer.add_callback("on_train_batch_end", stop)
        try:
            trainer.train()
        except Reached:
            total = time.perf_counter() - start
    return {"total": total, "beside": seconds.get("ours", seconds["stock"]) - seconds["stock"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Run all in turn and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits.yaml", help="data YAML (%(default)s)")
    parser.add_argument("--model", default="yolov5n.yaml", help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--name", default="start", help="of the files in docs/bench (%(default)s)")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)  # a worker
    args = parser.parse_args(argv)

    from yolo_sos.builtin import resolve_data

    data = resolve_data(args.data)
    if args.arm:
        channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what Ultralytics prints
        print(json.dumps(first_step(args.arm, data, args.model)), file=channel, flush=True)
        return
    starts: dict[str, list[float]] = {name: [] for name in SNIPPETS}
    for _ in range(4 * args.repeats):
        for name, code in SNIPPETS.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            starts[name].append(1e3 * (time.perf_counter() - begin))
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for repeat in range(args.repeats):
        for arm in (*ARMS[repeat % 3 :], *ARMS[: repeat % 3]):
            worker = [sys.executable, __file__, f"--arm={arm}", f"--data={data}", f"--model={args.model}"]
            out = subprocess.run(worker, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            runs[arm].append(json.loads(out.stdout.splitlines()[-1]))
    less = {k: [a - b for a, b in zip(v, starts["empty"], strict=True)] for k, v in starts.items()}
    stock = median(r["total"] for r in runs["stock"])
    rows = []
    for arm, rs in runs.items():
        ratios = [r["total"] / s["total"] for r, s in zip(rs, runs["stock"], strict=True)]
        beside = [1e3 * r["beside"] for r in rs]
        rows.append(
            [arm, told([r["total"] for r in rs]), told(ratios), told(beside), f"{median(beside) / stock / 10:.3f} %"]
        )
    body = (
        f"Medians (least–largest) of {4 * args.repeats} and {args.repeats} fresh processes, in turn.\n\n"
        + table(["", "ms", "less an empty one, ms"], [[k, told(starts[k]), told(less[k])] for k in starts])
        + "\n\nTo the end of the first training step:\n\n"
        + table(["", "s", "× stock", "ours beside Ultralytics', ms", "of stock"], rows)
    )
    save(args.name, "Start-up", body, {"starts_ms": starts, "first_step": runs}, argv)


if __name__ == "__main__":
    main()
