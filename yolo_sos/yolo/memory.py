# yolo-sos, AGPL-3.0
"""Try again with fewer images when memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from ultralytics.utils import LOGGER

T = TypeVar("T")


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether Python, a GPU (the first text) or the CPU's allocator (the others) had no memory left."""
    texts = "out of memory", "allocate memory", "not enough memory"
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


def with_fewer(count: int, run: Callable[[int], T], what: str) -> tuple[T, int]:
    """Return ``run(count)`` and the count, which is halved as often as memory runs out.

    Args:
        count (int): How many are tried first.
        run (Callable): Takes the number.
        what (str): What they are, for the warning.
    """
    while True:
        try:
            return run(count), count
        except (RuntimeError, MemoryError) as e:
            if count == 1 or not is_out_of_memory(e):
                raise
        # Outside the except block: the traceback, which holds the failed attempt's tensors, is gone.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        LOGGER.warning(f"Out of memory with {count} {what}: trying {count // 2}.")
        count //= 2
