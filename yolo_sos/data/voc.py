# yolo-sos, AGPL-3.0
"""Pascal VOC trees: annotations (XML) and image sets.

A VOC tree holds ``Annotations/{id}.xml``, ``ImageSets/Main/{split}.txt`` and ``JPEGImages/{id}.jpg``. Such trees come
from strangers, so the XML is parsed without DTDs and entities, and ids may not lead out of the tree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from xml.etree.ElementTree import Element, ParseError, SubElement, indent, tostring

from defusedxml import ElementTree

from yolo_sos.files import write_text

T = TypeVar("T")


@dataclass(frozen=True)
class VOCObject:
    """One annotated object.

    Attributes:
        name (str): Class name.
        box (tuple[float, float, float, float]): xmin, ymin, xmax, ymax as in the file: pixels, 1-based, inclusive.
        difficult (bool): Marked as hard to recognise; evaluation neither rewards nor punishes finding it.
        truncated (bool): The object extends beyond the box.
    """

    name: str
    box: tuple[float, float, float, float]
    difficult: bool = False
    truncated: bool = False


@dataclass(frozen=True)
class VOCAnnotation:
    """The annotation of one image.

    Attributes:
        image_id (str): Stem of the XML file.
        filename (str): What the file calls its image; may be empty.
        width (int): Width of the image in pixels, 0 if the file does not say.
        height (int): Height of the image in pixels, 0 if the file does not say.
        objects (tuple[VOCObject, ...]): The objects, in the order of the file.
    """

    image_id: str
    filename: str
    width: int
    height: int
    objects: tuple[VOCObject, ...]


def read_annotation(path: str | Path) -> VOCAnnotation:
    """Read one Pascal VOC annotation.

    Args:
        path (str | Path): The XML file.

    Returns:
        (VOCAnnotation): Its content. Boxes are as in the file: neither clipped nor checked for having an area.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no VOC annotation; names the file and the field.
    """
    path = Path(path)
    try:
        root = ElementTree.parse(path, forbid_dtd=True).getroot()
    except (ParseError, ValueError, LookupError) as e:  # defusedxml's refusals are ValueErrors
        raise ValueError(f"{path}: not a readable XML file: {e}") from e
    if root.tag != "annotation":
        raise ValueError(f"{path}: a Pascal VOC annotation has the root <annotation>, this one has <{root.tag}>")
    fields = _Fields(path)
    return VOCAnnotation(
        image_id=path.stem,
        filename=fields.get(root, "filename", str, ""),
        width=fields.get(root, "size/width", _pixels, 0),
        height=fields.get(root, "size/height", _pixels, 0),
        # Direct children only: a person's <part>s have a name and a bndbox of their own.
        objects=tuple(_read_object(fields, o, i) for i, o in enumerate(root.findall("object"), start=1)),
    )


def write_annotation(path: str | Path, annotation: VOCAnnotation) -> None:
    """Write a Pascal VOC annotation, the inverse of `read_annotation`.

    Args:
        path (str | Path): The XML file; its stem is what the file will be read as, whatever `image_id` says.
        annotation (VOCAnnotation): What to write.
    """
    root = Element("annotation")
    SubElement(root, "filename").text = annotation.filename
    size = SubElement(root, "size")
    for tag, value in ("width", annotation.width), ("height", annotation.height), ("depth", 3):
        SubElement(size, tag).text = str(value)
    for o in annotation.objects:
        element = SubElement(root, "object")
        for tag, text in ("name", o.name), ("truncated", int(o.truncated)), ("difficult", int(o.difficult)):
            SubElement(element, tag).text = str(text)
        box = SubElement(element, "bndbox")
        for tag, coordinate in zip(("xmin", "ymin", "xmax", "ymax"), o.box, strict=True):
            SubElement(box, tag).text = str(coordinate)
    indent(root)
    write_text(path, tostring(root, encoding="unicode") + "\n")


def read_image_set(root: str | Path, split: str) -> list[str]:
    """Read the image ids of one split.

    Args:
        root (str | Path): The VOC tree.
        split (str): Name of the image set, such as ``trainval``. A class's set (``cat_train``, with a column -1, 0 or
            1) gives all of its images.

    Returns:
        (list[str]): Ids in the order of ``ImageSets/Main/{split}.txt``.

    Raises:
        FileNotFoundError: If the tree has no such image set; lists those it has.
        ValueError: If the set is empty, lists an id twice, or an id is not a plain file name.
    """
    path = Path(root) / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        found = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) or "none"
        raise FileNotFoundError(f"{path}: no such image set; {path.parent} has: {found}")
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    ids = [re.sub(r"\s+-?[01]$", "", line.strip()) for line in lines if line.strip()]
    if not ids:
        raise ValueError(f"{path}: lists no image")
    seen: set[str] = set()
    for image_id in ids:
        if re.search(r"[/\\:]", image_id) or image_id in {".", ".."}:
            raise ValueError(f"{path}: '{image_id}' is no image id; an id is a file name without folder and suffix")
        if image_id in seen:
            raise ValueError(f"{path}: lists '{image_id}' twice")
        seen.add(image_id)
    return ids


def annotation_paths(data: Mapping[str, Any], split: str) -> dict[str, Path]:
    """Find the XML annotations of a split of a converted data set (see `yolo_sos.data.convert`).

    Args:
        data (Mapping[str, Any]): The data set as Ultralytics' ``check_det_dataset`` returns it. Its key ``voc`` names
            the folder that stands beside ``images`` and holds the annotations.
        split (str): ``train``, ``val`` or ``test``.

    Returns:
        (dict[str, Path]): Image id (stem of the image's file) to XML file, sorted by id.

    Raises:
        ValueError: If the data set carries no VOC annotations or no such split, or if two folders of the split hold
            the same id.
        FileNotFoundError: If a folder of annotations is missing or empty.
    """
    source = data.get("yaml_file", "data set")
    if not data.get("voc"):
        raise ValueError(f"{source}: no key 'voc', so it has no Pascal VOC annotations; make it with convert_voc")
    if not data.get(split):
        raise ValueError(f"{source}: no key '{split}', so it has no such split")
    found: dict[str, Path] = {}
    for images in [data[split]] if isinstance(data[split], str | Path) else data[split]:
        parts = Path(images).parts
        if "images" not in parts:
            raise ValueError(f"{source}: '{split}: {images}' has no folder 'images' that 'voc' could stand beside")
        last = len(parts) - 1 - parts[::-1].index("images")  # the host replaces the last one by labels, likewise
        folder = Path(*parts[:last], data["voc"], *parts[last + 1 :])
        paths = sorted(folder.glob("*.xml"))
        if not paths:
            raise FileNotFoundError(f"{folder}: no annotations (*.xml) for '{split}: {images}'")
        for path in paths:
            if path.stem in found:
                raise ValueError(f"{source}: '{split}' has '{path.stem}' twice: {found[path.stem]} and {path}")
            found[path.stem] = path
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class _Fields:
    """Reads typed fields of one file, so that every error names the file and the field."""

    path: Path

    def get(self, parent: Element, tag: str, convert: Callable[[str], T], default: T | None = None, of: str = "") -> T:
        text = (parent.findtext(tag) or "").strip()
        where = f"{self.path}: {of and of + ': '}<{tag}>"
        if not text:
            if default is None:
                raise ValueError(f"{where} is missing or empty")
            return default
        try:
            return convert(text)
        except (ValueError, OverflowError) as e:
            raise ValueError(f"{where} is '{text}': {e}") from e


def _read_object(fields: _Fields, element: Element, number: int) -> VOCObject:
    name = fields.get(element, "name", str, of=f"object {number}")
    of = f"object {number} ({name})"
    xmin, ymin, xmax, ymax = (
        fields.get(element, f"bndbox/{tag}", _coordinate, of=of) for tag in ("xmin", "ymin", "xmax", "ymax")
    )
    return VOCObject(
        name=name,
        box=(xmin, ymin, xmax, ymax),
        difficult=fields.get(element, "difficult", _flag, False, of=of),
        truncated=fields.get(element, "truncated", _flag, False, of=of),
    )


def _coordinate(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a coordinate is a finite number of pixels")
    return value


def _pixels(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("a size is a number of pixels, or 0 if unknown")
    return value


def _flag(text: str) -> bool:
    if text not in {"0", "1"}:
        raise ValueError("a flag is 0 or 1")
    return text == "1"
