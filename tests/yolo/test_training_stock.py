# yolo-sos, AGPL-3.0
"""Without SOS, and until the first shift, a run is that of Ultralytics, bit for bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from ultralytics.utils.patches import torch_load
from watched import EPOCHS, same

from yolo_sos.core import SOS, LayerReport, ShiftReport

TIMES = {"time"}


def rows(run, without=TIMES):
    """Return results.csv but for the columns that differ from run to run, and those of SOS."""
    return [{k: v for k, v in row.items() if k not in without and not k.startswith("sos/")} for row in run.results]


def files(run):
    return {str(p.relative_to(run.save_dir)) for p in run.save_dir.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def off(train):
    return train(sos=False, sos_rank=0.25)


def test_sos_false_is_the_stock_trainer_bit_for_bit(stock, off):
    assert sorted(off.ended) == sorted(stock.ended) == list(range(1, EPOCHS + 1))
    for epoch in stock.ended:
        for name in "model", "ema":
            assert same(off.ended[epoch][name], stock.ended[epoch][name]), (epoch, name)
    assert not same(stock.ended[1]["model"], stock.ended[2]["model"])  # the comparison can fail
    assert rows(off) == rows(stock)


def test_sos_false_leaves_what_the_stock_trainer_leaves(stock, off):
    assert files(off) == files(stock)
    assert list(off.results[0]) == list(stock.results[0])
    ours, theirs = (torch_load(run.save_dir / "weights/last.pt", map_location="cpu") for run in (off, stock))
    assert list(ours) == list(theirs)
    assert same(ours["model"].state_dict(), theirs["model"].state_dict())
    assert not off.images and not [line for line in off.log if "SOS" in line]


def test_until_the_first_shift_a_run_with_sos_is_the_stock_run(stock, shifted):
    assert same(shifted.ended[1]["model"], stock.ended[1]["model"])
    assert same(shifted.ended[1]["ema"], stock.ended[1]["ema"])
    assert same(shifted.trained[2]["model"], stock.trained[2]["model"])
    assert same(shifted.trained[2]["ema"], stock.trained[2]["ema"])
    assert not same(shifted.ended[2]["ema"], stock.ended[2]["ema"])
    assert rows(shifted)[0] == rows(stock)[0]


def test_a_shift_leaves_the_run_its_random_numbers_and_its_data(stock, train, monkeypatch):
    """With a shift that draws from every source and writes nothing, all four epochs are the stock ones."""
    drawn = []

    def idle(sos, batches, heldout, **_):
        sos.model.eval()(next(iter(batches))["img"])
        drawn.append((random.random(), np.random.rand(), torch.rand(3), [len(b["img"]) for b in heldout]))
        record = LayerReport(sos.layers[0].name, "box", 0, 1, 1, 1.0, 1.0, 1.0, 0.0, "ok")
        return ShiftReport((record,), 1.0, 1.0, 1.0, None, {"solve": 0.0})

    monkeypatch.setattr(SOS, "shift", idle)
    run = train(sos=True)
    assert len(drawn) == 2 * 3
    for epoch in stock.ended:
        assert same(run.ended[epoch]["model"], stock.ended[epoch]["model"]), epoch
        assert same(run.ended[epoch]["ema"], stock.ended[epoch]["ema"]), epoch
    assert rows(run) == rows(stock)
