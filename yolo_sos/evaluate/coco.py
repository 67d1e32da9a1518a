# yolo-sos, AGPL-3.0
"""The COCO metric, computed by pycocotools or by a faster package that gives the same numbers.

What a VOC data set needs to know about it: difficult objects become `iscrowd=1` (pycocotools overwrites `ignore`), so
any number of detections may fall on one, and their overlap is measured against the detection's own area; only the 100
best detections of an image and class take part; ties in score keep the order of the images, then of the detections.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from yolo_sos.evaluate.boxes import Detections, GroundTruth, xywh

BACKENDS = {  # name: where its data set and its evaluator are
    "pycocotools": (("pycocotools.coco", "COCO"), ("pycocotools.cocoeval", "COCOeval")),  # the reference
    "faster-coco-eval": (("faster_coco_eval", "COCO"), ("faster_coco_eval", "COCOeval_faster")),  # C++
    "hotcoco": (("hotcoco", "COCO"), ("hotcoco", "COCOeval")),  # Rust
}
_AREAS = {"": 0, "small": 1, "medium": 2, "large": 3}  # below 32², 32² to 96², and from 96² square pixels
_MOST = {1: 0, 10: 1, 100: 2}  # detections per image and class


@dataclass(frozen=True, eq=False)
class COCOResult:
    """Average precision by COCO's rules.

    Attributes:
        ap (np.ndarray): Mean over the IoU thresholds 0.5, 0.55, ..., 0.95, shape (K,); NaN without positives.
        ap50 (np.ndarray): At an IoU of 0.5, shape (K,); NaN without positives.
        stats (dict[str, float]): COCO's twelve numbers, under the names that `pycocotools` prints; NaN if undefined.
    """

    ap: np.ndarray
    ap50: np.ndarray
    stats: dict[str, float]


def coco_ap(truth: GroundTruth, detections: Detections, backend: str = "pycocotools") -> COCOResult:
    """Evaluate detections by COCO's rules.

    Difficult objects count as crowd. The backend is one of `BACKENDS`; all but pycocotools are optional packages.

    Raises:
        ValueError: If there is no such backend.
        ModuleNotFoundError: If it is not installed.
    """
    evaluator = coco_evaluator(truth, detections, backend)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
        evaluator.accumulate()
    precision = np.asarray(evaluator.eval["precision"])  # (10 thresholds, 101 recalls, K, 4 areas, 3 maxima), or -1
    recall = np.asarray(evaluator.eval["recall"])  # (10 thresholds, K, 4 areas, 3 maxima), or -1
    return COCOResult(
        ap=np.array([_mean(of_class) for of_class in np.moveaxis(precision[:, :, :, 0, 2], 2, 0)]),
        ap50=np.array([_mean(of_class) for of_class in precision[0, :, :, 0, 2].T]),
        stats={
            "AP": _mean(precision[:, :, :, 0, 2]),
            "AP50": _mean(precision[0, :, :, 0, 2]),
            "AP75": _mean(precision[5, :, :, 0, 2]),
            **{f"AP{name}": _mean(precision[:, :, :, a, 2]) for name, a in _AREAS.items() if name},
            **{f"AR{most}": _mean(recall[:, :, 0, m]) for most, m in _MOST.items()},
            **{f"AR{name}": _mean(recall[:, :, a, 2]) for name, a in _AREAS.items() if name},
        },
    )


def coco_evaluator(truth: GroundTruth, detections: Detections, backend: str = "pycocotools") -> Any:
    """Return a backend's `COCOeval` with ground truth and detections, before `evaluate()`; arguments as `coco_ap`."""
    coco, evaluator = load_backend(backend)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports every step
        objects = coco()
        objects.dataset = coco_dataset(truth)
        objects.createIndex()
        if len(detections):
            image, label = detections.image + 1, detections.label + 1
            found = objects.loadRes(np.column_stack([image, xywh(detections.boxes), detections.score, label]))
        else:  # pycocotools' loadRes looks at the first detection
            found = coco()
            found.dataset = {**coco_dataset(truth), "annotations": []}
            found.createIndex()
        return evaluator(objects, found, "bbox")


def load_backend(backend: str) -> tuple[Any, Any]:
    """Return the classes `COCO` and `COCOeval` of a backend.

    Raises:
        ValueError: If there is no such backend.
        ModuleNotFoundError: If it is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown COCO backend '{backend}'; there are {', '.join(BACKENDS)}")
    try:
        data_set, evaluator = (getattr(importlib.import_module(module), name) for module, name in BACKENDS[backend])
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(f"the COCO backend '{backend}' is not installed: pip install {backend}") from e
    return data_set, evaluator


def coco_dataset(
    truth: GroundTruth, image_ids: Sequence[int | str] | None = None, category_ids: Sequence[int | str] | None = None
) -> dict[str, Any]:
    """Return the ground truth as a COCO data set, with the ids of images and categories that are given, or 1, 2, ..."""
    images = range(1, len(truth.images) + 1) if image_ids is None else image_ids
    categories = range(1, len(truth.classes) + 1) if category_ids is None else category_ids
    columns = (
        [images[i] for i in truth.image],
        [categories[k] for k in truth.label],
        xywh(truth.boxes).tolist(),
        truth.area.tolist(),
        truth.difficult.astype(int).tolist(),
    )
    return {
        "info": {},
        "images": [{"id": i, "file_name": name} for i, name in zip(images, truth.stems, strict=True)],
        "categories": [{"id": k, "name": name} for k, name in zip(categories, truth.classes, strict=True)],
        "annotations": [  # an id of 0 would read as "not matched"
            {"id": i, "image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": crowd}
            for i, (image, label, box, area, crowd) in enumerate(zip(*columns, strict=True), start=1)
        ],
    }


def _mean(values: np.ndarray) -> float:
    """Average what is defined, as pycocotools' `summarize` does: -1 marks what has no positives."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else float("nan")
