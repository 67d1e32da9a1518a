# yolo-sos, AGPL-3.0
"""What to do when memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from ultralytics.utils import LOGGER

T = TypeVar("T")


def with_fewer(count: int, run: Callable[[int], T], what: str) -> tuple[T, int]:
    """Return ``run(count)``, with half as many as often as memory runs out; and how many it was done with.

    Args:
        count (int): How many are tried first.
        run (Callable): Takes the number.
        what (str): What they are, for the warning.
    """
    while True:
        try:
            return run(count), count
        except (RuntimeError, MemoryError) as e:
            text = str(e).lower()
            known = isinstance(e, MemoryError) or any(s in text for s in ("out of memory", "allocate memory"))
            if not known or count == 1:
                raise
        # Beyond the except block: the traceback, which holds the failed attempt's tensors, is gone.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        LOGGER.warning(f"Out of memory with {count} {what}: trying {count // 2}.")
        count //= 2
