# yolo-sos, AGPL-3.0
"""Ground truth and detections as COCO's JSON files.

An image goes by its id as the annotations have it. Ids of digits alone are written as numbers, as Ultralytics does, and
a number is found among ids with leading zeros too (12 among VOC's 000012).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from yolo_sos.evaluate.boxes import Detections, GroundTruth, box_area, first_duplicate, snap
from yolo_sos.evaluate.coco import coco_dataset
from yolo_sos.files import read_json, write_text


def read_coco_truth(path: str | Path) -> GroundTruth:
    """Read COCO annotations; `iscrowd` marks the difficult objects.

    Args:
        path (str | Path): The JSON file, with `images`, `categories` and `annotations`.

    Returns:
        (GroundTruth): Images and categories sorted by id.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is none of COCO's, an id or name comes twice, an id is unknown, or a box is wrong; names
            the file and the entry, counted from 0.
    """
    content = read_json(path)
    images = sorted(_entries(path, content, "images", "id"), key=_by_id)
    categories = sorted(_entries(path, content, "categories", "id", "name"), key=_by_id)
    objects = _entries(path, content, "annotations", "image_id", "category_id", "bbox")
    for what, names in (
        ("image id", [e["id"] for e in images]),
        ("category id", [e["id"] for e in categories]),
        ("category name", [e["name"] for e in categories]),
    ):
        if not names:
            raise ValueError(f"{path}: there is no {what}")
        if (twice := first_duplicate(map(str, names))) is not None:
            raise ValueError(f"{path}: {what} '{twice}' comes twice")

    def where(i: int) -> str:
        return f"{path}, annotations[{i}]"

    boxes = _boxes(objects, where)
    return GroundTruth.build(
        classes=[str(e["name"]) for e in categories],
        images=[str(e["id"]) for e in images],
        image=_indices(objects, "image_id", {str(e["id"]): n for n, e in enumerate(images)}, where),
        label=_indices(objects, "category_id", {str(e["id"]): k for k, e in enumerate(categories)}, where),
        boxes=boxes,
        difficult=[bool(o.get("iscrowd", 0)) for o in objects],
        area=_numbers(
            [o.get("area", a) for o, a in zip(objects, box_area(boxes).tolist(), strict=True)], "area", where
        ),
        category_ids=[e["id"] for e in categories],
        stems=[PurePath(str(e.get("file_name", e["id"]))).stem for e in images],
        where=where,
    )


def read_coco_detections(path: str | Path, truth: GroundTruth) -> Detections:
    """Read COCO results, a list of `image_id`, `category_id`, `bbox`, `score`, such as Ultralytics' predictions.json.

    Args:
        path (str | Path): The JSON file.
        truth (GroundTruth): Gives images and category ids.

    Returns:
        (Detections): In the order of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no COCO results, an image or category is unknown, a score is not finite, or a box is
            wrong; names the file and the entry, counted from 0.
    """
    found = _entries(path, {"": read_json(path)}, "", "image_id", "category_id", "bbox", "score")

    def where(i: int) -> str:
        return f"{path}, entry [{i}]"

    numbers = {str(int(name)): i for i, name in enumerate(truth.images) if _is_number(name)}
    return Detections.build(
        truth,
        image=_indices(found, "image_id", {**numbers, **{name: i for i, name in enumerate(truth.images)}}, where),
        label=_indices(found, "category_id", {str(c): k for k, c in enumerate(truth.category_ids)}, where),
        score=_numbers([d["score"] for d in found], "score", where),
        boxes=_boxes(found, where),
        where=where,
    )


def write_coco_truth(path: str | Path, truth: GroundTruth) -> None:
    """Write a ground truth as COCO annotations, under the ids that `write_coco_detections` uses."""
    dataset, ids = coco_dataset(truth), _image_ids(truth)
    for image, identity in zip(dataset["images"], ids, strict=True):
        image["id"] = identity
    for category, number in zip(dataset["categories"], truth.category_ids, strict=True):
        category["id"] = number
    for o, image, label in zip(dataset["annotations"], truth.image, truth.label, strict=True):
        o["image_id"], o["category_id"] = ids[image], truth.category_ids[label]
    write_text(path, json.dumps(dataset))


def write_coco_detections(path: str | Path, truth: GroundTruth, detections: Detections) -> None:
    """Write detections as COCO results, all digits kept.

    Args:
        path (str | Path): The JSON file.
        truth (GroundTruth): Gives image and category ids.
        detections (Detections): What to write.
    """
    ids = _image_ids(truth)
    corner, size = detections.boxes[:, :2], detections.boxes[:, 2:] - detections.boxes[:, :2]
    columns = detections.image, detections.label, detections.score.tolist(), np.hstack([corner, size]).tolist()
    entries = [
        json.dumps({"image_id": ids[image], "category_id": truth.category_ids[label], "bbox": box, "score": score})
        for image, label, score, box in zip(*columns, strict=True)
    ]
    write_text(path, "[\n" + ",\n".join(entries) + "\n]\n")  # one a line, so that entry [i] is on line i + 2


def _image_ids(truth: GroundTruth) -> list[Any]:
    """Return the ids of the images as they go into JSON: numbers, if all are and stay distinct, else strings."""
    if all(map(_is_number, truth.images)) and len({int(name) for name in truth.images}) == len(truth.images):
        return [int(name) for name in truth.images]
    return list(truth.images)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _by_id(entry: dict) -> tuple[bool, Any]:
    """Sort numbers as numbers, before strings."""
    return isinstance(entry["id"], str), entry["id"]


def _entries(path: str | Path, content: Any, key: str, *required: str) -> list[dict]:
    """Return the list `content[key]`, of objects that have the required fields."""
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: " + (f"expected an object with a list '{key}'" if key else "expected a list"))
    for i, entry in enumerate(entries):
        missing = [f for f in required if f not in entry] if isinstance(entry, dict) else list(required)
        if missing:
            raise ValueError(f"{path}, {key or 'entry '}[{i}]: has no '{missing[0]}'")
        if not isinstance(entry.get("id", 0), (int, str)):
            raise ValueError(f"{path}, {key or 'entry '}[{i}]: id is {entry['id']!r}; it must be a number or a string")
    return entries


def _indices(entries: list[dict], field: str, known: dict[str, int], where: Callable[[int], str]) -> list[int]:
    """Look up a field of each entry among the known ids."""
    indices = [known.get(str(e[field]), -1) for e in entries]
    if -1 in indices:
        i = indices.index(-1)
        some = ", ".join(list(known)[:5]) + (", ..." if len(known) > 5 else "")
        raise ValueError(f"{where(i)}: {field} {entries[i][field]!r} is not in the annotations, which have {some}")
    return indices


def _numbers(values: Iterable[Any], field: str, where: Callable[[int], str]) -> np.ndarray:
    """Return JSON's numbers as an array."""
    values = list(values)
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where(i)}: {field} is {value!r}; it must be a number")
    return np.array(values, np.float64)


def _boxes(entries: list[dict], where: Callable[[int], str]) -> np.ndarray:
    """Return the boxes of entries with COCO's `bbox`, shape (N, 4)."""
    for i, entry in enumerate(entries):
        if not isinstance(entry["bbox"], list) or len(entry["bbox"]) != 4:
            raise ValueError(f"{where(i)}: bbox is {entry['bbox']!r}; it must be a list of x, y, width, height")
    flat = _numbers([v for e in entries for v in e["bbox"]], "bbox", lambda i: where(i // 4))
    corner, size = np.hsplit(snap(flat.reshape(-1, 4)), 2)
    return np.hstack([corner, corner + size])
