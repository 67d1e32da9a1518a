# yolo-sos, AGPL-3.0
"""Detection with SOS."""

from ultralytics.models.yolo.detect import DetectionTrainer

from yolo_sos.train.mixin import SOSMixin


class SOSDetectionTrainer(SOSMixin, DetectionTrainer):
    """Ultralytics' detection trainer with stochastic optimum shifting.

    Examples:
        >>> from ultralytics import YOLO
        >>> YOLO("yolov5s.pt").train(trainer=SOSDetectionTrainer, data="VOC.yaml", sos=True)
    """
