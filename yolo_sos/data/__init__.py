# yolo-sos, AGPL-3.0
"""Data sets: Pascal VOC read and converted, image folders, and those that are made on first use, such as the digits."""

from yolo_sos._lazy import lazy_exports

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {  # reading annotations needs neither OpenCV nor Ultralytics
        "convert": ("ConversionReport", "convert_voc"),
        "image_folder": ("build_image_folder",),
        "images": ("check_complete", "image_size"),
        "voc": ("VOCAnnotation", "VOCObject", "read_annotation", "read_image_set", "write_annotation"),
    },
)
