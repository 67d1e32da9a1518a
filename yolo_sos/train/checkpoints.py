# yolo-sos, AGPL-3.0
"""What a trainer's checkpoints hold more than the host's, and the shift of those that no shift has reached."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, RANK, colorstr
from ultralytics.utils.patches import torch_load

from yolo_sos import __version__
from yolo_sos.config import CHECKPOINT_KEY, SOSConfig
from yolo_sos.core import ShiftReport
from yolo_sos.files import atomic_path
from yolo_sos.train.averaging import AVERAGED
from yolo_sos.train.record import ShiftLog, log_line
from yolo_sos.train.sampling import preserve_rng

if TYPE_CHECKING:
    from ultralytics.engine.trainer import BaseTrainer
else:
    BaseTrainer = object  # a mixin: the trainer comes from the class that uses it

PREFIX = colorstr("SOS: ")


class Checkpoints(BaseTrainer):
    """Saving: whole files, our settings in them, and at the end no ``best.pt`` that was left out.

    ``best.pt`` may be of an epoch before the first shift, and so may ``last.pt`` when patience ended the run. Such a
    checkpoint is shifted when training has ended, by the same rules: what is deployed is what was asked for.
    """

    sos: SOSConfig
    wdir: Path
    last: Path
    best: Path
    _averaged: int
    _shift_log: ShiftLog

    if TYPE_CHECKING:

        def _shift_models(self, models: dict[str, nn.Module]) -> dict[str, ShiftReport]: ...

    def save_model(self) -> bool:
        """Save as the host does, add the settings under a key of their own, and put whole files in place at once."""
        if self.sos.stock:
            return super().save_model()
        with TemporaryDirectory(prefix=".weights", dir=self.save_dir) as folder:
            with self._redirected(Path(folder)):
                saved = super().save_model()
            # Plain values only: a class of ours would make the checkpoint unreadable without yolo_sos.
            ckpt = torch_load(Path(folder) / "last.pt", map_location="cpu")
            ckpt[CHECKPOINT_KEY] = {"version": __version__, "settings": self.sos.to_dict()}
            if self.sos.swa is not None:
                ckpt[CHECKPOINT_KEY][AVERAGED] = self._averaged
            # last, best and epochN are one and the same
            _write(ckpt, *(self.wdir / file.name for file in Path(folder).glob("*.pt")))
        return saved

    @contextmanager
    def _redirected(self, folder: Path) -> Iterator[None]:
        places = self.wdir, self.last, self.best
        self.wdir, self.last, self.best = folder, folder / self.last.name, folder / self.best.name
        try:
            yield
        finally:
            self.wdir, self.last, self.best = places

    def final_eval(self) -> None:
        """Shift what no shift has reached, then finish as the host does: strip checkpoints and validate ``best.pt``."""
        if self.sos.sos and RANK in {-1, 0}:
            with preserve_rng():
                for path in (self.last, self.best):
                    if path.exists():
                        self._shift_left_out(path)
        super().final_eval()

    def _shift_left_out(self, path: Path) -> None:
        ckpt = torch_load(path, map_location="cpu")
        epoch = ckpt["epoch"] + 1
        if any(int(row["epoch"]) <= epoch for row in self._shift_log.rows):  # one that the guard refused counts
            return
        model = ckpt["ema"].float().to(self.device)
        report = self._shift_models({path.stem: model})[path.stem]
        self._shift_log.add(epoch, {path.stem: report})
        LOGGER.info(f"{PREFIX}{path.name}, of epoch {epoch}: {log_line({'ema': report})}")
        ckpt["ema"] = model.half().cpu()
        _write(ckpt, path)


def _write(ckpt: dict[str, Any], *paths: Path) -> None:
    buffer = io.BytesIO()
    torch.save(ckpt, buffer)
    for path in paths:
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
