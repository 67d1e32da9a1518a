# yolo-sos, AGPL-3.0
"""Two processes in Ultralytics' own loop, started by hand with torch.distributed.run; on the CPU, by gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Ultralytics knows DDP on GPUs alone: what it says of a device is left out, everything else is its own code.
BEFORE = """
import json, os, sys, traceback
from pathlib import Path
import torch
from torch import distributed as dist, nn
from ultralytics.utils.torch_utils import unwrap_model
from yolo_sos.trainers import SOSDetectionTrainer

class DDP(nn.parallel.DistributedDataParallel):
    def __init__(self, module, device_ids, **options):
        super().__init__(module, **options)

nn.parallel.DistributedDataParallel = DDP
folder, how, rank = Path(sys.argv[2]), sys.argv[3], os.environ["RANK"]

class TwoProcesses(SOSDetectionTrainer):
    def __init__(self, overrides):
        super().__init__(overrides=overrides)
        self.world_size, self.ddp = 2, False

    def _setup_ddp(self):
        dist.init_process_group("gloo")
"""
AFTER = """
try:
    trainer._do_train()
    error = None
except (Exception, KeyboardInterrupt) as e:
    traceback.print_exc()
    error = f"{type(e).__name__}: {e}"
(folder / f"{rank}.json").write_text(json.dumps({"told": told, "error": error}))
dist.barrier()  # a rank that leaves early breaks the connections of the other
dist.destroy_process_group()
# Everything tested is done. After an exception in the middle of an epoch, torch's background threads now and then abort
# the interpreter while it shuts down ("terminate called without an active exception").
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def run_two(code: str, settings: dict[str, Any], folder: Path, how: str) -> list[dict[str, Any]]:
    """Train in two processes, and return for each what it ``told`` and the ``error`` that ended it.

    Args:
        code (str): Makes a ``trainer``, of ``TwoProcesses``, with the settings in ``sys.argv[1]``, and ``told``.
        settings (dict): Of the training.
        folder (Path): Where the workers may write; ``folder`` in the code.
        how (str): ``how`` in the code.
    """
    script = folder / "worker.py"
    script.write_text(BEFORE + code + AFTER)
    # A port that is chosen by whoever binds it: one that is found free here may be taken by then.
    place = ["--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2"]
    given = [str(script), json.dumps(settings), str(folder), how]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *place, *given],
        **{"capture_output": True, "text": True, "timeout": 180, "env": {**os.environ, "OMP_NUM_THREADS": "1"}},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
