# yolo-sos, AGPL-3.0
"""Checks of settings: each returns the value, or raises a ``ValueError`` that names the key and what would be right."""

from __future__ import annotations

import sys
from collections.abc import Callable
from difflib import get_close_matches
from reprlib import Repr
from typing import Any

Check = Callable[[str, Any], Any]

_REPR = Repr()
_REPR.maxlevel = 2  # a YAML file can hold a list that contains itself


def shown(value: Any) -> str:
    """Return a value as an error message shows it."""
    return str(value) if value is None or isinstance(value, (str, int, float)) else _REPR.repr(value)


def invalid(key: str, value: Any, right: str) -> ValueError:
    """Return the error for a wrong value; ``right`` completes “key must be …”."""
    return ValueError(f"'{key}={shown(value)}' is invalid: {key} must be {right}.")


def boolean(key: str, value: Any) -> bool:
    """Accept true or false."""
    if not isinstance(value, bool):
        raise invalid(key, value, "true or false")
    return value


def choice(*choices: str) -> Check:
    """Return a check that accepts one of ``choices``."""

    def check(key: str, value: Any) -> str:
        if value not in choices:
            near = get_close_matches(shown(value), choices, n=1, cutoff=0.0)[0]
            raise invalid(key, value, f"one of {', '.join(choices)}; nearest: {near}")
        return value

    return check


def number(right: str, accept: Callable[[Any], bool], *, integer: bool = False) -> Check:
    """Return a check that accepts a finite number for which ``accept`` is true; ``right`` says that in words."""

    def check(key: str, value: Any) -> Any:
        valid = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
        if not valid or not abs(value) <= sys.float_info.max or not accept(value):  # NaN fails this comparison
            raise invalid(key, value, right)
        return value if integer else float(value)

    return check


def at_least(least: int) -> Check:
    """Return a check that accepts an integer of at least ``least``."""
    return number(f"an integer of at least {least}", lambda x: x >= least, integer=True)


def optional(check: Check) -> Check:
    """Return a check that also accepts None, or the word ``none``: YAML knows ``null``, users write ``none``."""
    return lambda key, value: None if shown(value).lower() == "none" else check(key, value)


def rank(key: str, value: Any) -> int | float:
    """Accept an integer of at least 1, or a float in (0, 1], a fraction of the layer's input size."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not valid or not (value >= 1 if isinstance(value, int) else 0.0 < value <= 1.0):
        raise invalid(key, value, "an integer of at least 1, or a fraction of d: a float above 0 and up to 1.0")
    return value


budget = number("a number of at least 0 and less than 1", lambda x: 0 <= x < 1)
up_to_1 = number("a number above 0 and up to 1", lambda x: 0 < x <= 1)
start = number("a number from 0 to 1", lambda x: 0 <= x <= 1)
interval = at_least(1)
guard = optional(number("a number of at least 0, or none", lambda x: x >= 0))
