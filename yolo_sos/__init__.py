# yolo-sos, AGPL-3.0
"""Fit, calibrate and shift the final layers of Ultralytics YOLO and any PyTorch model.

Importing this package loads neither torch nor ultralytics: public names are imported when they are first asked for.
"""

from yolo_sos._lazy import lazy_exports

__version__ = "0.1.0"

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "analyze.comparison": ("analyze_checkpoints",),
        "config": ("SOSConfig",),
        "core.fit": ("FitReport", "fit_model"),
        "core.method": ("Method",),
        "core.report": ("ShiftReport",),
        "core.sos": ("SOS", "shift_model"),
        "lightning": ("SOSCallback",),
        "trainers": (
            *("SOSClassificationTrainer", "SOSDetectionTrainer", "SOSOBBTrainer", "SOSPoseTrainer"),
            "SOSSegmentationTrainer",
        ),
        "yolo.calibrate": ("calibrate_checkpoint",),
        "yolo.fit": ("fit_checkpoint",),
        "yolo.heads": ("final_layers",),
        "yolo.shift": ("shift_checkpoint",),
        "yolo.sweep": ("sweep_checkpoint",),
    },
)
__all__ += ["__version__"]
