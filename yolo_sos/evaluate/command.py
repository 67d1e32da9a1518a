# yolo-sos, AGPL-3.0
"""Evaluate detectors by the VOC devkit's metric, COCO's and Ultralytics', side by side, on the same detections.

Run a model, or several (seeds: mean ± std), on a split of a data set:

    yolo-sos eval --weights runs/*/best.pt --data data.yaml --split test --json eval.json --plot curves.png

or judge detections that are there, in COCO's JSON or the devkit's files (a folder of comp4_det_{split}_{class}.txt):

    yolo-sos eval --detections results.json --annotations VOCdevkit/VOC2007 --data data.yaml
    yolo-sos eval --detections results/VOC2007/Main --annotations VOCdevkit/VOC2007

The ground truth is --annotations: a VOC tree, of which the image set --split, or COCO JSON. Without it, it is the VOC
XML in the folder that the data YAML's key `voc` names, laid out like its folder `images`; and without that, the YOLO
labels, which do not know difficult objects. Images that Ultralytics cannot read are refused by name, since it would
leave them out.

Exit status: 0 done; 2 bad input, with a message that says which file and where in it; 1 anything else.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from yolo_sos import __version__
from yolo_sos.builtin import resolve_data
from yolo_sos.data.voc import read_image_set
from yolo_sos.evaluate.boxes import Detections, GroundTruth
from yolo_sos.evaluate.calibration import NOT_JUDGED, Calibration, calibration_of
from yolo_sos.evaluate.coco import BACKENDS, coco_ap, load_backend
from yolo_sos.evaluate.coco_files import (
    read_coco_detections,
    read_coco_truth,
    write_coco_detections,
    write_coco_truth,
)
from yolo_sos.evaluate.plot import plot_curves, plot_reliability
from yolo_sos.evaluate.report import Scores, calibration_tables, notes, report_json, table
from yolo_sos.evaluate.voc import Matches, VOCResult, voc_result
from yolo_sos.evaluate.voc_files import check_class_files, read_voc_detections, write_voc_detections
from yolo_sos.files import write_text

COMMAND = "yolo-sos eval"
PICTURES = (".pdf", ".png", ".svg")
OUTPUTS = ("json", "markdown", "plot", "reliability", "save_coco", "save_voc")
# What bad input raises; what a full disk or a bug raises keeps its traceback.
BAD_PATH = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
BAD_INPUT = (ValueError, ImportError, *BAD_PATH)


class _Parser(argparse.ArgumentParser):
    """Raises what it finds wrong, for whoever calls it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser(command: str = COMMAND) -> argparse.ArgumentParser:
    """Return the parser of the command line, which declares all options, under the name that its help shows."""
    text, raw = (__doc__ or "").replace(COMMAND, command), argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog=command, description=text, formatter_class=raw)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", nargs="+", metavar="PT", help="checkpoints to run; patterns are expanded")
    source.add_argument("--detections", nargs="+", metavar="PATH", help="COCO results (.json) or devkit files (folder)")
    parser.add_argument("--data", metavar="YAML", help="data set: class names, images, ground truth")
    parser.add_argument("--annotations", metavar="PATH", help="ground truth: VOC tree, or COCO annotations (.json)")
    parser.add_argument("--split", default="test", help="split of the data set or image set of the tree (%(default)s)")

    metric = parser.add_argument_group("metrics")
    metric.add_argument("--iou", type=float, default=0.5, help="IoU threshold of the devkit's metric (%(default)s)")
    metric.add_argument("--precision", type=float, default=0.9, help="to report a threshold for (%(default)s)")
    metric.add_argument("--coco-backend", choices=BACKENDS, default="pycocotools", help="COCO's package (%(default)s)")

    model = parser.add_argument_group("running the model; what is not given is as in Ultralytics' val")
    model.add_argument("--conf", type=float, default=0.001, help="least confidence of a detection (%(default)s)")
    model.add_argument("--nms-iou", type=float, default=0.7, help="IoU above which NMS drops a box (%(default)s)")
    model.add_argument("--max-det", type=int, default=300, help="most detections per image (%(default)s)")
    model.add_argument("--clip", action="store_true", help="cut boxes off at the image's border, which val does not do")
    model.add_argument("--imgsz", type=int, help="size of the images in pixels; by default that of the training")
    model.add_argument("--batch", type=int, default=16, help="images at a time (%(default)s)")
    model.add_argument("--device", help="such as cpu or 0; by default what Ultralytics picks")

    output = parser.add_argument_group("output beside the table; detections of several runs go to subfolders 1, 2, ...")
    output.add_argument("--json", metavar="FILE", type=Path, help="all numbers, with settings and versions")
    output.add_argument("--markdown", metavar="FILE", type=Path, help="the command, the table and its notes")
    output.add_argument("--plot", metavar="FILE", type=Path, help="precision-recall curves, " + " ".join(PICTURES))
    output.add_argument("--reliability", metavar="FILE", type=Path, help="reliability curves, " + " ".join(PICTURES))
    output.add_argument("--save-coco", metavar="DIR", type=Path, help="write detections.json and annotations.json")
    output.add_argument("--save-voc", metavar="DIR", type=Path, help="write comp4_det_{split}_{class}.txt")
    return parser


def parse(argv: Sequence[str], command: str = COMMAND) -> argparse.Namespace:
    """Read the command line, and check what can be checked without the files.

    Raises:
        ValueError: If an option is wrong; names it.
    """
    args = parser(command).parse_args(argv)
    if not (args.weights or args.detections):
        raise ValueError("eval needs --weights, checkpoints to run, or --detections, files to read")
    if args.weights and not args.data:
        raise ValueError("--weights needs --data, which says where the images are")
    if args.detections and not (args.annotations or args.data):
        raise ValueError("--detections needs a ground truth: --annotations, or --data with one")
    for flag, picture in ("--plot", args.plot), ("--reliability", args.reliability):
        if picture and picture.suffix not in PICTURES:
            raise ValueError(f"{flag}: the suffix of '{picture}' must be one of {', '.join(PICTURES)}")
    for flag, value in ("--iou", args.iou), ("--precision", args.precision):
        if not 0 < value <= 1:
            raise ValueError(f"{flag}: must be above 0 and at most 1, not {value:g}")
    for flag, value in ("--conf", args.conf), ("--nms-iou", args.nms_iou):
        if not 0 <= value <= 1:
            raise ValueError(f"{flag}: must be at least 0 and at most 1, not {value:g}")
    for flag, value in ("--max-det", args.max_det), ("--batch", args.batch), ("--imgsz", args.imgsz):
        if value is not None and value < 1:
            raise ValueError(f"{flag}: must be at least 1, not {value}")
    args.data = resolve_data(args.data)
    return args


def main(argv: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Run the command and return its exit status (see the module).

    Args:
        argv (Sequence[str] | None): The arguments; by default those of the process.
        command (str): What the command is called in help, reports and errors.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        evaluate(parse(argv, command), shlex.join([*command.split(), *argv]))
    except BAD_INPUT as e:
        print(f"{command}: error: {e}", file=sys.stderr)
        return 2
    return 0


def run(**options: Any) -> dict[str, Any]:
    """Do what the command does, with its long options as keys: ``run(weights="best.pt", data="VOC.yaml")``.

    Args:
        **options (Any): As on the command line, with ``_`` for ``-``; ``model`` is another name of ``weights``. Several
            paths are a list, or have commas between them. What is None is left at its default.

    Returns:
        (dict[str, Any]): All numbers, as ``json=`` writes them.

    Raises:
        ValueError: If an option is unknown or its value is wrong, or a file is malformed; names it.
        FileNotFoundError: If a file is missing.
        ImportError: If a backend or matplotlib is missing.
    """
    actions = {action.dest: action for action in parser()._actions if action.dest != "help"}
    argv: list[str] = []
    for key, value in options.items():
        action = actions.get({"model": "weights"}.get(key, key))
        if action is None:
            raise ValueError(f"'{key}={value}': eval has no such argument; it takes {', '.join(actions)}")
        flag = action.option_strings[0]
        if action.nargs == 0:  # a flag
            if value not in (True, False, None, "true", "false", "True", "False"):
                raise ValueError(f"'{key}={value}' is invalid: {key} must be true or false")
            argv += [flag] if value in (True, "true", "True") else []
        elif value is not None:
            values = [str(v) for v in value] if isinstance(value, (list, tuple)) else str(value).split(",")
            argv += [flag, *values] if action.nargs == "+" else [f"{flag}={','.join(values)}"]
    command = shlex.join([*COMMAND.split(), *(f"{key}={value}" for key, value in options.items())])
    try:
        args = parse(argv)
    except ValueError as e:
        message = str(e).replace("--weights", "weights" if "weights" in options else "model")
        raise ValueError(re.sub(r"--([a-z][a-z-]+)", lambda m: m[1].replace("-", "_"), message)) from None
    return evaluate(args, command)


def evaluate(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Check all inputs, evaluate one source after the other, write and show the numbers, and return the report."""
    load_backend(args.coco_backend)
    sources = _expand(args.weights or args.detections)
    files = [args.json, args.markdown, args.plot, args.reliability]
    folders = [args.save_coco, args.save_voc, *(path.parent for path in files if path)]
    for folder in filter(None, folders):  # better refused now than after the models have run
        folder.mkdir(parents=True, exist_ok=True)
    truth = _ground_truth(args)
    if args.save_voc:
        check_class_files(truth.classes)
    if args.plot or args.reliability:
        import matplotlib  # noqa: F401
    if args.weights:
        from yolo_sos.evaluate.detections import load_detector

        for path in sources:
            load_detector(path, truth)  # for its checks: better now than after the others have run

    runs, results = [], []
    curves: dict[str, Calibration | None] = {}
    for i, path in enumerate(sources, start=1):
        found, details = _run_model(path, truth, args) if args.weights else (_read(path, truth, args.split), {})
        part = str(i) if len(sources) > 1 else ""
        if args.save_coco:
            write_coco_truth(args.save_coco / part / "annotations.json", truth)
            write_coco_detections(args.save_coco / part / "detections.json", truth, found)
        if args.save_voc:
            write_voc_detections(args.save_voc / part, truth, found, args.split)
        matches = Matches.of(truth, found)
        results.append(voc_result(matches, args.iou))
        judged = curves[str(path)] = calibration_of(matches, args.iou, args.precision)
        details["calibration"] = judged.to_dict() if judged else None
        runs.append(_score(str(path), truth, found, results[-1], args.coco_backend, details))
    return _show(truth, runs, results, curves, args, command)


def _score(
    name: str, truth: GroundTruth, found: Detections, voc: VOCResult, backend: str, details: dict[str, Any]
) -> Scores:
    """Evaluate one set of detections by every metric."""
    from yolo_sos.evaluate.detections import ultralytics_ap

    coco = coco_ap(truth, found, backend)
    ap50, ap = ultralytics_ap(truth, found)
    columns = {"VOC07": voc.ap07, "VOC10+": voc.ap, "COCO AP50": coco.ap50, "COCO AP": coco.ap}
    columns |= {"Ultralytics AP50": ap50, "Ultralytics AP": ap}
    return Scores(name, columns, {"detections": len(found), "coco": coco.stats, **details})


def _show(
    truth: GroundTruth,
    runs: Sequence[Scores],
    results: Sequence[VOCResult],
    curves: dict[str, Calibration | None],
    args: argparse.Namespace,
    command: str,
) -> dict[str, Any]:
    """Write the numbers, print the table, and draw the picture last: if it fails, no number is lost."""
    tables = [table(truth, runs), calibration_tables(truth.classes, runs, args.precision)]
    text = "\n".join(filter(None, tables))
    remarks = notes(truth, args.iou, len(runs)) + (_model_notes(runs, args.clip) if args.weights else [])
    settings = {k: v for k, v in vars(args).items() if k not in OUTPUTS}
    packages = ("numpy", "ultralytics", "torch", "pycocotools", args.coco_backend)
    versions = {"python": platform.python_version(), "yolo-sos": __version__, **{p: version(p) for p in packages}}
    report = report_json(truth, runs, command=command, settings=settings, versions=versions, notes=remarks)
    if args.json:
        write_text(args.json, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    listed = "\n".join(f"- {line}" for line in remarks)
    print(f"\n{text}\n{listed}")
    if args.markdown:
        write_text(args.markdown, f"# Evaluation\n\n    {command}\n\n{text}\n{listed}\n")
    if args.plot:
        plot_curves(args.plot, truth.classes, results, [run.name for run in runs])
    if args.reliability:
        found = {name: c.reliability for name, c in curves.items() if c}
        if not found:
            raise ValueError(f"--reliability: {args.reliability} has nothing to show: {NOT_JUDGED}")
        plot_reliability(args.reliability, {"all classes": found})
    return report


def _model_notes(runs: Sequence[Scores], clip: bool) -> list[str]:
    """Say how boxes at the border were treated, and what Ultralytics' val reported."""
    uncut = "Boxes may reach beyond the image's border, as in Ultralytics' val; clip cuts them off, as predict does."
    cut = "Boxes are cut off at the image's border (clip), as predict does; val evaluates them uncut."
    lines = [cut if clip else uncut]
    for run in runs:
        if own := run.details.get("ultralytics_val"):
            printed = f"mAP50 {own['mAP50']:.4f}, mAP50-95 {own['mAP50-95']:.4f}"
            lines.append(f"Ultralytics' val printed for {run.name}, on its own labels: {printed}.")
    return lines


def _expand(patterns: Sequence[str]) -> list[Path]:
    """Return the paths that patterns stand for; devkit files stand for their folder."""
    paths: list[Path] = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))
        if not found:
            raise FileNotFoundError(f"{pattern}: no such file")
        paths += [Path(p).parent if p.endswith(".txt") else Path(p) for p in found]
    return list(dict.fromkeys(paths))


def _read(path: Path, truth: GroundTruth, split: str) -> Detections:
    """Read detections in either format."""
    return read_voc_detections(path, truth, split) if path.is_dir() else read_coco_detections(path, truth)


def _ground_truth(args: argparse.Namespace) -> GroundTruth:
    """Read the best ground truth there is: --annotations, the data set's VOC XML, or its labels."""
    from yolo_sos.evaluate.detections import read_data_set, xml_truth

    data = read_data_set(args.data, args.split) if args.weights or not args.annotations else None
    if data and not args.annotations:
        return data.truth()
    path = Path(args.annotations)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_file():
        truth = read_coco_truth(path)
    else:
        if not args.data and (results := [p for p in args.detections if p.endswith(".json")]):
            raise ValueError(f"{results[0]}: COCO results give classes as numbers; --data must name them in order")
        tree = _voc_tree(path)
        truth = xml_truth([tree / "Annotations" / f"{i}.xml" for i in read_image_set(tree, args.split)], args.data)
    if data and (differ := set(data.stems()) ^ set(truth.stems)):  # what is not run would count as missed
        raise ValueError(
            f"{args.data}, split '{args.split}', and {path} differ in {len(differ)} images, such as '{min(differ)}'"
        )
    return truth


def _voc_tree(path: Path) -> Path:
    """Return the VOC tree: the folder itself, or the only one in a VOCdevkit folder."""
    trees = [path] if (path / "Annotations").is_dir() else [p.parent for p in sorted(path.glob("*/Annotations"))]
    if len(trees) != 1:
        found = f"several: {', '.join(p.name for p in trees)}; name one" if trees else "no folder 'Annotations'"
        raise FileNotFoundError(f"{path}: to be a VOC tree or COCO annotations, but has {found}")
    return trees[0]


def _run_model(path: Path, truth: GroundTruth, args: argparse.Namespace) -> tuple[Detections, dict[str, Any]]:
    """Return a model's detections, and what identifies it, its settings and Ultralytics' own metrics."""
    from yolo_sos.evaluate.detections import class_names, detect

    settings = {k: getattr(args, k) for k in ("data", "split", "conf", "max_det", "imgsz", "batch", "device")}
    settings = {k: v for k, v in settings.items() if v is not None}  # or None would take the place of the checkpoint's
    validation = detect(path, truth, clip=args.clip, iou=args.nms_iou, **settings)
    details: dict[str, Any] = {
        "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "val_settings": validation.settings,
    }
    if list(validation.names) == class_names(args.data)[1]:  # val goes by number: other names would measure nothing
        own = validation.metrics
        details["ultralytics_val"] = {"mAP50": own["metrics/mAP50(B)"], "mAP50-95": own["metrics/mAP50-95(B)"]}
    return validation.found, details
