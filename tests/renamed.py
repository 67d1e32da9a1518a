# yolo-sos, AGPL-3.0
"""The digits under names that no model knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

NAMES = {k: f"digit {k}" for k in range(10)}


def renamed_data(data: Path, folder: Path, **changes: Any) -> Path:
    """Write a data YAML like another but for the names of its classes, and for ``changes``, into a folder."""
    path = folder / f"renamed{len(list(folder.glob('renamed*')))}.yaml"
    content = {"path": str(data.parent), **yaml.safe_load(data.read_text()), "names": NAMES, **changes}
    path.write_text(yaml.safe_dump(content))
    return path
