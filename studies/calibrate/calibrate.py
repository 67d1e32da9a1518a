#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""Calibrations of detectors, compared on the same detections: errors, mAP and thresholds on the test split.

    python studies/calibrate/calibrate.py bccd seed0.pt seed1.pt seed2.pt --data bccd.yaml --imgsz 192

runs each model once on each split, keeps its matched detections in --cache, and writes studies/calibrate/bccd.json and
prints its table. Each arm is fitted on the val split or on the training images, and judged on the test split:

- ``none``: the scores as they are.
- ``temperature``: z → a·z, the map of least negative log-likelihood without a shift.
- ``shared``: z → a·z + b for all classes, what ``yolo-sos calibrate`` does.
- ``per class``: a map for each class with enough hits and misses, ``per_class=true``: Platt's scaling of each class.
- ``shared, soft``: as ``shared``, for the mean of the hits over IoU 0.5 to 0.95, ``iou=soft``.
- ``from 0.001``, ``from 0.1``: as ``shared``, fitted on detections of at least that score instead of 0.01.
- ``isotonic``: scikit-learn's isotonic regression of hits on the score, a bound: it does not fold into a layer.

Errors are those of ``yolo_sos.evaluate.calibration``, all at IoU 0.5, of the detections that scored at least 0.01
before the map; ECE once more of those of at least 0.1, which are few and hidden among the others. mAP50-95 is the mean
of the devkit's AP over ten thresholds, of detections that score at least 0.001 after the map, as Ultralytics' val has
it. What a map lifts above 0.001 is not among them: only the written file shows it, so --check runs ``yolo-sos
calibrate`` for the first model, too, and compares.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from sklearn.isotonic import IsotonicRegression

from yolo_sos.builtin import resolve_data
from yolo_sos.core import fit_logistic
from yolo_sos.evaluate.boxes import GroundTruth
from yolo_sos.evaluate.calibration import SOFT_IOUS, reliability, samples_of, thresholds
from yolo_sos.evaluate.voc import Matches, mean_ap, voc_result
from yolo_sos.files import as_json, write_text
from yolo_sos.markdown import markdown_table, mean_std
from yolo_sos.versions import versions
from yolo_sos.yolo import Checkpoint, calibrate_checkpoint
from yolo_sos.yolo.evidence import logit
from yolo_sos.yolo.recording import matches_of, read_truth, record

FOLDER = Path(__file__).parent
COLUMNS = ("ECE", "ECE from 0.1", "LaECE", "NLL", "Brier", "mAP50-95", "best-F1 threshold", "spread", "F1")
ARMS = ("temperature", "shared", "per class", "shared, soft", "from 0.001", "from 0.1", "isotonic")
LEAST = 0.001  # Ultralytics' least confidence in val
Map = Callable[[np.ndarray, np.ndarray], np.ndarray]  # scores and labels → scores


def detections(model: Path, data: str, imgsz: int, split: str, device: str | None) -> dict[str, np.ndarray]:
    """Run a model on a split; return its detections and the objects as plain arrays."""
    checkpoint = Checkpoint(model)
    args = {"task": checkpoint.task, "data": resolve_data(data), "imgsz": imgsz, "batch": 16, "device": device}
    args |= {"split": split, "rect": True, "workers": 0, "plots": False, "verbose": False, "mode": "val"}
    args["single_cls"] = checkpoint.args["single_cls"]
    truth = read_truth(args, split)
    found = matches_of(truth, record(checkpoint.validator, args, checkpoint.model).records[0], checkpoint.task)
    columns = {k: getattr(found, k) for k in ("image", "label", "score", "owner", "overlap")}
    objects = {f"t_{k}": getattr(truth, k) for k in ("image", "label", "difficult", "boxes")}
    return {**columns, **objects, "classes": np.array(truth.classes), "images": np.array(truth.images)}


def cached(file: Path, make: Callable[[], dict[str, np.ndarray]]) -> Matches:
    """Return matched detections from a file, which is made first if it is not there."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, **make())
    with np.load(file) as z:
        objects = [z[f"t_{k}"] for k in ("image", "label", "boxes", "difficult")]
        truth = GroundTruth.build(z["classes"].tolist(), z["images"].tolist(), *objects)
        return Matches(truth, *(z[k] for k in ("image", "label", "score", "owner", "overlap")))


def temperature(z: np.ndarray, t: np.ndarray) -> float:
    """Return the scale of least negative log-likelihood, by Newton's method on one number."""
    a = 1.0
    for _ in range(50):
        p = 1 / (1 + np.exp(-a * z))
        step = np.sum((p - t) * z) / np.sum(p * (1 - p) * z * z)
        a -= step
        if abs(step) < 1e-10:
            break
    return float(a)


def fitted(arm: str, on: Matches) -> tuple[Map, dict[str, Any]]:
    """Fit an arm on detections; return its map, and its parameters where it has few."""
    classes = len(on.truth.classes)
    least = np.full(classes, float(arm.removeprefix("from "))) if "from" in arm else None
    s = samples_of(on, "soft" if "soft" in arm else 0.5, least)
    if arm == "none":
        return lambda score, label: score, {}
    if arm == "isotonic":
        steps = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(s.score, s.target)
        return lambda score, label: steps.predict(score), {"steps": len(steps.X_thresholds_)}
    if arm == "temperature":
        a = temperature(logit(s.score).numpy(), s.target)
        return lambda score, label: torch.sigmoid(a * logit(score)).numpy(), {"a": a}
    targets, labels = torch.from_numpy(s.target), torch.from_numpy(s.label)
    mapping = fit_logistic(logit(s.score), targets, labels, classes, arm == "per class")
    own = sum(status == "own" for status in mapping.status)
    about: dict[str, Any] = {"classes with a map of their own": own}
    if arm != "per class":
        about = {"a": float(mapping.scale[0]), "b": float(mapping.shift[0])}
        about |= {"a_error": float(mapping.scale_error[0]), "b_error": float(mapping.shift_error[0])}
    return lambda score, label: mapping(logit(score), torch.from_numpy(label)).sigmoid().numpy(), about


def judge(test: Matches, arm: Map) -> dict[str, float]:
    """Return the figures of an arm."""
    samples, positives = samples_of(test), test.truth.positives()
    after = samples.scored(arm(samples.score, samples.label))
    errors = reliability(after, positives).errors()
    errors["ECE from 0.1"] = reliability(after[samples.score >= 0.1], positives).ece
    mapped = replace(test, score=arm(test.score, test.label))
    mapped = mapped[mapped.score >= LEAST]
    at = thresholds(mapped, 0.9)
    best = [t["best_f1"] for t in at if t["f1"] > 0]  # of the classes that are found at all
    ap = fmean(mean_ap(voc_result(mapped, iou).ap) for iou in SOFT_IOUS)
    f1 = fmean(np.nan_to_num(t["f1"]) for t, n in zip(at, positives, strict=True) if n)
    return {**errors, "mAP50-95": ap, "best-F1 threshold": fmean(best), "spread": float(np.std(best)), "F1": f1}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return mean ± standard deviation over models, a row for each arm and split that it was fitted on."""
    rows = []
    for key in dict.fromkeys((r["fitted_on"], r["arm"]) for r in runs):
        of = [r for r in runs if (r["fitted_on"], r["arm"]) == key]
        rows.append([*key, *(mean_std([r[c] for r in of], ".4f") for c in COLUMNS)])
    return markdown_table([["fitted on", "arm", *COLUMNS], *rows], texts=2)


def check(model: Path, data: str, imgsz: int, device: str | None) -> dict[str, Any]:
    """Return what ``yolo-sos calibrate`` says of the file that it writes."""
    with TemporaryDirectory() as folder:
        report = calibrate_checkpoint(Path(shutil.copy(model, folder)), data, imgsz=imgsz, device=device)
    (branch,) = report.branches
    figures = {k: list(v) for k, v in branch.accuracies().items()}
    return {"before": branch.before.errors(), "after": branch.after.errors(), **figures, "written": bool(report.output)}


def main() -> None:
    """Run the command."""
    text, raw = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=raw)
    parser.add_argument("name", help="of the record")
    parser.add_argument("models", nargs="*", type=Path, help="checkpoints of the seeds; may be left out with a cache")
    parser.add_argument("--data", required=True)
    parser.add_argument("--imgsz", type=int, required=True)
    parser.add_argument("--device", default=None)
    parser.add_argument("--seeds", type=int, default=3, help="models in the cache, where none are given")
    parser.add_argument("--cache", type=Path, default=Path("runs/calibrate"), help="folder of detections")
    parser.add_argument("--check", action="store_true", help="write and judge the file of the first model, too")
    args = parser.parse_args()
    models: list[Path | None] = list(args.models) or [None] * args.seeds
    runs = []
    for seed, model in enumerate(models):

        def seen(split: str, model: Path | None = model, seed: int = seed) -> Matches:
            def make() -> dict[str, np.ndarray]:
                if model is None:
                    parser.error(f"there is no {args.cache / f'{args.name}-{seed}-{split}.npz'}, and no model to run")
                return detections(model, args.data, args.imgsz, split, args.device)

            return cached(args.cache / f"{args.name}-{seed}-{split}.npz", make)

        test = seen("test")
        for split, arms in (("", ("none",)), ("val", ARMS), ("train", ARMS)):
            on = seen(split) if split else test
            for arm in arms:
                mapping, about = fitted(arm, on)
                run = {"seed": seed, "fitted_on": split or "–", "arm": arm, "samples": len(samples_of(on))}
                runs.append({**run, **judge(test, mapping), "map": about})
    record_ = {"data": args.data if "/" not in args.data else args.name, "imgsz": args.imgsz, "versions": versions()}
    record_ |= {"test_images": len(test.truth.images), "runs": runs}
    if args.check and args.models:
        record_["file"] = check(args.models[0], args.data, args.imgsz, args.device)
    write_text(FOLDER / f"{args.name}.json", as_json(record_))
    print(table(runs))
    if "file" in record_:
        print(json.dumps(record_["file"], indent=1))


if __name__ == "__main__":
    main()
