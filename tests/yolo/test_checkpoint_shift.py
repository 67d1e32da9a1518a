# yolo-sos, AGPL-3.0
"""Shifting a checkpoint: what is written, what is told, and that the two agree."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils.patches import torch_load

import yolo_sos
from yolo_sos.core import SOS, InputCapture, Method, evaluation, input_rows, weight_matrix
from yolo_sos.core.solvers import NON_FINITE, unchanged
from yolo_sos.yolo import CheckpointShift, shift_checkpoint
from yolo_sos.yolo import shift as shift_module
from yolo_sos.yolo.checkpoint import Checkpoint
from yolo_sos.yolo.checkpoint_data import CheckpointData
from yolo_sos.yolo.heads import YoloTask, final_layers
from yolo_sos.yolo.images import split_sizes

ALL = {"images": "all", "guard": None}


def final_weights(path):
    """Return the final weights of a checkpoint, as Ultralytics reads them, in float64."""
    return {layer.name: weight_matrix(layer.module).double() for layer in final_layers(load_checkpoint(path)[0])}


def opened(path, data, seed=0, batch=None):
    """Return a model, its final layers and its images."""
    checkpoint = Checkpoint(path)
    device = torch.device("cpu")
    opened = CheckpointData(checkpoint, data, imgsz=None, batch=batch, device=device)
    return checkpoint.model, checkpoint.layers, opened.sample(split_sizes(len(opened.dataset), None), seed)


def loss_of(path, data, **options):
    """Return Ultralytics' loss per image of a whole model on the held-out images."""
    model, _, images = opened(path, data, **options)
    task, total = YoloTask(model), 0.0
    with evaluation(model):
        for batch in images.batches("heldout"):
            total += len(batch["img"]) * float(task.loss(task.run(model, batch), batch))
    return total / len(images.sets["heldout"])


def rows_of(path, data, which):
    """Return the inputs of each final layer ``(n, d)`` in float64."""
    model, layers, images = opened(path, data)
    found = {layer.name: [] for layer in layers}
    with evaluation(model), InputCapture(layers) as capture:
        for batch in images.batches(which):
            model(batch["img"])
            inputs = capture.take()
            for layer in layers:
                found[layer.name].append(input_rows(layer.module, inputs[layer.name]).double())
    return {name: torch.cat(rows) for name, rows in found.items()}


@pytest.fixture(scope="module")
def shifted(trained, seen, tmp_path_factory):
    """A shift of given rank without a guard, and where it was written."""
    folder = tmp_path_factory.mktemp("shifted")
    path = folder / "best.pt"
    path.write_bytes(trained["best"].read_bytes())
    return path, shift_checkpoint(path, seen, method="principal", rank=0.5, guard=None)


# What is written and told ---------------------------------------------------------------------------------------------
def test_the_results_stand_beside_the_checkpoint(shifted, trained):
    path, report = shifted
    assert {p.name for p in path.parent.iterdir()} == {"best.pt", "best-sos.pt", "best-sos.json"}
    assert path.read_bytes() == trained["best"].read_bytes()
    assert report.output == str(path.with_name("best-sos.pt"))
    assert (report.model, report.status, report.step) == (str(path), "ok", 1.0)
    assert report.images == {"fit": 16, "heldout": 8}
    assert report.settings == {
        **{"method": "principal", "rank": 0.5, "weighting": "balanced", "budget": None, "found": False},
        **{"images": 16, "layers": "all", "guard": None, "seed": 0},
    }


def test_the_json_is_the_report(shifted):
    path, report = shifted
    found = json.loads(path.with_name("best-sos.json").read_text())
    assert found == json.loads(report.to_json())
    assert found["squared_norm_ratio"] == report.squared_norm_ratio
    assert [layer["name"] for layer in found["layers"]] == [r.name for r in report.layers]


def test_norms_and_ranks_are_those_of_the_files(shifted):
    path, report = shifted
    before, after = final_weights(path), final_weights(report.output)
    assert len(report.layers) == len(before) == 6
    for r in report.layers:
        assert r.norm_before == pytest.approx(float(before[r.name].norm()), rel=1e-12)
        assert r.norm_after == pytest.approx(float(after[r.name].norm()), rel=1e-4)
        assert r.d == before[r.name].shape[1]
        assert r.rank == r.d // 2
        s = torch.linalg.svdvals(after[r.name])
        assert int((s > 1e-2 * s[0]).sum()) <= r.rank
        assert r.milliseconds > 0
    total = sum(v.square().sum() for v in before.values())
    ratio = sum(v.square().sum() for v in after.values()) / total
    assert report.squared_norm_ratio == pytest.approx(float(ratio), rel=1e-4)
    assert report.squared_norm_ratio < 0.9


def test_deviations_are_those_of_the_outputs(shifted, seen):
    path, report = shifted
    before, after = final_weights(path), final_weights(report.output)
    heldout, fit = rows_of(path, seen, "heldout"), rows_of(path, seen, "fit")
    for r in report.layers:
        a, v = heldout[r.name], before[r.name]
        assert r.rows == len(fit[r.name])
        moved = (a @ (after[r.name] - v).T).norm() / (a @ v.T).norm()
        assert r.deviation_heldout == pytest.approx(float(moved), rel=1e-2)  # the file's weights are rounded
        assert 0 < r.rounding < 1e-3 < r.deviation_heldout


def test_the_loss_after_a_shift_is_that_of_the_file_as_written(shifted, seen):
    path, report = shifted
    assert report.heldout_before == pytest.approx(loss_of(path, seen), rel=1e-5)
    assert report.heldout_after == pytest.approx(loss_of(report.output, seen), rel=1e-5)
    assert report.heldout_after == pytest.approx(report.heldout_full, rel=1e-3) != report.heldout_before


def test_the_metrics_are_those_of_yolo_val(shifted, seen):
    path, report = shifted

    def stock(file):
        yolo = YOLO(file)
        return yolo.val(data=str(seen), batch=8, device="cpu", plots=False, workers=0).results_dict

    assert report.metrics_before == dict(stock(path))
    assert report.metrics_after == pytest.approx(dict(stock(report.output)), abs=1e-6)
    assert report.metrics_before != report.metrics_after


def test_the_table_holds_all_figures(shifted):
    _, report = shifted
    table = report.table()
    for r in report.layers:
        line = next(line for line in table.splitlines() if line.startswith(r.name))
        assert line.split()[1:5] == [r.kind, str(r.d), str(r.rows), f"{r.rank:.1f}"]
        assert line.split()[7:10] == [f"{r.deviation:.2e}", f"{r.deviation_heldout:.2e}", f"{r.rounding:.2e}"]
    assert f"squared norm ×{report.squared_norm_ratio:.3f}" in table
    assert "by rounding alone" in table
    main = next(line for line in table.splitlines() if "mAP50-95" in line)
    before, after = (m["metrics/mAP50-95(B)"] for m in (report.metrics_before, report.metrics_after))
    assert main.split()[1:4] == [f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"]


def test_rounding_is_measured_apart_from_the_shift(weights, seen):
    """OS over all rows changes no output; what is left is rounding."""
    path = weights()
    report = shift_checkpoint(path, seen, method="full", **ALL, val=False)
    before, after, rows = final_weights(path), final_weights(report.output), rows_of(path, seen, "heldout")
    for r in report.layers:
        assert r.deviation < 1e-7
        a, v = rows[r.name], before[r.name]
        moved = (a @ (after[r.name] - v).T).norm() / (a @ v.T).norm()
        bias = dict(load_checkpoint(path)[0].named_modules())[r.name].bias.double()
        with_bias = moved * (a @ v.T).norm() / (a @ v.T + bias).norm()
        assert r.rounding == pytest.approx(float(with_bias), rel=0.05, abs=1e-9)


def test_rounding_of_a_full_precision_checkpoint_counts_all_its_layers(weights, seen):
    path = weights()
    ckpt = torch_load(path)
    model = ckpt["model"].float()
    for p in model.parameters():
        p.data.mul_(1 + 1e-3 * torch.rand(p.shape, generator=torch.Generator().manual_seed(0)))
    torch.save(ckpt, path)
    report = shift_checkpoint(path, seen, **ALL, val=False)
    assert report.rounding > 1e-4
    assert report.heldout_after == pytest.approx(loss_of(report.output, seen), rel=1e-5)
    assert all(v.dtype != torch.float32 for v in torch_load(report.output)["model"].state_dict().values())


# The shift is that of the core ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("weighting", ["balanced", "confidence", "uniform"])
@pytest.mark.parametrize("name", ["loss", "principal", "expected", "budget", "full", "rows"])
def test_every_method_gives_what_the_core_gives(weights, seen, name, weighting):
    path = weights()
    options = {"method": name, "rank": 0.25, "budget": 0.05, "weighting": weighting}
    report = shift_checkpoint(path, seen, **options, **ALL, draws=1, seed=3, val=False)
    model, layers, images = opened(path, seen, seed=3)
    method = Method(name, 0.25, 0.05, "svd", weighting)
    sos = SOS(model, layers, task=YoloTask(model), method=method, guard=None)
    expected = sos.shift(images.batches("fit"), seed=3)
    found = final_weights(report.output)
    for layer, r, e in zip(layers, report.layers, expected.layers, strict=True):
        exact = weight_matrix(layer.module).double()
        assert torch.allclose(found[layer.name], exact, rtol=1e-3, atol=1e-6)
        assert (r.rank, r.rows, r.status) == (pytest.approx(e.rank), e.rows, e.status)
        assert r.deviation == pytest.approx(e.deviation, rel=1e-6, abs=1e-12)
        assert r.norm_after == pytest.approx(e.norm_after, rel=1e-6)


def test_layers_that_are_not_chosen_stay(weights, seen):
    path = weights()
    report = shift_checkpoint(path, seen, layers="cls", **ALL, val=False)
    before, after = final_weights(path), final_weights(report.output)
    assert {r.kind for r in report.layers} == {"cls"}
    for name, weight in before.items():
        assert torch.equal(after[name], weight) == ("cv2" in name)


def test_every_image_runs_once(weights, seen, monkeypatch):
    runs = []
    job = CheckpointShift(weights(), seen, **ALL, method="rows", draws=5, val=False)
    forward = type(job.model)._predict_once

    def counted(self, x, *args, **kwargs):
        runs.append((self is job.model, len(x)))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(type(job.model), "_predict_once", counted)
    job.run()
    assert runs == [(True, n) for n in (8, 4, 6, 6)] + [
        (False, 6)
    ]  # fit, selection, held-out; this once more to verify


# Drawn rows -----------------------------------------------------------------------------------------------------------
def test_the_draw_of_least_loss_on_images_set_aside_is_taken_and_all_are_reported(weights, seen):
    path = weights()
    report = shift_checkpoint(path, seen, method="rows", rank=0.5, draws=4, **ALL, seed=7, val=False)
    losses = [d["selection_loss"] for d in report.draws]
    assert sorted(d["seed"] for d in report.draws) == [7, 8, 9, 10]
    assert losses == sorted(losses)
    assert len(set(losses)) == 4
    assert report.images == {"fit": 12, "heldout": 6, "selection": 6}
    assert report.heldout_full not in losses  # the images of the guard took no part in the choice
    assert report.squared_norm_ratio == pytest.approx(report.draws[0]["squared_norm_ratio"], rel=1e-6)
    assert report.deviation == pytest.approx(report.draws[0]["deviation"], rel=1e-6)
    assert f"seed {report.draws[0]['seed']} was taken" in report.table()
    assert report.settings["draws"] == 4
    alone = shift_checkpoint(
        path, seen, method="rows", rank=0.5, draws=1, **ALL, seed=report.draws[0]["seed"], val=False, exist_ok=True
    )
    assert alone.draws == ()


def test_a_seed_gives_the_same_bytes(weights, seen):
    options = {"method": "rows", "draws": 2, **ALL, "val": False, "exist_ok": True}
    path = weights()

    def run(seed):
        return Path(shift_checkpoint(path, seen, seed=seed, **options).output).read_bytes()

    first = run(1)
    torch.manual_seed(99)
    np.random.seed(99)
    assert run(1) == first
    assert run(2) != first


# The guard ------------------------------------------------------------------------------------------------------------
def test_by_default_the_guard_finds_the_strength(weights, seen):
    path = weights()
    report = shift_checkpoint(path, seen, val=False)
    assert (report.settings["method"], report.settings["found"], report.settings["guard"]) == ("loss", True, 0.005)
    assert 0.5 <= report.settings["rank"] < 1.0
    assert report.heldout_after <= report.heldout_before + 0.005 * abs(report.heldout_before)
    report = shift_checkpoint(path, seen, val=False, method="expected", exist_ok=True)
    assert (report.settings["method"], report.settings["found"], report.settings["guard"]) == ("expected", True, 0.005)
    assert 0 < report.settings["rank"] < 1.0
    assert report.heldout_after <= report.heldout_before + 0.005 * abs(report.heldout_before)
    weaker = shift_checkpoint(path, seen, val=False, method="expected", guard=0.0005, exist_ok=True)
    assert weaker.settings["rank"] > report.settings["rank"]
    assert weaker.squared_norm_ratio > report.squared_norm_ratio
    given = shift_checkpoint(path, seen, val=False, method="expected", rank=report.settings["rank"], exist_ok=True)
    assert given.squared_norm_ratio == pytest.approx(report.squared_norm_ratio, rel=1e-9)


def test_the_guard_refuses(weights, seen, contents):
    path = weights()
    before = contents(path.parent)
    report = shift_checkpoint(path, seen, rank=1, guard=0.0, images="all")
    assert contents(path.parent) == before
    assert (report.status, report.output, report.step) == ("guarded", None, 0.0)
    assert report.heldout_after == report.heldout_before < report.heldout_full
    assert report.squared_norm_ratio == 1.0
    assert all((r.norm_after, r.deviation, r.deviation_heldout) == (r.norm_before, 0.0, 0.0) for r in report.layers)
    assert all(math.isnan(r.rounding) for r in report.layers)
    assert json.loads(report.to_json())["rounding"] is None
    assert report.metrics_before == report.metrics_after == {}
    text = report.refusal()
    assert "within sos_guard=0 (+0.00%)" in text
    assert f"to {report.heldout_full:.5g}" in text
    assert "sos_guard=none" in text


def test_the_guard_takes_a_shorter_step(weights, seen):
    path = weights()
    full = shift_checkpoint(path, seen, rank=4, **ALL, val=False)
    rise = full.heldout_full / full.heldout_before - 1
    assert rise > 0
    report = shift_checkpoint(path, seen, rank=4, images="all", guard=0.6 * rise, val=False, exist_ok=True)
    assert report.step in {0.5, 0.25}
    assert report.heldout_before < report.heldout_after < report.heldout_full == full.heldout_full
    assert full.squared_norm_ratio < report.squared_norm_ratio < 1
    assert report.deviation == pytest.approx(report.step * full.deviation)
    assert report.deviation_heldout == pytest.approx(report.step * full.deviation_heldout, rel=1e-4)
    before, found = final_weights(path), final_weights(report.output)
    for r in report.layers:
        assert r.norm_after == pytest.approx(float(found[r.name].norm()), rel=1e-4)
        assert not torch.equal(found[r.name], before[r.name])


def test_a_failed_solve_writes_nothing(weights, seen, contents, monkeypatch):
    path = weights()
    before = contents(path.parent)
    job = CheckpointShift(path, seen, method="expected", **ALL)
    monkeypatch.setattr("yolo_sos.core.engine.solve", lambda method, moments, weight: unchanged(weight, NON_FINITE))
    report = job.run()
    assert contents(path.parent) == before
    assert report.output is None
    assert report.refusal() == f"Nothing was written: non-finite in {report.layers[0].name}."


# Nothing half written -------------------------------------------------------------------------------------------------
def test_existing_results_are_kept_unless_exist_ok(weights, seen, contents):
    path = weights()
    for name in "best-sos.pt", "best-sos.json":
        path.with_name(name).write_text("mine")
        before = contents(path.parent)
        with pytest.raises(FileExistsError, match=rf"{name} exists already.*exist_ok=True"):
            shift_checkpoint(path, seen, **ALL)
        assert contents(path.parent) == before
        path.with_name(name).unlink()
    path.with_name("best-sos.json").write_text("mine")
    report = shift_checkpoint(path, seen, **ALL, val=False, exist_ok=True)
    assert json.loads(path.with_name("best-sos.json").read_text())["output"] == report.output


@pytest.mark.parametrize("where", ["save", "read_back", "write_text"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_on_the_way_leaves_nothing(weights, seen, contents, monkeypatch, where, error):
    path = weights()
    before = contents(path.parent)
    job = CheckpointShift(path, seen, **ALL, val=False)
    owner = {"save": Checkpoint, "read_back": CheckpointShift, "write_text": shift_module}[where]
    original = getattr(owner, where)

    def broken(*args, **kwargs):
        if where == "save":
            original(*args, **kwargs)
        raise error

    monkeypatch.setattr(owner, where, broken)
    with pytest.raises(error):
        job.run()
    assert contents(path.parent) == before


def test_a_read_only_folder_is_reported_first(weights, seen, monkeypatch):
    path = weights()

    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("yolo_sos.yolo.job.TemporaryFile", refuse)
    monkeypatch.setattr("yolo_sos.yolo.job.CheckpointData", lambda *_, **__: pytest.fail("read the data first"))
    with pytest.raises(PermissionError, match=r"weights cannot be written to: Read-only file system"):
        shift_checkpoint(path, seen)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs permissions that hold for this user")
def test_a_folder_without_permission(weights, seen):
    path = weights()
    path.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="cannot be written to"):
            shift_checkpoint(path, seen)
    finally:
        path.parent.chmod(0o700)


# Settings -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "row"}, "'sos_method=row' is invalid.*nearest: rows"),
        ({"rank": 0}, "'sos_rank=0' is invalid"),
        ({"sos_rank": 1.5}, "'sos_rank=1.5' is invalid"),
        ({"budget": 1}, "'sos_budget=1' is invalid"),
        ({"guard": -1}, "'sos_guard=-1' is invalid"),
        ({"layers": "mask"}, "chooses no layer of this model. It has: box, cls"),
        ({"images": 0}, "'sos_images=0' is invalid"),
        ({"images": "many"}, "'sos_images=many' is invalid"),
        ({"draws": 0}, "'draws=0' is invalid: draws must be an integer of at least 1"),
        ({"draws": 2.5}, "'draws=2.5' is invalid"),
        ({"seed": -1}, "'seed=-1' is invalid"),
        ({"imgsz": 1}, "'imgsz=1' is invalid"),
        ({"batch": True}, "'batch=True' is invalid"),
        ({"val": "no"}, "'val=no' is invalid: val must be true or false"),
        ({"exist_ok": 1}, "'exist_ok=1' is invalid"),
        ({"rank": 4, "sos_rank": 5}, "'sos_rank' is given twice, also as 'rank'"),
        ({"sos_start": 0.5}, "'sos_start' is not a setting of a checkpoint's shift"),
        ({"sos": True}, "'sos' is not a setting of a checkpoint's shift"),
        ({"ranks": 3}, "'ranks' is not a setting of a checkpoint's shift: method, rank,"),
    ],
)
def test_wrong_settings_are_refused(weights, seen, contents, options, message):
    path = weights()
    before = contents(path.parent)
    with pytest.raises(ValueError, match=message):
        shift_checkpoint(path, seen, **options)
    assert contents(path.parent) == before


def test_both_names_of_a_setting_mean_the_same(weights, seen):
    path = weights()
    report = shift_checkpoint(path, seen, sos_method="expected", sos_rank=8, sos_guard=None, sos_images=3, val=False)
    assert (report.settings["rank"], report.images["fit"]) == (8, 3)
    assert report.layers[0].rank == 8.0


def test_public_names_are_lazy():
    assert yolo_sos.shift_checkpoint is shift_checkpoint
    assert "sweep_checkpoint" in dir(yolo_sos)


# Two checkpoints of one folder ---------------------------------------------------------------------------------------
def test_two_checkpoints_of_one_folder_have_results_of_their_own(weights, seen):
    best, last = weights("best"), weights("last")
    reports = [shift_checkpoint(path, seen, **ALL, val=False) for path in (best, last)]
    assert {p.name for p in best.parent.iterdir()} == {
        *("best.pt", "best-sos.pt", "best-sos.json", "last.pt", "last-sos.pt", "last-sos.json")
    }
    for path, report in zip((best, last), reports, strict=True):
        found = json.loads(path.with_name(f"{path.stem}-sos.json").read_text())
        assert (found["model"], found["output"]) == (str(path), report.output)
        assert found["heldout_after"] == pytest.approx(loss_of(report.output, seen), rel=1e-5)


def test_a_shift_of_several_batches_is_that_of_one(weights, seen):
    path = weights()
    one, several = (
        shift_checkpoint(path, seen, **ALL, method="expected", val=False, exist_ok=True, batch=b) for b in (8, 3)
    )
    # Ultralytics' loss of an image depends on the others of its batch
    assert several.heldout_before == pytest.approx(loss_of(path, seen, batch=3), rel=1e-5)
    assert several.heldout_after == pytest.approx(loss_of(several.output, seen, batch=3), rel=1e-5)
    assert several.squared_norm_ratio == pytest.approx(one.squared_norm_ratio, rel=1e-4)


# Stock Ultralytics ----------------------------------------------------------------------------------------------------
STOCK = """
import sys
sys.modules["yolo_sos"] = None  # any import of it fails
from ultralytics import YOLO

best, last, data, folder = sys.argv[1:]
options = {"data": data, "imgsz": 64, "batch": 8, "device": "cpu", "workers": 0, "plots": False, "project": folder}
found = YOLO(best).val(**options).results_dict["metrics/mAP50-95(B)"]
onnx = YOLO(best).export(format="onnx", imgsz=64)
exported = YOLO(onnx, task="detect").val(**{**options, "batch": 1, "rect": False}).results_dict["metrics/mAP50-95(B)"]
assert abs(found - exported) < 0.02, (found, exported)
tuned = YOLO(best)
tuned.train(**options, epochs=1, name="tuned")
resumed = YOLO(last)
resumed.train(resume=True)
assert resumed.trainer.start_epoch == 41, resumed.trainer.start_epoch
assert resumed.trainer.epoch == 59
print("mAP", found)
"""


@pytest.mark.slow
def test_stock_ultralytics_validates_exports_tunes_and_resumes_what_is_written(weights, seen, tmp_path):
    best, last = weights("best"), weights("last")
    report = shift_checkpoint(best, seen, **ALL)
    (best.parent / "best-sos.json").unlink()
    unfinished = shift_checkpoint(last, seen, **ALL, val=False)
    result = subprocess.run(
        [sys.executable, "-c", STOCK, report.output, unfinished.output, str(seen), str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = float(result.stdout.rsplit("mAP ", 1)[1])
    assert found == pytest.approx(report.metrics_after["metrics/mAP50-95(B)"], abs=1e-6)
