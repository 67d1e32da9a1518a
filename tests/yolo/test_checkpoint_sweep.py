# yolo-sos, AGPL-3.0
"""The trade-off curve: its points are those of single shifts, from one pass over the images."""

from __future__ import annotations

import csv
import math
from itertools import pairwise

import cv2
import pytest

from yolo_sos.core import METHODS
from yolo_sos.yolo import CheckpointSweep, shift_checkpoint, sweep_checkpoint
from yolo_sos.yolo.sweep import BUDGETS, RANKS, cost, trials_of
from yolo_sos.yolo.sweep_report import GUARD, LOSS_OF_METRIC, Point, choices, csv_of, summary


@pytest.fixture(scope="module")
def swept(trained, seen, tmp_path_factory):
    """A sweep with two draws."""
    path = tmp_path_factory.mktemp("swept") / "best.pt"
    path.write_bytes(trained["best"].read_bytes())
    return path, sweep_checkpoint(path, seen, draws=2)


def test_every_method_goes_over_its_range():
    trials = trials_of(["balanced"], draws=2, seed=5)
    assert {m.name for m, _ in trials} == set(METHODS)
    for name, draws in ("loss", 1), ("principal", 1), ("expected", 1), ("rows", 2):
        assert sorted(m.rank for m, _ in trials if m.name == name) == sorted(draws * RANKS)
    assert sorted({seed for m, seed in trials if m.name == "rows"}) == [5, 6]
    assert [m.budget for m, _ in trials if m.name == "budget"] == list(BUDGETS)
    assert (min(RANKS), max(RANKS), min(BUDGETS), max(BUDGETS)) == (1 / 8, 1.0, 1e-3, 0.3)
    of_loss = len(RANKS)  # which has no weighting
    assert len(trials_of(["balanced", "uniform"])) - of_loss == 2 * (len(trials_of(["uniform"])) - of_loss)
    assert {m.name for m, _ in trials_of(["balanced"], task="classify")} == set(METHODS) - {"loss"}


def test_the_results_stand_beside_the_checkpoint_which_stays(swept, trained):
    path, points = swept
    assert {p.name for p in path.parent.iterdir()} == {"best.pt", "best-sweep.csv", "best-sweep.png"}
    assert path.read_bytes() == trained["best"].read_bytes()
    with open(path.with_name("best-sweep.csv"), newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == len(points) == 1 + 6 + 1 + 6 + 6 + 6 + 12
    assert rows[0]["method"] == "baseline"
    assert [r["method"] for r in rows] == [p.method for p in points]
    for row, point in zip(rows, points, strict=True):
        assert float(row["squared_norm_ratio"]) == pytest.approx(point.squared_norm_ratio, rel=1e-5)
        assert float(row["heldout_loss"]) == pytest.approx(point.heldout_loss, rel=1e-5)
        main = "metrics/mAP50-95(B)"
        assert float(row[f"val/{main}"]) == pytest.approx(point.metrics["val"][main], rel=1e-5)
    image = cv2.imread(str(path.with_name("best-sweep.png")))
    assert image.shape[1] > 2 * image.shape[0] > 1000
    assert len({tuple(c) for c in image.reshape(-1, 3)[::97]}) > 20  # curves in colours, on white


def find(points, method, setting, seed=0):
    return next(p for p in points if (p.method, p.setting, p.seed) == (method, setting, seed))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("loss", {"rank": 0.375}),
        ("principal", {"rank": 0.25}),
        ("expected", {"rank": 0.5}),
        ("budget", {"budget": 0.1}),
        ("rows", {"rank": 0.375, "draws": 1}),
        ("rows", {"rank": 1.0, "draws": 1, "seed": 1}),
    ],
)
def test_a_point_is_what_a_shift_alone_gives(swept, seen, weights, method, options):
    _, points = swept
    seed = options.get("seed", 0)
    point = find(points, method, options.get("budget", options.get("rank")), seed)
    if seed:  # another seed of a shift would choose other images, too
        assert point.squared_norm_ratio != find(points, method, options["rank"]).squared_norm_ratio
        return
    report = shift_checkpoint(weights(), seen, method=method, guard=None, **options)
    assert point.squared_norm_ratio == pytest.approx(report.squared_norm_ratio, rel=1e-5)
    assert point.rank == pytest.approx(report.rank)
    assert point.deviation == pytest.approx(report.deviation, rel=1e-6, abs=1e-12)
    assert point.deviation_heldout == pytest.approx(report.deviation_heldout, rel=1e-4)
    assert point.heldout_loss == pytest.approx(report.heldout_full, rel=1e-6)
    assert point.heldout_loss == pytest.approx(report.heldout_after, rel=1e-3)  # in half precision
    assert point.metrics["val"] == pytest.approx(report.metrics_after, abs=1e-6)
    assert points[0].metrics["val"] == report.metrics_before
    assert points[0].heldout_loss == report.heldout_before


def test_the_curves_run_as_they_must(swept):
    _, points = swept
    for method, settings in ("loss", RANKS), ("principal", RANKS), ("expected", RANKS), ("budget", BUDGETS[::-1]):
        curve = [find(points, method, s) for s in settings]
        assert all(a.squared_norm_ratio < b.squared_norm_ratio for a, b in pairwise(curve))
        assert all(a.deviation > b.deviation for a, b in pairwise(curve))
    full = next(p for p in points if p.method == "full")
    assert full.deviation_heldout < 1e-6
    assert full.heldout_loss == pytest.approx(points[0].heldout_loss, rel=1e-4)
    baseline = points[0]
    assert (baseline.squared_norm_ratio, baseline.deviation, baseline.deviation_heldout) == (1.0, 0.0, 0.0)
    assert math.isnan(baseline.setting)


def test_every_image_runs_once(weights, seen, monkeypatch):
    job = CheckpointSweep(weights(), seen, draws=1)
    runs, forward = [], type(job.model)._predict_once

    def counted(self, x, *args, **kwargs):
        runs.append((self is job.model, len(x)))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(type(job.model), "_predict_once", counted)
    job.run()
    assert runs[:3] == [(True, 8)] * 3
    assert [r for r in runs[3:] if r[1] > 1] == [(False, 8)] * 3  # the validation; one image counts its operations


def test_without_val_there_are_no_metrics(weights, seen):
    path = weights()
    points = sweep_checkpoint(path, seen, draws=1, val=False)
    assert all(p.metrics == {} for p in points)
    assert "val/" not in csv_of(points)
    assert path.with_name("best-sweep.png").exists()


@pytest.mark.parametrize("key", ["method", "rank", "budget", "guard", "sos_rank", "sos_guard"])
def test_what_a_sweep_goes_through_cannot_be_set(weights, seen, key):
    with pytest.raises(ValueError, match=f"'{key}' has no effect with sweep=true"):
        CheckpointSweep(weights(), seen, **{key: 0.5})


def test_results_that_are_there_stay(weights, seen):
    path = weights()
    path.with_name("best-sweep.png").write_text("mine")
    with pytest.raises(FileExistsError, match=r"best-sweep.png exists already"):
        CheckpointSweep(path, seen)


def test_the_cost_is_given_in_validations():
    text = cost({"images": 3.0, "algebra": 1.0, "validation": 2.0, "points": 4.0})
    assert text.startswith("10.0 s in all")
    assert text.endswith("that is 5.0 validations")
    assert "validations" not in cost({"images": 3.0, "algebra": 1.0, "validation": 0.0, "points": 0.0})


# What is recommended -------------------------------------------------------------------------------------------------


def point(method, setting, ratio, rise, metric, seed=0):
    """A point by the relative rise of its held-out loss from 2 and the change of its mAP50-95 from .5."""
    metrics = {"val": {"metrics/mAP50(B)": 0.8, "metrics/mAP50-95(B)": 0.5 + metric}}
    return Point(method, "balanced", setting, seed, ratio, 8.0, 0.0, 0.0, 2 * (1 + rise), metrics)


BASELINE = point("baseline", math.nan, 1.0, 0.0, 0.0)


def test_the_strongest_setting_that_keeps_loss_and_metric_is_chosen():
    points = [
        BASELINE,
        point("full", math.nan, 1.0, 0.0, 0.0),
        point("expected", 0.375, 0.25, 0.001, 0.0),  # below half of d
        point("rows", 0.625, 0.2, 0.003, -0.0020),  # loses mAP
        point("expected", 0.5, 0.4, 0.004, -0.0009),
        point("expected", 0.75, 0.6, 0.0, 0.01),
        point("principal", 0.5, 0.3, 0.006, 0.02),  # loses the held-out loss
        point("principal", 0.75, 0.5, -0.01, 0.0),
        point("budget", 0.3, 0.1, 0.0, 0.0),  # above 0.1
        point("budget", 0.1, 0.1, 0.5, -0.2),
        *(point("rows", 0.5, 0.3, rise, 0.0, seed) for seed, rise in enumerate((0.001, 0.001, 0.02))),  # mean .0073
        *(point("rows", 0.75, ratio, 0.0, 0.0, seed) for seed, ratio in enumerate((0.7, 0.8, 0.9))),
    ]
    found = [(c.method, c.setting, c.squared_norm_ratio) for c in choices(points)]
    assert found[:2] == [("expected", 0.5, 0.4), ("principal", 0.75, 0.5)]
    assert found[2][:2] == ("rows", 0.75) and found[2][2] == pytest.approx(0.8)
    assert found[3][0] == "full" and len(found) == 4
    text = summary(points)
    assert "Recommended: method=expected rank=0.5 in place of sweep=true" in text
    assert (
        "| expected  | rank=0.5  |       ×0.400 |        +0.40% |         -0.0009 |" in text and "budget=" not in text
    )
    assert (GUARD, LOSS_OF_METRIC) == (0.005, 0.001)


def test_nothing_is_recommended_where_nothing_is_gained_or_nothing_was_judged():
    points = [BASELINE, point("full", math.nan, 0.995, 0.0, 0.0), point("expected", 0.5, 0.4, 0.1, 0.0)]
    assert "leave the checkpoint as it is" in summary(points) and "Recommended" not in summary(points)
    blind = [Point(**{**vars(p), "metrics": {}}) for p in points]
    assert summary(blind).startswith("No setting is recommended without mAP")


def test_a_sweep_recommends_what_a_shift_then_does(swept, seen, weights):
    """A chosen setting, given to a shift of the same images, passes the guard with the norm that was stated."""
    _, points = swept
    # To choose between drawn rows, a shift sets other images aside.
    best = next(choice for choice in choices(points) if choice.method != "rows")
    setting = {} if math.isnan(best.setting) else {best.argument.split("=")[0]: best.setting}
    report = shift_checkpoint(weights(), seen, method=best.method, **setting)
    assert report.step == 1 and report.squared_norm_ratio == pytest.approx(best.squared_norm_ratio, rel=1e-5)
