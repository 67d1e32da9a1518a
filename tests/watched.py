# yolo-sos, AGPL-3.0
"""Tiny runs, watched: weights before and after each shift, the images it saw, and what was logged."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ultralytics import YOLO
from ultralytics.utils.torch_utils import unwrap_model

from yolo_sos.core import SOS

Weights = dict[str, torch.Tensor]
EPOCHS = 4


def weights_of(trainer) -> dict[str, Weights]:
    """Return copies of what the live model and the EMA hold."""
    models = {"model": unwrap_model(trainer.model), "ema": trainer.ema.ema}
    return {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}


def same(a: Weights, b: Weights) -> bool:
    """Tell whether two states are equal bit for bit."""
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the lines of a CSV file, each of which must have as many fields as the first."""
    with open(path, encoding="utf-8", newline="") as f:
        header, *lines = list(csv.reader(f))
    assert all(len(line) == len(header) for line in lines), "lines of different lengths"
    return [dict(zip(header, line, strict=True)) for line in lines]


@dataclass
class Run:
    """What happened in a run; epochs are counted from 1."""

    trained: dict[int, dict[str, Weights]] = field(default_factory=dict)  # after the last batch, before a shift
    ended: dict[int, dict[str, Weights]] = field(default_factory=dict)  # when the epoch's callbacks run
    validated: dict[int, dict[str, Weights]] = field(default_factory=dict)  # when validation begins
    images: dict[int, list[list[str]]] = field(default_factory=lambda: defaultdict(list))  # fit, held-out per model
    log: list[str] = field(default_factory=list)
    trainer: Any = None
    error: BaseException | None = None

    @property
    def save_dir(self) -> Path:
        return self.trainer.save_dir

    @property
    def results(self) -> list[dict[str, str]]:
        return read_csv(self.save_dir / "results.csv")

    @property
    def shifts(self) -> list[dict[str, str]]:
        path = self.save_dir / "sos.csv"
        return read_csv(path) if path.exists() else []

    def watch(self, model: YOLO) -> None:
        """Register callbacks that take notes."""

        def note(notes: dict[int, Any]) -> Callable[[Any], None]:
            def callback(_) -> None:
                notes[self.trainer.epoch + 1] = weights_of(self.trainer)

            return callback

        def start(trainer) -> None:
            self.trainer = trainer

        model.add_callback("on_pretrain_routine_start", start)
        model.add_callback("on_train_batch_end", note(self.trained))
        model.add_callback("on_train_epoch_end", note(self.ended))
        model.add_callback("on_val_start", lambda v: note(self.validated)(v) if v.training else None)

    def shift(self, sos: SOS, batches, heldout=(), **kwargs):
        """Shift as ever, and note the images."""
        seen: list[list[str]] = [[], []]

        def noting(batches, files):
            for batch in batches:
                files += [Path(f).name for f in batch["im_file"]]
                yield batch

        report = REAL_SHIFT(sos, noting(batches, seen[0]), noting(heldout, seen[1]), **kwargs)
        self.images[self.trainer.epoch + 1] += seen
        return report


REAL_SHIFT = SOS.shift
