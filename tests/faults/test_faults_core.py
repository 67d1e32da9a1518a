# yolo-sos, AGPL-3.0
"""A head level without any row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from yolo_sos.core import SOS, FinalLayer, Method


class TwoLevels(nn.Module):
    """Two final layers; the second sees as many rows as it is told. Linear: a convolution refuses an empty map."""

    def __init__(self, rows: int):
        super().__init__()
        torch.manual_seed(0)
        self.rows = rows
        self.first, self.second = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.first(x), self.second(x[: self.rows])


class Plain:
    """A task without labels and loss."""

    layers = ()

    def run(self, model, batch):
        return model(batch)

    def probabilities(self, layer, logits, batch):
        return logits.sigmoid()


@pytest.mark.parametrize("method", [Method("principal", 2), Method("expected", 2), Method("budget"), Method("rows", 4)])
@pytest.mark.fault("a head level without any row", "nothing is shifted; told, with the level's name")
def test_an_empty_level(method):
    shifted = {}
    for rows in 32, 0:
        model = TwoLevels(rows)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        layers = [FinalLayer(name, getattr(model, name), "cls", i) for i, name in enumerate(("first", "second"))]
        batch = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
        report = SOS(model, layers, method=method, task=Plain()).shift([batch])
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        shifted[rows] = report.status, same
    assert shifted[32] == ("ok", False)
    assert shifted[0][1] and shifted[0][0].endswith("in second")
