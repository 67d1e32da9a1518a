# yolo-sos, AGPL-3.0
"""When a shift is due."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_sos.core import is_due
from yolo_sos.recipes.schedule import step_factor

PROPERTY = settings(derandomize=True, max_examples=200, deadline=None, database=None)

# epochs, start, interval: the epochs, counted from 1, at whose end a shift is due; 0 is before the first
TABLE = [
    (4, 0.0, 1, [0, 1, 2, 3, 4]),
    (4, 0.0, 3, [0, 3]),
    (4, 0.0, 9, [0]),
    (4, 0.01, 1, [1, 2, 3, 4]),
    (4, 0.01, 3, [1, 4]),
    (4, 0.25, 1, [1, 2, 3, 4]),
    (4, 0.26, 1, [2, 3, 4]),
    (4, 0.5, 1, [2, 3, 4]),
    (4, 0.5, 2, [2, 4]),
    (4, 0.5, 5, [2]),
    (4, 0.75, 1, [3, 4]),
    (4, 0.76, 1, [4]),
    (4, 1.0, 1, [4]),
    (4, 1.0, 7, [4]),
    (5, 0.5, 1, [3, 4, 5]),
    (1, 0.0, 1, [0, 1]),
    (1, 0.5, 1, [1]),
    (1, 1.0, 1, [1]),
    (30, 0.1, 9, [3, 12, 21, 30]),  # 0.1 · 30 is 3.0000000000000004
    (100, 0.29, 50, [29, 79]),  # 0.29 · 100 is 28.999999999999996
    (50, 0.14, 40, [7, 47]),  # 0.14 · 50 is 7.000000000000001
    (300, 0.5, 50, [150, 200, 250, 300]),
]


def due(epochs, start, interval):
    return [trained for trained in range(epochs + 1) if is_due(trained, epochs, start, interval)]


@pytest.mark.parametrize(("epochs", "start", "interval", "expected"), TABLE)
def test_table(epochs, start, interval, expected):
    assert due(epochs, start, interval) == expected


@PROPERTY
@given(epochs=st.integers(1, 1000), percent=st.integers(0, 100), interval=st.integers(1, 50))
def test_the_first_shift_follows_the_part_that_is_trained_before_it(epochs, percent, interval):
    found = due(epochs, percent / 100, interval)
    assert found[0] == math.ceil(Fraction(percent, 100) * epochs)
    assert all(b - a == interval for a, b in pairwise(found))
    assert epochs - found[-1] < interval


@pytest.mark.parametrize(
    ("epochs", "steps", "changes"),
    [
        (300, [0.5, 0.75], {150: 0.1, 225: 0.01}),
        (4, [0.5, 0.75], {2: 0.1, 3: 0.01}),
        (5, [0.5], {3: 0.1}),
        (30, [0.1], {3: 0.1}),  # 0.1 · 30 is 3.0000000000000004
        (2, [0.9], {}),
    ],
)
def test_steps_of_the_learning_rate(epochs, steps, changes):
    expected = 1.0
    for epoch in range(epochs):  # counted from 0: epoch 150 is the first of the second half of 300
        expected = changes.get(epoch, expected)
        assert step_factor(epoch, epochs, steps) == pytest.approx(expected)
