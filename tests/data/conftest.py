"""Pascal VOC trees to test with."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from yolo_sos.data.voc import VOCAnnotation, VOCObject, write_annotation


class Tree:
    """A Pascal VOC tree that grows image by image."""

    def __init__(self, root: Path):
        self.root = root
        for folder in "Annotations", "ImageSets/Main", "JPEGImages":
            (root / folder).mkdir(parents=True)

    def add(self, split, image_id, objects=(), size=(64, 48), stated=None, suffix=".jpg"):
        """Add an image of `size` (width, height) with its annotation, which states its size as `stated`."""
        image = np.full((size[1], size[0], 3), 127, np.uint8)
        assert cv2.imwrite(str(self.root / "JPEGImages" / f"{image_id}{suffix}"), image)
        annotation = VOCAnnotation(image_id, f"{image_id}{suffix}", *(stated or size), tuple(objects))
        write_annotation(self.root / "Annotations" / f"{image_id}.xml", annotation)
        with (self.root / "ImageSets" / "Main" / f"{split}.txt").open("a") as f:
            f.write(f"{image_id}\n")
        return self


@pytest.fixture
def tree(tmp_path):
    """A factory of trees, each of which has one image per split."""

    def make(name="VOC", splits=("train", "val", "test")):
        new = Tree(tmp_path / "source" / name)
        for split in splits:
            new.add(split, f"{name}_{split}", [VOCObject("cat", (11, 6, 30, 25))])
        return new

    return make
