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
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml

import yolo_sos
from yolo_sos.data.voc import read_image_set
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
    table,
    voc_ap,
    write_coco_detections,
    write_coco_truth,
    write_voc_detections,
)
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
        from yolo_sos.experiment.detections import load_detector

        for path in sources:
            load_detector(path, truth)  # for its checks: better now than after the others have run

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


def ground_truth(args: argparse.Namespace) -> GroundTruth:
    """Read the best ground truth there is: --annotations, the data set's VOC XML, or its labels."""
    from yolo_sos.experiment.detections import read_data_set, xml_truth

    names = class_names(args.data) if args.data else None
    data = read_data_set(args.data, args.split) if args.weights or not args.annotations else None
    if data and not args.annotations:
        return data.truth()
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


def voc_tree(path: Path) -> Path:
    """Return the VOC tree: the folder itself, or the only one in a VOCdevkit folder."""
    trees = [path] if (path / "Annotations").is_dir() else [p.parent for p in sorted(path.glob("*/Annotations"))]
    if len(trees) != 1:
        found = f"several: {', '.join(p.name for p in trees)}; name one" if trees else "no folder 'Annotations'"
        raise FileNotFoundError(f"{path}: to be a VOC tree or COCO annotations, but has {found}")
    return trees[0]


def run_model(path: Path, truth: GroundTruth, args: argparse.Namespace) -> tuple[Detections, dict[str, Any]]:
    """Run a model, and say what it was and what Ultralytics' val said of it."""
    from yolo_sos.experiment.detections import detect

    settings = {k: getattr(args, k) for k in ("data", "split", "conf", "max_det", "imgsz", "batch", "device")}
    settings = {k: v for k, v in settings.items() if v is not None}  # or None would take the place of the checkpoint's
    validation = detect(path, truth, clip=args.clip, iou=args.nms_iou, **settings)
    details: dict[str, Any] = {
        "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "val_settings": validation.settings,
    }
    if list(validation.names) == class_names(args.data):  # val goes by number: with other names it measures nothing
        own = validation.metrics
        details["ultralytics_val"] = {"mAP50": own["metrics/mAP50(B)"], "mAP50-95": own["metrics/mAP50-95(B)"]}
    return validation.found, details


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
