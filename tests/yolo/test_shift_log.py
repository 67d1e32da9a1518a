# yolo-sos, AGPL-3.0
"""sos.png: a bar per layer for one shift, curves for several; of the model that is saved."""

from __future__ import annotations

import math

import cv2
import pytest

from yolo_sos.core import LayerReport, ShiftReport
from yolo_sos.yolo.shift_log import ShiftLog


def report(scale=0.5, before=2.0, after=2.01, step=1.0):
    layers = tuple(
        LayerReport(f"head.{kind}", kind, 0, 64, 100, 32.0, norm, scale * norm, 0.1, "ok")
        for kind, norm in (("box", 4.0), ("cls", 1.0))
    )
    return ShiftReport(layers, before, after, step, 0.005, {"solve": 1.0})


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """``drawn(log)`` plots a log and returns the figure, which stays open, and whether a file was written."""
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)

    def drawn(log):
        path = tmp_path / "sos.png"
        log.plot(path)
        return figures.pop() if figures else None, path.exists()

    yield drawn
    monkeypatch.undo()
    plt.close("all")


def test_one_shift_is_a_bar_per_layer(tmp_path, drawn):
    log = ShiftLog(tmp_path / "sos.csv")
    log.add(15, {"ema": report(), "model": report(scale=0.9)})
    figure, written = drawn(log)
    (ax,) = figure.axes
    assert written and [bar.get_width() for bar in ax.patches] == pytest.approx([16, 1, 4, 0.25])  # squared norms
    assert [label.get_text() for label in ax.get_yticklabels()] == ["head.box (box)", "head.cls (cls)"]
    assert [text.get_text() for text in ax.texts] == ["×0.25", "×0.25"]
    assert (
        ax.get_title()
        == "Shift after epoch 15: ×0.250 of the squared norm is left\nheld-out loss 2 → 2.01, step size t=1"
    )


def test_a_loss_that_is_not_known_is_not_drawn_as_nan(tmp_path, drawn):
    log = ShiftLog(tmp_path / "sos.csv")
    log.add(1, {"ema": report(before=math.nan, after=math.nan)})
    figure, _ = drawn(log)
    assert "held-out loss unknown" in figure.axes[0].get_title()


def test_several_shifts_are_curves(tmp_path, drawn):
    log = ShiftLog(tmp_path / "sos.csv")
    for epoch, step in (2, 1.0), (4, 0.5), (6, 0.25):
        log.add(epoch, {"ema": report(step=step), "model": report()})
    figure, _ = drawn(log)
    norms, losses, steps = figure.axes
    assert [list(line.get_ydata()) for line in norms.lines] == [[17.0] * 3, [4.25] * 3]
    assert [list(line.get_xdata()) for line in losses.lines] == [[2, 4, 6]] * 2
    assert list(steps.lines[0].get_ydata()) == [1.0, 0.5, 0.25] and steps.get_legend() is None


def test_a_checkpoint_that_was_shifted_at_the_end_stands_for_the_ema(tmp_path, drawn):
    log = ShiftLog(tmp_path / "sos.csv")
    log.add(5, {"last": report(scale=0.8)})
    log.add(3, {"best": report(scale=0.7)})
    figure, _ = drawn(log)
    assert "after epoch 3: ×0.490" in figure.axes[0].get_title()


def test_without_a_shift_there_is_no_picture(tmp_path, drawn):
    assert drawn(ShiftLog(tmp_path / "sos.csv")) == (None, False)


def test_the_picture_is_legible(tmp_path):
    log = ShiftLog(tmp_path / "sos.csv")
    log.add(1, {"ema": report()})
    told = []
    log.plot(tmp_path / "sos.png", on_plot=told.append)
    image = cv2.imread(str(tmp_path / "sos.png"))
    assert told == [tmp_path / "sos.png"] and image.shape[1] >= 1500 and image.std() > 5
