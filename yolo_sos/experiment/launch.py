# yolo-sos, AGPL-3.0
"""Execute runs in this process, one after another, or as tasks of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from yolo_sos.experiment.run import Run, execute

Outcome = tuple[Run, dict[str, Any] | Exception]
RETRIES = 3  # if a worker dies, the run resumes on another one from its last epoch


def local(runs: Iterable[Run]) -> Iterator[Outcome]:
    """Execute runs in this process, and yield each with its record or with the exception that it raised."""
    for run in runs:
        try:
            yield run, execute(run)
        except Exception as e:  # the experiment reports it, and the other runs go on
            yield run, e


def on_ray(runs: Iterable[Run]) -> Iterator[Outcome]:
    """Execute runs as tasks of the Ray cluster that ``RAY_ADDRESS`` names, or of one on this machine.

    A task takes one CPU and as many GPUs as its ``device`` names; where no device is named, one GPU if the cluster has
    any. Runs are yielded as they finish. A run can resume on another node only if every node sees its folder.
    """
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False)
    try:
        any_gpu = ray.cluster_resources().get("GPU", 0) > 0
        waiting = {}
        for run in runs:
            gpus = _gpus(run.device, any_gpu)
            # A task of Ray sees its own GPUs alone, counted from 0.
            placed = replace(run, device=",".join(map(str, range(gpus))) or "cpu", folder=run.folder.resolve())
            task = ray.remote(_execute_in).options(
                num_cpus=1, num_gpus=gpus, max_retries=RETRIES, name=f"{run.experiment} {run.name}"
            )
            waiting[task.remote(os.getcwd(), placed)] = run
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            run = waiting.pop(done)
            try:
                yield run, ray.get(done)
            except Exception as e:
                yield run, getattr(e, "cause", None) or e  # what the task raised, without the frames of Ray
    finally:
        if started:
            ray.shutdown()


def _execute_in(folder: str, run: Run) -> dict[str, Any]:
    os.chdir(folder)  # paths of data sets and models may be relative
    return execute(run)


def _gpus(device: str, any_gpu: bool) -> int:
    if device in {"", "None", "-1"}:
        return int(any_gpu)
    return 0 if device in {"cpu", "mps"} else len(device.strip("[]").split(","))


LAUNCHERS: dict[str, Callable[[Iterable[Run]], Iterator[Outcome]]] = {"local": local, "ray": on_ray}
