# yolo-sos, AGPL-3.0
"""Data sets: Pascal VOC read and converted, image folders, and those that are made on first use, such as the digits."""

from yolo_sos._lazy import lazy_exports

_MODULES = {  # public name → module: reading annotations needs neither OpenCV nor Ultralytics
    **dict.fromkeys(("VOCAnnotation", "VOCObject", "read_annotation", "read_image_set", "write_annotation"), "voc"),
    **dict.fromkeys(("ConversionReport", "convert_voc"), "convert"),
    **dict.fromkeys(("check_complete", "image_size"), "images"),
    "build_image_folder": "image_folder",
}
__all__ = sorted(_MODULES)
__getattr__, __dir__ = lazy_exports(__name__, {name: f"{__name__}.{module}" for name, module in _MODULES.items()})
