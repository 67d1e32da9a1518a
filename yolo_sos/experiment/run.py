# yolo-sos, AGPL-3.0
"""One run of an experiment: begun, resumed, finished or only judged, whatever is left to do; it ends in a record."""

from __future__ import annotations

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

from yolo_sos.builtin import resolve_data, resolve_model
from yolo_sos.config import CHECKPOINT_KEY
from yolo_sos.core import weight_matrix
from yolo_sos.experiment.arms import Arm
from yolo_sos.experiment.judge import judge, judged_settings
from yolo_sos.experiment.record import difference, read_rows, wall_time
from yolo_sos.files import as_json, read_json, write_text
from yolo_sos.trainers import TRAINERS
from yolo_sos.versions import git_commit, versions
from yolo_sos.yolo import final_layers

BEGUN = "run.json"  # in a run's folder: the config that it was begun with
LOG = "log.txt"
LOCK = "run.lock"  # held, not merely there, while a process executes the run


class Busy(RuntimeError):
    """Another process is executing the run."""


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        experiment (str): Name of the experiment.
        arm (Arm): What to train with.
        seed (int): The ``seed`` of the training.
        folder (Path): Where the training goes.
        device (str): The ``device`` of training and validation, as Ultralytics takes it.
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
    def data(self) -> str:
        """The data set, as Ultralytics finds it."""
        return resolve_data(self.arm.settings["data"])

    @property
    def last(self) -> Path:
        """The checkpoint that a training resumes from."""
        return self.folder / "weights" / "last.pt"

    @property
    def best(self) -> Path:
        """The checkpoint that is judged: ``last.pt`` where Ultralytics has saved no ``best.pt``."""
        best = self.folder / "weights" / "best.pt"
        return best if best.exists() else self.last

    @property
    def epochs_done(self) -> int:
        """The epochs that are trained and saved; all of them once training has ended (see `train`)."""
        if not self.last.exists():
            return 0
        epoch = torch_load(self.last, map_location="cpu")["epoch"]
        return self.arm.config["epochs"] if epoch < 0 else epoch + 1

    def check(self) -> None:
        """Raise a ``ValueError`` if an epoch was trained and saved with other settings."""
        begun = self.folder / BEGUN
        if begun.exists() and self.last.exists():  # what failed before an epoch holds nothing to lose
            refuse_change(begun, "begun", read_json(begun), self.arm, "the folder")


def refuse_change(path: Path, done: str, config: dict[str, Any], arm: Arm, away: str) -> None:
    """Raise a ``ValueError`` if what an earlier run left has another config than the arm."""
    if key := difference(config, arm.config):
        change = f"{key}={config.get(key)}, now it is {arm.config.get(key)}"
        raise ValueError(f"{path}: was {done} with {change}. Move {away} away to start again.")


def execute(run: Run) -> dict[str, Any]:
    """Do what is left to do of a run and return its record.

    What Ultralytics prints goes to ``log.txt`` in the run's folder, with the traceback if it fails.

    Returns:
        (dict[str, Any]): See ``record.FIELDS``; ``metrics`` by split, ``norm2`` as `squared_norm` and ``shifted`` as
            `was_shifted` of the model judged, ``sos`` the lines of ``sos.csv``.

    Raises:
        Busy: If another process is executing the run.
        Exception: Whatever goes wrong in training or evaluation.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run.folder / LOCK).acquire(timeout=0)  # the system frees it if this process dies
    except Timeout as e:
        raise Busy(f"{run.folder}: another process is executing this run") from e
    with lock, logged(run.folder / LOG):
        run.check()
        # Read now, since the checkout may be another one when the run ends.
        origin = {"versions": versions(), "git_commit": git_commit(), "device": device_name(run.device)}
        train(run)
        settings = judged_settings(run.arm.config)
        metrics = {split: judge(run.best, run.data, split, device=run.device, **settings) for split in run.splits}
        return {
            "experiment": run.experiment,
            "arm": run.arm.name,
            "seed": run.seed,
            "metrics": metrics,
            "norm2": squared_norm(run.best),
            "shifted": was_shifted(run.best) if run.arm.config["sos"] else None,
            "wall_time": wall_time(run.folder / "results.csv"),
            **origin,
            "differences": list(run.arm.differences),
            "config": run.arm.config,
            "sos": read_rows(run.folder / "sos.csv"),
        }


def train(run: Run) -> None:
    """Train from the start or from the last epoch that was saved, and do what comes after the last epoch.

    Training has ended when Ultralytics has stripped ``last.pt`` of its optimizer, which sets its epoch to -1. Before
    that it may be that all epochs are trained and that a shift after the last one is still due.
    """
    if run.last.exists():
        saved = torch_load(run.last, map_location="cpu")
        if saved["epoch"] < 0:
            return
        model = YOLO(run.last)
        trainer: Any = TRAINERS[model.task]
        device = run.device
        if is_trained(saved):
            trainer, device = finishing(trainer), device.strip("[]").split(",")[0]  # no epoch to share between devices
        model.train(trainer=trainer, resume=True, device=device, data=run.data)
        return
    write_text(run.folder / BEGUN, as_json(run.arm.config))
    settings = {**run.arm.settings, "data": run.data}
    # By name, not from a YOLO object: Ultralytics decides what `pretrained` and `model` mean together.
    model = YOLO(resolve_model(settings.pop("model")), task=settings.pop("task", None))
    model.train(
        trainer=TRAINERS[model.task],
        **{**settings, "seed": run.seed, "device": run.device, "plots": settings.get("plots", False)},
        project=str(run.folder.parent.resolve()),
        name=run.folder.name,
        exist_ok=True,
    )


def is_trained(checkpoint: dict[str, Any]) -> bool:
    """Tell whether the epoch that a checkpoint was saved after was the run's last: the last planned or by patience."""
    args, done = checkpoint["train_args"], checkpoint["epoch"] + 1
    best_epoch = (checkpoint.get("stopper") or {}).get("best_epoch", 0)  # 0 if there was no validation yet
    stopped = bool(args["patience"] and best_epoch) and done - best_epoch >= args["patience"]
    return done >= args["epochs"] or stopped


def finishing(trainer: Any) -> Any:
    """Return a trainer that resumes a run after its last epoch, which Ultralytics refuses, and does what is left."""

    class FinishingTrainer(trainer):
        def resume_training(self, ckpt: dict[str, Any]) -> None:
            self.epochs += 1  # passes the check that an epoch is left to train
            super().resume_training(ckpt)
            self.epochs -= 1

        def _do_train(self) -> None:
            self._setup_train()
            self.epoch = self.start_epoch - 1  # the last epoch, counted from 0
            self.final_eval()
            if self.args.plots:
                self.plot_metrics()
            self.run_callbacks("on_train_end")
            for loader in (self.train_loader, self.test_loader):
                if hasattr(loader, "close"):
                    loader.close()

    return FinishingTrainer


def squared_norm(weights: Path) -> float | None:
    """Return ``Σ‖V‖_F²`` over the final linear layers of a checkpoint; None for a model that has none."""
    try:
        layers = final_layers(load_checkpoint(weights)[0])
    except TypeError:
        return None
    return sum(float(weight_matrix(layer.module).double().square().sum()) for layer in layers)


def was_shifted(weights: Path) -> bool | None:
    """Tell whether a shift that the guard accepted has reached a checkpoint; None for those of older releases."""
    shifts = (torch_load(weights, map_location="cpu").get(CHECKPOINT_KEY) or {}).get("shifts")
    return None if shifts is None else any(shift["step"] > 0 for shift in shifts)


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
    """Append what Ultralytics logs and prints to a file, and the traceback of what is raised."""
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
