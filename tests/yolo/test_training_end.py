# yolo-sos, AGPL-3.0
"""Whatever ends a run, last.pt and best.pt are shifted: a checkpoint that no shift has reached is shifted at the end."""

from __future__ import annotations

import pytest
import torch
from ultralytics.utils.patches import torch_load
from watched import same

from yolo_sos.trainers import SOSDetectionTrainer


class Fading(SOSDetectionTrainer):
    """Finds the first epoch the best."""

    def validate(self):
        metrics, _ = super().validate()
        self.best_fitness = 1.0
        return metrics, 1 / (self.epoch + 1)


def state(path):
    ckpt = torch_load(path, map_location="cpu")
    return (ckpt["ema"] or ckpt["model"]).state_dict()


@pytest.fixture(scope="module")
def late(train):
    """A run whose one shift is at the end of epoch 4."""
    return train(trainer=Fading, sos=True, sos_start=1.0, save_period=1)


def test_best_is_shifted_and_nothing_else_of_it(late):
    weights = late.save_dir / "weights"
    before, after = state(weights / "epoch0.pt"), state(weights / "best.pt")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    rows = [row for row in late.shifts if row["model"] == "best"]
    assert changed == {f"{row['name']}.weight" for row in rows} and len(rows) == 6
    for row in rows:
        name = f"{row['name']}.weight"
        assert row["epoch"] == "1" and row["status"] == "ok"
        assert float(after[name].float().norm()) == pytest.approx(float(row["norm_after"]), rel=1e-2)  # half precision
        assert float(row["norm_after"]) < float(row["norm_before"])
    assert [line for line in late.log if "best.pt, of epoch 1: squared norm" in line]


def test_what_a_shift_has_reached_stays(late, shifted):
    assert same(state(late.save_dir / "weights/last.pt"), state(late.save_dir / "weights/epoch3.pt"))
    assert [(row["epoch"], row["model"]) for row in late.shifts][:12] == 6 * [("4", "ema")] + 6 * [("4", "model")]
    assert not [row for row in shifted.shifts if row["model"] in {"best", "last"}]


def test_a_run_that_patience_ends_leaves_no_checkpoint_without_a_shift(train):
    run = train(trainer=Fading, sos=True, sos_start=1.0, patience=1)
    assert {(row["epoch"], row["model"]) for row in run.shifts} == {("1", "best"), ("2", "last")}


def test_what_the_guard_refuses_stays_as_it_was(train):
    run = train(trainer=Fading, sos=True, sos_start=1.0, save_period=1, sos_rank=1, sos_guard=0.0)
    rows = [row for row in run.shifts if row["model"] == "best"]
    before, after = (state(run.save_dir / "weights" / name) for name in ("epoch0.pt", "best.pt"))
    assert (float(rows[0]["t"]) == 0) == same(before, after)
    assert [line for line in run.log if "best.pt, of epoch 1" in line]


def test_without_sos_nothing_is_shifted(train):
    run = train(trainer=Fading, save_period=1)
    assert same(state(run.save_dir / "weights/best.pt"), state(run.save_dir / "weights/epoch0.pt"))
