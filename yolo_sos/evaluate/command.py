# yolo-sos, AGPL-3.0
"""Evaluate detectors by the VOC devkit's metric, COCO's and Ultralytics', side by side, on the same detections.

The detections are those of a model, or of several (seeds: mean ± std), on a split of a data set, or are read from
files: COCO's JSON, or the devkit's (a folder of comp4_det_{split}_{class}.txt).

The ground truth is ``annotations``: a VOC tree, of which the image set ``split``, or COCO JSON. Without it, it is the
VOC XML in the folder that the data YAML's key ``voc`` names, laid out like its folder ``images``; and without that, the
YOLO labels, which do not know difficult objects. Images that Ultralytics cannot read are refused by name, since it
would leave them out.
"""

from __future__ import annotations

import glob
import hashlib
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from yolo_sos import __version__
from yolo_sos.arguments import OF_ONE_RUN
from yolo_sos.config import CHECKPOINT_KEY, SOSConfig, check_keys
from yolo_sos.data.voc import read_image_set
from yolo_sos.evaluate.boxes import Detections, GroundTruth
from yolo_sos.evaluate.calibration import LEAST_SCORE, NOT_JUDGED, Calibration, calibration_of
from yolo_sos.evaluate.coco import coco_ap, load_backend
from yolo_sos.evaluate.coco_files import (
    read_coco_detections,
    read_coco_truth,
    write_coco_detections,
    write_coco_truth,
)
from yolo_sos.evaluate.options import OUTPUT, EvalOptions
from yolo_sos.evaluate.plot import plot_curves, plot_reliability
from yolo_sos.evaluate.report import Scores, calibration_tables, notes, report_json, table, tables
from yolo_sos.evaluate.voc import Matches, VOCResult, voc_result
from yolo_sos.evaluate.voc_files import check_class_files, read_voc_detections, write_voc_detections
from yolo_sos.files import as_json, write_text


def run(**options: Any) -> dict[str, Any]:
    """Evaluate one source after the other, write and print the numbers, and return them.

    Args:
        **options (Any): See ``EvalOptions``; ``weights`` is another name of ``model``. What is None has its default.

    Returns:
        (dict[str, Any]): All numbers, as ``json=`` writes them.

    Raises:
        ValueError: If an option is unknown or its value is wrong, or a file is malformed; names it.
        FileNotFoundError: If a file is missing.
        ImportError: If a backend or matplotlib is missing.
    """
    options = {"model" if key == "weights" else key: value for key, value in options.items() if value is not None}
    check_keys(options, EvalOptions.__dataclass_fields__, "an argument of eval")
    o = EvalOptions(**options)
    shown = {k: ",".join(map(str, v)) if isinstance(v, (list, tuple)) else v for k, v in options.items()}
    command = shlex.join(["yolo-sos", "eval", *(f"{key}={value}" for key, value in shown.items())])
    load_backend(o.coco_backend)
    sources = _expand(o.model or o.detections or ())
    files = [o.json, o.markdown, o.plot, o.reliability]
    folders = [o.save_coco, o.save_voc, *(path.parent for path in files if path)]
    for folder in filter(None, folders):  # better refused now than after the models have run
        folder.mkdir(parents=True, exist_ok=True)
    truth = _ground_truth(o)
    if o.save_voc:
        check_class_files(truth.classes)
    if o.plot or o.reliability:
        import matplotlib  # noqa: F401
    apart = ""
    if o.model:
        from yolo_sos.evaluate.detections import load_detector

        # Checked before the first one runs. An export does not tell how it was trained.
        apart = _difference([load_detector(path, truth).ckpt or {} for path in sources])

    runs, results = [], []
    judged: list[Calibration | None] = []
    for i, path in enumerate(sources, start=1):
        found, details = _run_model(path, truth, o) if o.model else (_read(path, truth, o.split), {})
        part = str(i) if len(sources) > 1 else ""
        if o.save_coco:
            write_coco_truth(o.save_coco / part / "annotations.json", truth)
            write_coco_detections(o.save_coco / part / "detections.json", truth, found)
        if o.save_voc:
            write_voc_detections(o.save_voc / part, truth, found, o.split)
        matches = Matches.of(truth, found)
        results.append(voc_result(matches, o.iou))
        judged.append(calibration := calibration_of(matches, o.iou, o.precision))
        details["calibration"] = calibration.to_dict() if calibration else None
        runs.append(_score(str(path), truth, found, results[-1], o.coco_backend, details))
    return _show(truth, runs, results, judged, o, command, apart)


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
    judged: Sequence[Calibration | None],
    o: EvalOptions,
    command: str,
    apart: str,
) -> dict[str, Any]:
    """Write the numbers, print the table, and draw the pictures last: if that fails, no number is lost."""
    scores = calibration_tables(truth.classes, runs, o.precision, averaged=not apart)
    text = "\n".join(filter(None, [tables(truth, runs) if apart else table(truth, runs), scores]))
    remarks = [*notes(truth, o.iou), *_run_notes(runs, o, apart)]
    outputs = {a.name for a in EvalOptions.arguments(OUTPUT)}
    settings = {k: v for k, v in vars(o).items() if k not in outputs}
    packages = ("numpy", "ultralytics", "torch", "pycocotools", o.coco_backend)
    versions = {"python": platform.python_version(), "yolo-sos": __version__, **{p: version(p) for p in packages}}
    report = report_json(
        truth, runs, command=command, settings=settings, versions=versions, notes=remarks, averaged=not apart
    )
    if o.json:
        write_text(o.json, as_json(report))
    listed = "\n".join(f"- {line}" for line in remarks)
    print(f"\n{text}\n{listed}")
    if o.markdown:
        write_text(o.markdown, f"# Evaluation\n\n    {command}\n\n{text}\n{listed}\n")
    if o.plot:
        plot_curves(o.plot, truth.classes, results, [run.name for run in runs], averaged=not apart)
    if o.reliability:
        curves = {run.name: c.reliability for run, c in zip(runs, judged, strict=True) if c}
        if not curves:
            raise ValueError(f"'reliability={o.reliability}' has nothing to show: {NOT_JUDGED}")
        plot_reliability(o.reliability, {"all classes": curves})
    return report


def _run_notes(runs: Sequence[Scores], o: EvalOptions, apart: str) -> list[str]:
    """Say what is averaged, how boxes at the border were treated, and what Ultralytics' val reported."""
    lines = []
    if apart:
        lines.append(f"No mean over the models, which are not one training with several seeds: they differ in {apart}.")
        lines.append(
            f"A model's calibration errors are of the detections that it scores {LEAST_SCORE:g} or more, which differ "
            "from model to model: yolo-sos calibrate compares a model before and after on the same ones."
        )
    elif len(runs) > 1:
        unknown = "" if o.model else ", taken to be of one training with several seeds"
        lines.append(f"Mean ± sample standard deviation of {len(runs)} runs{unknown}.")
    if o.model and o.clip:
        lines.append("Boxes are cut off at the image's border (clip), as predict does; val evaluates them uncut.")
    elif o.model:
        lines.append("Boxes may reach beyond the image's border, as in val; clip=true cuts them off, as predict does.")
    for run in runs:
        if own := run.details.get("ultralytics_val"):
            printed = f"mAP50 {own['mAP50']:.4f}, mAP50-95 {own['mAP50-95']:.4f}"
            lines.append(f"Ultralytics' val printed for {run.name}, on its own labels: {printed}.")
    return lines


def _difference(checkpoints: Sequence[dict[str, Any]]) -> str:
    """Return in which settings checkpoints differ; empty if they are of one training with several seeds."""
    settings = []
    for ckpt in checkpoints:
        args, ours = ckpt.get("train_args") or {}, ckpt.get(CHECKPOINT_KEY) or {}
        given = {k: v for k, v in args.items() if k not in OF_ONE_RUN}
        own = {**SOSConfig().to_dict(), **ours.get("settings", {})}
        for key, done in ours.items():
            if done and key not in ("version", "settings"):  # an operation of yolo-sos; of a command, with its settings
                last = done[-1] if isinstance(done, list) else done
                chosen = last.get("settings", {}) if isinstance(last, dict) else {}
                found = ("rank", "budget") if chosen.get("found") else ()  # by the guard, for each model its own
                own[key] = {k: v for k, v in chosen.items() if k not in (*OF_ONE_RUN, *found)}
        settings.append({**given, **own})
    keys = sorted({key for one in settings for key in one})
    differ = [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]
    seeds = [(ckpt.get("train_args") or {}).get("seed") for ckpt in checkpoints]
    if len(set(seeds)) < len(seeds) and not differ:
        return "nothing but their weights"
    return ", ".join(differ)


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


def _ground_truth(o: EvalOptions) -> GroundTruth:
    """Read the best ground truth there is: annotations, the data set's VOC XML, or its labels."""
    from yolo_sos.evaluate.detections import read_data_set, xml_truth

    data = read_data_set(str(o.data), o.split) if o.model or not o.annotations else None
    if data and not o.annotations:
        return data.truth()
    path = Path(str(o.annotations))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_file():
        truth = read_coco_truth(path)
    else:
        if not o.data and (results := [p for p in o.detections or () if p.endswith(".json")]):
            raise ValueError(f"{results[0]}: COCO results give classes as numbers; data must name them in order")
        tree = _voc_tree(path)
        truth = xml_truth([tree / "Annotations" / f"{i}.xml" for i in read_image_set(tree, o.split)], o.data)
    if data and (differ := set(data.stems()) ^ set(truth.stems)):  # what is not run would count as missed
        raise ValueError(
            f"{o.data}, split '{o.split}', and {path} differ in {len(differ)} images, such as '{min(differ)}'"
        )
    return truth


def _voc_tree(path: Path) -> Path:
    """Return the VOC tree: the folder itself, or the only one in a VOCdevkit folder."""
    trees = [path] if (path / "Annotations").is_dir() else [p.parent for p in sorted(path.glob("*/Annotations"))]
    if len(trees) != 1:
        found = f"several: {', '.join(p.name for p in trees)}; name one" if trees else "no folder 'Annotations'"
        raise FileNotFoundError(f"{path}: to be a VOC tree or COCO annotations, but has {found}")
    return trees[0]


def _run_model(path: Path, truth: GroundTruth, o: EvalOptions) -> tuple[Detections, dict[str, Any]]:
    """Return a model's detections, and what identifies it, its settings and Ultralytics' own metrics."""
    from yolo_sos.evaluate.detections import class_names, detect

    settings = {k: getattr(o, k) for k in ("data", "split", "conf", "max_det", "imgsz", "batch", "device")}
    settings = {k: v for k, v in settings.items() if v is not None}  # or None would take the place of the checkpoint's
    validation = detect(path, truth, clip=o.clip, iou=o.nms_iou, **settings)
    details: dict[str, Any] = {
        "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "val_settings": validation.settings,
    }
    if list(validation.names) == class_names(str(o.data))[1]:  # val goes by number: other names would measure nothing
        own = validation.metrics
        details["ultralytics_val"] = {"mAP50": own["metrics/mAP50(B)"], "mAP50-95": own["metrics/mAP50-95(B)"]}
    return validation.found, details
