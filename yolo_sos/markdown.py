# yolo-sos, AGPL-3.0
"""Tables in Markdown that are tables to the eye, too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean


def markdown_table(lines: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """Return a table with its columns aligned.

    Args:
        lines (Sequence[Sequence[str]]): The heads of the columns, then the rows, all of one length.
        texts (int): How many of the first columns hold text, to the left; the others hold numbers, to the right.

    Returns:
        (str): The table, each line ended. A vertical bar in a cell is escaped.
    """
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * w if k < texts else "-" * (w - 1) + ":" for k, w in enumerate(widths)]

    def padded(line: Sequence[str]) -> list[str]:
        return [c.ljust(w) if k < texts else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True))]

    return "".join(f"| {' | '.join(padded(line))} |\n" for line in (lines[0], rule, *lines[1:]))


def mean_std(values: Sequence[float], form: str) -> str:
    """Return a mean, with the sample standard deviation if there are several values, both in a format as ``+.4f``."""
    mean = fmean(values)
    text = f"{mean:{form}}"
    if len(values) == 1:
        return text
    # Not statistics.stdev, which knows neither NaN nor Inf: a loss can be either.
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{text} ± {std:{form.lstrip('+')}}"
