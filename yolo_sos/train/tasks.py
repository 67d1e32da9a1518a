# yolo-sos, AGPL-3.0
"""The tasks whose heads are Detect's with further branches: segmentation, pose, oriented boxes."""

from ultralytics.models.yolo.obb import OBBTrainer
from ultralytics.models.yolo.pose import PoseTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer

from yolo_sos.train.mixin import SOSMixin


class SOSSegmentationTrainer(SOSMixin, SegmentationTrainer):
    """Ultralytics' segmentation trainer with stochastic optimum shifting; mask coefficients are shifted too."""


class SOSPoseTrainer(SOSMixin, PoseTrainer):
    """Ultralytics' pose trainer with stochastic optimum shifting; the keypoints' layers are shifted too."""


class SOSOBBTrainer(SOSMixin, OBBTrainer):
    """Ultralytics' trainer for oriented boxes with stochastic optimum shifting; the angles' layers are shifted too."""
