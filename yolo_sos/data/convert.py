# yolo-sos, AGPL-3.0
"""Convert Pascal VOC trees to a YOLO data set, true to VOC's pixel convention.

A VOC box counts pixels from 1 and includes its last one, so the box covers [xmin - 1, xmax] of the image's width in
continuous coordinates. (The stock VOC.yaml of Ultralytics makes boxes one pixel small and half a pixel off.)

What is written, with links to the images and annotations where the file system allows::

    data.yaml                       train, val, test, names, and voc: annotations
    images/{split}/{id}.jpg
    labels/{split}/{id}.txt         what is trained on: no difficult objects, no boxes without area
    difficult/{split}/{id}.txt      the difficult objects, in the same format; no file where there are none
    annotations/{split}/{id}.xml    the VOC annotations, for an evaluator that knows about difficult objects
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from ultralytics.data.utils import IMG_FORMATS
from ultralytics.utils import LOGGER, TQDM, YAML

from yolo_sos.data.images import image_size
from yolo_sos.data.voc import Box, Selection, VOCAnnotation, read_annotation, read_image_set
from yolo_sos.files import link, new_folder, write_text
from yolo_sos.markdown import markdown_table

SPLITS: Mapping[str, Sequence[str]] = {"train": ["train"], "val": ["val"], "test": ["test"]}


class SplitCounts(NamedTuple):
    """Numbers of images (those without labels included), of label lines, and of difficult objects, which are none."""

    images: int
    boxes: int
    difficult: int


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion found.

    Attributes:
        names (tuple[str, ...]): Class names by class index.
        splits (dict[str, SplitCounts]): Counts by split.
        noted (dict[str, tuple[str, ...]]): Where boxes have no area (``no area``: left out), where objects are
            repeated (``twice``) and where flags are words (``words``): see `yolo_sos.data.voc.Selection`.
        resized (tuple[Path, ...]): Annotations whose size is not that of their image. The image's size is used.
    """

    names: tuple[str, ...]
    splits: dict[str, SplitCounts]
    noted: dict[str, tuple[str, ...]]
    resized: tuple[Path, ...]

    def __str__(self) -> str:
        """Return the counts as a table, and the classes."""
        rows = [["split", *SplitCounts._fields], *([split, *map(str, n)] for split, n in self.splits.items())]
        return f"{markdown_table(rows)}{len(self.names)} classes: {', '.join(self.names)}"


class _Sample(NamedTuple):
    xml: Path
    image: Path
    annotation: VOCAnnotation


def convert_voc(
    roots: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    splits: Mapping[str, str | Sequence[str]] = SPLITS,
    val_share: float | None = None,
    seed: int = 0,
    names: Sequence[str] | Mapping[int, str] | None = None,
    copy: bool = False,
) -> ConversionReport:
    """Convert Pascal VOC trees into a YOLO data set with its data YAML, ``{out}/data.yaml``.

    Difficult objects are no labels: training takes their pixels for background, as is usual with VOC.

    Args:
        roots (str | Path | Sequence[str | Path]): One or more VOC trees, such as VOCdevkit/VOC2007 and
            VOCdevkit/VOC2012.
        out (str | Path): The folder to make. It appears when it is complete.
        splits (Mapping[str, str | Sequence[str]]): For ``train``, ``val`` and, optionally, ``test``: the image sets
            that it takes. A set is taken from every tree that has it, ``VOC2007/test`` from the tree of that name.
        val_share (float | None): Share of the images of ``train`` to hold out as ``val``, which `splits` then leaves
            out; above 0 and below 1.
        seed (int): Which images are held out. Not their order but their ids and the seed decide, by a hash, so that
            every machine and version holds out the same ones.
        names (Sequence[str] | Mapping[int, str] | None): Class names in the order of their indices, as in a data YAML;
            None for those that occur in any split, sorted.
        copy (bool): Copy images and annotations instead of linking to them.

    Returns:
        (ConversionReport): What was found; it is logged as well.

    Raises:
        FileExistsError: If `out` exists and is not an empty folder.
        FileNotFoundError: If a tree, an image set, an annotation or an image is missing.
        ValueError: If an argument or a file is malformed, an object's class is not in `names`, or a split has two
            images of the same id.
    """
    with new_folder(out) as folder:
        report = write_yolo(folder, roots, splits=splits, val_share=val_share, seed=seed, names=names, copy=copy)
    LOGGER.info(f"{report}\nwrote {Path(out) / 'data.yaml'}")
    return report


def write_yolo(
    folder: Path,
    roots: str | Path | Sequence[str | Path],
    *,
    splits: Mapping[str, str | Sequence[str]] = SPLITS,
    val_share: float | None = None,
    seed: int = 0,
    names: Sequence[str] | Mapping[int, str] | None = None,
    copy: bool = False,
) -> ConversionReport:
    """Do what `convert_voc` does in a folder that exists, for builders of data sets that have more to write there."""
    if val_share is not None and not ("val" not in splits and 0 < val_share < 1):
        raise ValueError(f"val_share={val_share}: 'val' is a share of 'train', above 0 and below 1, or one of splits")
    if not {"train", "val"} <= {*splits, *(["val"] if val_share else [])} <= {"train", "val", "test"}:
        raise ValueError(f"splits: a data YAML has 'train', 'val' and, optionally, 'test'; not {list(splits)}")
    trees = [Path(roots)] if isinstance(roots, str | Path) else [Path(r) for r in roots]
    for tree in trees:
        _check_tree(tree)
    samples = {split: _read_split(trees, split, [s] if isinstance(s, str) else s) for split, s in splits.items()}
    if val_share:
        train, val = _hold_out(samples.pop("train"), val_share, seed)
        samples = {"train": train, "val": val, **samples}
    for (a, of_a), (b, of_b) in combinations(samples.items(), 2):
        if shared := {s.image for s in of_a} & {s.image for s in of_b}:
            LOGGER.warning(f"splits: {len(shared)} images are both in '{a}' and in '{b}'")
    classes = _class_names(names, samples)
    writer = _Writer(folder, {name: i for i, name in enumerate(classes)}, copy)
    counts = {split: writer.write_split(split, of_split) for split, of_split in samples.items()}
    YAML.save(
        folder / "data.yaml",  # no path: Ultralytics takes the file's own folder, so the data set can be moved
        {**{s: f"images/{s}" for s in samples}, "names": dict(enumerate(classes)), "voc": "annotations"},
    )
    for note in writer.selection.notes():
        LOGGER.warning(f"{', '.join(map(str, trees))}: {note}")
    if resized := writer.resized:
        LOGGER.warning(f"Annotations state another size than their image has ({len(resized)}), such as {resized[0]}")
    noted = {kind: tuple(places) for kind, places in writer.selection.noted.items() if places}
    return ConversionReport(classes, counts, noted, tuple(resized))


def yolo_box(box: Box, width: int, height: int) -> Box:
    """Return x1, y1, x2, y2 in pixels from 0 as centre x, centre y, width and height in shares of the image's size."""
    left, top, right, bottom = box
    return (left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height


def _check_tree(tree: Path) -> None:
    if not (tree / "Annotations").is_dir():
        within = sorted(path.parent for path in tree.glob("*/Annotations"))
        hint = f". Did you mean {', '.join(map(str, within))}?" if within else ""
        raise FileNotFoundError(f"{tree}: not a Pascal VOC tree, it has no folder Annotations{hint}")


def _read_split(trees: Sequence[Path], split: str, sets: Sequence[str]) -> list[_Sample]:
    samples: dict[str, _Sample] = {}
    for name in sets:
        tree_name, _, image_set = name.rpartition("/")
        among = [t for t in trees if t.name == tree_name] if tree_name else trees
        if not among:
            raise ValueError(f"{split}: no tree is called '{tree_name}'; there are {', '.join(t.name for t in trees)}")
        having = [t for t in among if (t / "ImageSets" / "Main" / f"{image_set}.txt").is_file()]
        for tree in having or among:  # none has it: the first will say so, and what it has instead
            ids, images = read_image_set(tree, image_set), _images(tree)
            for image_id in TQDM(ids, desc=f"{split}: reading {tree.name}/{image_set}"):
                xml = tree / "Annotations" / f"{image_id}.xml"
                if image_id in samples:
                    both = f"{samples[image_id].xml} and {xml}"
                    advice = "rename one of them, or take its image set into another split"
                    raise ValueError(f"{split}: two images are called '{image_id}': {both}; {advice}")
                if image_id not in images:
                    wanted = tree / "JPEGImages" / f"{image_id}.jpg"
                    raise FileNotFoundError(f"{wanted}: missing, though image set '{image_set}' lists it")
                samples[image_id] = _Sample(xml, images[image_id], read_annotation(xml))
    if not samples:
        raise ValueError(f"{split}: no image set is named, so it would have no images")
    return list(samples.values())


def _hold_out(samples: list[_Sample], share: float, seed: int) -> tuple[list[_Sample], list[_Sample]]:
    """Divide samples into those that stay and those held out, both in their order."""
    count = round(share * len(samples))
    if not 0 < count < len(samples):
        raise ValueError(f"val_share={share}: of {len(samples)} images, {count} would be in 'val'; both need some")
    drawn = sorted(samples, key=lambda s: sha256(f"{seed} {s.annotation.image_id}".encode()).digest())[:count]
    ids = {s.annotation.image_id for s in drawn}
    kept, held = ([s for s in samples if (s.annotation.image_id in ids) is wanted] for wanted in (False, True))
    return kept, held


def _images(tree: Path) -> dict[str, Path]:
    """Image id to image file. One listing, since asking for each id and suffix is slow on network drives."""
    folder = tree / "JPEGImages"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; a Pascal VOC tree has its images there")
    images: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix[1:].lower() in IMG_FORMATS):
        if path.stem in images:
            raise ValueError(f"{folder}: two images have the id '{path.stem}': {images[path.stem].name}, {path.name}")
        images[path.stem] = path
    return images


def _class_names(
    names: Sequence[str] | Mapping[int, str] | None, samples: Mapping[str, Sequence[_Sample]]
) -> tuple[str, ...]:
    """Check the class names against the objects, or collect them from there.

    Objects whose box has no area count too: which ones those are depends on the images.
    """
    where = {o.name: s.xml for of_split in samples.values() for s in of_split for o in s.annotation.objects}
    if names is None:
        if not where:
            raise ValueError("names: the annotations have no objects, so the class names must be given")
        return tuple(sorted(where))
    if isinstance(names, Mapping):
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"names: class indices must be 0 to {len(names) - 1}, not {sorted(names)}")
        names = [names[i] for i in range(len(names))]
    if len(set(names)) < len(names):
        raise ValueError(f"names: a class name occurs twice in {list(names)}")
    for name, xml in where.items():
        if name not in names:
            raise ValueError(f"{xml}: class '{name}' is none of the given names: {', '.join(names)}")
    return tuple(names)


class _Writer:
    """Writes splits, and notes what is odd about them."""

    def __init__(self, folder: Path, index: Mapping[str, int], copy: bool):
        self.folder, self.index, self.copy = folder, index, copy
        self.selection = Selection()
        self.resized: list[Path] = []  # annotations that state another size than their image has

    def write_split(self, split: str, samples: Sequence[_Sample]) -> SplitCounts:
        to = {kind: self.folder / kind / split for kind in ("images", "labels", "difficult", "annotations")}
        for path in to.values():
            path.mkdir(parents=True)
        n_boxes = n_difficult = 0
        for sample in TQDM(samples, desc=f"{split}: writing"):
            boxes, difficult = self._label_lines(sample)
            label = f"{sample.annotation.image_id}.txt"
            write_text(to["labels"] / label, "".join(boxes))
            if difficult:
                write_text(to["difficult"] / label, "".join(difficult))
            link(sample.image, to["images"] / sample.image.name, copy=self.copy)
            link(sample.xml, to["annotations"] / sample.xml.name, copy=self.copy)
            n_boxes, n_difficult = n_boxes + len(boxes), n_difficult + len(difficult)
        return SplitCounts(len(samples), n_boxes, n_difficult)

    def _label_lines(self, sample: _Sample) -> tuple[list[str], list[str]]:
        """Return the label lines of the objects to train on, and of the difficult ones."""
        size = image_size(sample.image)
        stated = sample.annotation.width, sample.annotation.height
        if all(stated) and stated != size:
            self.resized.append(sample.xml)
        lines: tuple[list[str], list[str]] = [], []
        for i, box in self.selection.of(sample.annotation, size).items():
            o = sample.annotation.objects[i]
            # 8 decimals: a millionth of a pixel, where the float32 of Ultralytics keeps a ten-thousandth
            numbers = " ".join(f"{v:.8f}" for v in yolo_box(box, *size))
            lines[o.difficult].append(f"{self.index[o.name]} {numbers}\n")
        return lines
