# yolo-sos, AGPL-3.0
"""Train a small detector on five digits, fit it to the other five, calibrate and shift it. ``make demo`` runs it.

It prints a plain sentence on each part, and writes them with tables and pictures into one file that needs no other,
``runs/demo/demo.html``. A part is a function that takes the ``Demo`` and returns a ``Panel``; ``PANELS`` lists them.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from yolo_sos.builtin import resolve_data
from yolo_sos.core import NoMapError
from yolo_sos.files import link, write_text
from yolo_sos.markdown import markdown_table
from yolo_sos.yolo import calibrate_checkpoint, fit_checkpoint, shift_checkpoint, sweep_checkpoint
from yolo_sos.yolo.score import headline
from yolo_sos.yolo.sweep_report import recommended

# A digit in the mirror is none. A step after each batch, in place of one after 64 images: there are few of them.
TRAINING = {
    **{"epochs": 20, "imgsz": 128, "batch": 16, "nbs": 16, "optimizer": "AdamW", "lr0": 0.003, "warmup_epochs": 1},
    **{"mosaic": 0.0, "fliplr": 0.0, "device": "cpu", "workers": 0, "plots": False},
}
TRAINED = 5  # of the ten digits: 0 to 4 are trained, the others fitted
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
        data (str): The data YAML, of ten classes.
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

    @property
    def fitted(self) -> Path:
        """The checkpoint that was fitted to the other digits, too."""
        return self.best.with_name("best-fit.pt")

    @property
    def detector(self) -> tuple[Path, Any]:
        """The detector that the other panels work on, and its data: that of all digits unless the fit was refused."""
        return (self.fitted, resolve_data(self.data)) if self.fitted.is_file() else (self.best, None)

    def labelled(self, classes: range) -> str:
        """Return a data YAML of the same images, in which only some of the classes are labelled."""
        from ultralytics.data.utils import check_det_dataset, img2label_paths
        from ultralytics.utils import YAML

        splits = "train", "val", "test"
        content = check_det_dataset(resolve_data(self.data))
        root = self.folder / f"labels-{classes[0]}-{classes[-1]}"
        shutil.rmtree(root, ignore_errors=True)  # of an earlier run
        for split in splits:
            (root / "images" / split).mkdir(parents=True)
            (root / "labels" / split).mkdir(parents=True)
            for image in sorted(Path(content[split]).glob("*.jpg")):
                link(image, root / "images" / split / image.name)
                (label,) = img2label_paths([str(image)])
                lines = [line.split(maxsplit=1) for line in Path(label).read_text(encoding="utf-8").splitlines()]
                kept = [f"{classes.index(int(c))} {box}\n" for c, box in lines if int(c) in classes]
                write_text(root / "labels" / split / f"{image.stem}.txt", "".join(kept))
        names = {k: content["names"][c] for k, c in enumerate(classes)}
        YAML.save(root / "data.yaml", {"path": str(root), "names": names, **{s: f"images/{s}" for s in splits}})
        return str(root / "data.yaml")


def trained(demo: Demo) -> Panel:
    """Train the detector on half of the digits."""
    from ultralytics import YOLO

    data = demo.labelled(range(TRAINED))
    shutil.rmtree(demo.folder / "train", ignore_errors=True)  # of an earlier run
    start = time.perf_counter()
    yolo = YOLO(demo.model)
    yolo.train(data=data, project=str(demo.folder), name="train", exist_ok=True, **demo.training)
    seconds = time.perf_counter() - start
    with open(demo.folder / "train/results.csv", encoding="utf-8", newline="") as f:
        rows = [{key.strip(): value for key, value in row.items()} for row in csv.DictReader(f)]
    curves = {name: [float(row[f"metrics/{name}(B)"]) for row in rows] for name in ("mAP50", "mAP50-95")}
    return Panel(
        "A detector of five digits",
        f"A {Path(demo.model).stem} was trained from scratch on scenes of handwritten digits, of which only 0 to 4 are "
        f"labelled, for {len(rows)} epochs in {seconds:.0f} seconds; its mAP50 on the val split is "
        f"{max(curves['mAP50']):.3f}.",
        pictures=[
            ("mAP on the val split, by epoch", line_chart(curves)),
            (
                "What it finds in four test images, with its confidence: 5 to 9 it cannot name",
                detections(demo, demo.best),
            ),
        ],
    )


def taught(demo: Demo) -> Panel:
    """Fit it to the other digits without training, and compare the AP of each digit."""
    title = "Five digits more, without training"
    data, device = demo.labelled(range(TRAINED, 10)), demo.training["device"]
    start = time.perf_counter()
    report = fit_checkpoint(demo.best, data, add=True, images="all", val=False, device=device, exist_ok=True)
    seconds = time.perf_counter() - start
    if report.output is None:
        return Panel(title, f"Nothing was written: {report.refusal}.")
    before = average_precision(demo, demo.best, demo.labelled(range(TRAINED)))
    after = average_precision(demo, demo.fitted, demo.data)
    old, new = after[:TRAINED], after[TRAINED:]
    rows = [[str(c), f"{before[c]:.3f}" if c < TRAINED else "cannot name it", f"{x:.3f}"] for c, x in enumerate(after)]
    return Panel(
        title,
        f"In {seconds:.0f} seconds, without a training step, the class layers were given rows for 5 to 9, fitted to "
        f"{report.images['fit'] + report.images['selection']} images in which these are labelled: AP50-95 on the test "
        f"split is {np.mean(new):.3f} on average for these five, which the training took for background, against "
        f"{np.mean(old):.3f} for the trained ones, whose rows stay as they are (largest change of their AP: "
        f"{np.abs(old - before).max():.4f}).",
        [["digit", "AP50-95 before", "after"], *rows],
        [("The same four test images after the fit", detections(demo, demo.fitted))],
    )


def shifted(demo: Demo) -> Panel:
    """Shift it, and compare mAP and loss on the same weights."""
    report = shift_checkpoint(*demo.detector, device=demo.training["device"], exist_ok=True)
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
    points = sweep_checkpoint(*demo.detector, device=demo.training["device"], exist_ok=True, draws=1)
    best = recommended(points)
    sentence = "Each method was tried at every strength: from some point on a smaller norm costs loss and mAP. "
    if best is None:
        sentence += "None takes a hundredth of the squared norm at no cost."
    else:
        sentence += (
            "What is recommended, since held-out loss stays within half a per cent and mAP within .001, is "
            f"{f'{best.method} {best.argument}'.strip()}; it leaves {best.squared_norm_ratio:.0%} of the squared norm."
        )
    picture = beside(demo.detector[0], "-sweep.png").read_bytes()
    caption = "Held-out loss, deviation of the outputs and mAP over the squared norm that is left"
    return Panel("The trade-off", sentence, pictures=[(caption, picture)])


def calibrated(demo: Demo) -> Panel:
    """Make its scores probabilities, and show the reliability curve before and after."""
    title = "Scores as probabilities"
    try:
        report = calibrate_checkpoint(*demo.detector, device=demo.training["device"], exist_ok=True)
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
                beside(demo.detector[0], "-reliability.png").read_bytes(),
            )
        ],
    )


# Panels of the other operations on a checkpoint go here, one function each.
PANELS: tuple[Callable[[Demo], Panel], ...] = (trained, taught, calibrated, shifted, swept)


def beside(weights: Path, ending: str) -> Path:
    """Return a result's file beside a checkpoint."""
    return weights.with_name(weights.stem + ending)


def average_precision(demo: Demo, weights: Path, data: str) -> np.ndarray:
    """Return the AP50-95 of each class of a checkpoint on the test split."""
    from ultralytics import YOLO

    own = {k: demo.training[k] for k in ("imgsz", "batch", "device", "workers")}
    # Room for the detections of all classes: of five more, none of the old ones is crowded out.
    more = {"max_det": 1000, "plots": False, "verbose": False, "project": str(demo.folder), "name": "val"}
    return YOLO(weights).val(data=resolve_data(data), split="test", exist_ok=True, **own, **more).box.maps


def detections(demo: Demo, weights: Path, count: int = 4, side: int = 320) -> bytes:
    """Return a PNG of what a checkpoint finds in the first test images, side by side."""
    from ultralytics import YOLO
    from ultralytics.data.utils import check_det_dataset

    split = check_det_dataset(resolve_data(demo.data))["test"]
    paths = sorted(Path(split).glob("*.jpg"))[:count]
    images = [cv2.resize(cv2.imread(str(p)), (side, side), interpolation=cv2.INTER_CUBIC) for p in paths]
    own = {k: demo.training[k] for k in ("imgsz", "device")}
    results = YOLO(weights).predict(images, conf=0.25, verbose=False, **own)
    tiles = [np.pad(r.plot(line_width=2), ((0, 0), (0, 6), (0, 0)), constant_values=255) for r in results]
    return cv2.imencode(".png", np.hstack(tiles))[1].tobytes()


def line_chart(curves: dict[str, list[float]]) -> bytes:
    """Return a PNG of curves over epochs, counted from 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained", dpi=120)
    ax = figure.subplots()
    for name, values in curves.items():
        ax.plot(range(1, len(values) + 1), values, "o-", markersize=4, label=name)
    ax.set_xlabel("epoch")
    ax.xaxis.get_major_locator().set_params(integer=True)
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
