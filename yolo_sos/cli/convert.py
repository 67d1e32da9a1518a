# yolo-sos, AGPL-3.0
"""``yolo-sos convert``: Pascal VOC trees to a YOLO data set."""

from __future__ import annotations

from typing import Any

from yolo_sos.arguments import Argument
from yolo_sos.cli.grammar import Mode, refusing
from yolo_sos.core.checks import boolean, number, optional

OWN = (
    Argument("voc", None, "str | list", "VOC trees, with commas between them: folders that hold Annotations"),
    Argument("out", None, "str", "folder to make; its data.yaml is what train takes as data"),
    Argument("train", "train", "str | list", "image sets to train on; VOC2007/train is that of one tree alone"),
    Argument("val", None, "str | list", "image sets to validate on; val if neither they nor val_share are given"),
    Argument("test", None, "str | list", "image sets to test on; no test split if not given"),
    Argument("val_share", None, "float", "instead of val: share of train that is held out, above 0 and below 1"),
    Argument(
        "names", None, "list", "class names in the order of their indices; those that occur, sorted, if not given"
    ),
    Argument("copy", False, "bool", "copy images and annotations, where links to them would do"),
    Argument("seed", 0, "int", "chooses what is held out"),
)
CHECKS = {
    "val_share": optional(number("a number above 0 and below 1, or none", lambda x: 0 < x < 1)),
    "copy": boolean,
    "seed": number("an integer", lambda _: True, integer=True),
}


def run(arguments: dict[str, Any]) -> None:
    """Convert, and print what was found."""
    with refusing():
        from yolo_sos.data.convert import convert_voc

        for key, example in ("voc", "VOCdevkit/VOC2007"), ("out", "datasets/voc"):
            if not arguments.get(key):
                raise ValueError(f"convert needs {key}=…, such as {key}={example}")
        given = {a.name: arguments.get(a.name, a.default) for a in OWN}
        options = {key: check(key, given[key]) for key, check in CHECKS.items()}
        if given["val"] is None and options["val_share"] is None:
            given["val"] = "val"
        splits = {split: _listed(given[split]) for split in ("train", "val", "test") if given[split] is not None}
        names = None if given["names"] is None else _listed(given["names"])
        convert_voc(_listed(given["voc"]), given["out"], splits=splits, names=names, **options)


def _listed(value: Any) -> list[str]:
    """Return the items of a list, or of a text with commas between them."""
    items = value if isinstance(value, (list, tuple)) else str(value).removeprefix("[").removesuffix("]").split(",")
    return [str(item).strip() for item in items]


MODE = Mode(
    "convert",
    "convert Pascal VOC trees to a YOLO data set",
    [
        "convert voc=VOCdevkit/VOC2007 out=datasets/voc test=test",
        "convert voc=VOC2007,VOC2012 out=datasets/voc0712 train=trainval val_share=0.1 test=VOC2007/test",
        "convert voc=cells out=datasets/cells names=platelet,red,white",
    ],
    lambda: {"Arguments:": OWN},
    run,
    result="Writes data.yaml, images, labels and annotations into a new folder, and prints the counts of each split "
    "and what is odd about the annotations. Difficult objects are kept for yolo-sos eval and are no labels.",
)
