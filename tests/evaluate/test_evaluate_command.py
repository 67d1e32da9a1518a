"""``yolo-sos eval`` from end to end: detections in files, a model that runs, and refusals."""

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

from yolo_sos import cli
from yolo_sos.config import SOSConfig
from yolo_sos.data.convert import convert_voc
from yolo_sos.evaluate import command
from yolo_sos.evaluate.detections import class_names, read_data_set
from yolo_sos.evaluate.options import EvalOptions

TOOLS = Path(__file__).parents[2] / "tools"
TOOL = runpy.run_path(str(TOOLS / "eval_voc.py"))
SIZES = {"000001": (96, 64), "000002": (50, 90), "000003": (64, 64), "000004": (120, 40)}  # width, height
COLUMNS = ("VOC07", "VOC10+", "COCO AP50", "COCO AP", "Ultralytics AP50", "Ultralytics AP")


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


def call(capsys, *argv) -> tuple[int, str, str]:
    """Run the tool, which turns flags into the arguments of the command."""
    code = 0
    try:
        cli.main(["eval", *TOOL["as_keys"]([str(a) for a in argv])])
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err


def test_detections_in_every_format_give_the_same(capsys, tmp_path, tree, data, results):
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
        code, out, _ = call(capsys, *argv, *save, "--json", tmp_path / f"{name}.json")
        assert code == 0
        report = json.loads((tmp_path / f"{name}.json").read_text())
        means[name] = report["mean"]
        assert report["ground_truth"]["objects"] == {"cat": 4, "dog": 3}
        assert f"| **mean** |       7 |         1 | {report['mean']['VOC07']:.4f}" in out
    assert tuple(means["devkit"]) == COLUMNS and 0.3 < means["devkit"]["VOC10+"] < 0.95
    assert all(m == means["devkit"] for m in means.values())


def test_difficult_objects_separate_the_metrics(capsys, tmp_path, tree, results):
    call(capsys, "--detections", results, "--annotations", tree, "--json", tmp_path / "r.json")
    ap = json.loads((tmp_path / "r.json").read_text())["runs"][0]["per_class"]
    assert ap["cat"]["VOC10+"] == pytest.approx(ap["cat"]["Ultralytics AP50"], abs=0.06)
    assert ap["dog"]["VOC10+"] > ap["dog"]["Ultralytics AP50"] + 0.03  # its labels drop the difficult dog


def test_labels_alone_do_not_know_difficult_objects(capsys, tmp_path, data, results):
    labels = data.with_name("labels.yaml")
    labels.write_text(re.sub("^voc:.*\n", "", data.read_text(), flags=re.MULTILINE))
    code, out, _ = call(capsys, "--detections", results, "--data", labels)
    assert code == 0 and "Difficult flags are unknown" in out and "| dog      |       3 |         ? |" in out


def test_other_outputs_and_several_sources(capsys, tmp_path, tree, results):
    shutil.copytree(results, tmp_path / "second")
    outputs = ["--markdown", tmp_path / "new" / "r.md", "--plot", tmp_path / "r.png", "--save-voc", tmp_path / "out"]
    sources = ["--detections", results, tmp_path / "second", "--annotations", tree]
    code, out, _ = call(capsys, *sources, *outputs, "--iou", "0.6")
    assert code == 0 and "± 0.0000" in out and f"| {results} |" in out
    text = (tmp_path / "new" / "r.md").read_text()
    assert (
        f"    yolo-sos eval detections={results},{tmp_path / 'second'} annotations={tree} " in text
        and "at IoU 0.6" in text
        and "| **mean** |" in text
    )
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1", "2"]


def test_refusals(capsys, tmp_path, tree, data, results):
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
        code, _, err = call(capsys, *argv)
        assert code == 2 and re.search(message, err) and err.count("\n") <= 3, err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--weights", "a.pt"], "eval of a model needs data, which says where the images are"),
        (["--detections", "a.json"], "eval of detections needs a ground truth"),
        (
            ["--detections", "a", "--weights", "b.pt", "--data", "c"],
            "eval needs either model, checkpoints to run, or det",
        ),
        (
            ["--detections", "a", "--annotations", "b", "--plot", "c.jpeg"],
            "plot must be a file that ends in .pdf",
        ),
        (
            ["--detections", "a", "--annotations", "b", "--reliability", "c.jpeg"],
            "reliability must be a file that ends in .pdf",
        ),
        (
            ["--detections", "a", "--annotations", "b", "--precision", "0"],
            "precision must be a number above 0 and up to 1",
        ),
        (["--detections", "a", "--annotations", "b", "--iou", "0"], "iou must be a number above 0 and up to 1"),
        (["--detections", "a", "--annotations", "b", "--conf", "2"], "conf must be a number from 0 to 1"),
        (
            ["--detections", "a", "--annotations", "b", "--batch=0"],
            "'batch=0' is invalid: batch must be an integer",
        ),
        (["--detections", "a", "--iou", "much"], "'iou=much' is invalid"),
        (["--detections", "a", "--json"], "'json' needs a value"),
        (["--detections", "a", "--iuo", "1"], "'iuo' is not a valid argument. Did you mean 'iou'?"),
        (["a.json"], "'a.json' comes before any flag"),
        ([], "eval needs either model, checkpoints to run, or detections"),
    ],
)
def test_options_are_checked(capsys, argv, message):
    code, _, err = call(capsys, *argv)
    assert (code == 2 and message in err) or message in str(code)


def test_options_as_keys(capsys, tmp_path, tree, results):
    """``run`` takes the same options under the same names, as the command's ``key=value`` arguments come."""
    report = command.run(detections=results, annotations=tree, iou=0.6, clip=False, json=tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == report
    assert report["command"].startswith(f"yolo-sos eval detections={results} annotations={tree} iou=0.6")
    call(capsys, "--detections", results, "--annotations", tree, "--iou", 0.6, "--json", tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text())["mean"] == report["mean"]
    second = shutil.copytree(results, tmp_path / "second")
    for several in [results, second], f"{results},{second}":
        assert len(command.run(detections=several, annotations=tree, split=None)["runs"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iuo": 0.5}, "'iuo' is not an argument of eval. Did you mean 'iou'"),
        ({"model": "a.pt"}, "^eval of a model needs data, which says where the images are"),
        ({"weights": "a.pt,"}, "'model=a.pt,' is invalid: model must be paths"),
        ({"model": "a.pt", "data": "b", "nms_iou": 2}, "'nms_iou=2' is invalid: nms_iou must be a number from 0 to 1"),
        ({"model": "a.pt", "data": "b", "max_det": "many"}, "'max_det=many' is invalid: .* an integer of at least 1"),
        ({"model": "a.pt", "data": "b", "clip": "yes"}, "'clip=yes' is invalid: clip must be true or false"),
    ],
)
def test_keys_are_checked_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        command.run(**options)


def test_data_sets_that_come_with_the_package_go_by_name():
    path = Path(EvalOptions(model="a.pt", data="bccd.yaml").data)
    assert path.parts[-3:] == ("cfg", "datasets", "bccd.yaml") and path.is_file()


def test_the_tool_turns_flags_into_keys():
    flags = ["--weights", "a.pt", "b.pt", "--data=d.yaml", "--nms-iou", "0.6", "--clip", "--save-voc", "out"]
    assert TOOL["as_keys"](flags) == ["weights=a.pt,b.pt", "data=d.yaml", "nms_iou=0.6", "clip", "save_voc=out"]
    out = subprocess.check_output([sys.executable, TOOLS / "eval_voc.py", "--help"], text=True)
    assert "yolo-sos eval model=best.pt" in out and "nms_iou=0.7" in out
    shown = {a.name for section in cli.MODES["eval"].arguments().values() for a in section}
    assert len(shown) == 21 and shown == {*EvalOptions.__dataclass_fields__}
    assert shown == {*re.findall(r"^  (\w+)=", out, re.MULTILINE)}


@pytest.fixture
def copied(tree, tmp_path):
    """A converted set whose files are its own."""
    convert_voc(tree, tmp_path / "set", copy=True)
    return tmp_path / "set"


def cut_short(path: Path) -> None:
    cv2.imwrite(str(path.with_suffix(".jpg")), cv2.imread(str(path)))
    path.unlink()
    data = path.with_suffix(".jpg").read_bytes()
    path.with_suffix(".jpg").write_bytes(data[: len(data) // 2])


def another_format(path: Path) -> None:
    data = cv2.imencode(".ppm", np.zeros((64, 96, 3), np.uint8))[1]
    path.write_bytes(data.tobytes())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_short, r"000001\.jpg: not a readable image: image file is truncated"),
        (
            lambda p: cv2.imwrite(str(p), np.zeros((9, 96, 3), np.uint8)),
            r"000001\.png: of 96 x 9 pixels, where .* 10 x 10",
        ),
        (lambda p: p.write_bytes(b""), r"000001\.png: not a readable image: the file is empty"),
        (another_format, r"000001\.png: its format or its labels are not valid"),
        (
            lambda p: Path(str(p).replace("/images/", "/labels/")).with_suffix(".txt").write_text("7 .5 .5 .1 .1\n"),
            r"000001\.png: its format or its labels are not valid",
        ),
    ],
)
@pytest.mark.parametrize("voc", [True, False])
def test_images_that_ultralytics_drops_are_not_left_out_in_silence(copied, spoil, message, voc, monkeypatch):
    monkeypatch.setattr("ultralytics.utils.checks.check_requirements", lambda *_, **__: False)
    path = copied / "data.yaml"
    if not voc:
        path.write_text(re.sub("^voc:.*\n", "", path.read_text(), flags=re.MULTILINE))
    assert len(read_data_set(str(path), "test").truth().boxes) == (8 if voc else 7)
    spoil(copied / "images/test/000001.png")
    (copied / "labels/test.cache").unlink()
    with pytest.raises(
        ValueError, match=rf"data\.yaml, split 'test': Ultralytics would leave 1 of 4 images out .*{message}"
    ):
        read_data_set(str(path), "test")


def test_annotations_without_an_image_are_not_left_out_in_silence(copied):
    (copied / "images/test/000001.png").rename(copied / "images/test/000001.gif")
    with pytest.raises(ValueError, match=r"split 'test': annotations have no image that .*test/000001\.xml; their"):
        read_data_set(str(copied / "data.yaml"), "test")


def test_annotations_of_other_class_names_say_how_to_go_on(copied):
    path = copied / "data.yaml"
    path.write_text(path.read_text().replace("cat", "feline"))
    told = r"\.xml, object 1 \(cat\): unknown class 'cat'; the classes are .*feline.* leave out its key 'voc'"
    with pytest.raises(ValueError, match=told):
        read_data_set(str(path), "test").truth()
    path.write_text(re.sub("^voc:.*\n", "", path.read_text(), flags=re.MULTILINE))
    assert len(read_data_set(str(path), "test").truth().boxes) == 7


def test_classes_that_ultralytics_renames(capsys, tmp_path, results):
    """Names of ImageNet's classes: the XML has them as they are, the models as Ultralytics calls them."""
    objects = {
        name: [("n01440764", 3, 4, 30, 30, False), ("n01443537", 20, 8, 44, 39, i == 1)] for i, name in enumerate(SIZES)
    }
    root = write_tree(tmp_path / "tree", objects)
    convert_voc(root, tmp_path / "set")
    data = tmp_path / "set/data.yaml"
    assert class_names(str(data)) == (["n01440764", "n01443537"], ["tench", "goldfish"])
    for name, known in ("cat", "tench"), ("dog", "goldfish"):
        (results / f"comp4_det_test_{name}.txt").rename(results / f"comp4_det_test_{known}.txt")
    a = command.run(detections=results, data=data)
    b = command.run(detections=results, data=data, annotations=root)
    assert a["mean"] == b["mean"] and a["ground_truth"]["objects"] == {"tench": 4, "goldfish": 3}


def test_names_in_any_order_of_their_indices(tmp_path):
    (tmp_path / "d.yaml").write_text("names: {1: cat, 0: dog}\n")
    assert class_names(str(tmp_path / "d.yaml")) == (["dog", "cat"], ["dog", "cat"])


def test_converter_and_evaluator_see_the_same_objects(tmp_path):
    """Boxes without area are left out by both; objects that stand there twice are one to Ultralytics."""
    odd = [("cat", 30, 4, 3, 30, False), ("cat", 60, 4, 60, 9, False), ("cat", 200, 4, 300, 9, True)]
    objects = {name: [("cat", 3, 4, 30, 30, False), ("dog", 20, 8, 44, 39, False)] for name in SIZES}
    objects["000001"] += [*odd, ("cat", 3, 4, 30, 30, False)]
    report = convert_voc(write_tree(tmp_path / "tree", objects), tmp_path / "set")
    assert (report.splits["test"].boxes, report.splits["test"].difficult) == (9, 0)
    truth = read_data_set(str(tmp_path / "set/data.yaml"), "test").truth()
    assert len(truth.boxes) == 9 and truth.repeated().sum() == 1
    report = command.run(detections=as_files(tmp_path / "found", objects), data=tmp_path / "set/data.yaml")
    notes = "\n".join(report["notes"])
    assert "Boxes without area within their image are left out (3): " in notes
    assert "Objects repeat the class and box of another one (1): VOC and COCO count them" in notes
    ap = report["runs"][0]["per_class"]["cat"]
    assert ap["Ultralytics AP50"] == pytest.approx(0.995, abs=1e-3) and ap["VOC10+"] == 0.8  # of 4, and of 5


def as_files(folder: Path, objects: dict[str, list[tuple]]) -> Path:
    """Write detections of the first cat and the first dog of each image in the devkit's files."""
    folder.mkdir()
    for k, name in enumerate(("cat", "dog")):
        lines = [f"{image} 0.9 {' '.join(map(str, found[k][1:5]))}\n" for image, found in objects.items()]
        (folder / f"comp4_det_test_{name}.txt").write_text("".join(lines))
    return folder


def test_numbers_are_safe_before_what_is_decorative(capsys, tmp_path, monkeypatch):
    names = ["Ba$$in", "a|b", "$x_{$"]
    content = {
        "images": [{"id": 1}],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names)],
        "annotations": [{"image_id": 1, "category_id": k, "bbox": [0, 0, 9, 9]} for k in range(3)],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "$d$.json").write_text(
        json.dumps([{"image_id": 1, "category_id": 0, "bbox": [0, 0, 9, 9], "score": 1}])
    )
    shutil.copy(tmp_path / "$d$.json", tmp_path / "e.json")
    given = {"detections": [tmp_path / "$d$.json", tmp_path / "e.json"], "annotations": tmp_path / "a.json"}
    command.run(**given, plot=tmp_path / "p.png", markdown=tmp_path / "r.md")
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert r"| a\|b " in (tmp_path / "r.md").read_text()

    def fail(*_, **__):
        raise RuntimeError("no ink")

    monkeypatch.setattr(command, "plot_curves", fail)
    with pytest.raises(RuntimeError, match="no ink"):
        command.run(**given, plot=tmp_path / "q.png", json=tmp_path / "r.json", markdown=tmp_path / "s.md")
    assert json.loads((tmp_path / "r.json").read_text())["mean"]["VOC10+"] == pytest.approx(1 / 3)
    assert "Ba$$in" in capsys.readouterr().out and (tmp_path / "s.md").exists()


def test_class_names_are_checked_before_a_model_runs(tmp_path, monkeypatch):
    content = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "w/o"}], "annotations": []}
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "d.json").write_text("[]")
    monkeypatch.setattr(command, "voc_result", None)
    with pytest.raises(ValueError, match="class 'w/o' cannot be part of a file's name"):
        command.run(detections=tmp_path / "d.json", annotations=tmp_path / "a.json", save_voc=tmp_path / "out")


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


def test_a_model_and_ultralytics_own_number(capsys, tmp_path, tree, data, weights):
    """Objects are made of the model's own detections, so that there is something to score."""
    run = ["--imgsz", 64, "--device", "cpu"]
    first = ["--weights", weights, "--data", data, "--clip", "--save-voc", tmp_path / "v", *run]
    assert call(capsys, *first)[0] == 0
    objects = {name: [] for name in SIZES}
    for name in ("cat", "dog"):
        for line in (tmp_path / "v" / f"comp4_det_test_{name}.txt").read_text().splitlines()[::5]:
            image, (x1, y1, x2, y2) = line.split()[0], map(float, line.split()[2:])
            x2 = min(x2 + 1.5, SIZES[image][0])  # a pixel and a half beside
            if x2 - x1 > 4 and y2 - y1 > 4:
                objects[image].append((name, x1, y1, x2, y2, False))
    convert_voc(write_tree(tmp_path / "tree", objects), tmp_path / "set")
    argv = ["--weights", weights, "--data", tmp_path / "set" / "data.yaml", *run]
    code, out, err = call(capsys, *argv, "--json", tmp_path / "r.json", "--save-coco", tmp_path / "c")
    assert code == 0, err
    report = json.loads((tmp_path / "r.json").read_text())
    own, ours = report["runs"][0]["ultralytics_val"], report["mean"]
    assert 0.02 < own["mAP50"] < 0.98
    assert ours["Ultralytics AP50"] == pytest.approx(own["mAP50"], abs=1e-3)
    assert ours["Ultralytics AP"] == pytest.approx(own["mAP50-95"], abs=1e-3)
    assert "Ultralytics' val printed for" in out and report["runs"][0]["val_settings"]["rect"] is True

    argv = ["--detections", tmp_path / "c" / "detections.json", "--annotations", tmp_path / "c" / "annotations.json"]
    assert call(capsys, *argv, "--json", tmp_path / "back.json")[0] == 0
    assert json.loads((tmp_path / "back.json").read_text())["mean"] == ours


def test_only_models_of_one_training_are_averaged(capsys, tmp_path, data, weights):
    import torch

    ckpt = torch.load(weights, weights_only=False)
    default = {"version": "0", "settings": SOSConfig().to_dict()}
    shift = {"shifts": [{"settings": {"method": "expected"}, "step": 1.0}]}

    def found(rank, method="expected"):
        settings = {"method": method, "rank": rank, "budget": None, "seed": 0, "found": rank != 32}
        return {"shifts": [{"settings": settings, "step": 1.0}]}

    def fit(ridge):
        return {"fit": {"images": {"fit": 8}, "settings": {"ridge": ridge, "seed": 0}, "ridges": [7.0]}}

    def calibration(seed, iou):
        return {"settings": {"seed": seed, "iou": iou}, "maps": []}

    made = {
        "seed0": {"train_args": {"seed": 0, "name": "a"}},
        "seed1": {"train_args": {"seed": 1, "name": "b"}, "sos": default},  # the defaults are what stock has
        "longer": {"train_args": {"seed": 2, "epochs": 9}},
        "shifted": {"train_args": {"seed": 0, "name": "a"}, "sos": {**default, **shift}},
        "found": {"train_args": {"seed": 1}, "sos": {**default, **found(0.75)}},
        "found again": {"train_args": {"seed": 2}, "sos": {**default, **found(0.5625)}},
        "given": {"train_args": {"seed": 2}, "sos": {**default, **found(32)}},
        "fit": {"train_args": {"seed": 1}, "sos": {**default, **fit(None)}},
        "fit by 100": {"train_args": {"seed": 2}, "sos": {**default, **fit(100.0)}},
        "calibrated": {"train_args": {"seed": 1}, "sos": {**default, "calibrations": [calibration(0, 0.5)]}},
        "again": {"train_args": {"seed": 2}, "sos": {**default, "calibrations": [calibration(1, 0.5)]}},
        "soft": {"train_args": {"seed": 2}, "sos": {**default, "calibrations": [calibration(1, "soft")]}},
        "fitted": {"train_args": {"seed": 2}, "sos": {**default, "fits": [{"images": 8}]}},
        "averaged": {"train_args": {"seed": 2}, "sos": {**default, "averaged": 3}},
        "unknown": {"train_args": {}},
    }
    for name, content in made.items():
        content["train_args"] = {**(ckpt["train_args"] if name != "unknown" else {}), **content["train_args"]}
        torch.save({**ckpt, **content}, tmp_path / f"{name}.pt")

    def evaluate(*names):
        models = [tmp_path / f"{name}.pt" for name in names]
        report = command.run(model=models, data=data, imgsz=64, device="cpu", plot=tmp_path / "p.png")
        return report, capsys.readouterr().out

    report, out = evaluate("seed0", "seed1")
    assert report["mean"] == report["runs"][0]["mean"] and set(report["std"].values()) == {0.0}
    assert "Mean ± sample standard deviation of 2 runs." in out
    assert set(evaluate("calibrated", "again")[0]["std"].values()) == {0.0}  # other images, drawn by the seed
    assert set(evaluate("found", "found again")[0]["std"].values()) == {0.0}  # the guard found a rank for each
    for names, differ in (
        (("seed0", "longer"), "epochs"),
        (("seed0", "shifted"), "shifts"),
        (("seed0", "seed0", "seed1"), None),  # one file twice is one model
        (("seed0", "fitted"), "fits"),
        (("seed0", "averaged"), "averaged"),
        (("seed0", "calibrated"), "calibrations"),
        (("calibrated", "soft"), "calibrations"),
        (("found", "given"), "shifts"),
        (("fit", "fit by 100"), "fit"),
        (("seed0", "unknown"), "imgsz"),
    ):
        report, out = evaluate(*names)
        if differ is None:
            assert len(report["runs"]) == 2
            continue
        assert set(report["mean"].values()) == set(report["std"].values()) == {None} and "±" not in out
        assert out.count("| **mean** ") == 2 and re.search(rf"they differ in [\w, ]*\b{differ}\b", out)
    shutil.copy(tmp_path / "seed0.pt", tmp_path / "copy.pt")
    assert "they differ in nothing but their weights" in evaluate("seed0", "copy")[1]


def test_an_export_is_judged_as_its_checkpoint(capsys, tmp_path, data, weights):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from ultralytics import YOLO

    exported = YOLO(shutil.copy(weights, tmp_path / "tiny.pt")).export(format="onnx", imgsz=64, simplify=False)
    options = {"data": data, "imgsz": 64, "batch": 1, "device": "cpu"}
    stock, onnx = (command.run(model=path, **options)["runs"][0] for path in (weights, exported))
    assert stock["detections"] > 0 and onnx["detections"] > 0 and "calibration" in onnx
    assert len(command.run(model=[exported, weights], **options)["runs"]) == 2
    assert "No mean over the models" in capsys.readouterr().out


def test_a_model_of_other_classes_is_refused(capsys, tmp_path, data, weights):
    renamed = data.with_name("renamed.yaml")
    renamed.write_text(data.read_text().replace("dog", "cow").replace("voc:", "xml:"))
    code, _, err = call(capsys, "--weights", weights, "--data", renamed)
    assert code == 2 and "tiny.pt: predicts an unknown class 'dog'; there are cat, cow" in err


def test_bench_measures_every_contender():
    bench = runpy.run_path(str(TOOLS / "bench_eval.py"))
    shape = {"images": 20, "classes": 3, "objects": 60, "detections": 400, "seed": 0}
    devkit, coco = (bench["measure"](name, 1, **shape) for name in (bench["DEVKIT"], "pycocotools"))
    assert 0.1 < devkit["mAP"] < 0.95 and coco["mAP"] == pytest.approx(devkit["mAP"], abs=0.1)
    assert devkit["peak"] >= devkit["data"] > 10 and coco["evaluate"] > 0


def test_the_judge_imports_nothing_of_the_trainer():
    code = "import sys, yolo_sos.evaluate as e; [getattr(e, name) for name in dir(e)]; "
    code += "print({'torch', 'ultralytics', 'matplotlib'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
