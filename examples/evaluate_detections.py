# yolo-sos, AGPL-3.0
"""Judge the detections of any detector: from arrays, or from COCO's JSON files, without torch and Ultralytics.

The command line does the same: ``yolo-sos eval detections=detections.json annotations=annotations.json``. Run it with

    python examples/evaluate_detections.py
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from yolo_sos.evaluate import (
    Detections,
    GroundTruth,
    Scores,
    coco_ap,
    read_coco_detections,
    read_coco_truth,
    table,
    voc_ap,
    write_coco_detections,
    write_coco_truth,
)


def judge(name: str, truth: GroundTruth, found: Detections) -> Scores:
    """Return each class's AP by the VOC devkit's metric and by COCO's."""
    voc, coco = voc_ap(truth, found, iou=0.5), coco_ap(truth, found)
    return Scores(name, {"VOC10+": voc.ap, "VOC07": voc.ap07, "COCO AP50": coco.ap50, "COCO AP": coco.ap})


def main() -> dict[str, float]:
    """Judge three detections of two objects, and return the mean over the classes under each metric."""
    # Boxes are x1, y1, x2, y2 in pixels from the image's corner; `image` and `label` are indices into the names.
    truth = GroundTruth.build(
        classes=["cat", "dog"],
        images=["1", "2"],
        image=[0, 1, 1],
        label=[0, 1, 0],
        boxes=[[10, 20, 60, 80], [5, 5, 95, 70], [0, 0, 20, 20]],
        difficult=[False, False, True],  # neither rewarded nor punished
    )
    found = Detections.build(
        truth,
        image=[0, 0, 1],
        label=[0, 0, 1],
        score=[0.7, 0.9, 0.8],
        boxes=[[12, 18, 61, 79], [60, 60, 90, 90], [5, 5, 95, 60]],  # a hit, a miss with more confidence, a hit
    )
    with TemporaryDirectory() as folder:  # the same from files, such as another library writes
        annotations, detections = Path(folder, "annotations.json"), Path(folder, "detections.json")
        write_coco_truth(annotations, truth)
        write_coco_detections(detections, truth, found)
        read = read_coco_truth(annotations)
        from_files = judge("from files", read, read_coco_detections(detections, read))
    scores = judge("from arrays", truth, found)
    assert all(np.array_equal(scores.ap[metric], from_files.ap[metric], equal_nan=True) for metric in scores.ap)
    print(table(truth, [scores]))
    return scores.means()


if __name__ == "__main__":
    main()
