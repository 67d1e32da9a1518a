# yolo-sos, AGPL-3.0
"""A detector is to know new classes beside its own: `fit add=true`, and stock training on images of the new ones alone.

Two cases. `cells`: YOLOv8n trained on COCO, and the three classes of BCCD, which are far from COCO's. `five`: the same
model without five of its classes, which are added again from 300 images of VOC07 with labels of these alone; its
features know them, and its own classes are in those images, too. Old classes are scored on VOC07's val split: the 20
classes that COCO has, too, or 15 of them. Fits are to the images of the new classes, alone or with 100 of VOC07's
training images that show none and have no labels (`wide`). Stock training has a data YAML of the new names (`own
names`) or of all names, old ones first (`all names`), with backbone and neck frozen (`frozen`), or starting from a fit
(`from the fit`).

    yolo-sos convert voc=BCCD out=bccd train=train val=val
    python studies/fit/add.py --weights yolov8n-coco.pt --voc VOC07/data.yaml --cells bccd/data.yaml

adds a record per run to add.json, where those that exist stay, and prints the table of fit.md.
"""

from __future__ import annotations

import argparse
import shutil
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from ultralytics import YOLO
from ultralytics.utils import YAML

from yolo_sos.files import as_json, read_json, write_text
from yolo_sos.markdown import markdown_table
from yolo_sos.yolo import fit_checkpoint
from yolo_sos.yolo.classes import resized

HERE = Path(__file__).parent
COCO = {  # VOC's classes that COCO has by another name
    **{"aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle"},
    **{"pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"},
}
FIVE = ["potted plant", "sheep", "couch", "train", "tv"]  # the last of VOC's, as in Shmelkov et al., ICCV 2017
IMAGES = 300  # of them
OTHERS = 100  # of the old kind without labels
EPOCHS, TOLD = 10, (1, 2, 3, 5, 10)
STOCK = {"imgsz": 320, "batch": 16, "workers": 0, "device": "cpu", "plots": False, "verbose": False}
ARMS = {  # the data YAML and what else stock training is given
    "own names": ("new", {}),
    "all names": ("all", {}),
    # `auto` takes a rate of .000115 for 83 classes, and for three this one:
    "all names, rate of three": (
        "all",
        {"optimizer": "AdamW", "lr0": 0.001429, "momentum": 0.9, "warmup_bias_lr": 0.0},
    ),
    "frozen": ("all", {"freeze": 22}),
    "from the fit": ("all", {}),
}


class Case:
    """A model with old classes, and data sets in its folder: ``old.yaml``, ``both.yaml``, ``new.yaml`` and so on.

    ``old`` and ``both`` are VOC07's val split with labels of old classes, under the old names and under all names.
    ``new`` and ``all`` are images with labels of new classes alone, numbered from 0 and after the old ones; ``wide`` is
    ``new`` with images of VOC07 that show none of them.
    """

    def __init__(self, folder: Path, weights: Path, voc: Path, data: Path, new: dict[int, str], images: int | None):
        """Write the checkpoint and the data sets.

        Args:
            folder (Path): An empty folder.
            weights (Path): The detector.
            voc (Path): The data YAML whose val split has old classes.
            data (Path): The data YAML that has the new classes.
            new (dict[int, str]): New class there → its name. The detector is made to forget those that it knows.
            images (int, optional): Images to train on. None: all.
        """
        self.folder, self.weights = folder, folder / "model.pt"
        yolo = YOLO(weights)
        names = [name for name in yolo.names.values() if name not in new.values()]
        if len(names) < len(yolo.names):
            yolo.model = resized(yolo.model, dict(enumerate(names)), seed=0)
        yolo.save(self.weights)
        self.count, every = len(names), [*names, *new.values()]
        here = {c: COCO.get(name, name) for c, name in YAML.load(voc)["names"].items()}
        old = self._split("old", voc, "val", {c: names.index(name) for c, name in here.items() if name in names})
        self._yaml("old", names, [old], old)
        self._yaml("both", every, [old], old)
        for name, first, of in ("new", 0, [*new.values()]), ("all", self.count, every):
            classes = {c: first + k for k, c in enumerate(new)}
            train = self._split(name, data, "train", classes, images)
            val = self._split(name, data, "val", classes)
            self._yaml(name, of, [train], val)
        known = {c: 0 for c, name in here.items() if name in new.values()}
        others = self._split("others", voc, "train", known, OTHERS, shown=False)
        both = [self.folder / "new/images/train", others]
        self._yaml("wide", [*new.values()], both, self.folder / "new/images/val")
        shown = {file.stem for file in (folder / "new/labels/val").iterdir() if file.read_text()}
        self.without_new = [file for file in sorted(old.iterdir()) if file.stem not in shown]
        self.without_old = [] if data == voc else sorted((folder / "new/images/val").iterdir())

    def _split(
        self,
        name: str,
        data: Path,
        split: str,
        classes: dict[int, int],
        most: int | None = None,
        shown: bool = True,
    ) -> Path:
        """Link the images of a split, and write their labels of some classes.

        Args:
            name (str): Of the new data set.
            data (Path): The YAML of the old one.
            split (str): The split.
            classes (dict[int, int]): Old class → new class, of those that are labelled.
            most (int, optional): Take the first so many images that have such labels, or that have none. None: all.
            shown (bool): Whether those of ``most`` are to have labels.

        Returns:
            (Path): The folder of images.
        """
        source = data.parent / YAML.load(data)[split]
        images, labels = (self.folder / name / kind / split for kind in ("images", "labels"))
        for path in images, labels:
            path.mkdir(parents=True)
        taken = 0
        for file in sorted(source.iterdir()):
            lines = (source.parents[1] / "labels" / split / f"{file.stem}.txt").read_text().splitlines()
            found = [line.split(maxsplit=1) for line in lines]
            kept = [f"{classes[int(c)]} {box}\n" for c, box in found if int(c) in classes]
            if most is None or (bool(kept) is shown and taken < most):
                (images / file.name).symlink_to(file.resolve())
                (labels / f"{file.stem}.txt").write_text("".join(kept))
                taken += 1
        return images

    def _yaml(self, name: str, names: list[str], train: list[Path], val: Path) -> None:
        content = {"train": [*map(str, train)], "val": str(val), "names": dict(enumerate(names))}
        YAML.save(self.folder / f"{name}.yaml", content)

    def measure(self, path: Path, data: str = "all") -> dict:
        """Return mAP of old and new classes, and what is detected at .25 where nothing of the kind is to be seen.

        Args:
            path (Path): The checkpoint.
            data (str): Its classes: ``all``, ``new`` or ``old``.
        """
        told = {}
        where = {"all": {"old": "both", "new": "all"}, "new": {"new": "new"}, "old": {"old": "old"}}[data]
        for key, name in where.items():
            told[key] = self._score(path, name)
        for key, images, asked in ("new", self.without_new, {"all"}), ("old", self.without_old, {"all", "old"}):
            if images and data in asked:
                detections = self._detections(path, images, new=key == "new")
                told[f"false {key}"] = {"images": len(images), "detections": detections}
        return told

    def _score(self, path: Path, name: str, **more: int) -> dict[str, float]:
        data, project = (str(self.folder / of) for of in (f"{name}.yaml", "val"))
        box = YOLO(path).val(data=data, project=project, **STOCK, **more).box
        return {"mAP50-95": box.map, "mAP50": box.map50}

    def _detections(self, path: Path, images: list[Path], new: bool) -> int:
        options = {**STOCK, "batch": 1, "conf": 0.25, "stream": True, "project": str(self.folder / "predict")}
        found = (result.boxes.cls for result in YOLO(path).predict(list(map(str, images)), **options))
        return sum(int(((c >= self.count) == new).sum()) for c in found)

    def fit(self, seed: int, name: str = "new") -> dict:
        """Return the record of a fit to all images of a data set, which leaves its file."""
        path = Path(shutil.copy(self.weights, self.folder / f"{name}{seed}.pt"))
        data, old = (self.folder / f"{name}.yaml" for name in (name, "old"))
        start = time.perf_counter()
        options = {"imgsz": 320, "batch": 16, "device": "cpu", "exist_ok": True, "seed": seed}
        report = fit_checkpoint(path, data, images="all", add=True, old=old, **options)
        assert report.output is not None, report.refusal
        return {
            "seed": seed,
            "images": report.images,
            "seconds": sum(report.milliseconds.values()) / 1e3,
            "seconds with validation": time.perf_counter() - start,
            "heldout": [report.heldout_before, report.heldout_after],
            "new by themselves": report.metrics_after,
            "old before": report.old_before,
            "old after": report.old_after,
            # Ultralytics scores 300 detections of an image, among which new classes take places of old ones.
            "old, 3000 detections": [
                self._score(self.weights, "old", max_det=3000),
                self._score(Path(report.output), "both", max_det=3000),
            ],
            **self.measure(Path(report.output)),
        }

    def train(self, arm: str, seed: int = 0) -> dict:
        """Return the record of a stock training, by epoch."""
        data, more = ARMS[arm]
        start = self.folder / "new0-fit.pt" if arm == "from the fit" else self.weights
        if not start.exists():
            self.fit(0)
        yolo = YOLO(start)
        begun = time.perf_counter()
        place = {
            "project": str(self.folder / "runs"),
            "name": f"{arm}-{seed}".replace(",", "").replace(" ", "-"),
            "seed": seed,
        }
        yolo.train(data=str(self.folder / f"{data}.yaml"), epochs=EPOCHS, save_period=1, **place, **STOCK, **more)
        seconds = (time.perf_counter() - begun) / EPOCHS
        weights = yolo.trainer.wdir
        epochs = {str(e): self.measure(weights / f"epoch{e - 1}.pt", data) for e in TOLD}
        args = {key: getattr(yolo.trainer.args, key) for key in ("optimizer", "lr0", "freeze")}
        return {"seed": seed, "seconds an epoch": seconds, "args": args, "epochs": epochs}


def table(records: dict[str, dict]) -> str:
    """Return mAP50-95 of old and new classes: a row for each state of a model."""
    head = ["case", "model", "old classes", "new classes", "new seen on 100 old images"]
    rows: list[list[str]] = []
    for case, of in records.items():
        for run, record in of.items():
            for epoch, told in record.get("epochs", {"": record}).items():
                scores = [f"{told[k]['mAP50-95']:.3f}" if k in told else "" for k in ("old", "new")]
                false = told.get("false new")
                shown = f"{100 * false['detections'] / false['images']:.1f}" if false else ""
                rows.append([case, f"{run}, epoch {epoch}" if epoch else run, *scores, shown])
    return markdown_table([head, *rows], texts=2)


def main() -> None:
    """Run what has no record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("weights", "YOLOv8n trained on COCO"), ("voc", "VOC07's data YAML"), ("cells", "BCCD's")):
        parser.add_argument(f"--{name}", required=True, type=Path, help=what)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the fits")
    args = parser.parse_args()
    path = HERE / "add.json"
    records = read_json(path) if path.exists() else {}
    names = {c: COCO.get(name, name) for c, name in YAML.load(args.voc)["names"].items()}
    five = {c: name for c, name in names.items() if name in FIVE}
    cases = {"cells": (args.cells, YAML.load(args.cells)["names"], None), "five": (args.voc, five, IMAGES)}
    arms = {"cells": list(ARMS), "five": ["all names", "frozen", "from the fit"]}
    with TemporaryDirectory() as folder:
        for name, new in cases.items():
            place = Path(folder) / name
            place.mkdir()
            case, of = Case(place, args.weights, args.voc, *new), records.setdefault(name, {})
            work = {"before": partial(case.measure, case.weights, "old")}
            work |= {f"fit {seed}": partial(case.fit, seed) for seed in args.seeds}
            work |= {f"fit {seed}, wide": partial(case.fit, seed, "wide") for seed in args.seeds}
            work |= {arm: partial(case.train, arm) for arm in arms[name]}
            for key, run in work.items():
                of[key] = of.pop(key, None) or run()  # in this order
                write_text(path, as_json(records))
    print(table(records))


if __name__ == "__main__":
    main()
