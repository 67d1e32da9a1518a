# yolo-sos, AGPL-3.0
"""The grid on a local Ray of two workers, one of which dies half way."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import pytest
from test_grid import epochs

from yolo_sos.experiment.grid import Experiment
from yolo_sos.experiment.record import read_record

ray = pytest.importorskip("ray", reason="pip install 'yolo-sos[ray]'")
pytestmark = pytest.mark.slow


@pytest.fixture
def two_workers():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def kill_a_worker(checkpoint: Path, killed: list[int]) -> None:
    """Wait until a run has saved an epoch, then kill the process that trains it."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not checkpoint.exists():
        time.sleep(0.05)
    for process in psutil.Process().children(recursive=True):
        folder = str(checkpoint.parents[1])
        if any(file.path.startswith(folder) for file in process.open_files()):  # its log
            process.kill()
            killed.append(process.pid)


def test_a_worker_that_dies_half_way_costs_nothing(experiment, two_workers):
    grid = Experiment("little", seeds=(0, 1), launcher="ray", splits="val", epochs=6)
    victim = next(run for run in grid.runs if run.name == "shift-0")
    killed: list[int] = []
    watcher = threading.Thread(target=kill_a_worker, args=(victim.last.resolve(), killed))
    watcher.start()
    assert grid.run() == 0
    watcher.join()
    assert len(killed) == 1
    records = [read_record(path) for path in Path("results/little/records").glob("*.json")]
    assert sorted(f"{r['arm']}-{r['seed']}" for r in records) == ["baseline-0", "baseline-1", "shift-0", "shift-1"]
    for run in grid.runs:
        assert epochs(run.folder) == [1, 2, 3, 4, 5, 6]
    assert "Resuming training" in (victim.folder / "log.txt").read_text()


def test_a_run_that_fails_on_ray_is_told(experiment, two_workers):
    (experiment / "broken.yaml").write_text("cfg: default.yaml\nsos: true\nsos_layers: [mask]\n")
    grid = Experiment("little", seeds=0, arms="baseline,broken", launcher="ray", splits="val")
    assert grid.run() == 1
    assert [path.stem for path in Path("results/little/records").glob("*.json")] == ["baseline-0"]
