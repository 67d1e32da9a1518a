# yolo-sos, AGPL-3.0
"""What knows Ultralytics: heads, images, checkpoints, their shifts and calibrations, and what extends trainers."""

from yolo_sos._lazy import lazy_exports

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "calibrate": ("CheckpointCalibration", "calibrate_checkpoint"),
        "calibrate_report": ("CalibrationReport",),
        "checkpoint": ("Checkpoint",),
        "checkpoint_data": ("CheckpointData",),
        "fit": ("CheckpointFit", "fit_checkpoint"),
        "fit_report": ("CheckpointFitReport",),
        "heads": ("YoloTask", "final_layers"),
        "images": ("ImageSample",),
        "shift": ("CheckpointShift", "shift_checkpoint"),
        "shift_report": ("CheckpointReport",),
        "shifting": ("Shifting",),
        "sweep": ("CheckpointSweep", "sweep_checkpoint"),
        "training": ("TrainerExtension",),
    },
)
