# yolo-sos, AGPL-3.0
"""Calibrations of checkpoints: what is written, how it is judged, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from renamed import NAMES as DIGITS
from renamed import renamed_data
from stock import run_stock
from ultralytics import YOLO
from ultralytics.utils import nms

from yolo_sos import cli
from yolo_sos.cli import calibrate as command
from yolo_sos.cli.grammar import run_arguments
from yolo_sos.core import affine_matrix, fit_logistic, fold
from yolo_sos.core.calibration import AffineMap
from yolo_sos.evaluate.boxes import Detections
from yolo_sos.evaluate.calibration import LEAST_SCORE, reliability
from yolo_sos.yolo import Checkpoint, CheckpointCalibration, calibrate_checkpoint, recording, score
from yolo_sos.yolo.calibrate_report import BranchReport
from yolo_sos.yolo.classes import class_layers, in_order
from yolo_sos.yolo.evidence import DetectorEvidence, logit
from yolo_sos.yolo.job import CheckpointJob
from yolo_sos.yolo.recording import branch_arguments, matches_of, read_truth, record

NAMES = {"best.pt", "best-calibrated.pt", "best-calibrated.json", "best-reliability.png"}


@pytest.fixture(scope="module")
def data(seen, tmp_path_factory) -> Path:
    """The data YAML whose splits are all the training split, so that a tiny model finds something in each."""
    content = yaml.safe_load(seen.read_text())
    path = tmp_path_factory.mktemp("data") / "all.yaml"
    path.write_text(yaml.safe_dump({**content, "test": content["train"]}))
    return path


@pytest.fixture(scope="module")
def detector(data, tiny, tmp_path_factory) -> Path:
    """A checkpoint that finds most of the objects, and is too sure of them: its logits are raised."""
    folder = tmp_path_factory.mktemp("runs")
    fixed = {k: 0.0 for k in ("mosaic", "translate", "scale", "hsv_h", "hsv_s", "hsv_v", "fliplr", "warmup_epochs")}
    YOLO(tiny).train(
        data=str(data),
        **{"epochs": 100, "imgsz": 64, "batch": 8, "device": "cpu", "workers": 0, "plots": False, "val": False},
        **{"optimizer": "AdamW", "lr0": 0.01, "close_mosaic": 0, "project": str(folder), "name": "run"},
        **fixed,
    )
    checkpoint = Checkpoint(folder / "run/weights/best.pt")
    layers = [layer for of in class_layers(checkpoint.model).values() for layer in of]
    scale, shift = torch.full((10,), 1.5), torch.full((10,), 4.0)
    weights = {layer.name: fold(affine_matrix(layer.module), scale, shift) for layer in layers}
    checkpoint.save(checkpoint.path, weights, {})
    return checkpoint.path


@pytest.fixture
def weights(detector, tmp_path):
    """``weights()`` copies the checkpoint into a fresh folder."""

    def copy() -> Path:
        (tmp_path / "weights").mkdir(exist_ok=True)
        return Path(shutil.copy(detector, tmp_path / "weights"))

    return copy


@pytest.fixture(scope="module")
def without_test(data, tmp_path_factory) -> Path:
    content = yaml.safe_load(data.read_text())
    path = tmp_path_factory.mktemp("data") / "two.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if k != "test"}))
    return path


def run(*args):
    """Run the command in this process; return its exit status."""
    try:
        cli.main([str(a) for a in args])
    except SystemExit as e:
        return e.code
    return 0


def arguments(data: Path, task: str = "detect", split: str = "val", **more):
    """Return the arguments of a validation."""
    fixed = {"imgsz": 64, "batch": 8, "device": "cpu", "workers": 0, "plots": False, "verbose": False, "mode": "val"}
    return {**fixed, "task": task, "data": str(data), "split": split, "single_cls": False, "rect": True, **more}


@pytest.mark.parametrize("per_class", [False, True])
def test_a_calibration(weights, data, per_class):
    path = weights()
    report = calibrate_checkpoint(path, data, per_class=per_class)
    assert {p.name for p in path.parent.iterdir()} == NAMES
    (branch,) = report.branches
    assert (branch.fitted_on["split"], branch.judged_on) == ("val", {"split": "test", "images": 24, "crossed": False})
    assert branch.after.nll < branch.before.nll and branch.after.samples == branch.before.samples
    saved = json.loads(path.with_name("best-calibrated.json").read_text())
    assert saved["branches"][0]["mapping"]["scale"] == branch.mapping.scale.tolist()
    assert saved["branches"][0]["after"]["ECE"] == branch.after.ece and saved["refusals"] == []

    old, new = Checkpoint(path), Checkpoint(report.output)
    classifiers = {layer.name for layers in class_layers(old.model).values() for layer in layers}
    assert len(classifiers) == 3
    before, after = old.model.state_dict(), new.model.state_dict()
    changed = {k.rpartition(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == classifiers
    for layer in new.layers:
        if layer.name in classifiers:
            own = affine_matrix(old.model.get_submodule(layer.name))
            expected = fold(own, branch.mapping.scale, branch.mapping.shift).half().float()
            assert torch.equal(affine_matrix(layer.module), expected)


def test_the_map_is_that_of_the_detections(weights, data):
    path = weights()
    (branch,) = calibrate_checkpoint(path, data).branches
    checkpoint, args = Checkpoint(path), arguments(data)
    matches = matches_of(
        read_truth(args, "val"), record(checkpoint.validator, args, checkpoint.model).records[0], "detect"
    )
    hit, _ = matches.judge(0.5)
    some = matches.score >= 0.01
    z, t = torch.from_numpy(matches.score[some]).logit(), torch.from_numpy(hit[some])
    again = fit_logistic(z, t, torch.zeros(len(z), dtype=torch.long), 1)
    assert float(branch.mapping.scale[0]) == pytest.approx(float(again.scale[0]), abs=1e-9)
    assert float(branch.mapping.shift[0]) == pytest.approx(float(again.shift[0]), abs=1e-9)


def test_the_metrics_are_those_of_stock_ultralytics(weights, data):
    path = weights()
    report = calibrate_checkpoint(path, data)
    (branch,) = report.branches
    for file, found in (path, branch.metrics_before), (report.output, branch.metrics_after):
        stock = YOLO(file).val(data=str(data), split="test", imgsz=64, batch=8, device="cpu", plots=False, workers=0)
        assert found == pytest.approx(dict(stock.results_dict), abs=1e-6)


def test_the_same_again_gives_the_same(weights, data, contents):
    path = weights()
    first, files = calibrate_checkpoint(path, data), contents(path.parent)
    assert calibrate_checkpoint(path, data, exist_ok=True).to_json() == first.to_json()
    again = contents(path.parent)
    assert all(again[name] == files[name] for name in NAMES if not name.endswith(".png"))


def test_detections_that_fall_below_the_least_confidence_count(weights, data):
    """A detector that is unsure of everything: the map takes much of what scores 0.01 below 0.001."""
    path = weights()
    checkpoint = Checkpoint(path)
    half, none = torch.full((10,), 0.4), torch.zeros(10)
    layers = [layer for of in class_layers(checkpoint.model).values() for layer in of]
    checkpoint.save(path, {layer.name: fold(affine_matrix(layer.module), half, none) for layer in layers}, {})
    (branch,) = calibrate_checkpoint(path, data, exist_ok=True).branches
    mapping = branch.mapping
    assert float((mapping.scale[0] * math.log(0.01 / 0.99) + mapping.shift[0]).sigmoid()) < 0.0005
    assert branch.detections[1] < branch.detections[0]
    checkpoint, args = Checkpoint(path), arguments(data, split="test")
    seen = record(checkpoint.validator, args, checkpoint.model)
    found = DetectorEvidence(read_truth(args, "test"), seen.records[0], "detect", 0.5)
    p = mapping(logit(found.samples.score), torch.from_numpy(found.samples.label)).sigmoid().numpy()
    expected = reliability(found.samples.scored(p))
    assert abs(branch.after.samples - expected.samples) <= 20  # rounding moves some across the least confidence
    assert branch.after.nll == pytest.approx(expected.nll, rel=0.01) and branch.after.nll < branch.before.nll


def test_without_a_test_split_two_halves_judge_each_other(weights, without_test):
    (branch,) = calibrate_checkpoint(weights(), without_test).branches
    assert branch.judged_on == {"split": "val", "images": 24, "crossed": True}
    assert branch.before.nll > branch.after.nll
    assert branch.before.samples == branch.after.samples == branch.fitted_on["samples"]


def test_halves_of_some_images_are_compared_on_those_images(weights, without_test):
    report = calibrate_checkpoint(weights(), without_test, images=10)
    (branch,) = report.branches
    assert (branch.fitted_on["images"], branch.judged_on["images"]) == (10, 10)
    assert branch.before.samples == branch.after.samples == branch.fitted_on["samples"]
    assert "in 10 images of the val split, judged on" in report.table()


def test_a_test_split_without_labels_does_not_judge(weights, data, tmp_path, caplog):
    """As of COCO, whose test labels are not published."""
    content = yaml.safe_load(data.read_text())
    shutil.copytree(Path(content["path"]) / content["train"], tmp_path / "images/test")
    path = tmp_path / "unlabelled.yaml"
    fields = {k: v for k, v in content.items() if k != "voc"}
    path.write_text(yaml.safe_dump({**fields, "test": str(tmp_path / "images/test")}))
    (branch,) = calibrate_checkpoint(weights(), path).branches
    assert branch.judged_on["split"] == "val" and branch.judged_on["crossed"]
    assert "the test split cannot be judged on" in caplog.text


def test_images_of_the_training_split(weights, data):
    (branch,) = calibrate_checkpoint(weights(), data, split="train", images=12).branches
    assert (branch.fitted_on["split"], branch.fitted_on["images"]) == ("train", 12)
    (other,) = calibrate_checkpoint(weights(), data, split="train", images=12, seed=1, exist_ok=True).branches
    assert not torch.equal(branch.mapping.scale, other.mapping.scale)


def test_soft_hits(weights, data):
    (branch,) = calibrate_checkpoint(weights(), data, iou="soft").branches
    (hard,) = calibrate_checkpoint(weights(), data, exist_ok=True).branches
    total = [np.nansum(r.before.target * r.before.count) for r in (branch, hard)]
    assert 0 < total[0] < total[1]
    assert branch.after.nll < branch.before.nll


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("yolov8n.yaml", "detect"),
        ("yolo26n.yaml", "detect"),
        ("yolov8n-seg.yaml", "segment"),
        ("yolov8n-pose.yaml", "pose"),
        ("yolov8n-obb.yaml", "obb"),
    ],
)
def test_the_fold_maps_the_scores_of_every_head(model_of, data_of, name, task, monkeypatch):
    """A detector finds the same boxes, whose scores are mapped."""
    monkeypatch.setattr(nms, "time", SimpleNamespace(time=float))  # of so many boxes it drops some after two seconds
    data = data_of(task)
    checkpoint = Checkpoint(model_of(name, data))
    state = {k: v.clone() for k, v in checkpoint.model.state_dict().items()}
    several = "26" not in name  # which pairs of box and class a one-to-one head returns depends on all classes
    scale = torch.linspace(0.7, 1.3 if several else 0.7, 10).double()
    shift = torch.linspace(0.2, 0.8 if several else 0.2, 10).double()
    mapping = AffineMap(scale, shift, scale * 0, scale * 0, ("own",) * 10)
    branches = class_layers(checkpoint.model)
    assert len(branches) == (2 if "26" in name else 1)
    for of, layers in branches.items():
        assert len(layers) == 3
        folded = {layer.name: fold(affine_matrix(layer.module), scale, shift) for layer in layers}
        branch = branch_arguments(of == "one2one") if len(branches) > 1 else {}
        # No suppression and no cut-off: of nearly equal scores, rounding decides which boxes they keep.
        args = arguments(data, task, conf=0.0, iou=1.0, max_det=3000, **branch)
        seen = record(checkpoint.validator, args, checkpoint.model, [folded])
        truth = read_truth(args, "val")
        one, two = (matches_of(truth, records, task) for records in seen.records)
        assert len(one) == len(two) > 1000
        for image in range(len(truth.images)):
            for label in range(10):
                before, after = ((m.image == image) & (m.label == label) for m in (one, two))
                z, labels = logit(np.sort(one.score[before])), torch.full((before.sum(),), label)
                assert np.sort(two.score[after]) == pytest.approx(mapping(z, labels).sigmoid().numpy(), abs=1e-5)
                assert np.sort(two.overlap[after]) == pytest.approx(np.sort(one.overlap[before]), abs=1e-4)
    assert all(torch.equal(v, state[k]) for k, v in checkpoint.model.state_dict().items())


def test_two_branches_have_a_map_each(model_of, data_of, monkeypatch):
    """Plumbing only: an untrained model has nothing to fit, so the maps are given, and no guard asks for less loss."""
    data = data_of("detect")
    path = model_of("yolo26n.yaml", data)
    maps = [AffineMap(*(torch.full((10,), x).double() for x in (a, 0.5, 0, 0)), ("shared",) * 10) for a in (0.8, 0.9)]
    given = iter(maps)
    monkeypatch.setattr(DetectorEvidence, "fit", lambda *_: next(given))
    monkeypatch.setattr(BranchReport, "refusals", lambda self: [])
    report = calibrate_checkpoint(path, data, imgsz=64)
    assert [b.name for b in report.branches] == ["one-to-many branch", "one-to-one branch"]
    assert report.branches[0].before.samples != report.branches[1].before.samples
    old, new = Checkpoint(path), Checkpoint(report.output)
    for layers, mapping in zip(class_layers(old.model).values(), maps, strict=True):
        for layer in layers:
            expected = fold(affine_matrix(layer.module), mapping.scale, mapping.shift).half().float()
            assert torch.equal(affine_matrix(new.model.get_submodule(layer.name)), expected)
    assert "one-to-one branch" in report.table() and path.with_name("best-reliability.png").is_file()


def test_owners_of_oriented_boxes_are_those_of_ultralytics(model_of, data_of):
    data = data_of("obb")
    checkpoint, args = Checkpoint(model_of("yolov8n-obb.yaml", data)), arguments(data, "obb")
    seen = record(checkpoint.validator, args, checkpoint.model)
    truth = read_truth(args, "val")
    matches = matches_of(truth, seen.records[0], "obb")
    owned = matches.owner >= 0
    assert owned.any() and (matches.overlap[owned] > 0).any()
    assert np.array_equal(truth.image[matches.owner[owned]], matches.image[owned])
    assert np.array_equal(truth.label[matches.owner[owned]], matches.label[owned])


def test_a_classifier(model_of, data_of):
    """One whose last layer is solved for the labels."""
    data = data_of("classify")
    path = model_of("yolov8n-cls.yaml", data)
    checkpoint = Checkpoint(path)
    (layer,) = checkpoint.layers
    seen = [record(checkpoint.validator, arguments(data, "classify", of), checkpoint.model) for of in ("train", "val")]
    z, labels = (torch.cat(column) for column in zip(*(batch for of in seen for batch in of.records[0]), strict=True))
    rows, targets = torch.cat([z, torch.ones(len(z), 1)], 1).double(), torch.nn.functional.one_hot(labels, 10).double()
    solved = 12 * torch.linalg.lstsq(rows, targets).solution.T  # of the logits that are there
    weight = solved[:, :10] @ affine_matrix(layer.module).double()
    weight[:, -1] += solved[:, 10]
    checkpoint.save(path, {layer.name: weight.float()}, {})

    report = calibrate_checkpoint(path, data, imgsz=64)
    (branch,) = report.branches
    assert len(set(branch.mapping.scale.tolist())) == 1 and not branch.mapping.shift.any()
    assert branch.after.nll < branch.before.nll and math.isnan(branch.before.laece)
    assert branch.metrics_before == pytest.approx(branch.metrics_after)
    assert branch.thresholds_before == [] and Path(report.output).is_file()


def test_a_shift_and_a_calibration_together(weights, data, monkeypatch):
    path, passes = weights(), []
    validate = score.run_many

    def counted(mixins, validator, args, model, **attributes):
        passes.append(args["split"])
        return validate(mixins, validator, args, model, **attributes)

    for module in (score, recording):
        monkeypatch.setattr(module, "run_many", counted)
    assert run("shift", f"model={path}", f"data={data}", "rank=0.9", "guard=none", "images=8", "calibrate") == 0
    names = {"best.pt", "best-sos.pt", "best-sos.json"}
    names |= {"best-sos-calibrated.pt", "best-sos-calibrated.json", "best-sos-reliability.png"}
    assert {p.name for p in path.parent.iterdir()} == names
    assert passes == ["val", "test"]  # what val finds serves both
    together = json.loads(path.with_name("best-sos-calibrated.json").read_text())
    alone = calibrate_checkpoint(path.with_name("best-sos.pt"), data, exist_ok=True)
    expected, found = alone.branches[0].to_dict()["mapping"], together["branches"][0]["mapping"]
    assert found.pop("status") == expected.pop("status")
    assert all(found[k] == pytest.approx(v, rel=1e-4) for k, v in expected.items())
    assert torch.load(path.with_name("best-sos-calibrated.pt"), weights_only=False)["sos"]["calibrations"]


@pytest.fixture(scope="module")
def renamed(data, tmp_path_factory) -> Path:
    """The same data under names that the checkpoint does not know; VOC's annotations have the old ones."""
    return renamed_data(data, tmp_path_factory.mktemp("data"), voc=None)


def test_a_fit_and_a_calibration_together(weights, renamed):
    path = weights()  # a strong ridge leaves scores that are too low, so that there is something to calibrate
    assert run("fit", f"model={path}", f"data={renamed}", "ridge=30", "calibrate") == 0
    names = {"best.pt", "best-fit.pt", "best-fit.json", "best-fit.png"}
    names |= {"best-fit-calibrated.pt", "best-fit-calibrated.json", "best-fit-reliability.png"}
    assert {p.name for p in path.parent.iterdir()} == names
    together = json.loads(path.with_name("best-fit-calibrated.json").read_text())
    alone = calibrate_checkpoint(path.with_name("best-fit.pt"), exist_ok=True).to_dict()
    found, expected = (of["branches"][0]["mapping"] for of in (together, alone))
    assert all(found[k] == pytest.approx(expected[k], rel=1e-4) for k in ("scale", "shift"))
    assert together["classes"] == [*DIGITS.values()]
    before, after = (together["branches"][0][key]["NLL"] for key in ("before", "after"))
    assert after < before
    fitted, calibrated = (Checkpoint(path.with_name(f"best-fit{end}.pt")).model for end in ("", "-calibrated"))
    for old, new in zip(*map(in_order, (fitted, calibrated)), strict=True):
        assert torch.allclose(new.module.weight, old.module.weight * found["scale"][0], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["shift", "fit"])
def test_what_was_not_validated_cannot_be_calibrated(weights, renamed, data, mode, capsys):
    path = weights()
    assert run(mode, f"model={path}", f"data={data if mode == 'shift' else renamed}", "calibrate", "val=false") == 2
    assert "leave val on" in capsys.readouterr().err
    assert [p.name for p in path.parent.iterdir()] == ["best.pt"]


def test_a_fit_is_not_calibrated_where_a_result_exists_or_old_classes_have_no_labels(weights, renamed, capsys):
    path = weights()
    path.with_name("best-fit-reliability.png").touch()
    assert run("fit", f"model={path}", f"data={renamed}", "calibrate") == 2
    assert "best-fit-reliability.png exists already" in capsys.readouterr().err
    assert run("fit", f"model={path}", f"data={renamed}", "calibrate", "add", "exist_ok") == 2
    assert "'calibrate=true' does not work together with add=true" in capsys.readouterr().err
    assert {p.name for p in path.parent.iterdir()} == {"best.pt", "best-fit-reliability.png"}


def test_other_classes_are_refused(weights, data, tmp_path):
    content = yaml.safe_load(data.read_text())
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**content, "names": {i: f"class {i}" for i in range(11)}}))
    with pytest.raises(ValueError, match="do not match: 10 and 11"):
        calibrate_checkpoint(weights(), other)


def test_a_fused_checkpoint_is_refused(weights, data):
    path = weights()
    ckpt = torch.load(path, weights_only=False)
    ckpt["model"] = (ckpt["ema"] or ckpt["model"]).float().fuse(verbose=False).half()
    ckpt["ema"] = None
    torch.save(ckpt, path)
    with pytest.raises(ValueError, match="holds a fused model"):
        calibrate_checkpoint(path, data)


def evidence_of(weights, data, change):
    """Return the evidence of a checkpoint, with its records changed."""
    checkpoint, args = Checkpoint(weights()), arguments(data)
    records = record(checkpoint.validator, args, checkpoint.model).records[0]
    return DetectorEvidence(read_truth(args, "val"), [(stem, change(rows)) for stem, rows in records], "detect", 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:0], "There are no detections"),
        (lambda rows: rows[rows[:, 0] < 0.01], "There are no detections"),
        (lambda rows: rows * [1, 1, 0, 0, 0, 0], "all detections are misses"),
    ],
)
def test_detections_without_a_map(weights, data, change, message):
    with pytest.raises(ValueError, match=message):
        evidence_of(weights, data, change).fit(per_class=False)


def test_scores_that_are_no_numbers_are_refused(weights, data):
    with pytest.raises(ValueError, match="score is nan; it must be a finite number"):
        evidence_of(weights, data, lambda rows: rows * [math.nan, 1, 1, 1, 1, 1])


def test_a_model_that_finds_only_objects(weights, data):
    found = evidence_of(weights, data, lambda rows: rows)
    truth = found.truth
    exact = Detections.build(truth, truth.image, truth.label, np.full(len(truth.boxes), 0.5), truth.boxes)
    records = [
        (stem, np.column_stack([exact.score, exact.label, exact.boxes])[exact.image == i])
        for i, stem in enumerate(truth.stems)
    ]
    with pytest.raises(ValueError, match="all detections are hits"):
        DetectorEvidence(truth, records, "detect", 0.5).fit(per_class=True)


def test_the_guard_refuses_a_map_that_helps_nobody(weights, data, contents, monkeypatch):
    path = weights()
    before = contents(path.parent)
    fit = DetectorEvidence.fit

    def other(self, per_class, chosen=slice(None)):
        found = fit(self, per_class, chosen)
        return replace(found, shift=found.shift - 4)

    monkeypatch.setattr(DetectorEvidence, "fit", other)
    report = calibrate_checkpoint(path, data)
    assert report.output is None and contents(path.parent) == before
    assert "Nothing was written: the negative log-likelihood on the test split does not fall" in report.refusal()
    assert "falls by more than 0.001" in report.refusal() and "above its least confidence" in report.refusal()
    assert run("calibrate", f"model={path}", f"data={data}") == 3
    assert contents(path.parent) == before


def test_the_command(weights, data, capfd, caplog):
    path = weights()
    assert run("calibrate", f"model={path}", f"data={data}", "per_class", "precision=0.5") == 0
    assert {p.name for p in path.parent.iterdir()} == NAMES
    assert "for precision 0.5" in caplog.text and "judged on" in caplog.text and "ECE" in caplog.text
    assert run("calibrate", f"model={path}", f"data={data}") == 2
    assert "exists already" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "calibrate needs a checkpoint: model=path/to/best.pt"),
        (["model=none.pt"], "none.pt: there is no such checkpoint."),
        (["model={model}", "split=test"], "'split=test' is invalid: split must be one of val, train"),
        (["model={model}", "iou=0"], "'iou=0' is invalid: iou must be a number above 0 and up to 1, or soft."),
        (["model={model}", "iou=hard"], "'iou=hard' is invalid"),
        (["model={model}", "precision=2"], "'precision=2' is invalid"),
        (["model={model}", "images=1"], "'images=1' is invalid: images must be an integer of at least 2, or all."),
        (["model={model}", "images=some"], "'images=some' is invalid"),
        (["model={model}", "per_class=maybe"], "'per_class=maybe' is invalid"),
        (["model={model}", "rank=3"], "'rank' is not a valid argument."),
        (["model={model}", "data=none.yaml"], "none.yaml"),
    ],
)
def test_bad_input_exits_with_2(weights, contents, capsys, args, message):
    path = weights()
    before = contents(path.parent)
    assert run("calibrate", *(a.format(model=path) for a in args)) == 2
    assert message in capsys.readouterr().err
    assert contents(path.parent) == before


def test_the_keys_are_those_of_the_job():
    jobs = [signature(of.__init__).parameters for of in (CheckpointJob, CheckpointCalibration)]
    options = {**jobs[1], **{a.name: jobs[0][a.name] for a in run_arguments("")}}
    assert {a.name for a in command.OWN} == options.keys() - {"self", "options"}
    assert all(a.default == options[a.name].default for a in command.OWN if a.name != "model")


STOCK = """
from ultralytics import YOLO

model = YOLO(sys.argv[1])
found = model.val(data=sys.argv[2], split="test", imgsz=64, batch=8, device="cpu", plots=False)
boxes = YOLO(sys.argv[1]).predict(sys.argv[3], imgsz=64, device="cpu", conf=0.01, verbose=False)[0].boxes
print(json.dumps({"map": float(found.box.map), "scores": boxes.conf.tolist()}))
"""


def test_a_stock_ultralytics_loads_it_and_predicts(weights, data, tmp_path):
    report = calibrate_checkpoint(weights(), data)
    image = next((Path(yaml.safe_load(data.read_text())["path"]) / "images/train").glob("*.jpg"))
    told = run_stock(STOCK, report.output, data, image, cwd=tmp_path)
    assert told["map"] == pytest.approx(report.branches[0].metrics_after["metrics/mAP50-95(B)"], abs=1e-6)
    before = YOLO(report.model).predict(image, imgsz=64, device="cpu", conf=0.01, verbose=False)[0].boxes.conf
    mapping = report.branches[0].mapping
    mapped = (mapping.scale[0] * before.double().logit() + mapping.shift[0]).sigmoid().tolist()
    assert told["scores"][: len(mapped)] == pytest.approx(mapped[: len(told["scores"])], abs=5e-3)


@pytest.mark.slow
def test_the_export_gives_the_same_scores(weights, data):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    report = calibrate_checkpoint(weights(), data)
    yolo = YOLO(report.output)
    exported = yolo.export(format="onnx", imgsz=64, device="cpu")
    images = data.parent / yaml.safe_load(data.read_text())["path"] / "images/train"
    pixels = cv2.imread(str(next(images.glob("*.jpg"))))
    image = torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1)[None] / 255
    session = runtime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    ours = YOLO(report.output).model.float().eval()(image)[0].detach().numpy()
    assert found.shape == ours.shape
    assert np.abs(found[:, 4:] - ours[:, 4:]).max() < 1e-4
    plain = YOLO(report.model).model.float().eval()(image)[0].detach()
    mapping = report.branches[0].mapping
    mapped = mapping.scale[:, None] * plain[:, 4:].double().logit() + mapping.shift[:, None]
    assert np.abs(mapped.sigmoid().numpy() - found[:, 4:]).max() < 5e-3  # half precision rounds the weights
    assert (plain[:, 4:] > LEAST_SCORE).any()
