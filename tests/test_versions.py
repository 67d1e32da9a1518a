# yolo-sos, AGPL-3.0
"""The versions and the commit that records hold."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import cv2

from yolo_sos import versions as module


def test_versions_do_not_ask_which_distribution_opencv_is_of(monkeypatch):
    def version(name):
        if "opencv" in name:  # opencv-python-headless, or conda's
            raise PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(module, "version", version)
    found = module.versions()
    assert found["opencv"] == cv2.__version__ and found["torch"] == "1.2.3"


def test_the_commit_is_that_of_this_checkout():
    commit = module.git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40
