# yolo-sos, AGPL-3.0
"""The host, kept off the network and out of the user's settings, and what several tests train on."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

# Read by the host when it is first imported, in this process and in those that tests start: before any test module.
HOME = Path(tempfile.mkdtemp(prefix="yolo-sos-tests-"))
os.environ["YOLO_OFFLINE"] = "true"
os.environ["YOLO_CONFIG_DIR"] = str(HOME)

TINY = """\
# 325 000 parameters, strides 8, 16 and 32: an epoch of 24 images takes a tenth of a second
nc: 10
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, Conv, [48, 3, 2]]
  - [-1, 1, Conv, [64, 3, 2]]
head:
  - [[2, 3, 4], 1, Detect, [nc]]
"""


def configure_host(home: Path, **settings) -> Path:
    """Write the host's settings, and a font under the name of the one that it would download, into a folder.

    Returns:
        (Path): The folder, which YOLO_CONFIG_DIR is to name.
    """
    folder = home / "Ultralytics"
    folder.mkdir(parents=True)
    places = {f"{name}_dir": str(home / name) for name in ("datasets", "weights", "runs")}
    (folder / "settings.json").write_text(json.dumps({**places, "sync": False, **settings}))
    matplotlib = find_spec("matplotlib")
    assert matplotlib is not None and matplotlib.origin is not None
    for name in "Arial.ttf", "Arial.Unicode.ttf":
        shutil.copy(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", folder / name)
    return home


configure_host(HOME)


def pytest_unconfigure():
    """Leave nothing behind."""
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def activation():
    """The activation of convolutions whose model's YAML asks for none."""
    from ultralytics.nn.modules import Conv

    return Conv.default_act


@pytest.fixture(autouse=True)
def default_activation(activation):
    """Older releases of the host leave what one model's YAML asks for to all later models: ReLU, after a YOLOv6."""
    from ultralytics.nn.modules import Conv

    yield
    Conv.default_act = activation


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The data YAML of 24 + 8 + 8 images of 64 x 64 pixels."""
    from yolo_sos.data.digits import build

    return build(tmp_path_factory.mktemp("digits") / "set", train=24, val=8, test=8, imgsz=64, digits=(1, 3))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The YAML of a detector that trains in no time."""
    path = tmp_path_factory.mktemp("models") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def host_home():
    """``host_home(folder, **settings)`` makes a folder for YOLO_CONFIG_DIR with settings of the host in it."""
    return configure_host
