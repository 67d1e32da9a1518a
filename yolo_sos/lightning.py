# yolo-sos, AGPL-3.0
"""Stochastic optimum shifting in a Lightning training: a callback over the SOS object."""

from __future__ import annotations

from itertools import islice
from typing import Any

from yolo_sos.core import SOS, ShiftReport, is_due

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as e:
    raise ImportError("SOSCallback needs Lightning: pip install 'yolo-sos[lightning]'.") from e


class SOSCallback(Callback):
    """Shift a LightningModule's final layers at the end of each training epoch for which a shift is due.

    The first batches of the trainer's own training data are taken: ``heldout`` of them for the guard, the next ``fit``
    to fit on. They are drawn as the data loader draws them, shuffled or augmented where it does that.

    Args:
        fit (int): Batches to fit on.
        heldout (int): Batches that guard the shift; 0: no guard.
        **settings: As of ``SOS``: ``layers``, ``method``, ``rank``, ``start``, ``criterion``, ``forward``, …

    Attributes:
        reports (dict[int, ShiftReport]): Epoch, counted from 0 → what its shift did.

    Examples:
        >>> trainer = Trainer(max_epochs=20, callbacks=[SOSCallback(fit=8, heldout=8, rank=0.5)])
    """

    def __init__(self, fit: int = 8, heldout: int = 8, **settings: Any):
        """Keep the settings; they are checked when training starts."""
        self.fit, self.heldout, self.settings = fit, heldout, settings
        self.sos: SOS | None = None
        self.reports: dict[int, ShiftReport | None] = {}
        self._state: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the settings, before the first epoch.

        Raises:
            ValueError: If a setting is wrong, or the run is on several devices or has no last epoch.
        """
        if trainer.world_size > 1:
            raise ValueError("SOSCallback works on one device: the ranks would shift apart. Set Trainer(devices=1).")
        if not (trainer.max_epochs or 0) > 0:
            raise ValueError("SOSCallback needs the number of epochs to know when to shift. Set Trainer(max_epochs=…).")
        optimizer = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
        self.sos = SOS(pl_module, **{"optimizer": optimizer, **self.settings})
        self.sos.load_state_dict(self._state or self.sos.state_dict())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Shift if it is time to."""
        assert self.sos is not None
        epoch, epochs = trainer.current_epoch, trainer.max_epochs
        if is_due(epoch + 1, epochs, self.sos.start, self.sos.interval):
            batches = iter(trainer.train_dataloader)
            heldout = list(islice(batches, self.heldout))
            self.reports[epoch] = self.sos.step(epoch, epochs, islice(batches, self.fit), heldout)

    def state_dict(self) -> dict[str, Any]:
        """Return what goes into Lightning's checkpoints."""
        return self.sos.state_dict() if self.sos else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._state = dict(state_dict)
