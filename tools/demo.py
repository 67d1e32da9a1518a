# yolo-sos, AGPL-3.0
"""Train a small detector on the embedded digits with SOS, and say what the shifts did. ``make demo`` runs it."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from ultralytics.utils import YAML

COMMAND = (
    "train data=digits.yaml model=yolov5n.yaml imgsz=160 epochs=15 batch=16 optimizer=SGD lr0=0.02 mosaic=0 fliplr=0 "
    "warmup_epochs=1 device=cpu project={project} name=digits exist_ok=True sos=true"
)


def main() -> None:
    """Run the README's command and print the table of its epochs."""
    project = Path("runs/demo").resolve()
    arguments = COMMAND.format(project=project).split()
    print("yolo-sos " + " ".join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", "yolo_sos.cli", *arguments], check=True)

    run = project / "digits"
    with open(run / "results.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    columns = {
        "epoch": "epoch",
        "mAP50": "metrics/mAP50(B)",
        "mAP50-95": "metrics/mAP50-95(B)",
        "norm ratio": "sos/norm_ratio",
        "held-out before": "sos/heldout_before",
        "held-out after": "sos/heldout_after",
        "step t": "sos/t",
        "shift ms": "sos/ms",
    }
    print("\n" + "".join(f"{name:>16}" for name in columns))
    for row in rows:
        print("".join(f"{float(row[key]):>16.4g}" for key in columns.values()))
    seconds = float(rows[-1]["time"])
    shifting = sum(float(row["sos/ms"]) for row in rows if row["sos/ms"] != "nan") / 1e3
    print(f"\nShifts took {shifting:.1f} s of {seconds:.0f} s of training ({shifting / seconds:.1%}).")
    print(f"Settings: {YAML.load(run / 'sos.yaml')}")
    print(f"Curves: {run / 'sos.png'} and {run / 'results.png'}; every layer and shift: {run / 'sos.csv'}")


if __name__ == "__main__":
    main()
