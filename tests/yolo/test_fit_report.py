# yolo-sos, AGPL-3.0
"""What a fit tells of what it did, on blood cells."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from yolo_sos import cli
from yolo_sos.yolo import fit_checkpoint

SHARED = Path(__file__).parents[3] / "shared"
CELLS, WEIGHTS = SHARED / "data/BCCD", SHARED / "weights/yolov8n-coco.pt"

pytestmark = pytest.mark.skipif(
    not (CELLS.is_dir() and WEIGHTS.is_file()), reason=f"needs {CELLS} and {WEIGHTS}, which are not there"
)


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> Path:
    """A data YAML of the first 30 images to train on, and the first 8 to validate on."""
    folder = tmp_path_factory.mktemp("cells") / "set"
    cli.main(["convert", f"voc={CELLS}", f"out={folder}", "train=train", "val=val"])
    content = yaml.safe_load((folder / "data.yaml").read_text())
    for split, count in ("train", 30), ("val", 8):
        files = sorted((folder / content[split]).iterdir())[:count]
        (folder / f"{split}.txt").write_text("".join(f"{file}\n" for file in files))
        content[split] = str(folder / f"{split}.txt")
    path = folder / "few.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def weights(tmp_path) -> Path:
    """A copy of the checkpoint in a folder of its own."""
    (tmp_path / "weights").mkdir()
    return Path(shutil.copy(WEIGHTS, tmp_path / "weights/best.pt"))


OPTIONS = {"imgsz": 160, "batch": 8, "device": "cpu"}


def test_the_log_names_what_was_written_and_no_older_picture_stays(weights, cells, caplog):
    fit_checkpoint(weights, cells, **OPTIONS)
    assert caplog.text.rstrip().endswith("best-fit.pt, best-fit.json, best-fit.png")
    caplog.clear()
    fit_checkpoint(weights, cells, val=False, exist_ok=True, **OPTIONS)
    assert caplog.text.rstrip().endswith("best-fit.pt, best-fit.json")
    assert sorted(p.name for p in weights.parent.iterdir()) == ["best-fit.json", "best-fit.pt", "best.pt"]


def test_a_val_split_without_objects_gives_no_score(weights, cells, tmp_path, caplog):
    content = yaml.safe_load(cells.read_text())
    (tmp_path / "images").mkdir()
    for file in Path(content["val"]).read_text().split():
        shutil.copy(file, tmp_path / "images")  # without labels
    data = tmp_path / "blank.yaml"
    data.write_text(yaml.safe_dump({**content, "val": str(tmp_path / "images")}))
    report = fit_checkpoint(weights, data, **OPTIONS)
    assert report.output and report.metrics_after == {} and {c.after for c in report.classes} == {None}
    assert f"{data}: no image of the val split has an object, so it is not scored." in caplog.text
    assert "mAP" not in report.table() and not weights.with_name("best-fit.png").exists()


def test_with_add_figures_are_said_to_be_of_the_new_classes(weights, cells):
    alone = fit_checkpoint(weights, cells, **OPTIONS)
    added = fit_checkpoint(weights, cells, add=True, exist_ok=True, **OPTIONS)
    told, by_itself = added.table().splitlines(), " of the new classes by themselves"
    for start, now in ("held-out loss", "held-out loss "), ("val split", "val split: "):
        (line,) = (line for line in told if line.startswith(start + by_itself))
        (same,) = (line for line in alone.table().splitlines() if line.startswith(now))
        assert line.replace(by_itself, "").split(";")[0] == same.split(";")[0]


def test_a_long_list_of_classes_without_a_box_is_cut_short(weights, cells, tmp_path):
    data = tmp_path / "many.yaml"
    data.write_text(yaml.safe_dump({**yaml.safe_load(cells.read_text()), "names": [f"c{i}" for i in range(100)]}))
    with pytest.raises(ValueError, match=r"no training image shows 'c3', 'c4', 'c5', 'c6', 'c7', 92 more\. Label"):
        fit_checkpoint(weights, data, **OPTIONS)
