# yolo-sos, AGPL-3.0
"""Data sets: Pascal VOC read and converted, image folders, and those that are made on first use, such as the digits."""

from importlib import import_module
from typing import Any

_HOME = {  # a public name to its module: reading annotations needs neither OpenCV nor Ultralytics
    **dict.fromkeys(("VOCAnnotation", "VOCObject", "read_annotation", "read_image_set", "write_annotation"), "voc"),
    **dict.fromkeys(("ConversionReport", "convert_voc"), "convert"),
    **dict.fromkeys(("check_complete", "image_size"), "images"),
    "build_image_folder": "image_folder",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'. Available: {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
