# yolo-sos, AGPL-3.0
"""Ultralytics trainers that shift."""

from yolo_sos.train.classify import SOSClassificationTrainer
from yolo_sos.train.detect import SOSDetectionTrainer
from yolo_sos.train.tasks import SOSOBBTrainer, SOSPoseTrainer, SOSSegmentationTrainer

TRAINERS = {  # by task
    "detect": SOSDetectionTrainer,
    "segment": SOSSegmentationTrainer,
    "pose": SOSPoseTrainer,
    "obb": SOSOBBTrainer,
    "classify": SOSClassificationTrainer,
}

__all__ = [
    "TRAINERS",
    "SOSClassificationTrainer",
    "SOSDetectionTrainer",
    "SOSOBBTrainer",
    "SOSPoseTrainer",
    "SOSSegmentationTrainer",
]
