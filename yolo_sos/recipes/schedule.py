# yolo-sos, AGPL-3.0
"""A learning rate that is divided by 10 at given fractions of the epochs."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim.lr_scheduler import LambdaLR

from yolo_sos.yolo.training import TrainerExtension


def step_factor(epoch: int, epochs: int, steps: Sequence[float]) -> float:
    """Return the factor of the learning rate in an epoch, counted from 0: ``10⁻ᵏ`` after k of the steps.

    The steps are fractions of the ``epochs`` of the whole run, each in (0, 1).
    """
    return 0.1 ** sum(epoch >= round(step * epochs, 6) for step in steps)  # rounded: 0.1 · 30 is 3.0000000000000004


class SteppedLearningRate(TrainerExtension):
    """The extension of a trainer by ``lr_steps``."""

    def _setup_scheduler(self) -> None:
        """Schedule the learning rate as Ultralytics does, or in the steps of ``lr_steps``."""
        steps = self.sos.lr_steps
        if steps is None:
            super()._setup_scheduler()
            return
        self.lf = lambda epoch: step_factor(epoch, self.epochs, steps)
        self.scheduler = LambdaLR(self.optimizer, lr_lambda=self.lf)
