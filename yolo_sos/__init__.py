# yolo-sos, AGPL-3.0
"""Stochastic optimum shifting (SOS) for Ultralytics YOLO.

Importing this package loads neither torch nor ultralytics: what is public is imported when it is first asked for.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {  # name -> module
    "SOSConfig": "yolo_sos.config",
    "SOSClassificationTrainer": "yolo_sos.train",
    "SOSDetectionTrainer": "yolo_sos.train",
    "SOSOBBTrainer": "yolo_sos.train",
    "SOSPoseTrainer": "yolo_sos.train",
    "SOSSegmentationTrainer": "yolo_sos.train",
    "final_layers": "yolo_sos.heads",
    "shift_checkpoint": "yolo_sos.checkpoint",
    "shift_layers": "yolo_sos.core",
    "shift_model": "yolo_sos.core",
    "sweep_checkpoint": "yolo_sos.checkpoint",
}
__all__ = [
    "SOSClassificationTrainer",
    "SOSConfig",
    "SOSDetectionTrainer",
    "SOSOBBTrainer",
    "SOSPoseTrainer",
    "SOSSegmentationTrainer",
    "__version__",
    "final_layers",
    "shift_checkpoint",
    "shift_layers",
    "shift_model",
    "sweep_checkpoint",
]


def __getattr__(name: str):
    """Import a public name on first use (PEP 562)."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'yolo_sos' has no attribute '{name}'. Available: {', '.join(sorted(_PUBLIC))}")


def __dir__() -> list[str]:
    """List the lazy names too, so that completion shows them."""
    return sorted(__all__)
