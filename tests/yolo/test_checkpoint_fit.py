# yolo-sos, AGPL-3.0
"""A checkpoint fitted to a data set: what is written, what is told, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from renamed import NAMES, renamed_data
from stock import run_stock
from ultralytics import YOLO
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.utils.patches import torch_load

from yolo_sos import cli
from yolo_sos.core import affine_matrix
from yolo_sos.data.digits import source_digits
from yolo_sos.data.image_folder import build_image_folder
from yolo_sos.yolo import CheckpointFit, fit_checkpoint
from yolo_sos.yolo.class_fit import fit_classes, fit_sizes
from yolo_sos.yolo.classes import in_order
from yolo_sos.yolo.images import covering_order


@pytest.fixture
def renamed(able, tmp_path):
    """``renamed(**changes)`` returns the digits under names that no model knows, with other entries changed."""
    return lambda **changes: renamed_data(able["data"], tmp_path, **changes)


@pytest.fixture
def weights(able, tmp_path):
    """``weights()`` copies the checkpoint into a fresh folder."""

    def copy() -> Path:
        (tmp_path / "weights").mkdir(exist_ok=True)
        return Path(shutil.copy(able["best"], tmp_path / "weights/best.pt"))

    return copy


def layers_of(path):
    return [affine_matrix(layer.module).float() for layer in in_order(YOLO(path).model)]


def test_new_classes_are_fitted_and_the_file_is_a_stock_one(weights, renamed, contents):
    path, data = weights(), renamed()
    before = contents(path.parent)
    report = fit_checkpoint(path, data, batch=8)
    fitted = path.with_name("best-fit.pt")
    assert report.output == str(fitted) and not report.refusal
    assert {k: v for k, v in contents(path.parent).items() if k in before} == before
    assert sorted(p.name for p in path.parent.iterdir()) == [
        *("best-fit.json", "best-fit.png", "best-fit.pt", "best.pt"),
    ]
    assert report.heldout_after < report.heldout_before and 0.05 < report.explained < 1
    stock = YOLO(fitted)
    assert stock.names == yaml.safe_load(data.read_text())["names"] and stock.model.nc == 10
    metrics = stock.val(data=str(data), imgsz=64, batch=8, device="cpu", plots=False, workers=0)
    assert report.metrics_after == pytest.approx(dict(metrics.results_dict), abs=1e-6)
    assert report.metrics_after["metrics/mAP50(B)"] > 0.1  # the random rows that Ultralytics starts with find nothing
    for c, ap in zip(metrics.box.ap_class_index, metrics.box.ap, strict=True):
        assert report.classes[c].after == pytest.approx(ap) and report.classes[c].before is None
    ckpt = torch_load(fitted, map_location="cpu")
    assert ckpt["epoch"] == -1 and ckpt["optimizer"] is None and ckpt["train_args"]["data"] == str(data)
    assert ckpt["sos"]["fit"]["ridges"] == [layer.ridge for layer in report.layers]
    assert all(p.dtype == torch.float16 for p in ckpt["model"].parameters())
    told = json.loads(path.with_name("best-fit.json").read_text())
    assert told["output"] == str(fitted) and told["heldout_after"] == report.heldout_after
    assert "digit 3" in report.table() and "held-out loss" in report.table()


def test_levels_that_show_no_class_are_named_and_score_low(weights, renamed):
    path = weights()
    report = fit_checkpoint(path, renamed(), batch=8, val=False)
    found = {layer.name: affine_matrix(layer.module).float() for layer in in_order(YOLO(report.output).model)}
    rows = {line.split()[0]: line.split() for line in report.table().splitlines()[1 : 1 + len(report.layers)]}
    assert {layer.name: str(layer.classes) for layer in report.layers} == {name: row[2] for name, row in rows.items()}
    assert report.unfitted and sorted([*rows, *report.unfitted]) == sorted(found)  # the digits are small
    assert f"new ones score low: {', '.join(report.unfitted)}\n" in report.table()
    for name in report.unfitted:
        assert not found[name][:, :-1].any() and float(found[name][:, -1].sigmoid().max()) < 0.01  # half a row of all


def test_boxes_and_towers_are_those_of_the_checkpoint(weights, renamed):
    path = weights()
    fit_checkpoint(path, renamed(), batch=8, val=False)
    old, new = (YOLO(p).model.state_dict() for p in (path, path.with_name("best-fit.pt")))
    changed = {k for k in old if not torch.equal(old[k].half(), new[k].half())}
    rows = {layer.name for layer in in_order(YOLO(path).model)}
    assert changed == {f"{name}.{p}" for name in rows for p in ("weight", "bias")}
    assert not path.with_name("best-fit.png").exists()


def test_counts_are_those_of_the_labels(weights, renamed):
    data = renamed()
    report = fit_checkpoint(weights(), data, batch=8, val=False)
    content = yaml.safe_load(data.read_text())
    lines = [
        [int(line.split()[0]) for line in file.read_text().splitlines()]
        for file in (Path(content["path"]) / "labels/train").glob("*.txt")
    ]
    for c, record in enumerate(report.classes):
        assert record.boxes == sum(of.count(c) for of in lines)
        assert record.images == sum(c in of for of in lines)
    few = [r.name for r in report.classes if r.boxes < 5]
    assert all(f"{name} (" in report.table().splitlines()[-1] for name in few)


def test_two_fits_are_equal_and_another_seed_is_not(weights, renamed):
    data, found = renamed(), []
    for seed in (0, 0, 1):
        path = weights()
        fit_checkpoint(path, data, batch=8, seed=seed, val=False, exist_ok=True)
        found.append(layers_of(path.with_name("best-fit.pt")))
    assert all(map(torch.equal, found[0], found[1])) and not all(map(torch.equal, found[0], found[2]))


def test_known_classes_keep_what_they_know(weights, able):
    """The same names: the present rows are the prior, and the val split is scored before, too."""
    path = weights()
    report = fit_checkpoint(path, able["data"], batch=8)
    assert all(c.known for c in report.classes)
    own = YOLO(path).val(data=str(able["data"]), imgsz=64, batch=8, device="cpu", plots=False, workers=0).box.map
    assert not report.refusal, report.refusal
    assert report.metrics_before["metrics/mAP50-95(B)"] == pytest.approx(own, abs=1e-3)
    assert report.metrics_after["metrics/mAP50-95(B)"] > own - 0.02


def test_appended_classes(weights, renamed, able):
    path = weights()
    report = fit_checkpoint(path, renamed(), batch=8, add=True, old=able["data"])
    new = path.with_name("best-fit.pt")
    assert list(YOLO(new).names.values()) == [*map(str, range(10)), *NAMES.values()]
    for old, both in zip(layers_of(path), layers_of(new), strict=True):
        assert both.shape == (20, old.shape[1]) and torch.equal(both[:10], old)
    assert report.old_after == pytest.approx(report.old_before, abs=1e-6) and report.old_before
    assert report.metrics_after["metrics/mAP50(B)"] > 0.1
    with pytest.raises(ValueError, match="add=true: the model has '0', '1'"):
        fit_checkpoint(path, able["data"], add=True, exist_ok=True)
    with pytest.raises(ValueError, match="needs add=true"):
        fit_checkpoint(path, able["data"], old=able["data"], exist_ok=True)


def test_a_model_from_scratch_is_declined(tiny, renamed, tmp_path, capsys):
    path = tmp_path / "scratch.pt"
    torch.manual_seed(0)
    YOLO(tiny).save(path)
    args = [f"model={path}", f"data={renamed()}", "imgsz=64", "batch=8", "device=cpu"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", *args])
    assert ended.value.code == 3
    assert not list(tmp_path.glob("scratch-fit*"))
    report = fit_checkpoint(path, renamed(), imgsz=64, batch=8)
    assert report.refusal.startswith("nothing to fit") and report.output is None


def test_a_ridge_that_leaves_nothing_of_a_fit_is_named(weights, renamed):
    path = weights()
    report = fit_checkpoint(path, renamed(), batch=8, ridge=1e9, val=False)
    assert report.refusal.startswith("with ridge=1e+09 the fit explains 0.0%") and report.output is None
    assert [p.name for p in path.parent.iterdir()] == ["best.pt"]


def test_the_command_writes_and_says_so(weights, renamed):
    path = weights()
    cli.main(["fit", f"model={path}", f"data={renamed()}", "batch=8", "device=cpu", "val=false"])
    assert path.with_name("best-fit.pt").exists()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"images": 2}, ValueError, "'images=2' is invalid: images must be an integer of at least 3"),
        ({"ridge": 0}, ValueError, "'ridge=0' is invalid"),
        ({"add": 1}, ValueError, "'add=1' is invalid"),
        ({"seed": -1}, ValueError, "'seed=-1' is invalid"),
    ],
)
def test_wrong_options_are_refused(weights, renamed, options, error, text):
    path = weights()
    with pytest.raises(error, match=text):
        CheckpointFit(path, renamed(), **options)
    assert [p.name for p in path.parent.iterdir()] == ["best.pt"]


def test_data_that_cannot_be_fitted_is_refused(weights, renamed, tmp_path, digits):
    path = weights()
    names = {**NAMES, 10: "letter", 11: "comma"}
    with pytest.raises(ValueError, match="no training image shows 'letter', 'comma'"):
        fit_checkpoint(path, renamed(names=names))
    with pytest.raises((ValueError, FileNotFoundError), match=r"images|labels|exceeds"):  # a label out of range
        fit_checkpoint(path, renamed(names={0: "nought", 1: "one"}))
    with pytest.raises(FileNotFoundError):
        fit_checkpoint(path, tmp_path / "nowhere.yaml")
    with pytest.raises(FileExistsError, match="exist_ok"):
        path.with_name("best-fit.json").write_text("{}")
        fit_checkpoint(path, renamed())
    assert sorted(p.name for p in path.parent.iterdir()) == ["best-fit.json", "best.pt"]


def test_data_of_one_class(weights, digits, tmp_path):
    root = tmp_path / "one"
    for split in ("train", "val"):
        (root / "labels" / split).mkdir(parents=True)
        (root / "images").mkdir(exist_ok=True)
        (root / "images" / split).symlink_to(digits.parent / "images" / split)
        for file in (digits.parent / "labels" / split).glob("*.txt"):
            lines = [" ".join(["0", *line.split()[1:]]) for line in file.read_text().splitlines()]
            (root / "labels" / split / file.name).write_text("\n".join(lines))
    (root / "images").rename(root / "linked")
    (root / "images").mkdir()
    for split in ("train", "val"):
        (root / "images" / split).mkdir()
        for file in (root / "linked" / split).iterdir():
            (root / "images" / split / file.name).symlink_to(file.resolve())
    data = root / "data.yaml"
    data.write_text(yaml.safe_dump({"path": str(root), "train": "images/train", "val": "images/val", "names": ["any"]}))
    report = fit_checkpoint(weights(), data, batch=8)
    assert not report.refusal and report.classes[0].boxes > 20 and report.metrics_after["metrics/mAP50(B)"] > 0.1


@pytest.mark.parametrize(
    ("name", "task", "branches"),
    [
        ("yolo26n.yaml", "detect", 2),
        ("yolov8n-seg.yaml", "segment", 1),
        ("yolo26n-seg.yaml", "segment", 2),
        ("yolo26n-pose.yaml", "pose", 2),
        ("yolov8n-obb.yaml", "obb", 1),
        ("yolov8n-cls.yaml", "classify", 0),
    ],
)
def test_class_layers_of_every_task(model_of, data_of, name, task, branches):
    data = data_of(task)
    job = CheckpointFit(model_of(name, data), data, batch=8, val=False)
    fit = fit_classes(job.model, job.images, {}, None, 0)
    assert len(fit.weights) == max(3 * branches, 1)
    for layer in in_order(job.model):
        weight = fit.weights[layer.name]
        assert weight.shape == affine_matrix(layer.module).shape and weight.isfinite().all()
    assert all(layer.converged and layer.ridge > 0 for layer in fit.report.layers)
    assert len(fit.shown) == 10 and bool(fit.report.layers) == (max(fit.shown) >= 1)


def test_a_classifier_is_fitted_to_new_classes(classifier_settings, tmp_path):
    images, labels = source_digits()
    large = (255 * np.kron(images, np.ones((4, 4)))).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(labels))
    parts = {"train": order[:250], "val": order[250:400], "test": order[400:410]}
    names = [*NAMES.values()]
    root = build_image_folder(tmp_path / "set", {}, lambda: {k: (large[i], labels[i]) for k, i in parts.items()}, names)
    torch.manual_seed(0)
    settings = classifier_settings(data=str(root), epochs=5, optimizer="AdamW", lr0=0.005)
    trainer = ClassificationTrainer(overrides=settings)
    trainer.train()
    other = tmp_path / "other"
    for folder in root.glob("*/*"):
        shutil.copytree(folder, other / folder.parent.name / f"{folder.name}, renamed")
    report = fit_checkpoint(trainer.last, other, imgsz=32, batch=20)
    assert not report.refusal, report.refusal
    assert [layer.kind for layer in report.layers] == ["linear"]
    top1 = report.metrics_after["metrics/accuracy_top1"]
    assert top1 > 0.7  # chance: 0.1
    assert YOLO(report.output).val(data=str(other), imgsz=32, plots=False).top1 == pytest.approx(top1)
    shares = [sum(labels[parts["val"]] == c) / 150 for c in range(10)]
    assert sum(s * c.after for s, c in zip(shares, report.classes, strict=True)) == pytest.approx(top1)
    with pytest.raises(ValueError, match="add=true is for detectors"):
        fit_checkpoint(trainer.last, other, imgsz=32, add=True, exist_ok=True)


STOCK = """
import torch
from ultralytics import YOLO

file, data = sys.argv[1:]
settings = {"imgsz": 64, "device": "cpu", "plots": False}
rows = [t[-1].weight.clone() for t in YOLO(file).model.model[-1].cv3]
fresh = YOLO(file)
started = []
fresh.add_callback("on_train_start", lambda t: started.extend(x[-1].weight.clone() for x in t.model.model[-1].cv3))
fresh.train(data=data, epochs=1, batch=8, workers=0, **settings)
print(json.dumps({
    "map": float(YOLO(file).val(data=data, batch=8, **settings).box.map50),
    "boxes": len(YOLO(file).predict(torch.rand(1, 3, 64, 64), verbose=False, **settings)),
    "kept": all(map(torch.equal, [r.float() for r in rows], started)),
}))
"""


def test_stock_ultralytics_trains_from_it_without_us_and_keeps_the_rows(weights, renamed, tmp_path):
    path, data = weights(), renamed()
    report = fit_checkpoint(path, data, batch=8)
    told = run_stock(STOCK, path.with_name("best-fit.pt"), data, cwd=tmp_path)
    assert told["kept"] and told["boxes"] == 1
    assert told["map"] == pytest.approx(report.metrics_after["metrics/mAP50(B)"], abs=1e-6)


def test_sizes_are_disjoint_and_enough():
    assert fit_sizes(5000, 300) == {"fit": 225, "selection": 75, "heldout": 32}
    assert fit_sizes(205, 300) == {"fit": 130, "selection": 43, "heldout": 32}
    assert fit_sizes(3, None) == {"fit": 1, "selection": 1, "heldout": 1}
    assert sum(fit_sizes(50, None).values()) == 50
    with pytest.raises(ValueError, match="needs at least 3 training images"):
        fit_sizes(2, None)


def test_rare_classes_come_first():
    shown = [{0} for _ in range(50)] + [{0, 1}, {1}, {2}, {2, 0}, {2}, {2}]
    order = covering_order(shown, 2, seed=4)
    assert sorted(order) == list(range(56))
    first = order[:4]
    assert sum(1 in shown[i] for i in first) >= 2 and sum(2 in shown[i] for i in first) >= 2
    assert set().union(*(shown[i] for i in order[: len(set().union(*shown))])) == set().union(*shown)
    assert order != covering_order(shown, 2, seed=5) and order == covering_order(shown, 2, seed=4)
