# yolo-sos, AGPL-3.0
"""Stochastic optimum shifting in an Ultralytics trainer: when, on which images, and what a run keeps of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.patches import torch_load
from ultralytics.utils.torch_utils import unwrap_model

from yolo_sos.config import CHECKPOINT_KEY
from yolo_sos.core import SEEDS, SOS, FinalLayer, ShiftReport, is_due
from yolo_sos.files import atomic_path
from yolo_sos.yolo.checkpoint import write_checkpoint
from yolo_sos.yolo.heads import YoloTask, final_layers, layers_of_kinds
from yolo_sos.yolo.images import IMAGES, ImageSample, preserve_rng, split_sizes
from yolo_sos.yolo.memory import with_fewer
from yolo_sos.yolo.shift_log import ShiftLog, columns, log_line
from yolo_sos.yolo.training import PREFIX, TrainerExtension

# Measured on a YOLOv5n of 3 classes: 8 images fit as well as 64 or 100, 2 to 4 less well. Method loss needs more, since
# each output has a matrix of its own: with 60 it takes .06 of the squared norm of a detector on VOC07, with 512 .16.
FEW = 8
PER_CLASS = 3  # the paper draws 300 rows for the 100 classes of CIFAR-100


class Shifting(TrainerExtension):
    """The extension of a trainer by ``sos=true``.

    At the end of each epoch for which ``is_due`` says so, before validation and saving, and with ``sos_start=0`` also
    before the first epoch, the EMA and the live model are shifted, each from its own features of the same few training
    images. When training has ended, a checkpoint that no shift has reached is shifted by the same rules.
    """

    _shift_columns = columns({})
    _shifts: tuple[dict[str, Any], ...] = ()  # of the EMA so far, refused ones too: epoch and accepted step

    def setup_model(self) -> dict[str, Any] | None:
        """Build the model as Ultralytics does, and refuse it right away if it has no final linear layer."""
        ckpt = super().setup_model()
        if self.sos.sos:
            self.refuse_beside("sos=true")
            layers_of_kinds(final_layers(unwrap_model(self.model)), self.sos.kinds)
        return ckpt

    def _setup_train(self) -> None:
        """Set up as Ultralytics does; then everything that a shift needs, so that errors show now."""
        super()._setup_train()
        if not self.sos.sos:
            return
        chosen = layers_of_kinds(final_layers(unwrap_model(self.model)), self.sos.kinds)
        frozen = [layer.name for layer in chosen if not layer.module.weight.requires_grad]
        if len(frozen) == len(chosen):
            raise ValueError("sos=true has nothing to shift: all final layers are frozen. Change freeze or sos_layers.")
        if frozen:
            LOGGER.warning(f"{PREFIX}frozen layers are not shifted: {', '.join(frozen)}")
        if RANK in {-1, 0}:
            self._sizes(self.shift_images())
            self._shift_log = ShiftLog(self.save_dir / "sos.csv", resume_from=self.start_epoch)

    def shift_images(self) -> int:
        """Return how many images to fit on, at most: as many as asked for, or enough for every class to be seen."""
        enough = IMAGES if self.sos.method_of(self.args.task).name == "loss" else FEW
        return self.sos.sos_images or max(enough, PER_CLASS * self.data["nc"])

    def _sizes(self, images: int) -> dict[str, int]:
        sizes = split_sizes(len(self.train_loader.dataset), images, guarded=self.sos.sos_guard is not None)
        return {name: sizes[name] for name in ("fit", "heldout")}  # in this order: rare classes are fitted on

    def run_callbacks(self, event: str) -> None:
        """Shift at the end of a training epoch, or before the first, ahead of the callbacks.

        At the end of an epoch that is before the EMA is validated and saved.
        """
        if self.sos.sos and event == "on_train_start" and not self.start_epoch:
            self.epoch = -1  # none has been trained; Ultralytics counts from here on
            self._shift_if_due()
        if self.sos.sos and event == "on_train_epoch_end":
            self._shift_columns = columns(self._shift_if_due())
        super().run_callbacks(event)

    def extra_columns(self) -> dict[str, float]:
        """Add the columns of the last shift."""
        return {**super().extra_columns(), **(self._shift_columns if self.sos.sos else {})}

    def _shift_if_due(self) -> dict[str, ShiftReport]:
        """Shift if it is time to, and log it; returns what ``_shift_everywhere`` does."""
        trained = self.epoch + 1
        if not is_due(trained, self.epochs, self.sos.sos_start, self.sos.sos_interval):
            return {}
        reports = self._shift_everywhere({"ema": self.ema.ema, "model": unwrap_model(self.model)})
        if reports:
            self._shifts = (*self._shifts, {"epoch": trained, "step": reports["ema"].step})
            self._shift_log.add(trained, reports)
            LOGGER.info(PREFIX + log_line(reports))
        return reports

    def _shift_everywhere(self, models: dict[str, nn.Module]) -> dict[str, ShiftReport]:
        """Shift models on rank 0, and broadcast the result to the other ranks of a distributed run.

        Returns:
            (dict[str, ShiftReport]): By the models' names; empty on other ranks than 0.
        """

        def tensors() -> Iterator[Tensor]:
            if not self._chosen(unwrap_model(self.model)):
                return  # all final layers are frozen by now
            for model in models.values():
                sos = self._sos(model)
                for layer in sos.layers or ():
                    yield from (layer.module.weight.data, *sos.momentum(layer))  # type: ignore[misc, operator]

        return self.on_first_rank(partial(self._shift_models, models), tensors, "shift") or {}

    def _shift_models(self, models: dict[str, nn.Module]) -> dict[str, ShiftReport]:
        """Shift models, and return the reports by their names; none where all final layers are frozen by now."""
        if not self._chosen(unwrap_model(self.model)):
            LOGGER.warning(f"{PREFIX}all final layers are frozen: {' and '.join(models)} not shifted")
            return {}
        # One seed per epoch: a resumed run draws what an unbroken one would have drawn.
        seed = self.args.seed + SEEDS * (self.epoch + 1)
        samples: dict[int, ImageSample] = {}  # one, for all models

        def shift(model: nn.Module, images: int) -> ShiftReport:
            if images not in samples:
                samples.clear()
                samples[images] = self.sample_images(self._sizes(images), seed)
            sample = samples[images]
            return self._sos(model).shift(sample.batches("fit"), sample.batches("heldout"), seed=seed)

        reports: dict[str, ShiftReport] = {}
        images = self.shift_images()
        for name, model in models.items():
            reports[name], images = with_fewer(images, partial(shift, model), "images for the shift")
        return reports

    def _sos(self, model: nn.Module) -> SOS:
        criterion = getattr(unwrap_model(self.model), "criterion", None)  # made with the first batch of training
        return SOS(
            model,
            self._chosen(model),
            method=self.sos.method_of(self.args.task),
            step=self.sos.sos_step,
            guard=self.sos.sos_guard,
            optimizer=self.optimizer if self.sos.sos_momentum else None,  # it has no state of the EMA
            task=YoloTask(model, criterion),
        )

    def _chosen(self, model: nn.Module) -> list[FinalLayer]:
        """Return the layers to shift: those asked for, as far as they are trained at this moment."""
        live = final_layers(unwrap_model(self.model))
        trained = {layer.name for layer in live if layer.module.weight.requires_grad}
        return [layer for layer in layers_of_kinds(final_layers(model), self.sos.kinds) if layer.name in trained]

    def checkpoint_state(self) -> dict[str, Any]:
        """Add the shifts that the saved weights have seen."""
        return {**super().checkpoint_state(), "shifts": list(self._shifts)}

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        """Load as Ultralytics does, to resume or to recover from NaN, and with it the shifts so far."""
        super()._load_checkpoint_state(ckpt)
        self._shifts = tuple((ckpt.get(CHECKPOINT_KEY) or {}).get("shifts", ()))

    def final_eval(self) -> None:
        """Shift what no shift has reached, then finish as Ultralytics does: strip and validate the checkpoints."""
        if self.sos.sos and RANK in {-1, 0}:
            with preserve_rng():
                for path in (self.last, self.best):
                    # What an earlier run has left in this folder is not ours to shift.
                    if path.exists() and (self.resume or path.name in self._written):
                        self._shift_if_unreached(path)
        super().final_eval()

    def _shift_if_unreached(self, path: Path) -> None:
        ckpt = torch_load(path, map_location="cpu")
        state = ckpt.get(CHECKPOINT_KEY) or {}
        if state.get("shifts") or ckpt.get("ema") is None:  # a refused shift counts; without EMA: finished already
            return
        epoch = ckpt["epoch"] + 1
        model = ckpt["ema"].float().to(self.device)
        report = self._shift_models({path.stem: model}).get(path.stem)
        if report is None:
            return
        self._shift_log.add(epoch, {path.stem: report})
        LOGGER.info(f"{PREFIX}{path.name}, of epoch {epoch}: {log_line({'ema': report})}")
        ckpt["ema"] = model.half().cpu()
        ckpt[CHECKPOINT_KEY] = {**state, "shifts": [{"epoch": epoch, "step": report.step}]}
        with atomic_path(path) as temporary:
            write_checkpoint(temporary, ckpt)

    def plot_metrics(self) -> None:
        """Plot as Ultralytics does, and the curves of the shifts."""
        super().plot_metrics()
        if self.sos.sos and self._shift_log.rows:
            self._shift_log.plot(self.save_dir / "sos.png", on_plot=self.on_plot)
