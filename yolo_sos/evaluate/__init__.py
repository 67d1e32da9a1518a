# yolo-sos, AGPL-3.0
"""Detection metrics on arrays, files of ground truth and detections, and ``yolo-sos eval`` on top of them.

    truth = read_coco_truth("annotations.json")
    found = read_coco_detections("detections.json", truth)
    mean_ap(voc_ap(truth, found).ap), coco_ap(truth, found).stats["AP"]

`boxes` holds the data and the convention of coordinates, `voc` the devkit's metric, `coco` COCO's, `calibration` the
errors of scores as probabilities, `voc_files` and `coco_files` the files, `report` and `plot` what is shown. None of
these needs Ultralytics or torch; `detections`, which runs a model over a data set, and `command` do.
"""

from yolo_sos._lazy import lazy_exports

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "boxes": ("Detections", "GroundTruth", "snap"),
        "calibration": ("Reliability", "Samples", "reliability", "samples_of"),
        "coco": ("COCOResult", "coco_ap"),
        "coco_files": ("read_coco_detections", "read_coco_truth", "write_coco_detections", "write_coco_truth"),
        "plot": ("plot_curves", "plot_reliability"),
        "report": ("Scores", "report_json", "table"),
        "voc": ("Curve", "Matches", "VOCResult", "mean_ap", "voc_ap"),
        "voc_files": ("read_voc_detections", "voc_truth", "write_voc_detections"),
    },
)
