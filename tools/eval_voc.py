#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""Evaluate detectors by the VOC devkit's metric, COCO's and Ultralytics', side by side, on the same detections.

Run a model, or several (seeds: mean ± std), on a split of a data set:

    python tools/eval_voc.py --weights runs/*/best.pt --data data.yaml --split test --json eval.json --plot curves.png

or judge detections that are there, in COCO's JSON or the devkit's files (a folder of comp4_det_{split}_{class}.txt):

    python tools/eval_voc.py --detections results.json --annotations VOCdevkit/VOC2007 --data data.yaml
    python tools/eval_voc.py --detections results/VOC2007/Main --annotations VOCdevkit/VOC2007

The ground truth is --annotations: a VOC tree, of which the image set --split, or COCO JSON. Without it, it is the VOC
XML in the folder that the data YAML's key `voc` names, laid out like its folder `images`; and without that, the YOLO
labels, which do not know difficult objects.

Exit status: 0 done; 2 bad input, with a message that says which file and where in it; 1 anything else.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml

import yolo_sos
from yolo_sos.data.voc import read_annotation, read_image_set
from yolo_sos.evaluate import (
    Detections,
    GroundTruth,
    Run,
    VOCResult,
    coco_ap,
    plot_curves,
    read_coco_detections,
    read_coco_truth,
    read_voc_detections,
    report_json,
    snap,
    table,
    voc_ap,
    voc_truth,
    write_coco_detections,
    write_coco_truth,
    write_voc_detections,
)
from yolo_sos.evaluate.boxes import first_duplicate
from yolo_sos.evaluate.coco import BACKENDS, load_backend
from yolo_sos.evaluate.report import notes
from yolo_sos.files import write_text

PICTURES = (".pdf", ".png", ".svg")
REFUSED = (  # what bad input raises; what a full disk or a bug raises keeps its traceback
    ValueError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    FileExistsError,
    PermissionError,
    ModuleNotFoundError,
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="eval_voc", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", nargs="+", metavar="PT", help="checkpoints to run; patterns are expanded")
    source.add_argument("--detections", nargs="+", metavar="PATH", help="COCO results (.json) or devkit files (folder)")
    parser.add_argument("--data", metavar="YAML", help="data set: class names, images, ground truth")
    parser.add_argument("--annotations", metavar="PATH", help="ground truth: VOC tree, or COCO annotations (.json)")
    parser.add_argument(
        "--split", default="test", help="split of the data set, image set of the VOC tree (%(default)s)"
    )

    metric = parser.add_argument_group("metrics")
    metric.add_argument("--iou", type=float, default=0.5, help="IoU threshold of the devkit's metric (%(default)s)")
    metric.add_argument("--coco-backend", choices=BACKENDS, default="pycocotools", help="who counts (%(default)s)")

    model = parser.add_argument_group("running the model; what is not given is as in Ultralytics' val")
    model.add_argument("--conf", type=float, default=0.001, help="least confidence of a detection (%(default)s)")
    model.add_argument("--nms-iou", type=float, default=0.7, help="IoU beyond which NMS drops the lesser (%(default)s)")
    model.add_argument("--max-det", type=int, default=300, help="most detections per image (%(default)s)")
    model.add_argument("--clip", action="store_true", help="cut boxes off at the image's border, which val does not do")
    model.add_argument("--imgsz", type=int, help="size of the images in pixels; by default that of the training")
    model.add_argument("--batch", type=int, default=16, help="images at a time (%(default)s)")
    model.add_argument("--device", help="such as cpu or 0; by default what Ultralytics picks")

    output = parser.add_argument_group("output beside the table; detections of several runs go to subfolders 1, 2, ...")
    output.add_argument("--json", metavar="FILE", type=Path, help="all numbers, with settings and versions")
    output.add_argument("--markdown", metavar="FILE", type=Path, help="the command, the table and its notes")
    output.add_argument("--plot", metavar="FILE", type=Path, help="precision-recall curves, " + " ".join(PICTURES))
    output.add_argument("--save-coco", metavar="DIR", type=Path, help="write detections.json and annotations.json")
    output.add_argument("--save-voc", metavar="DIR", type=Path, help="write comp4_det_{split}_{class}.txt")
    args = parser.parse_args(argv)
    if args.weights and not args.data:
        parser.error("--weights needs --data, which says where the images are")
    if args.detections and not (args.annotations or args.data):
        parser.error("--detections needs a ground truth: --annotations, or --data with one")
    if args.plot and args.plot.suffix not in PICTURES:
        parser.error(f"--plot: the suffix of '{args.plot}' must be one of {', '.join(PICTURES)}")
    if not 0 < args.iou <= 1:
        parser.error(f"--iou: the threshold must be above 0 and at most 1, not {args.iou:g}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status (see the module)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        evaluate(parse(argv), shlex.join(["python", "tools/eval_voc.py", *argv]))
    except REFUSED as e:
        print(f"eval_voc: error: {e}", file=sys.stderr)
        return 2
    return 0


def evaluate(args: argparse.Namespace, command: str) -> None:
    """Check all inputs, evaluate one source after the other, and show the numbers."""
    load_backend(args.coco_backend)
    sources = expand(args.weights or args.detections)
    for file in filter(None, (args.json, args.markdown, args.plot)):
        file.parent.mkdir(parents=True, exist_ok=True)  # better refused now than after the models have run
    truth = ground_truth(args)
    if args.weights:
        for path in sources:
            load_model(path, truth)  # for its checks: better now than after the others have run

    runs: list[Run] = []
    curves: list[VOCResult] = []
    for i, path in enumerate(sources, start=1):
        found, details = (
            run_model(path, truth, args) if args.weights else (read_detections(path, truth, args.split), {})
        )
        run, voc = judge(str(path), truth, found, args, details)
        runs.append(run)
        curves.append(voc)
        part = str(i) if len(sources) > 1 else ""
        if args.save_coco:
            write_coco_truth(args.save_coco / part / "annotations.json", truth)
            write_coco_detections(args.save_coco / part / "detections.json", truth, found)
        if args.save_voc:
            write_voc_detections(args.save_voc / part, truth, found, args.split)
    show(truth, runs, curves, args, command)


def judge(
    name: str, truth: GroundTruth, found: Detections, args: argparse.Namespace, details: dict[str, Any]
) -> tuple[Run, VOCResult]:
    """Evaluate one set of detections by every metric."""
    voc = voc_ap(truth, found, args.iou)
    coco = coco_ap(truth, found, args.coco_backend)
    ap50, ap = ultralytics_ap(truth, found)
    columns = {
        "VOC07": voc.ap07,
        "VOC10+": voc.ap,
        "COCO AP50": coco.ap50,
        "COCO AP": coco.ap,
        "Ultralytics AP50": ap50,
        "Ultralytics AP": ap,
    }
    return Run(name, columns, {"detections": len(found), "coco": coco.stats, **details}), voc


def show(
    truth: GroundTruth, runs: Sequence[Run], curves: Sequence[VOCResult], args: argparse.Namespace, command: str
) -> None:
    """Write the files that were asked for, and print the table."""
    text = table(truth, runs)
    remarks = notes(truth, args.iou, len(runs)) + (model_notes(runs, args.clip) if args.weights else [])
    if args.markdown:
        body = [f"    {command}\n", text, "\n".join(f"- {line}" for line in remarks)]
        write_text(args.markdown, "# Evaluation\n\n" + "\n".join(body) + "\n")
    if args.json:
        outputs = {"json", "markdown", "plot", "save_coco", "save_voc"}
        settings = {k: v for k, v in vars(args).items() if k not in outputs}
        packages = ("numpy", "ultralytics", "torch", "pycocotools", args.coco_backend)
        versions = {"python": platform.python_version(), "yolo-sos": yolo_sos.__version__}
        versions |= {package: version(package) for package in packages}
        report = report_json(truth, runs, command=command, settings=settings, versions=versions, notes=remarks)
        write_text(args.json, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if args.plot:
        plot_curves(args.plot, truth.classes, curves, [run.name for run in runs])
    print(f"\n{text}\n" + "\n".join(f"- {line}" for line in remarks))


def model_notes(runs: Sequence[Run], clip: bool) -> list[str]:
    """Say how boxes at the border were taken, and what val printed of itself."""
    if clip:
        lines = ["Boxes are cut off at the image's border (--clip), as predict does; val judges them uncut."]
    else:
        lines = [
            "Boxes may reach beyond the image's border, as where val judges them; --clip cuts them, as predict does."
        ]
    for run in runs:
        if own := run.details.get("ultralytics_val"):
            printed = f"mAP50 {own['mAP50']:.4f}, mAP50-95 {own['mAP50-95']:.4f}"
            lines.append(f"Ultralytics' val printed for {run.name}, on its own labels: {printed}.")
    return lines


def expand(patterns: Sequence[str]) -> list[Path]:
    """Return the paths that patterns stand for; devkit files stand for their folder."""
    paths: list[Path] = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))
        if not found:
            raise FileNotFoundError(f"{pattern}: no such file")
        paths += [Path(p).parent if p.endswith(".txt") else Path(p) for p in found]
    return list(dict.fromkeys(paths))


def read_detections(path: Path, truth: GroundTruth, split: str) -> Detections:
    """Read detections in either format."""
    return read_voc_detections(path, truth, split) if path.is_dir() else read_coco_detections(path, truth)


@dataclass(frozen=True)
class DataSet:
    """A split of a data set: its images with their YOLO labels, as Ultralytics reads them, and its VOC XML, if any."""

    labels: list[dict[str, Any]]
    xml: list[Path]

    def stems(self) -> list[str]:
        """Return the names of the images without folder and suffix."""
        return [Path(d["im_file"]).stem for d in self.labels]


def ground_truth(args: argparse.Namespace) -> GroundTruth:
    """Read the best ground truth there is: --annotations, the data set's VOC XML, or its labels."""
    names = class_names(args.data) if args.data else None
    data = read_data_set(args.data, args.split) if args.weights or not args.annotations else None
    if data and not args.annotations:
        return xml_truth(data.xml, names) if data.xml else label_truth(data, names or [])
    path = Path(args.annotations)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_file():
        truth = read_coco_truth(path)
    else:
        if names is None and (results := [p for p in args.detections if p.endswith(".json")]):
            raise ValueError(f"{results[0]}: COCO results give classes as numbers; --data must name them in order")
        tree = voc_tree(path)
        truth = xml_truth([tree / "Annotations" / f"{i}.xml" for i in read_image_set(tree, args.split)], names)
    if data and (differ := set(data.stems()) ^ set(truth.stems)):  # what is not run would count as missed
        raise ValueError(
            f"{args.data}, split '{args.split}', and {path} differ in {len(differ)} images, such as '{min(differ)}'"
        )
    return truth


def class_names(data: str) -> list[str]:
    """Read the class names of a data YAML, in the order of their indices."""
    from ultralytics.data.utils import check_class_names
    from ultralytics.utils import YAML
    from ultralytics.utils.checks import check_file

    try:
        return list(check_class_names(YAML.load(check_file(data))["names"]).values())
    except (yaml.YAMLError, AssertionError, AttributeError, KeyError, TypeError) as e:  # not YAML, or not such names
        raise ValueError(f"{data}: must be YAML with the class names under 'names': {type(e).__name__}: {e}") from e


def read_data_set(path: str, split: str) -> DataSet:
    """Read one split of a data set; the key `voc` of the data YAML names the folder of its XML."""
    from ultralytics.data import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    try:
        data = check_det_dataset(path, split=split)
        labels = YOLODataset(img_path=data[split], data=data, task="detect", augment=False).labels
    except (SyntaxError, TypeError, AssertionError) as e:  # how Ultralytics refuses a data YAML
        raise ValueError(f"{path}: {e}") from e
    files = [Path(d["im_file"]) for d in labels]
    if (twice := first_duplicate(f.stem for f in files)) is not None:
        raise ValueError(
            f"{path}: two images of split '{split}' are called '{twice}'; an id must say which one is meant"
        )
    if not (folder := data.get("voc")):
        return DataSet(labels, [])
    root = Path(data["path"]).resolve() / "images"
    if outside := [f for f in files if not f.is_relative_to(root)]:
        raise ValueError(f"{path}: 'voc: {folder}' is to be laid out like {root}, but {outside[0]} is not in there")
    return DataSet(labels, [root.parent / folder / f.relative_to(root).with_suffix(".xml") for f in files])


def xml_truth(paths: Sequence[Path], names: Sequence[str] | None) -> GroundTruth:
    """Read VOC annotations."""
    if missing := [p for p in paths if not p.is_file()]:
        raise FileNotFoundError(f"{missing[0]}: no such file; {len(missing)} of {len(paths)} annotations are missing")
    return voc_truth([read_annotation(p) for p in paths], names, str(paths[0].parent))


def label_truth(data: DataSet, names: Sequence[str]) -> GroundTruth:
    """Make a ground truth of YOLO labels, fractions of the image's size; it does not know what is difficult."""
    labels = sorted(data.labels, key=lambda d: Path(d["im_file"]).stem)
    boxes = []
    for d in labels:
        (height, width), (centre, size) = d["shape"], np.hsplit(np.asarray(d["bboxes"], np.float64).reshape(-1, 4), 2)
        boxes.append(np.hstack([centre - size / 2, centre + size / 2]) * [width, height, width, height])
    counts = [len(b) for b in boxes]
    return GroundTruth.build(
        classes=names,
        images=[Path(d["im_file"]).stem for d in labels],
        image=np.repeat(np.arange(len(labels)), counts),
        label=np.concatenate([d["cls"].reshape(-1) for d in labels]).astype(int),
        boxes=snap(np.concatenate(boxes)),
    )


def voc_tree(path: Path) -> Path:
    """Return the VOC tree: the folder itself, or the only one in a VOCdevkit folder."""
    trees = [path] if (path / "Annotations").is_dir() else [p.parent for p in sorted(path.glob("*/Annotations"))]
    if len(trees) != 1:
        found = f"several: {', '.join(p.name for p in trees)}; name one" if trees else "no folder 'Annotations'"
        raise FileNotFoundError(f"{path}: to be a VOC tree or COCO annotations, but has {found}")
    return trees[0]


def load_model(path: Path, truth: GroundTruth) -> Any:
    """Load a checkpoint, and check that it detects classes of the ground truth."""
    from ultralytics import YOLO

    try:
        model = YOLO(path)
    except Exception as e:  # torch and Ultralytics raise whatever they stumble over
        raise ValueError(f"{path}: not a checkpoint that Ultralytics can load: {type(e).__name__}: {e}") from e
    if model.task != "detect":
        raise ValueError(f"{path}: a model for '{model.task}'; to be evaluated here it must be one for 'detect'")
    if unknown := [name for name in model.names.values() if name not in truth.classes]:
        raise ValueError(f"{path}: predicts an unknown class '{unknown[0]}'; there are {', '.join(truth.classes)}")
    return model


def run_model(path: Path, truth: GroundTruth, args: argparse.Namespace) -> tuple[Detections, dict[str, Any]]:
    """Run Ultralytics' val and take its detections, in pixels of the original image, on the way."""
    import torch
    from ultralytics.models.yolo.detect import DetectionValidator
    from ultralytics.utils import ops

    model = load_model(path, truth)
    images = {stem: i for i, stem in enumerate(truth.stems)}
    labels = np.array([truth.classes.index(model.names[c]) for c in range(len(model.names))])
    found: list[tuple[int, np.ndarray]] = []
    used: dict[str, Any] = {}  # val may raise max_det

    class Collector(DetectionValidator):
        def update_metrics(self, preds: list[dict[str, Any]], batch: dict[str, Any]) -> None:
            for i, pred in enumerate(preds):
                image = self._prepare_batch(i, batch)
                boxes = ops.xyxy2xywh(pred["bboxes"].cpu().double())  # as xyxy, scale_boxes would clip them too
                boxes = ops.scale_boxes(image["imgsz"], boxes, image["ori_shape"], image["ratio_pad"], xywh=True)
                boxes = ops.xywh2xyxy(boxes)
                if args.clip:
                    ops.clip_boxes(boxes, image["ori_shape"])
                rows = torch.column_stack([pred["conf"].cpu().double(), pred["cls"].cpu().double(), boxes])
                found.append((images[Path(image["im_file"]).stem], rows.numpy()))
            super().update_metrics(preds, batch)

        def finalize_metrics(self) -> None:
            used.update({k: getattr(self.args, k) for k in ("imgsz", "rect", "batch", "conf", "iou", "max_det")})
            super().finalize_metrics()

    options = {"imgsz": args.imgsz, "device": args.device}
    try:
        with tempfile.TemporaryDirectory() as folder:
            metrics = model.val(
                validator=Collector,
                data=args.data,
                split=args.split,
                conf=args.conf,
                iou=args.nms_iou,
                max_det=args.max_det,
                batch=args.batch,
                plots=False,
                project=folder,
                **{k: v for k, v in options.items() if v is not None},
            )
    except Exception as e:  # the inputs were checked, so this is not one of REFUSED
        raise RuntimeError(f"{path}: Ultralytics' val failed") from e
    table = np.concatenate([rows for _, rows in found])
    detections = Detections.build(
        truth,
        image=np.repeat([i for i, _ in found], [len(rows) for _, rows in found]),
        label=labels[table[:, 1].astype(int)],
        score=table[:, 0],
        boxes=snap(table[:, 2:]),
        where=f"{path}, detection {{}}".format,
    )
    details: dict[str, Any] = {"weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "val_settings": used}
    if [*model.names.values()] == class_names(args.data):  # val goes by number: with other names it measures nothing
        details["ultralytics_val"] = {"mAP50": float(metrics.box.map50), "mAP50-95": float(metrics.box.map)}
    return detections, details


def ultralytics_ap(truth: GroundTruth, found: Detections) -> tuple[np.ndarray, np.ndarray]:
    """Let Ultralytics' own code judge the detections, against the objects that its VOC labels would hold.

    Returns:
        ap50 (np.ndarray): AP at an IoU of 0.5, shape (K,); NaN without objects.
        ap (np.ndarray): Mean AP over IoU 0.5 to 0.95, shape (K,); NaN without objects.
    """
    import torch
    from ultralytics.engine.validator import BaseValidator
    from ultralytics.utils.metrics import ap_per_class, box_iou

    matcher = SimpleNamespace(iouv=torch.linspace(0.5, 0.95, 10))  # all that match_predictions asks of a validator
    objects = np.flatnonzero(~truth.difficult)
    objects = objects[np.argsort(truth.image[objects], kind="stable")]
    order = np.lexsort((found.label, -found.score, found.image))  # the same for detections from files of any format
    every = np.arange(len(truth.images) + 1)
    starts, object_starts = (np.searchsorted(i, every) for i in (found.image[order], truth.image[objects]))
    true = np.zeros((len(found), 10), bool)
    for i in range(len(truth.images)):
        d, o = order[starts[i] : starts[i + 1]], objects[object_starts[i] : object_starts[i + 1]]
        if len(d) and len(o):
            overlap = box_iou(torch.from_numpy(truth.boxes[o]), torch.from_numpy(found.boxes[d]))
            classes = torch.from_numpy(found.label[d]), torch.from_numpy(truth.label[o])
            true[d] = BaseValidator.match_predictions(matcher, *classes, overlap).numpy()
    result = ap_per_class(true[order], found.score[order], found.label[order], truth.label[objects])
    per_threshold = np.full((len(truth.classes), 10), np.nan)
    per_threshold[result[6]] = result[5]  # classes that have objects, and their AP
    return per_threshold[:, 0], per_threshold.mean(1)


if __name__ == "__main__":
    sys.exit(main())
