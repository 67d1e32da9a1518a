# yolo-sos, AGPL-3.0
"""What is not SOS: its peers (SAM and kin, SWA) and the recipe of its paper (mixup, learning rate steps, networks)."""

from yolo_sos.recipes.averaging import WeightAveraging
from yolo_sos.recipes.mixup import Mixup
from yolo_sos.recipes.schedule import SteppedLearningRate, step_factor
from yolo_sos.recipes.sharpness import SharpnessAware, frozen_statistics, perturbation

__all__ = [
    "Mixup",
    "SharpnessAware",
    "SteppedLearningRate",
    "WeightAveraging",
    "frozen_statistics",
    "perturbation",
    "step_factor",
]
