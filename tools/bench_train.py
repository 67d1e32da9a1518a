#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""Time training epochs of stock Ultralytics, SOS, SOS at every epoch, and SAM, side by side.

    python tools/bench_train.py --data=digits.yaml --model=yolov5n.yaml --imgsz=160 --epochs=10
    python tools/bench_train.py --data=VOC.yaml --model=yolov5n.yaml --imgsz=640 --device=0 --amp

Each arm trains in a process of its own, the same model, data and seed, and they take turns epoch by epoch: what slows
the machine down for a while slows all of them down. An epoch is timed from its start to the end of its training, the
shift included, validation not: it would only dilute the cost. Batches are loaded in the process itself
(workers=0), as a loader that works ahead would do so in the turn of another.

SOS's share is told twice: as the ratio of the arms' seconds, and as the seconds of the shifts over those of the other
epochs of the same arm, which is far less noisy. Results go to docs/bench/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench_common import Peak, save, spread, table, told

ARMS = {
    "stock": {},
    "sos": {"sos": True, "sos_start": 0.5},  # by default there is one shift, at the end: too few to set epochs against
    "sos-every": {"sos": True, "sos_start": 0.01, "sos_interval": 1},
    "sam": {"sharpness_aware": "sam"},
}
PHASES = ("sample", "forward", "rows", "solve", "guard", "write")


def work(arm: str, options: dict[str, Any]) -> None:
    """Train one arm in this process, an epoch for each line that arrives; answer each with a record in JSON."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ultralytics prints goes to its log
    import torch
    from ultralytics.models.yolo.detect import DetectionTrainer

    from yolo_sos import SOSDetectionTrainer

    base = DetectionTrainer if arm == "stock" else SOSDetectionTrainer
    peak, record = Peak(options["device"]), {}

    def clock() -> float:
        if peak.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Probe(base):  # type: ignore[misc, valid-type]
        def _shift_everywhere(self, models: dict[str, Any]) -> dict[str, Any]:
            record["step_mb"] = peak.mb
            peak.reset()
            start = clock()
            reports = super()._shift_everywhere(models)
            record["shift_s"] = clock() - start
            record["shift_mb"] = peak.mb
            record["ms"] = {p: sum(r.milliseconds[p] for r in reports.values()) for p in PHASES}
            return reports

    def begin(trainer: Any) -> None:
        print(json.dumps(record), file=channel)
        record.clear()
        if not sys.stdin.readline():
            raise SystemExit("The benchmark is gone.")
        peak.reset()
        record["start"] = clock()

    def end(trainer: Any) -> None:
        record["seconds"] = clock() - record.pop("start")
        record.setdefault("step_mb", peak.mb)

    trainer = Probe(overrides={**options, **ARMS[arm]})
    trainer.add_callback("on_train_epoch_start", begin)
    trainer.add_callback("on_train_epoch_end", end)
    trainer.train()
    print(json.dumps(record), file=channel)


def turns(arms: Sequence[str], options: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Train all arms, taking turns epoch by epoch, each round in another order; return their records."""
    records: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        workers = {}
        try:
            for arm in arms:
                settings = json.dumps({**options, "project": folder, "name": arm})
                log = open(Path(folder) / f"{arm}.log", "w")  # noqa: SIM115, the worker outlives this block
                workers[arm] = subprocess.Popen(
                    [sys.executable, __file__, f"--arm={arm}", f"--settings={settings}"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
                listen(workers[arm], log.name)  # one at a time: none sets up in the turn of another
            for epoch in range(options["epochs"]):
                shift = epoch % len(arms)
                for arm in (*arms[shift:], *arms[:shift]):
                    workers[arm].stdin.write("go\n")
                    workers[arm].stdin.flush()
                    records[arm].append(listen(workers[arm], str(Path(folder) / f"{arm}.log")))
                print(f"epoch {epoch + 1}:", {a: round(r[-1]["seconds"], 2) for a, r in records.items()}, flush=True)
            for worker in workers.values():
                worker.wait()
        finally:
            for worker in workers.values():
                worker.kill()
                worker.wait()
    return records


def listen(worker: subprocess.Popen, log: str) -> dict[str, Any]:
    """Return the next record of a worker; raise a RuntimeError with the end of its log if there is none."""
    line = worker.stdout.readline()  # type: ignore[union-attr]
    if not line:
        raise RuntimeError(f"A training ended early:\n{Path(log).read_text()[-2000:]}")
    return json.loads(line)


def summarize(records: dict[str, list[dict[str, Any]]], interval: int) -> tuple[str, dict[str, Any]]:
    """Return tables in Markdown, and the same as plain values.

    Args:
        records (dict): Of each arm, one record per epoch.
        interval (int): Epochs from one shift to the next in the arm ``sos``.
    """
    seconds = {arm: [r["seconds"] for r in rs] for arm, rs in records.items()}
    due = [i for i, r in enumerate(records["sos"]) if "ms" in r]
    # As many epochs as whole intervals have, so that each shift is set against what it is the price of.
    active = range(due[0], max(due[0] + (len(seconds["sos"]) - due[0]) // interval * interval, due[0] + 1))
    warm = range(1, len(seconds["stock"]))  # the first epoch warms up
    rows, data = [], {}
    for arm in seconds:
        window = active if arm == "sos" else warm
        ratios = [seconds[arm][i] / seconds["stock"][i] for i in window]
        total = sum(seconds[arm][i] for i in window) / sum(seconds["stock"][i] for i in window)
        bare = [r["seconds"] - r.get("shift_s", 0.0) for r in records[arm][1:]]
        shifts = [r["shift_s"] for r in records[arm] if "ms" in r]
        every = interval if arm == "sos" else 1
        direct = 1 + median(shifts) / (every * median(bare)) if shifts else None
        peaks = [max(r["step_mb"], r.get("shift_mb", 0.0)) for r in records[arm]]
        data[arm] = {
            "seconds": seconds[arm],
            "ratio_of_sums": total,
            "epoch_ratio": spread(ratios),
            "direct": direct,
            "default": 1 + median(shifts) / (len(records[arm]) * median(bare)) if shifts else None,
            "shift_s": spread(shifts) if shifts else None,
            "peak_mb": max(peaks),
        }
        told_shifts = told([1e3 * s for s in shifts]) if shifts else "–"
        rows.append(
            [
                arm,
                told(seconds[arm][1:]),
                f"{total:.3f}",
                told(ratios),
                f"{direct:.4f}" if direct else "–",
                told_shifts,
                f"{max(peaks):.0f}",
            ]
        )
    head = ["arm", "epoch, s", "× stock", "× stock by epoch", "× by shift time", "one shift, ms", "peak MB"]
    parts, memory = breakdown(records["sos-every"] if "sos-every" in records else records["sos"])
    data.update(breakdown=parts, memory=memory, active_epochs=[i + 1 for i in active])
    wall = parts["wall"]["median"]
    lines = [[p, f"{parts[p]['median']:.1f}", f"{100 * parts[p]['median'] / wall:.0f} %"] for p in parts]
    text = (
        f"Medians (least–largest). `sos` is compared over epochs {active[0] + 1} to {active[-1] + 1}, in which it is "
        f"active, the others from the second on. “× by shift time”: 1 + shift / ({interval} epochs of the same arm "
        "without one; `sos-every`: 1 epoch). By default a run shifts once, at the end: over its "
        f"{len(records['sos'])} epochs this one would take × {data['sos']['default']:.4f}.\n\n"
        + table(head, rows)
        + "\n\nOne shift of both models, EMA and live, by phase:\n\n"
        + table(["phase", "ms", "of the whole"], lines)
        + f"\n\nPeak memory while training an epoch {memory['step_mb']:.0f} MB, during its shift "
        f"{memory['shift_mb']:.0f} MB."
    )
    return text, data


def breakdown(records: Sequence[dict[str, Any]]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return the time of each phase with what is left of the whole, in ms, and the peaks of step and shift in MB."""
    shifts = [r for r in records if "ms" in r]
    parts = {phase: spread([r["ms"][phase] for r in shifts]) for phase in PHASES}
    parts["other"] = spread([1e3 * r["shift_s"] - sum(r["ms"].values()) for r in shifts])
    parts["wall"] = spread([1e3 * r["shift_s"] for r in shifts])
    return parts, {key: max(r[key] for r in shifts) for key in ("step_mb", "shift_mb")}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the arms and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits.yaml", help="data YAML (%(default)s)")
    parser.add_argument("--model", default="yolov5n.yaml", help="(%(default)s)")
    parser.add_argument("--imgsz", type=int, default=160, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, or the number of a GPU (%(default)s)")
    parser.add_argument("--amp", action="store_true", help="mixed precision, on a GPU")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="(all); stock and sos are needed")
    parser.add_argument("--name", default="train", help="of the files in docs/bench (%(default)s)")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # a worker
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.arm:
        work(args.arm, json.loads(args.settings))
        return
    if missing := {"stock", "sos"} - set(args.arms):
        parser.error(f"--arms lacks {', '.join(sorted(missing))}: ratios need both.")

    from yolo_sos.builtin import resolve_data
    from yolo_sos.config import SOSConfig

    options = {key: getattr(args, key) for key in ("model", "imgsz", "batch", "epochs", "seed", "device", "amp")}
    options["data"] = resolve_data(args.data)
    # nbs: a step per batch; val and plots: not what is measured here.
    options.update(nbs=args.batch, workers=0, val=False, plots=False, exist_ok=True)
    config = SOSConfig.from_dict(ARMS["sos"])
    records = turns(args.arms, options)
    text, data = summarize(records, config.sos_interval)
    shown = {k: v for k, v in options.items() if k != "data"} | {"model": Path(args.model).name}
    told_settings = ", ".join(f"{k}={v}" for k, v in shown.items())
    told_sos = ", ".join(f"{k}={v}" for k, v in config.to_dict().items() if k.startswith("sos_") and v is not None)
    save(
        args.name,
        f"Training epochs, side by side: {Path(args.model).stem} on {'/'.join(Path(args.data).parts[-2:])}",
        f"{text}\n\n{told_settings}; {told_sos}.",
        {"settings": shown, "sos": config.to_dict(), **data, "records": records},
        argv,
    )


if __name__ == "__main__":
    main()
