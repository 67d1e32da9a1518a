# yolo-sos, AGPL-3.0
"""What knows Ultralytics: heads, images, checkpoints, their shifts and calibrations, and what extends trainers."""

from yolo_sos._lazy import lazy_exports

_MODULES = {
    "CalibrationReport": "yolo_sos.yolo.calibrate_report",
    "Checkpoint": "yolo_sos.yolo.checkpoint",
    "CheckpointCalibration": "yolo_sos.yolo.calibrate",
    "CheckpointData": "yolo_sos.yolo.images",
    "CheckpointFit": "yolo_sos.yolo.fit",
    "CheckpointFitReport": "yolo_sos.yolo.fit_report",
    "CheckpointReport": "yolo_sos.yolo.shift_report",
    "CheckpointShift": "yolo_sos.yolo.shift",
    "CheckpointSweep": "yolo_sos.yolo.sweep",
    "ImageSample": "yolo_sos.yolo.images",
    "Shifting": "yolo_sos.yolo.shifting",
    "TrainerExtension": "yolo_sos.yolo.training",
    "YoloTask": "yolo_sos.yolo.heads",
    "calibrate_checkpoint": "yolo_sos.yolo.calibrate",
    "fit_checkpoint": "yolo_sos.yolo.fit",
    "final_layers": "yolo_sos.yolo.heads",
    "shift_checkpoint": "yolo_sos.yolo.shift",
    "sweep_checkpoint": "yolo_sos.yolo.sweep",
}
__all__ = sorted(_MODULES)
__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
