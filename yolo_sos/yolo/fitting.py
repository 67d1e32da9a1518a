# yolo-sos, AGPL-3.0
"""Fit the class layers in an Ultralytics trainer, before the first epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.utils import LOGGER, RANK, colorstr
from ultralytics.utils.torch_utils import unwrap_model

from yolo_sos.config import CHECKPOINT_KEY
from yolo_sos.core import affine_matrix, write_weights
from yolo_sos.files import as_json, read_json, write_text
from yolo_sos.yolo.class_fit import LEAST, ClassFit, default_images, fit_classes, fit_sizes
from yolo_sos.yolo.classes import class_layers, in_order, known_classes, listed, take_over
from yolo_sos.yolo.images import covering_order, object_classes, preserve_rng
from yolo_sos.yolo.training import TrainerExtension

PREFIX = colorstr("fit_head: ")


class Fitting(TrainerExtension):
    """The extension of a trainer by ``fit_head=true``.

    Before the first epoch, and before a shift that is due then, the class layers of the live model and of its EMA,
    which are alike at that time, are fitted to the labels of some training images, seen without augmentation. A fit
    that gains nothing on held-out images is left out, which the log tells. A resumed run is not fitted again.

    The fitted model is validated and saved as ``best.pt``, which an epoch replaces only if it is better: the first
    epochs, whose images are augmented and whose batches normalise themselves, often are not.
    """

    _source: tuple[dict[int, str], list[Tensor]] = ({}, [])  # classes and class layers of the pretrained model
    _fitted: dict[str, Any] | None = None  # what checkpoints tell of the fit

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """Build the model as Ultralytics does, and keep in mind which classes the pretrained one knows."""
        model = super().get_model(cfg, weights, verbose)
        if self.sos.fit_head and weights is not None and not self.resume:
            class_layers(model)  # refuses a model that has none
            names = dict(weights.names)  # type: ignore[arg-type]
            self._source = names, [affine_matrix(layer.module) for layer in in_order(weights)]
            take_over(model, weights, self._known_by_name(names), self.args.seed)
        return model

    def _known_by_name(self, names: dict[int, str]) -> dict[int, int]:
        """Return the classes that a pretrained model's ``names`` have, too, unless ``cls_remap=False`` forbids it."""
        wanted = getattr(self.args, "cls_remap", True)
        return known_classes(dict(self.data["names"]), names) if wanted else {}

    def _setup_train(self) -> None:
        """Set up as Ultralytics does, unless the settings exclude each other."""
        if self.sos.fit_head:
            self.refuse_beside("fit_head=true")
        super()._setup_train()
        if self.sos.fit_head and not self.start_epoch and RANK in {-1, 0}:
            fit_sizes(len(self.train_loader.dataset), None)

    def run_callbacks(self, event: str) -> None:
        """Fit before the first epoch, ahead of the callbacks."""
        if self.sos.fit_head and event == "on_train_start" and not self.start_epoch:
            before = [affine_matrix(layer.module) for layer in in_order(self.ema.ema)]
            self._fit_everywhere()
            after = [affine_matrix(layer.module) for layer in in_order(self.ema.ema)]
            if not all(map(torch.equal, before, after)) and self.args.val and self.args.save:
                with preserve_rng():
                    self._save_as_best()
        super().run_callbacks(event)

    def _save_as_best(self) -> None:
        """Validate the model before the first epoch and save it as ``best.pt``; every rank takes part."""
        self.epoch = -1  # none has been trained; Ultralytics counts from here on
        images, _ = self.plain_images()
        batch = self.preprocess_plain(images.collate_fn([images[0]]))
        with torch.no_grad():  # Ultralytics' validation asks for the training's losses, and there are none yet
            self.loss, self.loss_items = self.ema.ema.loss(batch)
        self.metrics, self.fitness = self.validate()
        self.loss = None
        if RANK in {-1, 0}:
            path = self.save_dir / "fit.json"
            write_text(path, as_json({**read_json(path), "metrics": self.metrics}))
            self.save_model()
            self.last.unlink()  # an epoch of -1 is that of a training which has ended
            LOGGER.info(
                f"{PREFIX}before the first epoch the model has a fitness of {self.fitness:.4g}, and is best.pt until "
                "that is beaten"
            )

    def _fit_everywhere(self) -> None:
        models = [unwrap_model(self.model), self.ema.ema]

        def work() -> ClassFit:
            fit = self._fit()
            if not fit.report.refusal:
                for model in models:
                    write_weights(model, fit.weights)
            return fit

        def tensors() -> Iterator[Tensor]:
            for model in models:
                for layer in in_order(model):
                    yield from (p.data for p in layer.module.parameters())

        fit = self.on_first_rank(work, tensors, "fit")
        if fit is None:
            return
        report = fit.report
        names = self.data["names"]
        self._fitted = {"refusal": report.refusal, "ridges": [layer.ridge for layer in report.layers]}
        told = {"explained": report.explained, **asdict(report)}
        shown = [{"name": names[k], "targets": targets} for k, targets in enumerate(fit.shown)]
        told |= {"unfitted": fit.unfitted, "shown": shown}
        write_text(self.save_dir / "fit.json", as_json(told))
        (LOGGER.warning if report.refusal else LOGGER.info)(f"{PREFIX}{report}")
        if not report.refusal and (unseen := [names[k] for k, targets in enumerate(fit.shown) if targets < 1]):
            LOGGER.warning(f"{PREFIX}the images fitted on hold next to nothing of {listed(unseen)}.")

    def _fit(self) -> ClassFit:
        view, _ = self.plain_images()
        images = fit_sizes(len(view), default_images(self.data["nc"]))
        order = covering_order(object_classes(view), LEAST, self.args.seed)
        sample = self.sample_images(images, self.args.seed, keep=False, order=order)
        return fit_classes(self.ema.ema, sample, self._known_rows(), None, self.args.seed)

    def _known_rows(self) -> dict[int, int]:
        """Return the classes that the pretrained model knows by name and whose rows the model has from it."""
        names, matrices = self._source
        layers = [affine_matrix(layer.module).cpu() for layer in in_order(self.ema.ema)]
        alike = [a for a, b in zip(layers, matrices, strict=False) if a.shape[1:] == b.shape[1:]]
        if not matrices or len(alike) != len(layers):
            return {}
        return {
            k: j
            for k, j in self._known_by_name(names).items()
            if all(bool((a[k] == b[j].cpu()).all()) for a, b in zip(layers, matrices, strict=True))
        }

    def checkpoint_state(self) -> dict[str, Any]:
        """Add what was fitted."""
        return {**super().checkpoint_state(), **({"fit": self._fitted} if self._fitted else {})}

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        """Load as Ultralytics does, to resume or to recover from NaN, and with it what was fitted."""
        super()._load_checkpoint_state(ckpt)
        self._fitted = (ckpt.get(CHECKPOINT_KEY) or {}).get("fit", self._fitted)
