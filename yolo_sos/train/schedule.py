# yolo-sos, AGPL-3.0
"""When to shift: one pure function of the epoch."""

from __future__ import annotations

import math


def is_due(epoch: int, epochs: int, start: float, interval: int) -> bool:
    """Tell whether a shift is due at the end of an epoch.

    Args:
        epoch (int): The epoch that ends, counted from 0 as in the host's loop.
        epochs (int): Epochs of the whole run.
        start (float): Fraction of the epochs that are trained before the first shift, in [0, 1]; at least one epoch is.
        interval (int): Epochs from one shift to the next.

    Returns:
        (bool): True at the end of epoch ``ceil(start · epochs)`` (counted from 1) and every ``interval`` after it.
    """
    trained = epoch + 1
    # Rounded first: 0.1 · 30 is 3.0000000000000004.
    first = max(1, math.ceil(round(start * epochs, 6)))
    return trained >= first and (trained - first) % interval == 0
