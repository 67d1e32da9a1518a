# yolo-sos, AGPL-3.0
"""``yolo-sos experiment``: arms × seeds."""

from __future__ import annotations

from typing import Any

from yolo_sos.arguments import DEPRECATED, Argument, sos_arguments, ultralytics_arguments
from yolo_sos.cli.grammar import Mode, refusing

OWN = (
    Argument("name", None, "str", "an experiment of yolo-sos, such as voc/yolov5s, or a folder with default.yaml"),
    Argument("seeds", (0, 1, 2), "int | list", "seeds, with commas between them"),
    Argument("arms", None, "str | list", "arms to run, with commas between them; all if not given"),
    Argument("plan", False, "bool", "print the runs and how far they are, and train nothing"),
    Argument("launcher", "local", "str", "local, one run after another, or ray, a task per run on a Ray cluster"),
    Argument("splits", None, "str | list", "splits to judge on; val, and test if there is one, if not given"),
    Argument("device", None, "int | str | list", "as in Ultralytics"),
    Argument("project", "runs/experiments", "str", "folder of the trainings"),
    Argument("results", "results", "str", "folder of the records"),
)
# A run's own, or of no effect on it; the others are settings for all arms
LEFT_OUT = {"cfg", "exist_ok", "mode", "resume", "save_dir", "seed", *(argument.name for argument in OWN)}


def run(arguments: dict[str, Any]) -> int:
    """Execute the runs that are left; the exit status is 1 if one failed."""
    with refusing():
        from yolo_sos.experiment.grid import Experiment

        grid = Experiment(**arguments)
    with refusing(
        ValueError, OSError, ImportError
    ):  # of data that cannot be judged on; a failed run is told, not raised
        return int(grid.run() > 0)


MODE = Mode(
    "experiment",
    "train arms over seeds, and keep a record of each run",
    ["experiment voc/yolov5s seeds=0,1,2 device=0", "experiment digits arms=baseline,principal plan"],
    lambda: {
        "Arguments:": OWN,
        "Settings for all arms:": [a for a in (*sos_arguments(), *ultralytics_arguments()) if a.name not in LEFT_OUT],
    },
    run,
    word="name",
    also=[key for key in DEPRECATED if key not in LEFT_OUT],
    result="An experiment is a folder with default.yaml and a YAML of differences per arm. Finished runs are skipped, "
    "interrupted ones go on. The exit status is 1 if a run failed.",
)
