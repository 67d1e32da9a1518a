# yolo-sos, AGPL-3.0
"""Train a small detector on the embedded digits with SOS, and say what the shifts did. ``make demo`` runs it."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

COMMAND = (
    "train data=digits.yaml model=yolov5n.yaml imgsz=160 epochs=15 batch=16 optimizer=SGD lr0=0.02 mosaic=0 fliplr=0 "
    "warmup_epochs=1 device=cpu project={project} name=digits exist_ok=True sos=true"
)


def main() -> None:
    """Train, and print the mAP of each epoch and what the shift did."""
    project = Path("runs/demo").resolve()
    arguments = COMMAND.format(project=project).split()
    print("yolo-sos " + " ".join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", "yolo_sos.cli", *arguments], check=True)

    run = project / "digits"
    with open(run / "results.csv", encoding="utf-8", newline="") as f:
        print("\n" + summary(list(csv.DictReader(f))))
    print(f"Settings: {run / 'sos.yaml'}; every layer and shift: {run / 'sos.csv'}")
    print(f"Curves: {run / 'sos.png'} and {run / 'results.png'}")


def summary(rows: list[dict[str, str]]) -> str:
    """Tell what ``results.csv`` holds: the mAP of each epoch, and what each shift did to the model that is saved.

    Args:
        rows (list[dict[str, str]]): The rows of the file, in its order.
    """
    lines = [f"{'epoch':>5}{'mAP50':>10}{'mAP50-95':>10}"]
    for row in rows:
        mark = "  after a shift" if float(row["sos/t"]) > 0 else ""  # nan where none was due
        maps = [float(row[f"metrics/{name}(B)"]) for name in ("mAP50", "mAP50-95")]
        lines.append(f"{row['epoch']:>5}" + "".join(f"{value:>10.4f}" for value in maps) + mark)

    shifts = [row for row in rows if math.isfinite(float(row["sos/t"]))]
    lines.append("")
    for row in shifts:
        ratio, before, after, t = (
            float(row[f"sos/{name}"]) for name in ("squared_norm_ratio", "heldout_before", "heldout_after", "t")
        )
        if t == 0:
            lines.append(
                f"Epoch {row['epoch']}: not shifted, as no step kept the loss on the held-out training images."
            )
            continue
        lines.append(
            f"Epoch {row['epoch']}: the shift left {ratio:.0%} of the squared norm of the final layers. The loss on "
            f"the held-out training images went from {before:.4g} to {after:.4g} ({after / before - 1:+.2%})."
        )
    seconds, shifting = float(rows[-1]["time"]), sum(float(row["sos/ms"]) for row in shifts) / 1e3
    lines.append(f"The shifts took {shifting:.1f} s of {seconds:.0f} s of training ({shifting / seconds:.1%}).")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
