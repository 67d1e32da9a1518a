# yolo-sos, AGPL-3.0
"""Shift a trained checkpoint: no training, no optimizer, one pass over a few hundred images."""

from yolo_sos.checkpoint.report import CheckpointLayer, CheckpointReport
from yolo_sos.checkpoint.shift import CheckpointShift, shift_checkpoint
from yolo_sos.checkpoint.sweep import CheckpointSweep, Point, sweep_checkpoint
from yolo_sos.checkpoint.workbench import Workbench

__all__ = [
    "CheckpointLayer",
    "CheckpointReport",
    "CheckpointShift",
    "CheckpointSweep",
    "Point",
    "Workbench",
    "shift_checkpoint",
    "sweep_checkpoint",
]
