# yolo-sos, AGPL-3.0
"""Data sets, models and experiments that come with yolo-sos, by name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries cfg/ inside the package; in a checkout it lies beside it.
CFG_DIR = _PACKAGE / "cfg" if (_PACKAGE / "cfg").is_dir() else _PACKAGE.parent / "cfg"
# Classification sets are folders: those that come along are built in Ultralytics' datasets directory on first use.
BUILDERS = {"digits-cls": "yolo_sos.data.digits_cls"}


def resolve_data(data: Any) -> Any:
    """Return the path of a data set that comes with yolo-sos: ``digits.yaml``, or ``digits-cls``, built on first use.

    Anything else is returned as it is. A file or folder of that name in the working directory takes precedence, as
    everywhere in Ultralytics.
    """
    if isinstance(data, str) and data in BUILDERS and not Path(data).exists():
        return str(import_module(BUILDERS[data]).build())
    return _resolve("datasets", data)


def resolve_model(model: Any) -> Any:
    """Return the path of a model YAML that comes with yolo-sos, such as ``resnet18-cifar.yaml``; else as it is."""
    return _resolve("models", model)


def resolve_cfg(cfg: Any) -> Any:
    """Return the path of an experiment that comes with yolo-sos, such as ``cifar/rows.yaml``; else as it is."""
    return _resolve("experiments", cfg)


def _resolve(folder: str, name: Any) -> Any:
    if isinstance(name, str) and Path(name).suffix in {"", ".yaml"} and not Path(name).exists():
        path = (CFG_DIR / folder / name).with_suffix(".yaml")
        if path.is_file():
            return str(path)
    return name
