# yolo-sos, AGPL-3.0
"""The trade-off curve of a checkpoint: every method over its range, from one pass over the images."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER, TQDM

from yolo_sos.core import OK, Method, Shift
from yolo_sos.files import write_text
from yolo_sos.yolo.job import ShiftJob, deviations, heldout_moments
from yolo_sos.yolo.sweep_report import Point, csv_of, plot, summary
from yolo_sos.yolo.training import PREFIX

RANKS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)  # fractions of d
BUDGETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


def trials_of(
    weightings: Iterable[str],
    *,
    task: str = "detect",
    ranks: Sequence[float] = RANKS,
    solver: str = "svd",
    draws: int = 1,
    seed: int = 0,
) -> list[tuple[Method, int]]:
    """Return every method over its range, with the seeds of the drawings; of a classifier all but ``loss``."""
    trials: list[tuple[Method, int]] = []
    if task != "classify":  # whose moments of one class each are too large
        trials += [(Method("loss", r), seed) for r in ranks]
    for w in weightings:
        trials.append((Method("full", weighting=w), seed))
        trials += [(Method(name, r, weighting=w), seed) for name in ("principal", "expected") for r in ranks]
        trials += [(Method("budget", budget=b, weighting=w), seed) for b in BUDGETS]
        trials += [(Method("rows", r, solver=solver, weighting=w), seed + k) for r in ranks for k in range(draws)]
    return trials


def trace(
    job: ShiftJob, trials: Sequence[tuple[Method, int]], splits: Sequence[str]
) -> tuple[list[Point], dict[str, float]]:
    """Return the points of ``trials`` at full steps, the baseline first, and the seconds that each part took.

    Seconds: ``images`` (the pass over them, held-out ones included), ``algebra`` (solving, held-out losses and
    deviations), ``validation`` (of the model as it is, all splits) and ``points`` (scoring all others beside it).

    Raises:
        ValueError: If a layer cannot be solved; names the method and why.
    """
    start = time.perf_counter()
    engine = job.fitted(trials)
    heldout = engine.hold_out(job.images.batches("heldout"))
    moments = heldout_moments(job.layers, heldout)
    seconds = {"images": time.perf_counter() - start, "algebra": 0.0, "validation": 0.0, "points": 0.0}
    start = time.perf_counter()
    shifts = [engine.solve(method, seed) for method, seed in trials]
    points = [Point("baseline", "", math.nan, 0, 1.0, math.nan, 0.0, 0.0, heldout.before, {})]
    for shift in TQDM(shifts, desc="held-out loss", unit="point"):
        if shift.status != OK:
            raise ValueError(f"{shift.method}: {shift.status}.")
        changes = deviations(job.layers, moments, shift.weights()).values()
        figures = shift.squared_norm_ratio, shift.rank, shift.deviation, sum(changes) / len(changes)
        points.append(Point(*_name(shift), *figures, heldout.loss(shift.weights()), {}))
    seconds["algebra"] = time.perf_counter() - start
    for split in splits:
        seen = job.score([shift.weights() for shift in shifts], split)
        for point, scores in zip(points, seen.metrics, strict=True):
            point.metrics[split] = scores
        seconds = {k: v + seen.seconds.get(k, 0.0) for k, v in seconds.items()}
    return points, seconds


def _name(shift: Shift) -> tuple[str, str, float, int]:
    method = shift.method
    setting = {"budget": method.budget, "full": math.nan}.get(method.name, method.rank)
    return method.name, method.weighting, setting, shift.seed


class CheckpointSweep(ShiftJob):
    """A sweep over a checkpoint, checked and ready to ``run``. See ``sweep_checkpoint``."""

    draws = 3
    names = ("{}-sweep.csv", "{}-sweep.png")

    def __init__(self, *args: Any, **options: Any):
        """Refuse what a sweep goes through, then check the rest."""
        for key in options:
            if key.removeprefix("sos_") in {"method", "rank", "budget", "guard"}:
                raise ValueError(f"'{key}' has no effect with sweep=true, which goes through all of them, unguarded.")
        super().__init__(*args, **options)

    def run(self) -> list[Point]:
        """Run the images, solve, score, and write ``{stem}-sweep.csv`` and ``{stem}-sweep.png``.

        Returns:
            (list[Point]): The baseline, then the curve.
        """
        c, table, picture = self.config, *self.outputs
        own = {"solver": c.sos_solver, "draws": self.draws, "seed": self.seed}
        trials = trials_of([c.sos_weighting], task=self.checkpoint.task, **own)
        points, seconds = trace(self, trials, self.splits)
        write_text(table, csv_of(points))
        plot(points, picture)
        LOGGER.info(f"\n{summary(points)}\n\n{PREFIX}{len(points) - 1} points: {cost(seconds)}")
        LOGGER.info(f"{PREFIX}wrote {table} and {picture}")
        return points


def cost(seconds: dict[str, float]) -> str:
    """Return what a sweep cost, in words, against one validation."""
    one = seconds["validation"]
    total = sum(seconds.values())
    parts = ", ".join(f"{k} {v:.1f} s" for k, v in seconds.items())
    return f"{total:.1f} s in all ({parts})" + (f", that is {total / one:.1f} validations" if one else "")


def sweep_checkpoint(model: str | Path, data: str | Path | None = None, **options: Any) -> list[Point]:
    """Trace what every method does to a trained checkpoint, and write ``{stem}-sweep.csv`` and ``.png`` beside it.

    The images run through the model once; each point is algebra on the last layers, and of a validation only what
    follows them. The checkpoint itself is not written. The log ends with the strongest setting of each method that
    keeps held-out loss and mAP, see ``yolo_sos.yolo.sweep_report.choices``.

    Args:
        model (str | Path): A checkpoint of Ultralytics.
        data (str | Path, optional): The data set. None: the one that the model was trained on.
        **options (Any): As ``shift_checkpoint``, except for ``method``, ``rank``, ``budget`` and ``guard``, which the
            sweep goes through; ``draws`` is 3 by default.

    Returns:
        (list[Point]): The model as it is, then a point per method and setting.

    Raises:
        ValueError, TypeError, OSError: As ``shift_checkpoint``.
    """
    return CheckpointSweep(model, data, **options).run()
