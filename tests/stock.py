# yolo-sos, AGPL-3.0
"""A process where yolo_sos cannot be imported: what a stock Ultralytics makes of our checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BEFORE = """
import json, sys

class Absent:
    # What is asked for, and is not there
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "yolo_sos":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
try:
    import yolo_sos
    raise SystemExit("yolo_sos is there")
except ModuleNotFoundError:
    pass
"""
AFTER = """
assert not [name for name in sys.modules if name.split(".")[0] == "yolo_sos"]
"""


def run_stock(code: str, *args: str | Path, cwd: Path) -> Any:
    """Run code without yolo_sos in a folder; return what its last line of output says, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + code + AFTER, *map(str, args)],
        **{"capture_output": True, "text": True, "cwd": cwd},
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
