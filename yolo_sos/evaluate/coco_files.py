# yolo-sos, AGPL-3.0
"""Ground truth and detections as COCO's JSON files.

Values have the types that COCO's format asks for, with the meaning that pycocotools gives them, or are refused: numbers
are numbers (not strings, booleans or null), and ids are whole numbers or strings, of which 1 and "1" are two.

The images of a VOC set go by their ids. Ids of digits alone are written as numbers, as Ultralytics does, and a number
is found among ids with leading zeros too (12 among VOC's 000012).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from yolo_sos.evaluate.boxes import Detections, GroundTruth, box_area, first_duplicate, snap, xywh
from yolo_sos.evaluate.coco import coco_dataset
from yolo_sos.files import read_json, write_text

Where = Callable[[int], str]  # names the place of an entry, for errors


def read_coco_truth(path: str | Path) -> GroundTruth:
    """Read COCO annotations; `iscrowd` marks the difficult objects, and `ignore` is not read, as by pycocotools.

    Images and categories are sorted by id.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is none of COCO's, an id, a name or the file of an image comes twice, an id is unknown,
            or a value is wrong; names the file and the entry, counted from 0.
    """
    content = read_json(path)
    images = sorted(_entries(path, content, "images", "id"), key=_by_id)
    categories = sorted(_entries(path, content, "categories", "id", "name"), key=_by_id)
    objects = _entries(path, content, "annotations", "image_id", "category_id", "bbox")
    names = [_text(e, "name", f"{path}, category {e['id']!r}") for e in categories]
    files = [_text({"file_name": str(e["id"]), **e}, "file_name", f"{path}, image {e['id']!r}") for e in images]
    for what, values in (
        ("image id", [e["id"] for e in images]),
        ("image file", files),
        ("category id", [e["id"] for e in categories]),
        ("category name", names),
    ):
        if not values:
            raise ValueError(f"{path}: there is no {what}")
        if (twice := first_duplicate(map(str, values))) is not None:
            raise ValueError(f"{path}: {what} '{twice}' comes twice")

    def where(i: int) -> str:
        return f"{path}, annotations[{i}]"

    boxes = _boxes(objects, where)
    areas = _numbers([o.get("area", a) for o, a in zip(objects, box_area(boxes), strict=True)], "area", where)
    for i in np.flatnonzero(~(np.isfinite(areas) & (areas >= 0)))[:1]:
        raise ValueError(f"{where(i)}: area is {areas[i]:g}; it must be a finite number of at least 0")
    crowd = [o.get("iscrowd", 0) for o in objects]
    for i, value in enumerate(crowd):
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(f"{where(i)}: iscrowd is {value!r}; it must be 0 or 1")
    return GroundTruth.build(
        classes=names,
        images=[str(e["id"]) for e in images],
        image=_indices(objects, "image_id", {e["id"]: n for n, e in enumerate(images)}, where),
        label=_indices(objects, "category_id", {e["id"]: k for k, e in enumerate(categories)}, where),
        boxes=boxes,
        difficult=crowd,
        area=areas,
        category_ids=[e["id"] for e in categories],
        image_ids=[e["id"] for e in images],
        stems=[PurePosixPath(file).stem for file in files],
        where=where,
    )


def read_coco_detections(path: str | Path, truth: GroundTruth) -> Detections:
    """Read COCO results, a list of `image_id`, `category_id`, `bbox`, `score`, such as Ultralytics' predictions.json.

    Where an entry has a `file_name`, as Ultralytics' have, it decides which image is meant: Ultralytics makes the ids
    of file names, whatever ids the annotations give.

    The order is that of the file; `truth` gives the ids of images and categories.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no COCO results, an image or category is unknown or ambiguous, a score is not finite, or
            a box is wrong; names the file and the entry, counted from 0.
    """
    found = _entries(path, {"": read_json(path)}, "", "image_id", "category_id", "bbox", "score")

    def where(i: int) -> str:
        return f"{path}, entry [{i}]"

    return Detections.build(
        truth,
        image=_images(found, truth, where),
        label=_indices(found, "category_id", {c: k for k, c in enumerate(truth.category_ids)}, where),
        score=_numbers([d["score"] for d in found], "score", where),
        boxes=_boxes(found, where),
        where=where,
    )


def write_coco_truth(path: str | Path, truth: GroundTruth) -> None:
    """Write a ground truth as COCO annotations, under the ids that `write_coco_detections` uses."""
    write_text(path, json.dumps(coco_dataset(truth, _written_ids(truth), truth.category_ids)))


def write_coco_detections(path: str | Path, truth: GroundTruth, detections: Detections) -> None:
    """Write detections as COCO results, all digits kept; the ground truth gives the ids of images and categories."""
    ids = _written_ids(truth)
    columns = detections.image, detections.label, detections.score.tolist(), xywh(detections.boxes).tolist()
    entries = [
        json.dumps({"image_id": ids[image], "category_id": truth.category_ids[label], "bbox": box, "score": score})
        for image, label, score, box in zip(*columns, strict=True)
    ]
    write_text(path, "[\n" + ",\n".join(entries) + "\n]\n")  # one a line, so that entry [i] is on line i + 2


def _written_ids(truth: GroundTruth) -> list[int | str]:
    """Return the ids of the images as they go into JSON: as numbers if all names are and stay distinct."""
    if all(map(_is_number, truth.images)) and len({int(name) for name in truth.images}) == len(truth.images):
        return [int(name) for name in truth.images]
    return list(truth.image_ids)


def _is_number(name: object) -> bool:
    return isinstance(name, str) and name.isascii() and name.isdigit()


def _by_id(entry: dict) -> tuple[bool, Any]:
    """Sort numbers as numbers, before strings."""
    return isinstance(entry["id"], str), entry["id"]


def _id(value: Any, where: str) -> int | str:
    """Return an id as a number or a string; 1.0 is 1, as a key of a dictionary it is the same to pycocotools."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{where} is {value!r}; it must be a whole number or a string")
    return value


def _text(entry: dict, field: str, where: str) -> str:
    """Return a field that holds a name, which may be a number."""
    value = entry[field]
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{where}: {field} is {value!r}; it must be a string")
    return str(value)


def _entries(path: str | Path, content: Any, key: str, *required: str) -> list[dict]:
    """Return the list `content[key]`, of objects that have the required fields."""
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: " + (f"expected an object with a list '{key}'" if key else "expected a list"))
    for i, entry in enumerate(entries):
        where = f"{path}, {key or 'entry '}[{i}]:"
        missing = [f for f in required if f not in entry] if isinstance(entry, dict) else list(required)
        if missing:
            raise ValueError(f"{where} has no '{missing[0]}'")
        if "id" in required:
            entry["id"] = _id(entry["id"], f"{where} id")
    return entries


def _indices(entries: Sequence[dict], field: str, known: Mapping[int | str, int], where: Where) -> list[int]:
    """Look up a field of each entry among the known ids."""
    indices = [known.get(_id(e[field], f"{where(i)}: {field}"), -1) for i, e in enumerate(entries)]
    if -1 in indices:
        i = indices.index(-1)
        raise ValueError(f"{where(i)}: {field} {entries[i][field]!r} is not in the annotations, {_some(list(known))}")
    return indices


def _images(entries: Sequence[dict], truth: GroundTruth, where: Where) -> list[int]:
    """Find the image of each detection by its `file_name`, if it has one, and by its `image_id`."""
    by_id: dict[int | str, list[int]] = {k: [i] for i, k in enumerate(truth.image_ids)}
    by_file: dict[str, list[int]] = {}
    for i, (name, stem) in enumerate(zip(truth.image_ids, truth.stems, strict=True)):
        by_file.setdefault(stem, []).append(i)
        if _is_number(name):
            by_id.setdefault(int(name), []).append(i)
    images = []
    for n, entry in enumerate(entries):
        meant, what = by_id.get(_id(entry["image_id"], f"{where(n)}: image_id"), []), "image_id"
        if "file_name" in entry:
            named = by_file.get(PurePosixPath(_text(entry, "file_name", where(n))).stem, [])
            # Annotations that name no files have the number as stem: the id is all there is to go by.
            if named or not all(isinstance(k := truth.image_ids[i], int) and truth.stems[i] == str(k) for i in meant):
                meant, what = [i for i in meant if i in named] or named, "file_name"
        if len(meant) != 1:
            problem = f"may be any of {', '.join(truth.images[i] for i in meant)} of" if meant else "is not in"
            raise ValueError(f"{where(n)}: {what} {entry[what]!r} {problem} the annotations, {_some(truth.image_ids)}")
        images.append(meant[0])
    return images


def _some(ids: Sequence[object]) -> str:
    return f"which have {', '.join(map(str, ids[:5]))}{', ...' if len(ids) > 5 else ''}"


def _numbers(values: Sequence[Any], field: str, where: Where) -> np.ndarray:
    """Return JSON's numbers as an array."""
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where(i)}: {field} is {value!r}; it must be a number")
        if isinstance(value, int) and abs(value) > 1e300:
            raise ValueError(f"{where(i)}: {field} is a number of {len(str(value))} digits")
    return np.array(values, np.float64)


def _boxes(entries: Sequence[dict], where: Where) -> np.ndarray:
    """Return the boxes of entries with COCO's `bbox`, shape (N, 4)."""
    for i, entry in enumerate(entries):
        if not isinstance(entry["bbox"], list) or len(entry["bbox"]) != 4:
            raise ValueError(f"{where(i)}: bbox is {entry['bbox']!r}; it must be a list of x, y, width, height")
    flat = _numbers([v for e in entries for v in e["bbox"]], "bbox", lambda i: where(i // 4))
    corner, size = np.hsplit(snap(flat.reshape(-1, 4)), 2)
    return np.hstack([corner, corner + size])
