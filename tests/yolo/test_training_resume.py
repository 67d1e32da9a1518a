# yolo-sos, AGPL-3.0
"""A run that was cut off goes on as if it had not been."""

from __future__ import annotations

import math

import pytest
import yaml
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.patches import torch_load
from watched import EPOCHS, same

from yolo_sos.yolo.shift_log import ShiftLog, columns


@pytest.fixture(scope="module")
def resumed(train, interrupt):
    """A run that was cut off after the shift of epoch 3, before it was saved; and its continuation."""
    broken = train(sos=True, callbacks=interrupt("on_train_epoch_end", 3), error=KeyboardInterrupt)
    last = broken.save_dir / "weights/last.pt"
    assert torch_load(last, map_location="cpu")["epoch"] == 1  # counted from 0
    assert {row["epoch"] for row in broken.shifts} == {"2", "3"}
    return broken, train(model=last, resume=True)


def test_it_shifts_when_the_unbroken_run_does_and_logs_each_shift_once(shifted, resumed):
    broken, run = resumed
    assert run.save_dir == broken.save_dir
    assert sorted(run.ended) == sorted(run.images) == [3, 4]

    def told(run):
        return [(row["epoch"], row["model"], row["name"]) for row in run.shifts]

    assert told(run) == told(shifted)
    assert len(set(told(run))) == len(told(run))


def test_it_draws_the_images_that_the_unbroken_run_does(shifted, resumed):
    broken, run = resumed
    assert {**broken.images, **run.images} == shifted.images


def test_its_results_have_one_line_per_epoch_under_one_header(shifted, resumed):
    run = resumed[1]
    assert list(run.results[0]) == list(shifted.results[0])
    assert [row["epoch"] for row in run.results] == [str(epoch) for epoch in range(1, EPOCHS + 1)]
    for row, unbroken in zip(run.results, shifted.results, strict=True):
        for column in row:
            if column.startswith("lr/"):
                assert row[column] == unbroken[column], (row["epoch"], column)
        for column in columns({}):
            assert math.isnan(float(row[column])) == (row["epoch"] == "1")
        if row["epoch"] != "1":
            assert float(row["sos/rank"]) == pytest.approx(
                float(unbroken["sos/rank"]), abs=0.5
            )  # numerical, in one layer
            assert float(row["sos/t"]) == 1 and 0 < float(row["sos/squared_norm_ratio"]) < 1


def test_its_settings_come_from_the_checkpoint(shifted, resumed):
    run = resumed[1]
    assert run.trainer.sos == shifted.trainer.sos
    assert yaml.safe_load((run.save_dir / "sos.yaml").read_text()) == shifted.trainer.sos.to_dict()
    ckpt = torch_load(run.save_dir / "weights/last.pt", map_location="cpu")
    assert ckpt["sos"]["settings"] == shifted.trainer.sos.to_dict()
    assert not [line for line in run.log if "Resume ignores" in line]


@pytest.fixture
def cut(train, interrupt):
    """The checkpoint of a run of two epochs, cut off after the first; ``cut(**settings)``."""

    def cut(**settings):
        callbacks = interrupt("on_train_epoch_start", 2)
        run = train(epochs=2, callbacks=callbacks, error=KeyboardInterrupt, **settings)
        return run.save_dir / "weights/last.pt"

    return cut


@pytest.mark.parametrize(
    ("asked", "ignored"),
    [
        ({"sos": True, "sos_rank": 0.25, "sos_images": 8}, "['sos_rank']"),
        ({"sos": False}, "['sos']"),
        ({"sos": True, "sos_layers": "box", "sos_guard": "none"}, "['sos_layers', 'sos_guard']"),
    ],
)
def test_changed_settings_are_ignored_with_a_warning(train, cut, asked, ignored):
    last = cut(sos=True)
    before = torch_load(last, map_location="cpu")["sos"]["settings"]
    run = train(model=last, resume=True, **asked)
    assert run.trainer.sos.to_dict() == before
    assert [line for line in run.log if f"Resume ignores {ignored}" in line]
    assert {row["epoch"] for row in run.shifts} == {"1", "2"}


def test_a_run_without_sos_cannot_be_resumed_with_it(train, cut):
    last = cut(trainer=DetectionTrainer)
    run = train(model=last, resume=True, sos=True, error=ValueError)
    assert "trained without SOS" in str(run.error) and str(last) in str(run.error)
    assert torch_load(last, map_location="cpu")["epoch"] == 0  # nothing was trained


def test_a_stock_run_is_resumed_as_one(train, cut):
    last = cut(trainer=DetectionTrainer)
    run = train(model=last, resume=True)
    assert sorted(run.ended) == [2] and not run.images
    assert run.trainer.sos.sos is False
    assert not list(run.save_dir.glob("sos.*"))
    assert "sos" not in torch_load(last, map_location="cpu")


def test_a_new_run_from_a_checkpoint_of_sos_takes_no_settings_from_it(train, cut):
    run = train(model=cut(sos=True), epochs=1)
    assert run.trainer.sos.sos is False and not run.shifts


def test_an_epoch_that_is_recovered_from_nan_is_logged_once(train):
    """Ultralytics runs an epoch again from the last checkpoint when its loss is not a number."""
    poisoned = []

    def poison(trainer):
        if trainer.epoch + 1 == 3 and not poisoned:
            poisoned.append(True)
            trainer.loss = trainer.loss * math.nan

    run = train(sos=True, callbacks={"on_train_epoch_end": poison})
    assert len(run.images[3]) == 2 * len(run.images[2])  # it was shifted twice
    lines = [(row["epoch"], row["model"], row["name"]) for row in run.shifts]
    assert len(lines) == len(set(lines))
    assert [row["epoch"] for row in run.results] == ["1", "2", "3", "4"]
    for name in "model", "ema":
        assert not same(run.trained[3][name], run.ended[3][name])


def test_lines_of_epochs_that_will_run_again_are_dropped(tmp_path, resumed):
    path = tmp_path / "sos.csv"
    path.write_bytes((resumed[1].save_dir / "sos.csv").read_bytes())
    assert {row["epoch"] for row in ShiftLog(path, resume_from=3).rows} == {"2", "3"}
    assert ShiftLog(path).rows == []  # a new run in an old folder
    assert ShiftLog(tmp_path / "none.csv", resume_from=3).rows == []
