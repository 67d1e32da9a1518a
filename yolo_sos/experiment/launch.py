# yolo-sos, AGPL-3.0
"""Where runs are executed: here, one after another, or as tasks of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from yolo_sos.experiment.run import Run, execute

Outcome = tuple[Run, dict[str, Any] | Exception]


def local(runs: Sequence[Run]) -> Iterator[Outcome]:
    """Execute runs in this process and yield each with its record, or with what it raised."""
    for run in runs:
        try:
            yield run, execute(run)
        except Exception as e:  # told by the grid; the others go on
            yield run, e


LAUNCHERS: dict[str, Callable[[Sequence[Run]], Iterator[Outcome]]] = {"local": local}
