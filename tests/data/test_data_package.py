"""What the package exports, and what that costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from yolo_sos import data


def test_public_names_are_those_of_their_modules():
    assert {"convert_voc", "read_annotation", "build_image_folder"} <= {*data.__all__}
    for name in data.__all__:
        assert getattr(data, name).__name__ == name
    with pytest.raises(AttributeError, match=r"no attribute 'convert_all'. Available: .*convert_voc"):
        data.convert_all  # noqa: B018


def test_reading_annotations_loads_nothing_heavy():
    code = (
        "import sys; from yolo_sos.data import read_annotation; print({'torch', 'ultralytics', 'cv2'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
