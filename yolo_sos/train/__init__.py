# yolo-sos, AGPL-3.0
"""Ultralytics trainers that shift."""

from yolo_sos.train.detect import SOSDetectionTrainer

TRAINERS = {"detect": SOSDetectionTrainer}  # by task

__all__ = ["TRAINERS", "SOSDetectionTrainer"]
