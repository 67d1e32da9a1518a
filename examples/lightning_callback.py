# yolo-sos, AGPL-3.0
"""SOS in a Lightning training: one callback.

It needs ``pip install 'yolo-sos[lightning]'``. Run it with

    python examples/lightning_callback.py
"""

from __future__ import annotations

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from yolo_sos import SOSCallback


class Classifier(lightning.LightningModule):
    """Two layers on the 64 pixels of scikit-learn's handwritten digits."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def main() -> dict[int, float]:
    """Train, and return what is left of the squared norm after each epoch that ended with a shift."""
    lightning.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images).float() / 16, torch.tensor(labels))
    # From half of the epochs on, every second one: four batches are held out, eight are fitted on.
    sos = SOSCallback(fit=8, heldout=4, start=0.5, interval=2)
    trainer = lightning.Trainer(
        max_epochs=8,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[sos],
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=64, shuffle=True))
    for epoch, report in sos.reports.items():
        print(f"after epoch {epoch + 1}: {report}")
    return {epoch: report.squared_norm_ratio for epoch, report in sos.reports.items()}


if __name__ == "__main__":
    main()
