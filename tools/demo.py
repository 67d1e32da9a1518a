# yolo-sos, AGPL-3.0
"""Train a small detector on the embedded digits, shift it, and show what that did. ``make demo`` runs it.

It prints a plain sentence on each part, and writes them with tables and pictures into one file that needs no other,
``runs/demo/demo.html``. A part is a function that takes the ``Demo`` and returns a ``Panel``; ``PANELS`` lists them.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from yolo_sos.builtin import resolve_data
from yolo_sos.core import NoMapError
from yolo_sos.files import write_text
from yolo_sos.markdown import markdown_table
from yolo_sos.yolo import calibrate_checkpoint, shift_checkpoint, sweep_checkpoint
from yolo_sos.yolo.score import headline
from yolo_sos.yolo.sweep_report import recommended

# The recipe of the experiment digits, see cfg/experiments/digits: a digit in the mirror is none
TRAINING = {
    **{"epochs": 15, "imgsz": 128, "batch": 16, "optimizer": "SGD", "lr0": 0.02, "warmup_epochs": 1},
    **{"mosaic": 0.0, "fliplr": 0.0, "device": "cpu", "workers": 0, "plots": False},
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; } figure { margin: 1rem 0; } figcaption { color: #555; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; }
"""


@dataclass
class Panel:
    """A part of the demo.

    Attributes:
        title (str): Its title.
        sentence (str): What it shows, in plain words.
        table (list[list[str]]): The heads of the columns, then the rows; empty for none.
        pictures (list[tuple[str, bytes]]): Captions and PNG files.
    """

    title: str
    sentence: str
    table: list[list[str]] = field(default_factory=list)
    pictures: list[tuple[str, bytes]] = field(default_factory=list)

    def text(self) -> str:
        """Return the panel for a terminal."""
        return f"\n{self.title}\n{self.sentence}\n{markdown_table(self.table) if self.table else ''}"

    def html(self) -> str:
        """Return the panel as HTML, its pictures within."""
        parts = [f"<h2>{html.escape(self.title)}</h2>", f"<p>{html.escape(self.sentence)}</p>"]
        if self.table:
            head, *rows = ([html.escape(cell) for cell in row] for row in self.table)
            lines = [f"<tr><th>{'</th><th>'.join(head)}</th></tr>"]
            lines += [f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows]
            parts.append(f"<table>{''.join(lines)}</table>")
        for caption, png in self.pictures:
            source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            text = html.escape(caption)
            parts.append(f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>')
        return "\n".join(parts)


@dataclass
class Demo:
    """What the panels share.

    Attributes:
        folder (Path): Where everything is written.
        data (str): The data YAML.
        model (str): The model to train.
        training (dict): Arguments of the training.
    """

    folder: Path
    data: str = "digits.yaml"
    model: str = "yolov5n.yaml"
    training: dict[str, Any] = field(default_factory=lambda: dict(TRAINING))

    @property
    def best(self) -> Path:
        """The trained checkpoint."""
        return self.folder / "train/weights/best.pt"


def trained(demo: Demo) -> Panel:
    """Train the detector."""
    from ultralytics import YOLO

    start = time.perf_counter()
    yolo = YOLO(demo.model)
    yolo.train(data=resolve_data(demo.data), project=str(demo.folder), name="train", exist_ok=True, **demo.training)
    seconds = time.perf_counter() - start
    with open(demo.folder / "train/results.csv", encoding="utf-8", newline="") as f:
        rows = [{key.strip(): value for key, value in row.items()} for row in csv.DictReader(f)]
    curves = {name: [float(row[f"metrics/{name}(B)"]) for row in rows] for name in ("mAP50", "mAP50-95")}
    return Panel(
        "A detector",
        f"A {Path(demo.model).stem} was trained from scratch on real handwritten digits, composed into scenes, for "
        f"{len(rows)} epochs in {seconds:.0f} seconds; its mAP50 on the val split is {max(curves['mAP50']):.3f}.",
        pictures=[
            ("mAP on the val split, by epoch", line_chart(curves)),
            ("What it finds in four test images, with its confidence", detections(demo, demo.best)),
        ],
    )


def shifted(demo: Demo) -> Panel:
    """Shift it, and compare mAP and loss on the same weights."""
    report = shift_checkpoint(demo.best, device=demo.training["device"], exist_ok=True)
    if report.output is None:
        return Panel("A shift", report.refusal())
    norms = [sum(getattr(layer, key) ** 2 for layer in report.layers) for key in ("norm_before", "norm_after")]
    main = headline(report.metrics_before)
    metrics = [name for name in ("metrics/mAP50(B)", main) if name in report.metrics_before]
    rows = [
        ["squared norm of the final layers", *norms],
        ["loss per held-out training image", report.heldout_before, report.heldout_after],
        *(
            [f"{name.removeprefix('metrics/')}, val split", report.metrics_before[name], report.metrics_after[name]]
            for name in metrics
        ),
    ]
    change = report.metrics_after[main] - report.metrics_before[main]
    return Panel(
        "A shift",
        f"Without a training step, the final layers were given smaller weights with nearly the same outputs: "
        f"{report.squared_norm_ratio:.0%} of their squared norm is left, the held-out loss changes by "
        f"{report.heldout_after / report.heldout_before - 1:+.2%} and mAP50-95 by {change:+.4f}.",
        [["", "before", "after", "change"], *([n, f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}"] for n, a, b in rows)],
        [("The same four test images after the shift", detections(demo, Path(report.output)))],
    )


def swept(demo: Demo) -> Panel:
    """Trace every method over its range."""
    points = sweep_checkpoint(demo.best, device=demo.training["device"], exist_ok=True, draws=1)
    best = recommended(points)
    sentence = "Each method was tried at every strength: from some point on a smaller norm costs loss and mAP. "
    if best is None:
        sentence += "None takes a hundredth of the squared norm at no cost."
    else:
        sentence += (
            "What is recommended, since held-out loss stays within half a per cent and mAP within .001, is "
            f"{f'{best.method} {best.argument}'.strip()}; it leaves {best.squared_norm_ratio:.0%} of the squared norm."
        )
    picture = demo.best.with_name("best-sweep.png").read_bytes()
    caption = "Held-out loss, deviation of the outputs and mAP over the squared norm that is left"
    return Panel("The trade-off", sentence, pictures=[(caption, picture)])


def calibrated(demo: Demo) -> Panel:
    """Make its scores probabilities, and show the reliability curve before and after."""
    title = "Scores as probabilities"
    try:
        report = calibrate_checkpoint(demo.best, device=demo.training["device"], exist_ok=True)
    except NoMapError as e:
        return Panel(title, f"No map of the scores makes them probabilities: {e}.")
    if report.output is None:
        return Panel(title, report.refusal())
    (branch,) = report.branches
    before, after = branch.accuracies()[headline(branch.metrics_before)]
    return Panel(
        title,
        f"On the {branch.judged_on['split']} split, scores differed from the share of detections that are right by "
        f"{branch.before.ece:.4f} on average (expected calibration error); with one map of all scores, fitted on the "
        f"{branch.fitted_on['split']} split and folded into the final layers, they differ by {branch.after.ece:.4f}, "
        f"and mAP50-95 changes by {after - before:+.4f}.",
        pictures=[
            (
                "Share of detections that are right over their score, before and after; below, their number",
                demo.best.with_name("best-reliability.png").read_bytes(),
            )
        ],
    )


# Panels of the other operations on a checkpoint go here, one function each.
PANELS: tuple[Callable[[Demo], Panel], ...] = (trained, shifted, swept, calibrated)


def detections(demo: Demo, weights: Path, count: int = 4, side: int = 320) -> bytes:
    """Return a PNG of what a checkpoint finds in the first test images, side by side."""
    from ultralytics import YOLO
    from ultralytics.data.utils import check_det_dataset
    from ultralytics.utils.plotting import colors

    split = check_det_dataset(resolve_data(demo.data))["test"]
    images = sorted(Path(split).iterdir())[:count]
    results = YOLO(weights).predict(
        [str(path) for path in images],
        conf=0.25,
        imgsz=demo.training["imgsz"],
        device=demo.training["device"],
        verbose=False,
    )
    tiles = []
    for result in results:
        scale = side / result.orig_img.shape[1]
        tile = cv2.resize(result.orig_img, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        for *box, score, label in result.boxes.data.tolist():
            x1, y1, x2, y2 = (round(v * scale) for v in box)
            colour, text = colors(int(label), bgr=True), f"{result.names[int(label)]} {score:.2f}"
            cv2.rectangle(tile, (x1, y1), (x2, y2), colour, 2)
            cv2.rectangle(tile, (x1, max(y1 - 16, 0)), (x1 + 9 * len(text), max(y1, 16)), colour, cv2.FILLED)
            white = (255, 255, 255)
            cv2.putText(tile, text, (x1 + 2, max(y1, 16) - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.45, white, 1, cv2.LINE_AA)
        tiles.append(np.pad(tile, ((0, 0), (0, 6), (0, 0)), constant_values=255))
    return cv2.imencode(".png", np.hstack(tiles))[1].tobytes()


def line_chart(curves: dict[str, list[float]]) -> bytes:
    """Return a PNG of curves over epochs, counted from 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained", dpi=120)
    ax = figure.subplots()
    for name, values in curves.items():
        ax.plot(range(1, len(values) + 1), values, "o-", markersize=4, label=name)
    ax.set_xlabel("epoch")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.25)
    ax.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def run(demo: Demo, panels: Sequence[Callable[[Demo], Panel]] = PANELS) -> Path:
    """Make the panels, print them, and write the page.

    Returns:
        (Path): The page.
    """
    start = time.perf_counter()
    done = [panel(demo) for panel in panels]
    page = demo.folder / "demo.html"
    body = "\n".join(panel.html() for panel in done)
    took = f"{time.perf_counter() - start:.0f} seconds"
    write_text(
        page,
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>yolo-sos: demo</title><style>{STYLE}</style>\n'
        f"<h1>yolo-sos</h1>\n<p>Made by <code>make demo</code> in {took}.</p>\n{body}\n</html>\n",
    )
    print("".join(panel.text() for panel in done))
    print(f"All of it, with pictures: {page} ({took})")
    return page


if __name__ == "__main__":
    run(Demo(Path("runs/demo").resolve()))
