# yolo-sos, AGPL-3.0
"""``yolo-sos experiment``: arms × seeds. Finished runs are skipped and interrupted ones resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from ultralytics.utils import LOGGER, TQDM, colorstr

from yolo_sos.arguments import several
from yolo_sos.core.checks import boolean, choice, invalid
from yolo_sos.experiment.arms import find_experiment, read_arms
from yolo_sos.experiment.judge import check_judgement, judged_settings
from yolo_sos.experiment.launch import LAUNCHERS
from yolo_sos.experiment.record import read_record, record_path, wall_time, write_record
from yolo_sos.experiment.run import Busy, Run, available_splits, refuse_change

PREFIX = colorstr("experiment: ")


class Experiment:
    """The runs of an experiment, with everything checked before anything is trained.

    Args:
        name (str): An experiment of yolo-sos, such as ``voc/yolov5s``, or a folder that holds ``default.yaml``.
        seeds (int | Sequence[int]): The seeds.
        arms (str | Sequence[str], optional): The arms to run. None: all.
        plan (bool): Print the runs and their states, and train nothing.
        launcher (str): ``local``, one run after another in this process, or ``ray``.
        splits (str | Sequence[str], optional): What to judge on. None: val, and test if the data set has it.
        device (str | int | list, optional): The ``device`` of trainings, as Ultralytics takes it.
        project (str): Folder of the trainings.
        results (str): Folder of the records.
        **overrides (Any): Settings for all arms, which replace those of ``default.yaml``.

    Raises:
        ValueError: If a setting is wrong, or an earlier run was made with other settings.
        FileNotFoundError: If there is no such experiment.
    """

    def __init__(
        self,
        name: str,
        seeds: int | Sequence[int] = (0, 1, 2),
        arms: str | Sequence[str] | None = None,
        plan: bool = False,
        launcher: str = "local",
        splits: str | Sequence[str] | None = None,
        device: Any = None,
        project: str = "runs/experiments",
        results: str = "results",
        **overrides: Any,
    ):
        """Check everything that can be checked without the data."""
        self.plan, self.launcher = boolean("plan", plan), choice(*LAUNCHERS)("launcher", launcher)
        if launcher == "ray" and find_spec("ray") is None:
            raise ValueError("launcher=ray needs Ray. Install it with: pip install 'yolo-sos[ray]'")
        folder = find_experiment(name)
        path = Path(name)  # records bear the name as it was given, or that of the folder where it lies elsewhere
        self.name = folder.name if path.is_absolute() or ".." in path.parts else path.as_posix()
        self.results = Path(results)
        self.splits = None if splits is None else tuple(several("splits")("splits", splits))
        for split in self.splits or ():
            if split not in {"train", "val", "test"}:
                raise invalid("splits", split, "of train, val, test")
        chosen = read_arms(folder, None if arms is None else several("arms")("arms", arms), overrides)
        for arm in chosen.values():
            judged_settings(arm.config)  # raises if a record could not judge as the training validates
        given = ("0" if device == 0 else device) or next(iter(chosen.values())).settings.get("device") or ""
        self.runs = [
            Run(self.name, arm, seed, Path(project) / self.name / f"{arm.name}-{seed}", str(given), self.splits or ())
            for seed in _seeds(seeds)  # all arms of a seed first, so that there are early pairs to compare
            for arm in chosen.values()
        ]
        self.finished = [run for run in self.runs if self._is_finished(run)]
        for run in self.runs:
            if run not in self.finished:
                run.check()

    def _is_finished(self, run: Run) -> bool:
        path = self.record_path(run)
        if not path.exists():
            return False
        record = read_record(path)
        refuse_change(path, "run", record["config"], run.arm, "the record and its run")
        return set(run.splits) <= set(record["metrics"])

    def record_path(self, run: Run) -> Path:
        """Return where the record of a run lies."""
        return record_path(self.results, run.experiment, run.arm.name, run.seed)

    def run(self) -> int:
        """Execute the runs that are not finished; skip those that another process executes.

        Returns:
            (int): The number of runs that failed.

        Raises:
            FileNotFoundError: If a data set cannot be had, or lacks a split, an image or an annotation.
            ValueError: If a data set cannot be judged on, so that training on it would be in vain.
        """
        waiting = [run for run in self.runs if run not in self.finished]
        LOGGER.info(f"{PREFIX}{self.name}: {len(self.runs)} runs, {len(self.finished)} finished, {self.estimate()}")
        if self.plan:
            for run in self.runs:
                LOGGER.info(f"{run.name:<32}{self.state(run)}")
            return 0
        if not waiting:
            return 0
        if self.splits is None:
            found = tuple(available_splits(waiting[0].arm.config["task"], waiting[0].data))
            waiting = [replace(run, splits=found) for run in waiting]
        judgements = [(run.data, split, judged_settings(run.arm.config)) for run in waiting for split in run.splits]
        for i, (data, split, settings) in enumerate(judgements):
            if judgements[i] not in judgements[:i]:  # most arms are judged alike
                check_judgement(data, split, **settings)
        failed, elsewhere = [], []
        bar = TQDM(total=len(self.runs), initial=len(self.finished), desc=self.name)
        left = (run for run in waiting if not self._is_finished(run))  # another process may have finished it meanwhile
        for run, outcome in LAUNCHERS[self.launcher](left):
            if isinstance(outcome, Busy):
                elsewhere.append(run.name)
                LOGGER.info(f"{PREFIX}{outcome}")
            elif isinstance(outcome, Exception):
                failed.append(f"{run.name}: {type(outcome).__name__}: {outcome}. See {run.folder / 'log.txt'}")
                LOGGER.error(f"{PREFIX}{failed[-1]}")
            else:
                write_record(self.record_path(run), outcome)
            bar.set_description(f"{self.name} {run.name}{f', {len(failed)} failed' if failed else ''}")
            bar.update(1)
        bar.close()
        done = len(self.runs) - len(failed) - len(elsewhere)
        left_to = f", {len(elsewhere)} left to others" if elsewhere else ""
        LOGGER.info(f"{PREFIX}{done} of {len(self.runs)} runs finished{left_to}. Table: yolo-sos table {self.name}")
        return len(failed)

    def state(self, run: Run) -> str:
        """Return the state of a run in words."""
        if run in self.finished:
            return "finished"
        return f"{done} of {run.arm.config['epochs']} epochs" if (done := run.epochs_done) else "to do"

    def estimate(self) -> str:
        """Return in words how long the rest will take, one run after another, by the times of earlier runs."""
        seconds = [read_record(self.record_path(run))["wall_time"] for run in self.finished]
        left = 0.0
        for run in (run for run in self.runs if run not in self.finished):
            share = run.epochs_done / run.arm.config["epochs"]
            left += 1 - share
            if share and (csv := run.folder / "results.csv").exists():
                seconds.append(wall_time(csv) / share)
        if not seconds:
            return "no estimate of time before one run has trained an epoch"
        return f"about {left * median(seconds) / 3600:.1f} h left, one after another"


def _seeds(value: int | Sequence[int]) -> tuple[int, ...]:
    seeds = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise invalid("seeds", value, "different integers of at least 0, such as 0,1,2")
    return seeds
