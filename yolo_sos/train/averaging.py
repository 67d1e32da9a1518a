# yolo-sos, AGPL-3.0
"""Stochastic weight averaging: from an epoch on, the mean of the epochs' weights takes the place of the EMA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader
from ultralytics.utils import LOGGER, RANK, colorstr
from ultralytics.utils.patches import override_configs
from ultralytics.utils.torch_utils import unwrap_model

from yolo_sos.config import CHECKPOINT_KEY, SOSConfig
from yolo_sos.train.sampling import Source, preserve_rng
from yolo_sos.train.schedule import is_due

if TYPE_CHECKING:
    from ultralytics.engine.trainer import BaseTrainer
else:
    BaseTrainer = object  # a mixin: the trainer comes from the class that uses it

PREFIX = colorstr("SWA: ")
AVERAGED = "averaged"  # under CHECKPOINT_KEY: of how many epochs the saved weights are the mean


class WeightAveraging(BaseTrainer):
    """What a trainer does more with ``swa``.

    At the end of each epoch from ``swa`` of them on, the weights of the live model join an equal average, and
    BatchNorm's statistics are computed anew for it, from one pass over the training images. The average is kept where
    the EMA was, which rests from then on: so it is what is validated, shifted, saved and resumed.

    Source: Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, *Averaging Weights Leads to Wider Optima and Better
    Generalization*, UAI 2018, Algorithm 1, with c one epoch and the host's learning rate.
    """

    sos: SOSConfig
    _averaged = 0  # epochs in the average

    if TYPE_CHECKING:

        def shift_source(self) -> Source: ...

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
        if RANK in {-1, 0}:  # the others get the statistics at validation, with all buffers
            # A norm that the live model holds in eval mode was frozen by the host.
            frozen = [name for name, m in live.named_modules() if isinstance(m, _BatchNorm) and not m.training]
            with preserve_rng():
                update_bn(self._bn_images(self.shift_source().view, frozen), self.ema.ema)
            LOGGER.info(f"{PREFIX}mean of {self._averaged} epochs")

    def _bn_images(self, view: Any, frozen: list[str]) -> Iterator[Tensor]:
        """Yield the training images ``(B, 3, H, W)`` without augmentation, in random order: classes may be sorted."""
        size = max(self.batch_size // max(self.world_size, 1), 1)
        loader = DataLoader(
            view,
            batch_size=size,
            shuffle=True,
            drop_last=len(view) > size,  # BatchNorm needs more than one value per channel
            collate_fn=view.collate_fn,
            num_workers=self.args.workers,
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        live = unwrap_model(self.model)
        for name in frozen:  # update_bn has reset them, as all others, and set them to training mode
            self.ema.ema.get_submodule(name).load_state_dict(live.get_submodule(name).state_dict())
            self.ema.ema.get_submodule(name).eval()
        for batch in loader:
            with override_configs(self.args, {"multi_scale": 0.0}):
                images = self.preprocess_batch(batch)["img"]
            yield images

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        """Load as the host does, to resume or to recover from NaN, and how many epochs the average holds."""
        super()._load_checkpoint_state(ckpt)
        self._averaged = (ckpt.get(CHECKPOINT_KEY) or {}).get(AVERAGED, 0)
        self.ema.enabled = not self._averaged
