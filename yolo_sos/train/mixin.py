# yolo-sos, AGPL-3.0
"""What turns an Ultralytics trainer into one that shifts: settings, schedule, the shift itself, and its records."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from ultralytics import __version__ as host_version
from ultralytics.cfg import cfg2dict
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import DEFAULT_CFG, LOGGER, RANK, YAML
from ultralytics.utils.torch_utils import unwrap_model

from yolo_sos import __version__
from yolo_sos.analyze import curves, watch
from yolo_sos.config import CHECKPOINT_KEY, SOSConfig, is_sos_key, resolve_data, resolve_model
from yolo_sos.core import FinalLayer, ShiftReport, shift_layers
from yolo_sos.files import atomic_path, write_text
from yolo_sos.heads import HostTask, final_layers, select_layers
from yolo_sos.memory import with_fewer
from yolo_sos.train.averaging import WeightAveraging
from yolo_sos.train.checkpoints import PREFIX, Checkpoints
from yolo_sos.train.record import ShiftLog, columns, log_line
from yolo_sos.train.sampling import IMAGES, PER_CLASS, ShiftSample, Source, plain_view, preserve_rng, split_sizes
from yolo_sos.train.schedule import is_due, step_factor
from yolo_sos.train.sharpness import SharpnessAware

# An event that nothing runs. The callbacks are the one thing besides args and weights that the host hands to the
# workers of a distributed run, and args refuse keys that are not the host's.
CARRIER = "sos_settings"
MOMENTUM = ("momentum_buffer", "momentum_buffer_SGD", "exp_avg")  # as torch's optimizers and the host's MuSGD have it
TESTED_HOSTS = ("8.4.150", "8.4.190")  # the releases of Ultralytics that the suite has passed with


class SOSMixin(Checkpoints, SharpnessAware, WeightAveraging):
    """Stochastic optimum shifting for a trainer of Ultralytics: put it before the trainer among the base classes.

    The settings are taken out of ``overrides`` and never reach ``trainer.args``. With ``sos=False`` the trainer is the
    stock one, unless a setting of ``RECIPE`` asks for more. With ``sos=True``, at the end of each epoch for
    which ``is_due`` says so, before validation and saving, and with ``sos_start=0`` also before the first epoch, the
    EMA and the live model are shifted, each from its own features of the same few training images.

    Attributes:
        sos (SOSConfig): The settings.
    """

    sos: SOSConfig

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: dict | None = None):
        """Take the ``sos*`` settings out and hand the rest to the host.

        Args:
            cfg (str | dict | SimpleNamespace, optional): The host's configuration; may hold ``sos*`` keys too.
            overrides (dict, optional): Overrides of both kinds.
            _callbacks (dict, optional): The host's callbacks.

        Raises:
            ValueError: If a setting is wrong, or a run that was trained without SOS is to be resumed with it.
        """
        cfg, overrides = dict(cfg2dict(cfg)), dict(overrides or {})
        self._asked = {k: d.pop(k) for d in (cfg, overrides) for k in list(d) if is_sos_key(k)}
        carried = (_callbacks or {}).get(CARRIER)
        self.sos = SOSConfig.from_dict(carried[0] if carried else self._asked)
        for key, resolve in (("data", resolve_data), ("model", resolve_model)):
            if key in overrides:
                overrides[key] = resolve(overrides[key])
        self._shift_columns, self._watch_columns = columns({}), watch.columns()
        super().__init__(cfg, overrides, _callbacks)
        if self.sos.mixup_alpha is not None and self.args.task != "classify":
            raise ValueError(
                f"mixup_alpha={self.sos.mixup_alpha} is for task=classify; for task={self.args.task} there is mixup."
            )
        every = self.sos.sos_analyze
        if every is not None and every > self.args.epochs:
            raise ValueError(f"sos_analyze={every} is more than epochs={self.args.epochs}: nothing would be measured.")
        if not self.sos.stock:
            self.callbacks[CARRIER] = [self.sos.to_dict()]
            if RANK in {-1, 0}:
                settings = self.sos.to_dict()
                with atomic_path(self.save_dir / "sos.yaml") as temporary:
                    YAML.save(temporary, settings)
                LOGGER.info(PREFIX + ", ".join(f"{k}={v}" for k, v in settings.items()))
                if host_version not in TESTED_HOSTS:
                    LOGGER.warning(
                        f"Ultralytics {host_version} is untested: yolo-sos {__version__} has been tested with "
                        f"{', '.join(TESTED_HOSTS)}."
                    )

    def check_resume(self, overrides: dict[str, Any]) -> None:
        """Take the settings from the checkpoint that a run resumes from, as the host does with its own."""
        super().check_resume(overrides)
        if not self.resume:
            return
        saved = load_checkpoint(self.args.model)[1].get(CHECKPOINT_KEY)
        settings = SOSConfig.from_dict(saved["settings"] if saved else {})
        if self.sos.sos and not settings.sos:
            raise ValueError(
                f"{self.args.model} was trained without SOS: resuming it with sos=true would change the run half "
                f"way. Resume without sos=true, or start a new run from it: model={self.args.model} sos=true."
            )
        self.sos = settings
        ignored = [
            k
            for k, v in SOSConfig.from_dict(self._asked).to_dict().items()
            if k in self._asked and v != getattr(self.sos, k)
        ]
        if ignored:
            LOGGER.warning(f"Resume ignores {ignored}, using checkpoint values. Start a new run to change them.")

    def setup_model(self) -> dict[str, Any] | None:
        """Build the model as the host does, and refuse it right then if it has no final linear layer."""
        ckpt = super().setup_model()
        if self.args.distill_model is not None:
            asked = {"sos=true": self.sos.sos or None, "sharpness_aware": self.sos.sharpness_aware, "swa": self.sos.swa}
            for key in [key for key, value in asked.items() if value is not None]:
                raise ValueError(f"{key} does not work together with distill_model. Leave out one of them.")
        if self.sos.sos:
            if self.args.quantize == 8:  # its layers compute with rounded copies of the weights that are written
                raise ValueError("sos=true does not work together with quantize=8. Leave out one of them.")
            select_layers(final_layers(unwrap_model(self.model)), self.sos.kinds())
        return ckpt

    def _setup_train(self) -> None:
        """Set up as the host does; then everything that a shift needs, so that what is wrong shows now."""
        super()._setup_train()
        if not self.sos.stock and self.start_epoch and RANK in {-1, 0}:
            self._drop_later_results()
        if self.sos.sos_analyze is not None and RANK in {-1, 0}:
            final_layers(unwrap_model(self.model))  # raises where there are none
            self._watched: dict[int, ShiftSample] = {}
            self.metrics.update(self._watch_columns)
        if not self.sos.sos:
            return
        model = unwrap_model(self.model)
        chosen = select_layers(final_layers(model), self.sos.kinds())
        frozen = [layer.name for layer in chosen if not layer.module.weight.requires_grad]
        if len(frozen) == len(chosen):
            raise ValueError("sos=true has nothing to shift: all final layers are frozen. Change freeze or sos_layers.")
        if frozen:
            LOGGER.warning(f"{PREFIX}frozen layers are not shifted: {', '.join(frozen)}")
        self._shifted_names = {layer.name for layer in chosen} - set(frozen)
        if RANK in {-1, 0}:
            self._source = self.shift_source()
            split_sizes(len(self._source.view), self._source.images, self.sos.sos_guard is not None)
            self._shift_log = ShiftLog(self.save_dir / "sos.csv", resume_from=self.start_epoch)
            self.metrics.update(self._shift_columns)

    def _drop_later_results(self) -> None:
        """Drop the lines of results.csv that belong to epochs that will run again: the host writes before it saves."""
        if not self.csv.exists():
            return
        header, *lines = self.csv.read_text(encoding="utf-8").splitlines() or [""]
        whole = [line for line in lines if line.count(",") == header.count(",")]
        kept = [line for line in whole if int(line.split(",")[0]) <= self.start_epoch]
        if kept != lines:
            write_text(self.csv, "".join(f"{line}\n" for line in (header, *kept)))

    def shift_source(self) -> Source:
        """Return what the images of shifts are drawn from; asked once, when everything else is set up."""
        return Source(plain_view(self.train_loader.dataset, self.args), self.shift_images())

    def shift_images(self) -> int:
        """Return how many images to fit on: as many as asked for, or enough for every class to be seen."""
        return self.sos.sos_images or max(IMAGES, PER_CLASS * self.data["nc"])

    def _setup_scheduler(self) -> None:
        """Schedule the learning rate as the host does, or in the steps of ``lr_steps``."""
        steps = self.sos.lr_steps
        if steps is None:
            super()._setup_scheduler()
            return
        self.lf = lambda epoch: step_factor(epoch, self.epochs, steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lr_lambda=self.lf)

    def run_callbacks(self, event: str) -> None:
        """Shift at the end of a training epoch, or before the first, ahead of the callbacks.

        At the end of an epoch that is before the EMA is validated and saved.
        """
        if event == "on_train_start" and self.sos.sos and not self.start_epoch:
            self.epoch = -1  # none has been trained; the host counts from here on
            self._shift_if_due()
        if event == "on_train_epoch_end":
            if self.sos.swa is not None:
                self._average()  # first: what is shifted is the average
            if self.sos.sos:
                self._end_epoch()
            if self.sos.sos_analyze is not None:
                self._analyze()
        super().run_callbacks(event)

    def _end_epoch(self) -> None:
        self._shift_columns = columns(self._shift_if_due())
        if RANK in {-1, 0}:
            self.metrics.update(self._shift_columns)  # an epoch without validation keeps these metrics

    def _shift_if_due(self) -> dict[str, ShiftReport]:
        """Shift if it is time to, and keep a record; returns what ``_shift`` does."""
        trained = self.epoch + 1
        if not is_due(trained, self.epochs, self.sos.sos_start, self.sos.sos_interval):
            return {}
        reports = self._shift()
        if reports:
            self._shift_log.add(trained, reports)
            LOGGER.info(PREFIX + log_line(reports))
        return reports

    def _analyze(self) -> None:
        """Measure the EMA, as it is validated and saved: on rank 0, the others meet it again at validation."""
        every = self.sos.sos_analyze
        due = every is not None and (self.epoch + 1) % every == 0
        measured: dict[str, float] = {}
        if due and RANK in {-1, 0}:
            with preserve_rng():
                measured = watch.measure(self.ema.ema, self._watched_batches, seed=self.args.seed)
            LOGGER.info(PREFIX + watch.log_line(measured))
        self._watch_columns = watch.columns(measured)
        if RANK in {-1, 0}:
            self.metrics.update(self._watch_columns)

    def _watched_batches(self, images: int) -> Iterator[dict[str, Any]]:
        """Yield the batches that are measured: those of one drawing, whatever the epoch."""
        if images not in self._watched:
            source = self.shift_source()
            self._watched[images] = ShiftSample(self, source.view, images, False, self.args.seed, source.labels)
        return self._watched[images].batches("fit")

    @property
    def _columns(self) -> dict[str, float]:
        """Our columns of this epoch; the same keys in every one."""
        shift = self._shift_columns if self.sos.sos else {}
        return {**shift, **(self._watch_columns if self.sos.sos_analyze is not None else {})}

    def _shift(self) -> dict[str, ShiftReport]:
        """Shift the EMA and the live model; in a distributed run rank 0 does, and tells the others.

        Returns:
            (dict[str, ShiftReport]): By ``ema`` and ``model``; empty on other ranks than 0.
        """
        models = {"ema": self.ema.ema, "model": unwrap_model(self.model)}
        reports: dict[str, ShiftReport] = {}
        error: Exception | None = None
        if RANK in {-1, 0}:
            try:
                with preserve_rng():
                    reports = self._shift_models(models)
            except Exception as e:
                error = e  # raised below, when no rank waits any more
        if self.world_size > 1:
            told = [None if error is None else f"{type(error).__name__}: {error}"]
            dist.broadcast_object_list(told, src=0)
            if told[0] and error is None:
                raise RuntimeError(f"The shift failed on rank 0: {told[0]}")
            if error is None:
                for model in models.values():
                    for layer in self._shifted(model):
                        for tensor in (layer.module.weight.data, *self._momentum(layer)):
                            dist.broadcast(tensor, src=0)
        if error is not None:
            raise error
        return reports

    def _shift_models(self, models: dict[str, nn.Module]) -> dict[str, ShiftReport]:
        guard = self.sos.sos_guard
        # One seed per epoch: a resumed run draws what an unbroken one would have drawn.
        seed = self.args.seed + 1_000_003 * (self.epoch + 1)
        source = self._source
        criterion = getattr(unwrap_model(self.model), "criterion", None)  # made with the first batch of training
        samples: dict[int, ShiftSample] = {}  # one, which both models see

        def shift(model: nn.Module, images: int) -> ShiftReport:
            if images not in samples:
                samples.clear()
                samples[images] = ShiftSample(self, source.view, images, guard is not None, seed, source.labels)
            return shift_layers(
                model,
                final_layers(model),
                samples[images].batches("fit"),
                HostTask(model, criterion),
                heldout=samples[images].batches("heldout"),
                shifted=self._shifted(model),
                along={layer.name: self._momentum(layer) for layer in self._shifted(model)},
                method=self.sos.method(),
                step=self.sos.sos_step,
                guard=guard,
                seed=seed,
            )

        reports: dict[str, ShiftReport] = {}
        images = source.images
        for name, model in models.items():
            reports[name], images = with_fewer(images, partial(shift, model), "images for the shift")
        return reports

    def _shifted(self, model: nn.Module) -> list[FinalLayer]:
        return [layer for layer in final_layers(model) if layer.name in self._shifted_names]

    def _momentum(self, layer: FinalLayer) -> list[Tensor]:
        """Return the momentum that a shift of the layer takes along: none of the EMA, which has no optimizer."""
        state = self.optimizer.state.get(layer.module.weight, {}) if self.sos.sos_momentum else {}
        return [state[key] for key in MOMENTUM if state.get(key) is not None]

    def validate(self) -> tuple[dict[str, Any] | None, float | None]:
        """Validate as the host does; our columns join its metrics, and so every logger."""
        metrics, fitness = super().validate()
        if metrics is not None:
            metrics.update(self._columns)
        return metrics, fitness

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Write a row of results.csv with our columns last: the host writes by position, the header once."""
        super().save_metrics({**{k: v for k, v in metrics.items() if k not in self._columns}, **self._columns})

    def plot_metrics(self) -> None:
        """Plot as the host does, and the curves of the shifts."""
        super().plot_metrics()
        if self.sos.sos and self._shift_log.rows:
            self._shift_log.plot(self.save_dir / "sos.png", on_plot=self.on_plot)
        if self.sos.sos_analyze is not None:
            curves.plot(self.csv, self.save_dir / "analyze.png", self.on_plot)
