# yolo-sos, AGPL-3.0
"""SOS in a Lightning training, on scikit-learn's handwritten digits."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

pytest.importorskip("sklearn", reason="needs scikit-learn's digits: the extra 'digits'")
lightning = pytest.importorskip("lightning", reason="needs the extra 'lightning'")

EPOCHS = 6


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def loader():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    data = torch.utils.data.TensorDataset(torch.tensor(images).float() / 16, torch.tensor(labels))
    return torch.utils.data.DataLoader(data, batch_size=100)


def train(folder, stop=EPOCHS, resume=None, **settings):
    """Train up to ``stop`` epochs; the schedule is that of the whole run."""
    from yolo_sos import SOSCallback

    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch + 1 >= stop

    torch.manual_seed(0)
    model, callback = (
        Classifier(),
        SOSCallback(fit=4, heldout=4, **{"rank": 0.5, "start": 0.5, "interval": 2, **settings}),
    )
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, callbacks=[callback, Stop()],
    )  # fmt: skip
    trainer.fit(model, loader(), ckpt_path=resume)
    return trainer, model, callback


def test_shifts_are_made_when_they_are_due(tmp_path):
    _, model, callback = train(tmp_path)
    assert list(callback.reports) == [2, 4]
    for report in callback.reports.values():
        assert (report.layers[0].name, report.guard) == ("net.2", 0.005)
        assert report.layers[0].rows == 400
        assert report.step == 0 or report.squared_norm_ratio < 1
        assert report.heldout_after <= 1.01 * report.heldout_before
    x, y = loader().dataset.tensors
    assert float((model(x).argmax(1) == y).float().mean()) > 0.85
    assert model.training


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, stop):
    settings = {"method": "rows", "rank": 20, "guard": None}
    _, unbroken, whole = train(tmp_path, **settings)
    trainer, _, _ = train(tmp_path, stop, **settings)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, rest = train(tmp_path, resume=tmp_path / "half.ckpt", **settings)
    assert list(rest.reports) == [epoch for epoch in whole.reports if epoch >= stop]
    assert rest.state_dict() == whole.state_dict() == {"shifts": 2}
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.reports[2].squared_norm_ratio < 1


def test_wrong_settings_stop_the_run_before_its_first_epoch(tmp_path):
    with pytest.raises(ValueError, match="'rank=True' is invalid"):
        train(tmp_path, rank=True)


def test_without_lightning_the_extra_is_named():
    code = "import sys; sys.modules['lightning'] = None\nfrom yolo_sos import SOSCallback"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "SOSCallback needs Lightning: pip install 'yolo-sos[lightning]'" in result.stderr
