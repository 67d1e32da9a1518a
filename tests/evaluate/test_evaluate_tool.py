"""tools/eval_voc.py from end to end: detections in files, a model that runs, and refusals."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolo_sos.data.convert import convert_voc

TOOL = Path(__file__).parents[2] / "tools" / "eval_voc.py"
SIZES = {"000001": (96, 64), "000002": (50, 90), "000003": (64, 64), "000004": (120, 40)}  # width, height
COLUMNS = ("VOC07", "VOC10+", "COCO AP50", "COCO AP", "Ultralytics AP50", "Ultralytics AP")


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(TOOL))


def write_tree(root: Path, objects: dict[str, list[tuple]]) -> Path:
    """Write a VOC tree of noise with objects (name, xmin, ymin, xmax, ymax, difficult) by image."""
    rng = np.random.default_rng(0)
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for split in ("train", "val", "test"):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(SIZES))
    for name, (width, height) in SIZES.items():
        cv2.imwrite(str(root / "JPEGImages" / f"{name}.png"), rng.integers(0, 256, (height, width, 3), np.uint8))
        body = "".join(
            f"<object><name>{o[0]}</name><difficult>{int(o[5])}</difficult><bndbox><xmin>{o[1]}</xmin>"
            f"<ymin>{o[2]}</ymin><xmax>{o[3]}</xmax><ymax>{o[4]}</ymax></bndbox></object>"
            for o in objects[name]
        )
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{body}</annotation>")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    objects = {name: [("cat", 3, 4, 30, 30, False), ("dog", 20, 8, 44, 39, i == 1)] for i, name in enumerate(SIZES)}
    return write_tree(tmp_path_factory.mktemp("tree") / "VOC", objects)


@pytest.fixture(scope="module")
def data(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    convert_voc(tree, folder)
    return folder / "data.yaml"


@pytest.fixture
def results(tmp_path):
    """Devkit files in which each object is found, with an extra detection per image."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name, box in ("cat", "3 4 30 28"), ("dog", "21 8 44 36"):
        lines = [f"{image} 0.{9 - i} {box}\n{image} 0.85 1 1 5 5\n" for i, image in enumerate(SIZES)]
        (folder / f"comp4_det_test_{name}.txt").write_text("".join(lines))
    return folder


def call(tool, capsys, *argv) -> tuple[int, str, str]:
    code = tool["main"]([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_detections_in_every_format_give_the_same(tool, capsys, tmp_path, tree, data, results):
    sources = {
        "devkit": ["--detections", results, "--annotations", tree],
        "again": ["--detections", tmp_path / "voc" / "comp4_det_test_*.txt", "--annotations", tree.parent],
        "coco": [
            "--detections",
            tmp_path / "coco/detections.json",
            "--annotations",
            tmp_path / "coco/annotations.json",
        ],
        "mixed": ["--detections", tmp_path / "coco/detections.json", "--annotations", tree, "--data", data],
        "yaml": ["--detections", tmp_path / "coco/detections.json", "--data", data],
    }
    means = {}
    for name, argv in sources.items():
        save = ["--save-voc", tmp_path / "voc", "--save-coco", tmp_path / "coco"] if name == "devkit" else []
        code, out, _ = call(tool, capsys, *argv, *save, "--json", tmp_path / f"{name}.json")
        assert code == 0
        report = json.loads((tmp_path / f"{name}.json").read_text())
        means[name] = report["mean"]
        assert report["ground_truth"]["objects"] == {"cat": 4, "dog": 3}
        assert f"| **mean** |       7 |         1 | {report['mean']['VOC07']:.4f}" in out
    assert tuple(means["devkit"]) == COLUMNS and 0.3 < means["devkit"]["VOC10+"] < 0.95
    assert all(m == means["devkit"] for m in means.values())


def test_difficult_objects_separate_the_metrics(tool, capsys, tmp_path, tree, results):
    call(tool, capsys, "--detections", results, "--annotations", tree, "--json", tmp_path / "r.json")
    ap = json.loads((tmp_path / "r.json").read_text())["runs"][0]["per_class"]
    assert ap["cat"]["VOC10+"] == pytest.approx(ap["cat"]["Ultralytics AP50"], abs=0.06)
    assert ap["dog"]["VOC10+"] > ap["dog"]["Ultralytics AP50"] + 0.03  # its labels drop the difficult dog


def test_labels_alone_do_not_know_difficult_objects(tool, capsys, tmp_path, data, results):
    labels = data.with_name("labels.yaml")
    labels.write_text(re.sub("^voc:.*\n", "", data.read_text(), flags=re.MULTILINE))
    code, out, _ = call(tool, capsys, "--detections", results, "--data", labels)
    assert code == 0 and "Difficult flags are unknown" in out and "| dog      |       3 |         ? |" in out


def test_other_outputs_and_several_sources(tool, capsys, tmp_path, tree, results):
    shutil.copytree(results, tmp_path / "second")
    outputs = ["--markdown", tmp_path / "new" / "r.md", "--plot", tmp_path / "r.png", "--save-voc", tmp_path / "out"]
    sources = ["--detections", results, tmp_path / "second", "--annotations", tree]
    code, out, _ = call(tool, capsys, *sources, *outputs, "--iou", "0.6")
    assert code == 0 and "± 0.0000" in out and f"| {results} |" in out
    text = (tmp_path / "new" / "r.md").read_text()
    assert "    python tools/eval_voc.py --detections " in text and "at IoU 0.6" in text and "| **mean** |" in text
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1", "2"]


def test_refusals(tool, capsys, tmp_path, tree, data, results):
    (tmp_path / "bad.pt").write_bytes(b"not a model")
    (tmp_path / "empty.json").write_text("[]")
    broken = shutil.copytree(tree, tmp_path / "broken")
    (broken / "Annotations" / "000003.xml").unlink()
    for argv, message in [
        (["--detections", results, "--annotations", tree, "--split", "all"], "all.txt: no such image set"),
        (
            ["--detections", results, "--annotations", broken],
            "000003.xml: no such file; 1 of 4 annotations are missing",
        ),
        (["--detections", results, "--annotations", results], "to be a VOC tree .* has no folder 'Annotations'"),
        (["--detections", tmp_path / "no.json", "--annotations", tree], "no.json: no such file"),
        (["--detections", results, "--annotations", tmp_path / "no.json"], "no.json: no such file or folder"),
        (
            ["--detections", results, "--annotations", tree, "--data", results / "comp4_det_test_cat.txt"],
            "under 'names'",
        ),
        (
            ["--detections", tmp_path / "empty.json", "--annotations", tree],
            "empty.json: COCO results give classes as num",
        ),
        (["--weights", tmp_path / "bad.pt", "--data", data], "bad.pt: not a checkpoint"),
        (["--weights", tmp_path / "bad.pt", "--data", data, "--split", "other"], "data.yaml.*'other:'"),
        (["--weights", tmp_path / "bad.pt", "--data", tmp_path / "no.yaml"], "no.yaml.*does not exist"),
    ]:
        code, _, err = call(tool, capsys, *argv)
        assert code == 2 and re.search(message, err) and err.count("\n") <= 3, err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--weights", "a.pt"], "--weights needs --data"),
        (["--detections", "a.json"], "--detections needs a ground truth"),
        (
            ["--detections", "a", "--annotations", "b", "--plot", "c.jpeg"],
            "--plot: the suffix of 'c.jpeg' must be one of",
        ),
        (["--detections", "a", "--annotations", "b", "--iou", "0"], "--iou: the threshold must be above 0"),
        ([], "one of the arguments --weights --detections is required"),
    ],
)
def test_options_are_checked(tool, capsys, argv, message):
    with pytest.raises(SystemExit) as e:
        tool["main"](argv)
    assert e.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of a tiny detector whose head fires at random."""
    import torch
    from ultralytics import YOLO
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    backbone = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]]
    model = DetectionModel({"nc": 2, "backbone": backbone, "head": [[[1, 2], 1, "Detect", ["nc"]]]}, verbose=False)
    model.names = {0: "cat", 1: "dog"}
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):  # spread the activations, so that scores differ
            torch.nn.init.uniform_(layer.weight, 1, 4)
    for boxes, scores in zip(model.model[-1].cv2, model.model[-1].cv3, strict=True):
        boxes[-1].bias.data = -0.8 * torch.arange(16.0).repeat(4)  # sides of a few cells, so that boxes differ
        torch.nn.init.normal_(scores[-1].weight, std=0.4)
        torch.nn.init.constant_(scores[-1].bias, -3)
    yolo = YOLO("yolov8n.yaml")
    yolo.model = model
    model.args = {**yolo.overrides, "imgsz": 64, "task": "detect"}
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save({"model": model, "train_args": model.args, "epoch": -1}, path)
    return path


def test_a_model_and_ultralytics_own_number(tool, capsys, tmp_path, tree, data, weights):
    """Objects are made of the model's own detections, so that there is something to score."""
    run = ["--imgsz", 64, "--device", "cpu"]
    first = ["--weights", weights, "--data", data, "--clip", "--save-voc", tmp_path / "v", *run]
    assert call(tool, capsys, *first)[0] == 0
    objects = {name: [] for name in SIZES}
    for name in ("cat", "dog"):
        for line in (tmp_path / "v" / f"comp4_det_test_{name}.txt").read_text().splitlines()[::5]:
            image, (x1, y1, x2, y2) = line.split()[0], map(float, line.split()[2:])
            x2 = min(x2 + 1.5, SIZES[image][0])  # a pixel and a half beside
            if x2 - x1 > 4 and y2 - y1 > 4:
                objects[image].append((name, x1, y1, x2, y2, False))
    convert_voc(write_tree(tmp_path / "tree", objects), tmp_path / "set")
    argv = ["--weights", weights, "--data", tmp_path / "set" / "data.yaml", *run]
    code, out, err = call(tool, capsys, *argv, "--json", tmp_path / "r.json", "--save-coco", tmp_path / "c")
    assert code == 0, err
    report = json.loads((tmp_path / "r.json").read_text())
    own, ours = report["runs"][0]["ultralytics_val"], report["mean"]
    assert 0.02 < own["mAP50"] < 0.98
    assert ours["Ultralytics AP50"] == pytest.approx(own["mAP50"], abs=1e-3)
    assert ours["Ultralytics AP"] == pytest.approx(own["mAP50-95"], abs=1e-3)
    assert "Ultralytics' val printed for" in out and report["runs"][0]["val_settings"]["rect"] is True

    argv = ["--detections", tmp_path / "c" / "detections.json", "--annotations", tmp_path / "c" / "annotations.json"]
    assert call(tool, capsys, *argv, "--json", tmp_path / "back.json")[0] == 0
    assert json.loads((tmp_path / "back.json").read_text())["mean"] == ours


def test_a_model_of_other_classes_is_refused(tool, capsys, tmp_path, data, weights):
    renamed = data.with_name("renamed.yaml")
    renamed.write_text(data.read_text().replace("dog", "cow").replace("voc:", "xml:"))
    code, _, err = call(tool, capsys, "--weights", weights, "--data", renamed)
    assert code == 2 and "tiny.pt: predicts an unknown class 'dog'; there are cat, cow" in err


def test_bench_measures_every_contender():
    bench = runpy.run_path(str(TOOL.with_name("bench_eval.py")))
    shape = {"images": 20, "classes": 3, "objects": 60, "detections": 400, "seed": 0}
    devkit, coco = (bench["measure"](name, 1, **shape) for name in (bench["DEVKIT"], "pycocotools"))
    assert 0.1 < devkit["mAP"] < 0.95 and coco["mAP"] == pytest.approx(devkit["mAP"], abs=0.1)
    assert devkit["peak"] >= devkit["data"] > 10 and coco["evaluate"] > 0


def test_the_judge_imports_nothing_of_the_trainer():
    code = "import sys, yolo_sos.evaluate as e; print({'torch', 'ultralytics', 'matplotlib'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
