# yolo-sos, AGPL-3.0
"""What the fit of a checkpoint did: as a table, as JSON, and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ultralytics.utils import plt_settings

from yolo_sos.core import FitReport
from yolo_sos.files import as_json, save_figure
from yolo_sos.yolo.score import headline
from yolo_sos.yolo.shift_report import aligned

FEW = 5  # boxes: with fewer, what a class is fitted to is a matter of chance
TALL = 40  # classes at most that the picture shows


@dataclass(frozen=True)
class ClassRecord:
    """What is known of one class.

    Attributes:
        name (str): Its name.
        known (bool): Whether the model knew it by name.
        images (int): Training images that show it.
        boxes (int): Its boxes in the training images; of a classifier its images.
        shown (float): The sum of its targets over the rows that were fitted on: each in [0, 1], by the overlap of the
            predicted box.
        before (float | None): AP (mAP50-95, or the share of its images that a classifier gets right) on the val split
            of the model before; None where the class was unknown to it, or without ``val``.
        after (float | None): The same of the written file; None without ``val`` or without the class there.
    """

    name: str
    known: bool
    images: int
    boxes: int
    shown: float
    before: float | None
    after: float | None


@dataclass(frozen=True)
class CheckpointFitReport(FitReport):
    """What the fit of a checkpoint did; ``heldout_after`` is of the file as it was written.

    Attributes:
        model (str): The checkpoint.
        data (str): The data set.
        output (str | None): The file written; None if nothing was.
        images (dict[str, int]): Number of images to fit on (``fit``), that the ridge was chosen by and that were fitted
            on then (``selection``), and held out for the guard (``heldout``).
        unfitted (tuple[str, ...]): Class layers whose rows show no class, see ``ClassFit``.
        settings (dict): The settings, as in ``fit_checkpoint``.
        classes (tuple[ClassRecord, ...]): One per class of the data set.
        metrics_before (dict[str, float]): Ultralytics' metrics on the val split before, if the model knew a class.
        metrics_after (dict[str, float]): The same of the written file; with ``add`` of the new classes by themselves.
        old_before (dict[str, float]): With ``add`` and ``old``: metrics of the old classes on their val split.
        old_after (dict[str, float]): The same of the written file.
    """

    model: str
    data: str
    output: str | None
    images: dict[str, int]
    unfitted: tuple[str, ...]
    settings: dict[str, Any]
    classes: tuple[ClassRecord, ...]
    metrics_before: dict[str, float]
    metrics_after: dict[str, float]
    old_before: dict[str, float]
    old_after: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {"explained": self.explained, **asdict(self)}

    def to_json(self) -> str:
        """Return the report as JSON; what is not a number there is null."""
        return as_json(self.to_dict())

    def table(self) -> str:
        """Return the report as text: a row per layer and per class, then the totals."""
        rows = [["layer", "level", "classes", "d", "rows", "ridge", "explained"]]
        for r in self.layers:
            counts = map(str, (r.level, r.classes, r.d, r.rows))
            rows.append([r.name, *counts, f"{r.ridge:.4g}", f"{r.explained:.1%}"])
        lines = aligned(rows, left=1)
        if self.unfitted:
            lines.append(f"no row shows a class, so new ones score low: {', '.join(self.unfitted)}")
        lines.append("")
        rows = [["class", "images", "boxes", "targets", "val before", "after"]]
        for c in self.classes:
            scores = ["" if x is None else f"{x:.3f}" for x in (c.before, c.after)]
            rows.append([c.name, str(c.images), str(c.boxes), f"{c.shown:.0f}", *scores])
        lines += [*aligned(rows, left=1), ""]
        images = self.images["fit"] + self.images["selection"]
        seconds = sum(self.milliseconds.values()) / 1e3
        new = " of the new classes by themselves" if self.settings["add"] else ""
        change = self.heldout_after / self.heldout_before - 1
        lines.append(
            f"held-out loss{new} {self.heldout_before:.5g} → {self.heldout_after:.5g} ({change:+.1%}), as written, on "
            f"{self.images['heldout']} images; fitted on {images} others, {seconds:.1f} s"
        )
        for what, before, after in (
            (f"val split{new}", self.metrics_before, self.metrics_after),
            ("old classes", self.old_before, self.old_after),
        ):
            if after:
                key = headline(after)
                was = f"{before[key]:.4f} → " if before else ""
                lines.append(f"{what}: {key} {was}{after[key]:.4f}")
        if few := [f"{c.name} ({c.boxes})" for c in self.classes if c.boxes < FEW]:
            lines.append(f"Fewer than {FEW} boxes, so their fit is a matter of chance: {', '.join(few)}")
        return "\n".join(lines)

    @plt_settings()
    def plot(self, path: Path, on_plot: Callable[[Path], None] | None = None) -> None:
        """Draw the score of each class on the val split, before where the model knew it, and after; the best on top."""
        import matplotlib.pyplot as plt

        scored = sorted((c for c in self.classes if c.after is not None), key=lambda c: c.after or 0.0)
        shown = [*scored[: TALL // 2], *scored[-(TALL - TALL // 2) :]] if len(scored) > TALL else scored
        key = headline(self.metrics_after)
        fig, ax = plt.subplots(figsize=(7, 1.4 + 0.28 * len(shown)), layout="constrained")
        places = range(len(shown))
        ax.barh(places, [c.after or 0.0 for c in shown], color="#2a6f97", height=0.7, label="fitted, no training")
        if any(c.before is not None for c in shown):
            points = [(c.before, i) for i, c in enumerate(shown) if c.before is not None]
            ax.plot(*zip(*points, strict=True), "D", color="#e07a5f", markersize=5, label="before")
        ax.set_yticks(places, [f"{c.name}  ({c.boxes})" for c in shown])
        for i, c in enumerate(shown):
            width = c.after or 0.0
            inside = width > 0.08
            side, color = ("right", "white") if inside else ("left", "black")
            ax.text(width - 0.008 if inside else width + 0.008, i, f"{width:.2f}", ha=side, va="center", color=color)
        ax.axvline(self.metrics_after[key], color="black", linewidth=1, linestyle="--", label=f"mean {key}")
        ax.set_xlim(0, 1)
        ax.set_ylim(-0.7, len(shown) - 0.3)
        ax.set_xlabel("top-1 accuracy" if "top1" in key else "AP50-95 on the val split")
        left_out = f", the worst and best {TALL // 2} of {len(scored)} classes" if len(scored) > TALL else ""
        ax.set_title(f"{Path(self.model).name} fitted to {Path(self.data).name}{left_out}\n(boxes to train on)")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(loc="lower right", fontsize=8)
        save_figure(fig, path, dpi=150)
        plt.close(fig)
        if on_plot:
            on_plot(path)


def class_records(
    names: dict[int, str],
    known: dict[int, int],
    shown: Sequence[Sequence[int]],
    fitted: Sequence[float],
    before: dict[int, float],
    after: dict[int, float],
) -> tuple[ClassRecord, ...]:
    """Return a record per class; ``shown`` holds the class of every object of each training image."""
    images, boxes = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for of in shown:
        for c in of:
            boxes[c] += 1
        for c in set(of):
            images[c] += 1
    return tuple(
        ClassRecord(
            name, k in known, images[k], boxes[k], fitted[k], before.get(k) if k in known else None, after.get(k)
        )
        for k, name in names.items()
    )
