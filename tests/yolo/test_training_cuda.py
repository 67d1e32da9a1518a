# yolo-sos, AGPL-3.0
"""Training and what follows it on a GPU, in mixed precision, as Ultralytics does there by default."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from renamed import renamed_data
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.patches import torch_load
from watched import EPOCHS, REAL_SHIFT, same

from yolo_sos.core import SOS
from yolo_sos.yolo import calibrate_checkpoint, fit_checkpoint, shift_checkpoint
from yolo_sos.yolo.heads import final_layers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def run(train):
    """Shifts after epochs 2, 3 and 4."""
    return train(sos=True, device=0, amp=True)


def assert_finished(run):
    """All epochs ran, with losses that are numbers."""
    assert len(run.results) == EPOCHS
    assert all(math.isfinite(float(v)) for row in run.results for k, v in row.items() if "loss" in k)


def test_a_run(run):
    assert run.trainer.amp and run.trainer.device.type == "cuda"
    names = {layer.name for layer in final_layers(run.trainer.model)}
    assert {(r["epoch"], r["model"], r["name"]) for r in run.shifts} == {
        (str(epoch), model, name) for epoch in (2, 3, 4) for model in ("ema", "model") for name in names
    }
    assert all(r["status"] == "ok" and float(r["norm_after"]) < float(r["norm_before"]) for r in run.shifts)
    assert_finished(run)
    for model in "ema", "model":  # float32, and nothing but the final layers changed
        before, after = run.trained[EPOCHS][model], run.ended[EPOCHS][model]
        assert {k for k in before if not torch.equal(before[k], after[k])} == {f"{name}.weight" for name in names}
        assert all(v.dtype == torch.float32 for v in after.values() if v.is_floating_point())


def test_its_checkpoint_is_of_the_shifted_ema(run):
    saved = torch_load(run.save_dir / "weights/last.pt", map_location="cpu")["model"].state_dict()
    ema = {k: v.cpu() for k, v in run.ended[EPOCHS]["ema"].items()}
    assert same(saved, {k: v.half() if v.is_floating_point() else v for k, v in ema.items()})
    assert len(YOLO(run.save_dir / "weights/last.pt").predict(torch.zeros(1, 3, 64, 64), device=0, verbose=False)) == 1


def test_a_broken_run_goes_on(train, interrupt):
    broken = train(sos=True, device=0, callbacks=interrupt("on_train_batch_end", 4), error=KeyboardInterrupt)
    resumed = train(resume=str(broken.save_dir / "weights/last.pt"), model=broken.save_dir / "weights/last.pt")
    assert [row["epoch"] for row in resumed.results] == ["1", "2", "3", "4"]
    assert [row["epoch"] for row in resumed.shifts][:: len(final_layers(resumed.trainer.model)) * 2] == ["2", "3", "4"]


def test_without_sos_it_is_ultralytics(train):
    """As far as Ultralytics repeats itself on a GPU."""
    stock = [train(trainer=DetectionTrainer, device=0, amp=True) for _ in range(2)]
    states = [r.ended[EPOCHS]["ema"] for r in (*stock, train(device=0, amp=True))]
    if not same(*states[:2]):
        pytest.skip("two runs of Ultralytics differ here")
    assert same(states[0], states[2])


@pytest.mark.parametrize("settings", [{"sharpness_aware": "sam"}, {"sharpness_aware": "gnp"}, {"swa": 0.5}])
def test_peers(train, settings):
    run = train(sos=True, device=0, amp=True, **settings)
    assert all(r["status"] == "ok" for r in run.shifts)
    assert_finished(run)


def test_out_of_memory(train, monkeypatch):
    """Of 8 images: the allocator's own error, and half as many."""
    sizes = []

    def hungry(sos, batches, *args, **kwargs):
        batches = list(batches)
        sizes.append(sum(len(batch["img"]) for batch in batches))
        if sizes[-1] > 4:
            torch.empty(1 << 45, device="cuda")
        return REAL_SHIFT(sos, batches, *args, **kwargs)

    monkeypatch.setattr(SOS, "shift", hungry)
    run = train(sos=True, sos_images=8, device=0, epochs=2)
    assert sizes == 2 * [8, 4, 4]
    assert any("Out of memory with 8 images for the shift: trying 4." in line for line in run.log)
    assert {row["status"] for row in run.shifts} == {"ok"}


@pytest.mark.parametrize(
    "options",
    [{"method": "expected"}, {"method": "loss", "layers": "cls"}],  # loss draws signs, which only boxes depend on
    ids=["expected", "loss"],
)
def test_a_trained_checkpoint_is_shifted_as_on_the_cpu(run, digits, tmp_path, monkeypatch, options):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions with ten bits: no comparison
    weights = {}
    for device in "cpu", "0":
        path = tmp_path / device / "last.pt"
        path.parent.mkdir()
        shutil.copy(run.save_dir / "weights/last.pt", path)
        shift_checkpoint(path, digits, device=device, val=False, guard=None, rank=0.25, **options)
        weights[device] = torch_load(path.with_name("last-sos.pt"), map_location="cpu")["model"].float().state_dict()
    for key, expected in weights["cpu"].items():  # but for the last digits of float16, in which they are saved
        difference = (weights["0"][key] - expected).double().norm()
        assert float(difference) <= 5e-3 * float(expected.double().norm()), key


@pytest.fixture
def renamed(able, tmp_path):
    """The digits under names that no model knows."""
    return renamed_data(able["data"], tmp_path)


def test_fit_head(train, able, renamed):
    """Before the first epoch, of the model in float32, and a shift at the end."""
    run = train(model=able["best"], data=str(renamed), fit_head=True, sos=True, device=0, amp=True)
    assert {"2", "3", "4"} <= {r["epoch"] for r in run.shifts}
    told = json.loads((run.save_dir / "fit.json").read_text())
    assert not told["refusal"] and told["heldout_after"] < told["heldout_before"]
    assert_finished(run)


def test_a_checkpoint_is_fitted_as_on_the_cpu(able, renamed, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    reports = {}
    for device in "cpu", "0":
        (tmp_path / device).mkdir()
        path = shutil.copy(able["best"], tmp_path / device / "best.pt")
        reports[device] = fit_checkpoint(path, renamed, device=device, val=False)
    here, there = reports["cpu"], reports["0"]
    assert not here.refusal and not there.refusal
    assert [x.ridge for x in there.layers] == pytest.approx([x.ridge for x in here.layers], rel=0.05)
    assert there.heldout_before == pytest.approx(here.heldout_before, rel=1e-3)
    assert there.heldout_after == pytest.approx(here.heldout_after, rel=0.02)


def test_a_checkpoint_is_calibrated_as_on_the_cpu(able, tmp_path, monkeypatch):
    """To the same map, whether or not it is accepted."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    maps = {}
    for device in "cpu", "0":
        (tmp_path / device).mkdir()
        path = shutil.copy(able["best"], tmp_path / device / "best.pt")
        (branch,) = calibrate_checkpoint(path, able["data"], device=device).branches
        maps[device] = branch.mapping
    for name in "scale", "shift":
        there, here = (float(getattr(maps[device], name).mean()) for device in ("0", "cpu"))
        assert there == pytest.approx(here, rel=0.05), name
