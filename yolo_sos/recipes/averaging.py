# yolo-sos, AGPL-3.0
"""Stochastic weight averaging: from an epoch on, the mean of the epochs' weights takes the place of the EMA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, default_collate
from ultralytics.utils import LOGGER, RANK, colorstr
from ultralytics.utils.torch_utils import unwrap_model

from yolo_sos.config import CHECKPOINT_KEY
from yolo_sos.core import is_due
from yolo_sos.yolo.images import preserve_rng
from yolo_sos.yolo.training import TrainerExtension

PREFIX = colorstr("SWA: ")
AVERAGED = "averaged"  # under CHECKPOINT_KEY: of how many epochs the saved weights are the mean


class WeightAveraging(TrainerExtension):
    """The extension of a trainer by ``swa``.

    At the end of each epoch from ``swa`` of them on, the weights of the live model join an equal average, and
    BatchNorm's statistics are computed anew for it, from one pass over the training images. The average replaces the
    EMA, which is no longer updated: so it is what is validated, shifted, saved and resumed.

    Source: Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, *Averaging Weights Leads to Wider Optima and Better
    Generalization*, UAI 2018, Algorithm 1, with c one epoch and Ultralytics' learning rate.
    """

    _averaged = 0  # epochs in the average

    def _setup_train(self) -> None:
        """Set up as Ultralytics does, unless the settings exclude each other."""
        if self.sos.swa is not None and self.args.distill_model is not None:
            raise ValueError("swa does not work together with distill_model. Leave out one of them.")
        super()._setup_train()

    def run_callbacks(self, event: str) -> None:
        """Average at the end of an epoch, before a shift: what is shifted is the average."""
        if event == "on_train_epoch_end" and self.sos.swa is not None:
            self._average()
        super().run_callbacks(event)

    def _average(self) -> None:
        """At the end of an epoch, take the live model into the average if it is time."""
        assert self.sos.swa is not None
        # `time` estimates the epochs anew as it goes: what has begun goes on.
        if not self._averaged and not is_due(self.epoch + 1, self.epochs, self.sos.swa, 1):
            return
        live = unwrap_model(self.model)
        average = AveragedModel(live)
        average.module = self.ema.ema
        average.n_averaged.fill_(self._averaged)
        average.update_parameters(live)
        self._averaged = int(average.n_averaged)
        self.ema.enabled = False
        if RANK in {-1, 0}:  # other ranks receive the statistics at validation, with all buffers
            # A norm that the live model holds in eval mode was frozen by Ultralytics.
            frozen = [name for name, m in live.named_modules() if isinstance(m, _BatchNorm) and not m.training]
            with preserve_rng():
                update_bn(self._bn_images(frozen), self.ema.ema)
            LOGGER.info(f"{PREFIX}mean of {self._averaged} epochs")

    def _bn_images(self, frozen: list[str]) -> Iterator[Tensor]:
        """Yield the training images ``(B, 3, H, W)`` without augmentation, in random order: classes may be sorted."""
        view, _ = self.plain_images()
        size = max(self.batch_size // max(self.world_size, 1), 1)
        loader = DataLoader(
            view,
            batch_size=size,
            shuffle=True,
            drop_last=len(view) > size,  # BatchNorm needs more than one value per channel
            collate_fn=getattr(view, "collate_fn", None) or default_collate,
            num_workers=self.args.workers,
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        live = unwrap_model(self.model)
        for name in frozen:  # update_bn has reset them, as all others, and set them to training mode
            self.ema.ema.get_submodule(name).load_state_dict(live.get_submodule(name).state_dict())
            self.ema.ema.get_submodule(name).eval()
        for batch in loader:
            yield self.preprocess_plain(batch)["img"]

    def checkpoint_state(self) -> dict[str, Any]:
        """Add the number of epochs in the average."""
        return {**super().checkpoint_state(), **({AVERAGED: self._averaged} if self.sos.swa is not None else {})}

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        """Load as Ultralytics does, to resume or to recover from NaN, and how many epochs the average holds."""
        super()._load_checkpoint_state(ckpt)
        self._averaged = (ckpt.get(CHECKPOINT_KEY) or {}).get(AVERAGED, 0)
        self.ema.enabled = not self._averaged
