# yolo-sos, AGPL-3.0
"""What every extension of an Ultralytics trainer needs: settings, columns, a key in checkpoints, plain images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from ultralytics import __version__ as ultralytics_version
from ultralytics.cfg import cfg2dict
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import DEFAULT_CFG, LOGGER, RANK, YAML, colorstr
from ultralytics.utils.patches import override_configs

from yolo_sos import __version__
from yolo_sos.builtin import resolve_data, resolve_model
from yolo_sos.config import CHECKPOINT_KEY, SOSConfig, is_sos_key
from yolo_sos.files import atomic_path, write_text
from yolo_sos.yolo.images import ImageSample, draw, preserve_rng

if TYPE_CHECKING:
    from ultralytics.engine.trainer import BaseTrainer
else:
    BaseTrainer = object  # a mixin: the trainer comes from the class that uses it

T = TypeVar("T")

PREFIX = colorstr("SOS: ")
# An event that nothing runs. Besides args and weights, callbacks are the one thing that Ultralytics hands to the
# workers of a distributed run, and args refuse keys that are not Ultralytics'.
CARRIER = "sos_settings"
# Files of a run; those that an earlier run left in its folder are removed.
OUTPUTS = ("sos.yaml", "sos.csv", "sos.png", "fit.json", "analyze.png")
TESTED = ("8.4.150", "8.4.190")  # the releases of Ultralytics that the test suite has passed with


class TrainerExtension(BaseTrainer):
    """The base of the mixins that extend an Ultralytics trainer by what our settings ask for.

    The settings are taken out of ``overrides`` and never reach ``trainer.args``. A run keeps them in ``sos.yaml`` and
    in its checkpoints, as plain values under a key of their own, and resumes with them.

    Attributes:
        sos (SOSConfig): The settings.
    """

    sos: SOSConfig
    wdir: Path
    last: Path
    best: Path

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: dict | None = None):
        """Take our settings out and hand the rest to Ultralytics.

        Args:
            cfg (str | dict | SimpleNamespace, optional): Ultralytics' configuration; may hold our keys too.
            overrides (dict, optional): Overrides of both kinds.
            _callbacks (dict, optional): Ultralytics' callbacks.

        Raises:
            ValueError: If a setting is wrong or has no effect, or a run that was trained without SOS is to be resumed
                with it.
        """
        cfg, overrides = dict(cfg2dict(cfg)), dict(overrides or {})
        asked = {k: d.pop(k) for d in (cfg, overrides) for k in list(d) if is_sos_key(k)}
        self._asked = tuple(asked)
        if carried := (_callbacks or {}).get(CARRIER):
            self.sos = SOSConfig.from_dict(carried[0])
        elif overrides.get("resume") or cfg.get("resume"):
            self.sos = SOSConfig.from_dict(asked)
        else:
            self.sos = SOSConfig.of_training(asked)
        for key, resolve in (("data", resolve_data), ("model", resolve_model)):
            if key in overrides:
                overrides[key] = resolve(overrides[key])
        self._written: set[str] = set()  # names of the checkpoints that this run has written
        super().__init__(cfg, overrides, _callbacks)
        if RANK in {-1, 0} and not self.resume:
            for name in OUTPUTS:
                (self.save_dir / name).unlink(missing_ok=True)
        if self.sos.stock:
            return
        self.callbacks[CARRIER] = [self.sos.to_dict()]
        if RANK in {-1, 0}:
            settings = self.sos.to_dict()
            with atomic_path(self.save_dir / "sos.yaml") as temporary:
                YAML.save(temporary, settings)
            LOGGER.info(PREFIX + ", ".join(f"{k}={v}" for k, v in settings.items()))
            if ultralytics_version not in TESTED:
                LOGGER.warning(
                    f"Ultralytics {ultralytics_version} is untested: yolo-sos {__version__} has been tested with "
                    f"{', '.join(TESTED)}."
                )

    def check_resume(self, overrides: dict[str, Any]) -> None:
        """Take the settings from the checkpoint that a run resumes from, as Ultralytics does with its own."""
        super().check_resume(overrides)
        if not self.resume:
            return
        asked = self.sos
        saved = load_checkpoint(self.args.model)[1].get(CHECKPOINT_KEY)
        self.sos = SOSConfig.from_dict(saved["settings"] if saved else {})
        if asked.sos and not self.sos.sos:
            raise ValueError(
                f"{self.args.model} was trained without SOS: resuming it with sos=true would change the run half "
                f"way. Resume without sos=true, or start a new run from it: model={self.args.model} sos=true."
            )
        if ignored := [key for key in self._asked if getattr(asked, key) != getattr(self.sos, key)]:
            LOGGER.warning(f"Resume ignores {ignored}, using checkpoint values. Start a new run to change them.")

    def _setup_train(self) -> None:
        """Set up as Ultralytics does; a resumed run drops the results of epochs that will run again."""
        super()._setup_train()
        if RANK in {-1, 0}:
            if not self.sos.stock and self.start_epoch:
                self._drop_later_results()
            self.metrics.update(self.extra_columns())

    def refuse_beside(self, setting: str) -> None:
        """Raise a ``ValueError`` where Ultralytics trains with what a setting of ours that writes weights breaks."""
        # A distillation wraps the model; quantized layers compute with rounded copies of the weights that are written.
        for key, given in ("distill_model", self.args.distill_model), ("quantize=8", self.args.quantize == 8):
            if given:
                raise ValueError(f"{setting} does not work together with {key}. Leave out one of them.")

    def _drop_later_results(self) -> None:
        """Drop the lines of results.csv after the epoch of the checkpoint: Ultralytics writes them before it saves."""
        if not self.csv.exists():
            return
        header, *lines = self.csv.read_text(encoding="utf-8").splitlines() or [""]
        whole = [line for line in lines if line.count(",") == header.count(",")]
        kept = [line for line in whole if int(line.split(",")[0]) <= self.start_epoch]
        if kept != lines:
            write_text(self.csv, "".join(f"{line}\n" for line in (header, *kept)))

    def plain_images(self) -> tuple[Any, list[int] | None]:
        """Return the training set with validation transforms, and the class of each image where an image has one."""
        view = copy(self.train_loader.dataset)  # shallow: labels and cached images are shared
        view.augment, view.rect = False, False
        view.transforms = view.build_transforms(hyp=self.args)
        return view, None

    def preprocess_plain(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Preprocess a batch as in training, but without multi-scale resizing."""
        with override_configs(self.args, {"multi_scale": 0.0}):
            return self.preprocess_batch(batch)

    def sample_images(
        self, sizes: dict[str, int], seed: int, keep: bool = True, order: Sequence[int] | None = None
    ) -> ImageSample:
        """Return random sets of training images as validation would see them, see ``ImageSample``."""
        view, labels = self.plain_images()
        batch = max(self.batch_size // max(self.world_size, 1), 1)
        order = draw(len(view), labels, seed) if order is None else order
        return ImageSample(view, self.preprocess_plain, batch, sizes, order, keep)

    def on_first_rank(self, work: Callable[[], T], tensors: Callable[[], Iterable[Tensor]], what: str) -> T | None:
        """Do work on rank 0, and broadcast what it has written to the other ranks of a distributed run.

        Args:
            work (Callable): Does it. Global random states are restored after it.
            tensors (Callable): Returns the tensors that it may have written, in one order on all ranks.
            what (str): What it is called in the error of another rank.

        Returns:
            (T | None): What it returns; None on other ranks.
        """
        result: T | None = None
        error: Exception | None = None
        if RANK in {-1, 0}:
            try:
                with preserve_rng():
                    result = work()
            except Exception as e:
                error = e  # raised below, once no rank waits any more
        if self.world_size > 1:
            message = [None if error is None else f"{type(error).__name__}: {error}"]
            dist.broadcast_object_list(message, src=0)
            if message[0] and error is None:
                raise RuntimeError(f"The {what} failed on rank 0: {message[0]}")
            for tensor in tensors() if error is None else ():
                dist.broadcast(tensor, src=0)
        if error is not None:
            raise error
        return result

    def extra_columns(self) -> dict[str, float]:
        """Return our columns of this epoch; the same keys in every one."""
        return {}

    def run_callbacks(self, event: str) -> None:
        """Run the callbacks; at the end of an epoch our columns are up to date, also where validation is left out."""
        if event == "on_train_epoch_end" and RANK in {-1, 0}:
            self.metrics.update(self.extra_columns())
        super().run_callbacks(event)

    def validate(self) -> tuple[dict[str, Any] | None, float | None]:
        """Validate as Ultralytics does; our columns join its metrics, and so every logger."""
        metrics, fitness = super().validate()
        if metrics is not None:
            metrics.update(self.extra_columns())
        return metrics, fitness

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Write a row of results.csv with our columns last: Ultralytics writes by position, the header once."""
        ours = self.extra_columns()
        super().save_metrics({**{k: v for k, v in metrics.items() if k not in ours}, **ours})

    def checkpoint_state(self) -> dict[str, Any]:
        """Return what a checkpoint holds under our key: plain values, which load without yolo-sos."""
        return {"version": __version__, "settings": self.sos.to_dict()}

    def save_model(self) -> bool:
        """Save as Ultralytics does, with our state in the checkpoint, and move whole files into place."""
        if self.sos.stock:
            return super().save_model()
        with TemporaryDirectory(prefix=".weights", dir=self.save_dir) as folder:
            with self._redirected(Path(folder)), _adding({CHECKPOINT_KEY: self.checkpoint_state()}):
                saved = super().save_model()
            for file in Path(folder).glob("*.pt"):
                os.replace(file, self.wdir / file.name)
                self._written.add(file.name)
        return saved

    @contextmanager
    def _redirected(self, folder: Path) -> Iterator[None]:
        places = self.wdir, self.last, self.best
        self.wdir, self.last, self.best = folder, folder / self.last.name, folder / self.best.name
        try:
            yield
        finally:
            self.wdir, self.last, self.best = places


@contextmanager
def _adding(items: dict[str, Any]) -> Iterator[None]:
    """Add items to the dictionaries that ``torch.save`` writes: Ultralytics offers no place for them."""
    save = torch.save

    def save_with(obj: Any, *args: Any, **kwargs: Any) -> None:
        save({**obj, **items}, *args, **kwargs)

    torch.save = save_with
    try:
        yield
    finally:
        torch.save = save
