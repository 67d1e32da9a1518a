# yolo-sos, AGPL-3.0
"""Ground truth of Pascal VOC annotations, and detections in the devkit's text files.

The devkit reads one file per class, `comp4_det_{image set}_{class}.txt`, one detection per line:

    image-id score xmin ymin xmax ymax

1-based and inclusive, so that a detection that is narrower than a pixel has `xmax < xmin`, by less than 1. The devkit
prints six decimals; here numbers are written with as many as it takes to read the same number back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from yolo_sos.data.voc import NO_AREA, WORDS, Selection, VOCAnnotation
from yolo_sos.evaluate.boxes import Detections, GroundTruth, snap
from yolo_sos.files import read_text, write_text

_TO_CONTINUOUS = np.array([-1.0, -1.0, 0.0, 0.0])  # the first pixel covers [0, 1], see boxes.py


def voc_truth(
    annotations: Iterable[VOCAnnotation],
    classes: Sequence[str] | None = None,
    sizes: Callable[[str], tuple[float, float]] | None = None,
) -> GroundTruth:
    """Make a ground truth of VOC annotations.

    Boxes without area within their image are left out, as by the converter, and the remarks say so.

    Args:
        annotations (Iterable[VOCAnnotation]): One per image.
        classes (Sequence[str] | None): Names of the classes; by default those that occur, sorted.
        sizes (Callable[[str], tuple[float, float]] | None): Gives width and height in pixels of the image of an id;
            without it, a box to the right of its image, or below it, is not found out.

    Returns:
        (GroundTruth): Images sorted by id, objects in the order of their file.

    Raises:
        ValueError: If an image id comes twice, or a class is unknown; names file and object.
    """
    annotations = sorted(annotations, key=lambda a: a.image_id)
    selection, unbounded = Selection(), (math.inf, math.inf)
    found = [
        (number, a, i)
        for number, a in enumerate(annotations)
        for i in selection.of(a, sizes(a.image_id) if sizes else unbounded)
    ]
    objects = [a.objects[i] for _, a, i in found]
    names = sorted({o.name for o in objects}) if classes is None else list(classes)
    index = {name: k for k, name in enumerate(names)}
    for (_, a, i), o in zip(found, objects, strict=True):
        if o.name not in index:
            raise ValueError(f"{a.where(i)}: unknown class '{o.name}'; the classes are {', '.join(names)}")
    return GroundTruth.build(
        classes=names,
        images=[a.image_id for a in annotations],
        image=[number for number, _, _ in found],
        label=[index[o.name] for o in objects],
        boxes=snap(np.array([o.box for o in objects], np.float64).reshape(-1, 4) + _TO_CONTINUOUS),
        difficult=[o.difficult for o in objects],
        remarks=selection.notes(NO_AREA, WORDS),
        where=lambda i: found[i][1].where(found[i][2]),
    )


def read_voc_detections(folder: str | Path, truth: GroundTruth, image_set: str = "test") -> Detections:
    """Read the devkit's detection files, `comp*_det_{image_set}_{class}.txt`.

    `truth` gives classes and images. The detections come class by class, each class in the order of its file.

    Raises:
        FileNotFoundError: If a class has no file; one without detections is to be there and empty.
        ValueError: If a file's class is unknown or comes twice, or a line is wrong; names file and line.
    """
    folder = Path(folder)
    files: dict[str, Path] = {}
    for path in sorted(folder.glob(f"comp*_det_{image_set}_*.txt")):
        name = path.stem.split(f"_det_{image_set}_", maxsplit=1)[1]
        if name not in truth.classes:
            raise ValueError(f"{path}: unknown class '{name}'; the classes are {', '.join(truth.classes)}")
        if name in files:
            raise ValueError(f"{path}: class '{name}' already has {files[name].name}")
        files[name] = path
    for name in truth.classes:
        if name not in files:
            wanted = folder / f"comp4_det_{image_set}_{name}.txt"
            raise FileNotFoundError(f"{wanted}: no such file; a class without detections has an empty one")
    images = {name: i for i, name in enumerate(truth.images)}
    indices: list[tuple[int, int]] = []  # image and class
    numbers: list[list[float]] = []  # score and box
    places: list[str] = []
    for k, name in enumerate(truth.classes):
        for line, text in enumerate(read_text(files[name]).split("\n"), start=1):
            if not text.strip():
                continue
            place = f"{files[name]}, line {line}"
            fields = text.rsplit(maxsplit=5)  # an id may hold blanks
            try:
                image, *values = fields[0].strip(), *map(float, fields[1:])
                if len(values) != 5:
                    raise ValueError
            except ValueError:
                raise ValueError(f"{place}: '{text}' is not 'id score xmin ymin xmax ymax'") from None
            if image not in images:
                some = f"which have {len(images)} images, such as '{truth.images[0]}'"
                raise ValueError(f"{place}: image '{image}' is not in the annotations, {some}")
            indices.append((images[image], k))
            numbers.append(values)
            places.append(place)
    image_index, label = np.array(indices, np.int64).reshape(-1, 2).T
    score, boxes = np.split(np.array(numbers, np.float64).reshape(-1, 5), [1], axis=1)
    return Detections.build(truth, image_index, label, score[:, 0], snap(boxes + _TO_CONTINUOUS), places.__getitem__)


def write_voc_detections(
    folder: str | Path, truth: GroundTruth, detections: Detections, image_set: str = "test"
) -> list[Path]:
    """Write the devkit's files, `comp4_det_{image_set}_{class}.txt`, one per class, also for one without detections.

    The folder is made. The files are returned in the order of the classes.

    Raises:
        ValueError: If a class's name cannot be part of a file's name.
    """
    check_class_files(truth.classes)
    boxes = (detections.boxes - _TO_CONTINUOUS).tolist()
    lines: list[list[str]] = [[] for _ in truth.classes]
    columns = detections.image.tolist(), detections.label.tolist(), detections.score.tolist()
    for image, label, score, box in zip(*columns, boxes, strict=True):
        lines[label].append(" ".join([truth.images[image], repr(score), *map(repr, box)]) + "\n")
    files = [Path(folder, f"comp4_det_{image_set}_{name}.txt") for name in truth.classes]
    for path, content in zip(files, lines, strict=True):
        write_text(path, "".join(content))
    return files


def check_class_files(classes: Sequence[str]) -> None:
    """Raise a ``ValueError`` if a class cannot be part of a file's name, as the devkit's format asks for."""
    if bad := [name for name in classes if re.search(r"[/\\\0-\x1f]", name)]:
        raise ValueError(f"class '{bad[0]}' cannot be part of a file's name, which the devkit's format asks for")
