# yolo-sos, AGPL-3.0
"""Data sets that are built on first use and reused afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from yolo_sos.files import new_folder, write_text


def build_once(path: Path, record: str, options: Mapping[str, object], fill: Callable[[Path], None]) -> None:
    """Build a data set, unless it is there already with the same options.

    The folder appears when `fill` has written the set. Its file `record` keeps the options, what the set was made from
    and how, in JSON.

    Raises:
        FileExistsError: If `path` holds something else, be it the set with other options.
    """

    def is_built() -> bool:
        try:
            return json.loads((path / record).read_text(encoding="utf-8")) == json.loads(json.dumps(options))
        except (OSError, ValueError):
            return False

    if is_built():
        return
    try:
        with new_folder(path) as folder:
            fill(folder)
            write_text(folder / record, json.dumps(options, indent=2) + "\n")
    except FileExistsError:
        if not is_built():  # or else another process was faster, and its set is as good
            raise
