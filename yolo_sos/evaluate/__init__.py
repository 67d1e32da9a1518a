# yolo-sos, AGPL-3.0
"""Detection metrics on arrays, files of ground truth and detections, and ``yolo-sos eval`` on top of them.

    truth = read_coco_truth("annotations.json")
    found = read_coco_detections("detections.json", truth)
    mean_ap(voc_ap(truth, found).ap), coco_ap(truth, found).stats["AP"]

`boxes` holds the data and the convention of coordinates, `voc` the devkit's metric, `coco` COCO's, `calibration` the
errors of scores as probabilities, `voc_files` and `coco_files` the files, `report` and `plot` what is shown. None of
these needs Ultralytics or torch; `detections`, which runs a model over a data set, and `command` do, and are not
imported here.
"""

from yolo_sos.evaluate.boxes import Detections, GroundTruth, snap
from yolo_sos.evaluate.calibration import Reliability, Samples, reliability, samples_of
from yolo_sos.evaluate.coco import COCOResult, coco_ap
from yolo_sos.evaluate.coco_files import (
    read_coco_detections,
    read_coco_truth,
    write_coco_detections,
    write_coco_truth,
)
from yolo_sos.evaluate.plot import plot_curves, plot_reliability
from yolo_sos.evaluate.report import Scores, report_json, table
from yolo_sos.evaluate.voc import Curve, Matches, VOCResult, mean_ap, voc_ap
from yolo_sos.evaluate.voc_files import read_voc_detections, voc_truth, write_voc_detections

__all__ = [
    "COCOResult",
    "Curve",
    "Detections",
    "GroundTruth",
    "Matches",
    "Reliability",
    "Samples",
    "Scores",
    "VOCResult",
    "coco_ap",
    "mean_ap",
    "plot_curves",
    "plot_reliability",
    "read_coco_detections",
    "read_coco_truth",
    "read_voc_detections",
    "reliability",
    "report_json",
    "samples_of",
    "snap",
    "table",
    "voc_ap",
    "voc_truth",
    "write_coco_detections",
    "write_coco_truth",
    "write_voc_detections",
]
