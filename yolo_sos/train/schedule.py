# yolo-sos, AGPL-3.0
"""When to shift, and the learning rate's steps: pure functions of the epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence


def is_due(trained: int, epochs: int, start: float, interval: int) -> bool:
    """Tell whether a shift is due.

    Args:
        trained (int): Epochs that have been trained: 0 before the first one, ``epochs`` at the end of the last.
        epochs (int): Epochs of the whole run.
        start (float): Fraction of the epochs that are trained before the first shift, in [0, 1].
        interval (int): Epochs from one shift to the next.

    Returns:
        (bool): True after ``ceil(start · epochs)`` epochs and every ``interval`` from there on.
    """
    first = math.ceil(round(start * epochs, 6))  # rounded first: 0.1 · 30 is 3.0000000000000004
    return trained >= first and (trained - first) % interval == 0


def step_factor(epoch: int, epochs: int, steps: Sequence[float]) -> float:
    """Return the factor of the learning rate in an epoch.

    Args:
        epoch (int): The epoch, counted from 0 as in the host's loop.
        epochs (int): Epochs of the whole run.
        steps (Sequence[float]): Fractions of the epochs after which the learning rate is divided by 10, each in (0, 1).

    Returns:
        (float): ``10⁻ᵏ`` after k of the steps.
    """
    return 0.1 ** sum(epoch >= round(step * epochs, 6) for step in steps)  # rounded as above
