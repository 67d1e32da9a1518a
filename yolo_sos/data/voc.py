# yolo-sos, AGPL-3.0
"""Pascal VOC trees: annotations (XML) and image sets.

A VOC tree holds ``Annotations/{id}.xml``, ``ImageSets/Main/{split}.txt`` and ``JPEGImages/{id}.jpg``. The files may
come from anyone, so the XML is parsed without DTDs and entities, and ids may not lead out of the tree. The converter
and the evaluator read annotations with `read_annotation` and select the objects with `Selection`, so both see the same
objects.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from xml.etree.ElementTree import Element, ParseError, SubElement, indent, tostring

from defusedxml import ElementTree

from yolo_sos.files import read_text, write_text

T = TypeVar("T")
Box = tuple[float, float, float, float]
FLAGS = {"0": False, "false": False, "no": False, "unspecified": False, "1": True, "true": True, "yes": True}
NO_AREA, TWICE, WORDS = "no area", "twice", "words"  # what a `Selection` notes
NOTES = {
    NO_AREA: "Boxes without area within their image are left out",
    TWICE: "Objects repeat the class and box of another one, which Ultralytics counts once",
    WORDS: "Flags 'difficult' are words, of which true and yes count as 1, false, no and Unspecified as 0",
}


@dataclass(frozen=True)
class VOCObject:
    """One annotated object.

    Attributes:
        name (str): Class name.
        box (tuple[float, float, float, float]): xmin, ymin, xmax, ymax as in the file: pixels, 1-based, inclusive.
        difficult (bool): Marked as hard to recognise; evaluation neither rewards nor punishes finding it.
    """

    name: str
    box: Box
    difficult: bool = False


@dataclass(frozen=True)
class VOCAnnotation:
    """The annotation of one image.

    Attributes:
        image_id (str): Stem of the XML file.
        filename (str): What the file calls its image; may be empty.
        width (int): Width of the image in pixels, 0 if the file does not say.
        height (int): Height of the image in pixels, 0 if the file does not say.
        objects (tuple[VOCObject, ...]): The objects, in the order of the file.
        path (Path): The XML file; by default named after `image_id`.
        words (tuple[str, ...]): The `difficult` flags that are written as words, with their objects.
    """

    image_id: str
    filename: str
    width: int
    height: int
    objects: tuple[VOCObject, ...]
    path: Path = field(default=Path(), compare=False)
    words: tuple[str, ...] = ()

    def where(self, index: int) -> str:
        """Name the place of an object, for errors and notes."""
        path = self.path if self.path.name else f"{self.image_id}.xml"
        return f"{path}, object {index + 1} ({self.objects[index].name})"


class Selection:
    """Selects the objects that a set of annotations asks for, and notes what is odd, once for the whole set.

    Attributes:
        noted (dict[str, list[str]]): The places of boxes without area, of repeated objects, and of flags in words.
    """

    def __init__(self) -> None:
        """Begin with nothing noted."""
        self.noted: defaultdict[str, list[str]] = defaultdict(list)

    def of(self, annotation: VOCAnnotation, size: tuple[float, float] = (math.inf, math.inf)) -> dict[int, Box]:
        """Return the objects whose box has an area within the image, of that width and height in pixels, if known.

        Returns:
            (dict[int, Box]): Index into ``annotation.objects`` to the box that `clipped_box` gives.
        """
        self.noted[WORDS] += [f"{annotation.path}, {word}" for word in annotation.words]
        selected, seen = {}, set()
        for i, o in enumerate(annotation.objects):
            if (clipped := clipped_box(o.box, *size)) is None:
                self.noted[NO_AREA].append(f"{annotation.where(i)} {o.box}")
                continue
            if (o.name, o.box) in seen:
                self.noted[TWICE].append(annotation.where(i))
            seen.add((o.name, o.box))
            selected[i] = clipped
        return selected

    def notes(self, *kinds: str) -> list[str]:
        """Return one sentence for each of the kinds of oddity that was found, with the count and the first places."""
        return [
            f"{NOTES[kind]} ({len(places)}): {'; '.join(places[:3])}{'; ...' if len(places) > 3 else '.'}"
            for kind in kinds or NOTES
            if (places := self.noted[kind])
        ]


def clipped_box(box: Box, width: float = math.inf, height: float = math.inf) -> Box | None:
    """Return the part of a VOC box within the image as x1, y1, x2, y2 in continuous pixels that count from 0.

    Args:
        box (tuple[float, float, float, float]): xmin, ymin, xmax, ymax: pixels, 1-based, inclusive.
        width (float): Width of the image in pixels.
        height (float): Height of the image in pixels.

    Returns:
        (tuple[float, float, float, float] | None): None if the box has no area within the image. A box whose corners
            share a row or a column has none: it is an annotator's slip, although the convention gives it one pixel.
    """
    xmin, ymin, xmax, ymax = box
    left, right = max(xmin - 1, 0), min(xmax, width)
    top, bottom = max(ymin - 1, 0), min(ymax, height)
    degenerate = xmin >= xmax or ymin >= ymax or left >= right or top >= bottom
    return None if degenerate else (left, top, right, bottom)


def read_annotation(path: str | Path) -> VOCAnnotation:
    """Read one Pascal VOC annotation; upper and lower case in tags, and XML namespaces, make no difference.

    Boxes are as in the file: neither clipped nor checked for having an area.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no VOC annotation; names the file and the field.
    """
    path = Path(path)
    try:
        root = ElementTree.parse(path, forbid_dtd=True).getroot()
    except (ParseError, ValueError, LookupError) as e:  # defusedxml's refusals are ValueErrors
        raise ValueError(f"{path}: not a readable XML file: {e}") from e
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2].lower()
    if root.tag != "annotation":
        raise ValueError(f"{path}: a Pascal VOC annotation has the root <annotation>, this one has <{root.tag}>")
    words: list[str] = []
    # Direct children only: a person's <part>s have a name and a bndbox of their own.
    objects = tuple(_read_object(path, o, i, words) for i, o in enumerate(root.findall("object"), start=1))
    width, height = (_pixels(root.findtext(f"size/{side}") or "") for side in ("width", "height"))
    filename = (root.findtext("filename") or "").strip()
    return VOCAnnotation(path.stem, filename, width, height, objects, path, tuple(words))


def write_annotation(path: str | Path, annotation: VOCAnnotation) -> None:
    """Write a Pascal VOC annotation, the inverse of `read_annotation`; the id is the stem of `path` afterwards."""
    root = Element("annotation")
    SubElement(root, "filename").text = annotation.filename
    size = SubElement(root, "size")
    for tag, value in ("width", annotation.width), ("height", annotation.height), ("depth", 3):
        SubElement(size, tag).text = str(value)
    for o in annotation.objects:
        element = SubElement(root, "object")
        SubElement(element, "name").text = o.name
        SubElement(element, "difficult").text = str(int(o.difficult))
        box = SubElement(element, "bndbox")
        for tag, coordinate in zip(("xmin", "ymin", "xmax", "ymax"), o.box, strict=True):
            SubElement(box, tag).text = str(coordinate)
    indent(root)
    write_text(path, tostring(root, encoding="unicode") + "\n")


def read_image_set(root: str | Path, split: str) -> list[str]:
    """Read the image ids of one split.

    The set of a class, such as ``cat_train``, has a second column with -1, 0 or 1. A list has that column if its name
    is made of two parts, every line ends in such a number, and no line as a whole is the name of an annotation. All of
    its images are returned, in the order of ``ImageSets/Main/{split}.txt``.

    Raises:
        FileNotFoundError: If the tree has no such image set; lists those it has.
        ValueError: If the set is empty, lists an id twice, or an id is not a plain file name; names file and line.
    """
    path = Path(root) / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        found = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) or "none"
        raise FileNotFoundError(f"{path}: no such image set; {path.parent} has: {found}")
    lines = {n: line.strip() for n, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()}
    if not lines:
        raise ValueError(f"{path}: lists no image")
    without = {n: re.sub(r"\s+(-1|0|1)$", "", line) for n, line in lines.items()}
    if "_" in split and all(without[n] != line for n, line in lines.items()):
        annotations = Path(root) / "Annotations"
        if not any((annotations / f"{line}.xml").is_file() for line in lines.values()):
            lines = without
    first: dict[str, int] = {}
    for n, image_id in lines.items():
        if re.search(r"[/\\:\0]", image_id) or image_id in {".", ".."}:
            raise ValueError(f"{path}, line {n}: '{image_id}' is no image id, a file name without folder and suffix")
        if image_id in first:
            raise ValueError(f"{path}, line {n}: lists '{image_id}' twice; it is on line {first[image_id]} already")
        first[image_id] = n
    return list(first)


def _read_object(path: Path, element: Element, number: int, words: list[str]) -> VOCObject:
    """Read one object, and note a flag that is a word."""

    def get(tag: str, convert: Callable[[str], T], default: T | None = None) -> T:
        text = (element.findtext(tag) or "").strip()
        if not text and default is not None:
            return default
        if not text:
            raise ValueError(f"{path}: {of}: <{tag}> is missing or empty")
        try:
            return convert(text)
        except (ValueError, OverflowError) as e:
            raise ValueError(f"{path}: {of}: <{tag}> is '{text}': {e}") from e

    def flag(text: str) -> bool:
        if text.lower() in FLAGS:
            if text not in {"0", "1"}:
                words.append(f"{of}: '{text}'")
            return FLAGS[text.lower()]
        if not re.fullmatch(r"[01]\.0*", text):
            raise ValueError("a flag is 0 or 1, or one of the words true, false, yes, no and Unspecified")
        return text[0] == "1"

    of = f"object {number}"
    name = get("name", str)
    of = f"object {number} ({name})"
    xmin, ymin, xmax, ymax = (get(f"bndbox/{tag}", _coordinate) for tag in ("xmin", "ymin", "xmax", "ymax"))
    return VOCObject(name, (xmin, ymin, xmax, ymax), get("difficult", flag, False))


def _coordinate(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("a coordinate is a finite number of pixels")
    return value


def _pixels(text: str) -> int:
    """Return a side that the file states in whole pixels, else 0: it is only compared with the image's own."""
    try:
        value = float(text)
    except ValueError:
        return 0
    return int(value) if value > 0 and value.is_integer() else 0
