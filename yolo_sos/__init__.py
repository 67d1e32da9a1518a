# yolo-sos, AGPL-3.0
"""Fit, calibrate and shift the final layers of Ultralytics YOLO and any PyTorch model.

Importing this package loads neither torch nor ultralytics: public names are imported when they are first asked for.
"""

from yolo_sos._lazy import lazy_exports

__version__ = "0.1.0"

_MODULES = {  # public name → module
    "Method": "yolo_sos.core.method",
    "SOS": "yolo_sos.core.sos",
    "SOSCallback": "yolo_sos.lightning",
    "SOSClassificationTrainer": "yolo_sos.trainers",
    "SOSConfig": "yolo_sos.config",
    "SOSDetectionTrainer": "yolo_sos.trainers",
    "SOSOBBTrainer": "yolo_sos.trainers",
    "SOSPoseTrainer": "yolo_sos.trainers",
    "SOSSegmentationTrainer": "yolo_sos.trainers",
    "ShiftReport": "yolo_sos.core.report",
    "analyze_checkpoints": "yolo_sos.analyze.comparison",
    "calibrate_checkpoint": "yolo_sos.yolo.calibrate",
    "FitReport": "yolo_sos.core.fit",
    "final_layers": "yolo_sos.yolo.heads",
    "fit_checkpoint": "yolo_sos.yolo.fit",
    "fit_model": "yolo_sos.core.fit",
    "shift_checkpoint": "yolo_sos.yolo.shift",
    "shift_model": "yolo_sos.core.sos",
    "sweep_checkpoint": "yolo_sos.yolo.sweep",
}
__all__ = ["__version__", *sorted(_MODULES)]
__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
