# yolo-sos, AGPL-3.0
"""One run of an experiment: begun, resumed or only judged, whatever is left to do; it ends in a record."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from ultralytics import YOLO
from ultralytics.data.utils import check_cls_dataset, check_det_dataset
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER
from ultralytics.utils.patches import torch_load
from ultralytics.utils.torch_utils import get_cpu_info, get_gpu_info, select_device

from yolo_sos.config import resolve_data, resolve_model
from yolo_sos.core.layers import weight_matrix
from yolo_sos.experiment.arms import Arm
from yolo_sos.experiment.judge import judge
from yolo_sos.experiment.record import difference, git_commit, shifts, versions, wall_time
from yolo_sos.files import read_json, write_text
from yolo_sos.heads import final_layers
from yolo_sos.train import TRAINERS

BEGUN = "run.json"  # in a run's folder: what it was begun with
LOG = "log.txt"
LOCK = "run.lock"  # held, not merely there, while a process is at the run


class Busy(RuntimeError):
    """Another process is at the run."""


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        experiment (str): Name of the experiment.
        arm (Arm): What to train with.
        seed (int): The host's ``seed``.
        folder (Path): Where the training goes.
        device (str): The host's ``device``.
        splits (tuple[str, ...]): What to judge the model on, such as ``val`` and ``test``.
    """

    experiment: str
    arm: Arm
    seed: int
    folder: Path
    device: str = ""
    splits: tuple[str, ...] = ("val", "test")

    @property
    def name(self) -> str:
        """Arm and seed, as files and folders are called."""
        return f"{self.arm.name}-{self.seed}"

    @property
    def last(self) -> Path:
        """The checkpoint that a training resumes from."""
        return self.folder / "weights" / "last.pt"

    @property
    def best(self) -> Path:
        """The checkpoint that is judged: the last one where no epoch was better than nothing."""
        best = self.folder / "weights" / "best.pt"
        return best if best.exists() else self.last

    @property
    def epochs_done(self) -> int:
        """The epochs that are trained and saved; all of them once the host has stripped the checkpoint."""
        if not self.last.exists():
            return 0
        epoch = torch_load(self.last, map_location="cpu")["epoch"]
        return self.arm.config["epochs"] if epoch < 0 else epoch + 1

    def check(self) -> None:
        """Raise a ``ValueError`` if the run was begun with other settings."""
        begun = self.folder / BEGUN
        if not begun.exists():
            return
        config = read_json(begun)
        if key := difference(config, self.arm.config):
            raise ValueError(
                f"{begun}: was begun with {key}={config.get(key)}, now it is {self.arm.config.get(key)}. "
                "Move the folder away to start again."
            )


def execute(run: Run) -> dict[str, Any]:
    """Do what is left to do of a run and return its record.

    What the host prints goes to ``log.txt`` in the run's folder, with the traceback if it fails.

    Returns:
        (dict[str, Any]): See ``record.KEYS``; ``metrics`` by split, ``norm2`` as ``squared_norm`` of the model judged,
            ``sos`` the lines of ``sos.csv``.

    Raises:
        Busy: If another process is at the run.
        Exception: Whatever goes wrong in training or evaluation.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run.folder / LOCK).acquire(timeout=0)  # the system frees it if we die
    except Timeout as e:
        raise Busy(f"{run.folder}: another process is at this run") from e
    with lock, logged(run.folder / LOG):
        run.check()
        # Taken now: the checkout may be another one when the run ends.
        begun = {"versions": versions(), "git_commit": git_commit(), "device": device_name(run.device)}
        train(run)
        metrics = {split: evaluate(run, split) for split in run.splits}
        norm2 = squared_norm(run.best)
    return {
        "experiment": run.experiment,
        "arm": run.arm.name,
        "seed": run.seed,
        "metrics": metrics,
        "norm2": norm2,
        "wall_time": wall_time(run.folder / "results.csv"),
        **begun,
        "differences": list(run.arm.differences),
        "config": run.arm.config,
        "sos": shifts(run.folder / "sos.csv"),
    }


def train(run: Run) -> None:
    """Train from the start, from the last epoch that was saved, or not at all if all epochs are."""
    done = run.epochs_done
    if done >= run.arm.config["epochs"]:
        return
    if done:
        model = YOLO(run.last)
        model.train(trainer=TRAINERS[model.task], resume=True, device=run.device, data=data_of(run))
        return
    write_text(run.folder / BEGUN, json.dumps(run.arm.config, indent=1) + "\n")
    settings = {**run.arm.settings, "data": data_of(run)}
    # By name, not from a YOLO object: what `pretrained` and `model` mean is the host's to say.
    model = YOLO(resolve_model(settings.pop("model")), task=settings.pop("task", None))
    model.train(
        trainer=TRAINERS[model.task],
        **{**settings, "seed": run.seed, "device": run.device, "plots": settings.get("plots", False)},
        project=str(run.folder.parent.resolve()),
        name=run.folder.name,
        exist_ok=True,
    )


def evaluate(run: Run, split: str) -> dict[str, float]:
    """Return the metrics of ``best.pt`` on a split."""
    config = run.arm.config
    return judge(
        run.best,
        data_of(run),
        split,
        task=config["task"],
        imgsz=config["imgsz"],
        batch=config["batch"],
        device=run.device,
    )


def squared_norm(weights: Path) -> float | None:
    """Return ``Σ‖V‖_F²`` over the final linear layers of a checkpoint; None for a model that has none."""
    try:
        layers = final_layers(load_checkpoint(weights)[0])
    except TypeError:
        return None
    return sum(float(weight_matrix(layer.module).double().square().sum()) for layer in layers)


def data_of(run: Run) -> str:
    """Return the data set as the host finds it."""
    return resolve_data(run.arm.settings["data"])


def available_splits(task: str, data: str) -> list[str]:
    """Return the splits that a data set has, of val and test; gets the data set if it is not there yet."""
    found = (check_cls_dataset if task == "classify" else check_det_dataset)(data)
    return [split for split in ("val", "test") if found.get(split)]


def device_name(device: str) -> str:
    """Return what a run runs on, in words."""
    chosen = select_device(device, verbose=False)
    if chosen.type == "cuda":
        return get_gpu_info(chosen.index or 0)
    return f"{get_cpu_info()}, {torch.get_num_threads()} threads" if chosen.type == "cpu" else str(chosen)


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Send what the host logs and prints to the end of a file, and the traceback of what is raised."""
    with open(path, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        handlers = [h for h in LOGGER.handlers if isinstance(h, logging.StreamHandler)]
        streams = [handler.setStream(file) for handler in handlers]
        try:
            yield
        except BaseException:
            traceback.print_exc(file=file)
            raise
        finally:
            for handler, stream in zip(handlers, streams, strict=True):
                handler.setStream(stream)
