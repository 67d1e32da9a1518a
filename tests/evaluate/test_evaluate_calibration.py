# yolo-sos, AGPL-3.0
"""Calibration errors and thresholds: against scikit-learn, netcal and plain loops, and by hand."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from yolo_sos.evaluate import command
from yolo_sos.evaluate.boxes import Detections, GroundTruth
from yolo_sos.evaluate.calibration import (
    BINS,
    LA_BINS,
    LEAST_SCORE,
    SOFT_IOUS,
    Samples,
    best_f1,
    calibration_of,
    classifier_reliability,
    reliability,
    samples_of,
    threshold_of,
    thresholds,
)
from yolo_sos.evaluate.plot import plot_reliability
from yolo_sos.evaluate.report import Scores, calibration_tables
from yolo_sos.evaluate.voc import Curve, Matches, voc_result


def drawn(n=2000, classes=3, seed=0) -> Samples:
    """Return scores, and targets that are drawn with a lower probability."""
    rng = np.random.default_rng(seed)
    p = rng.beta(0.6, 1.2, n)
    hit = (rng.random(n) < p**1.5).astype(float)
    return Samples(p, hit, rng.integers(0, classes, n), np.arange(n), hit * rng.uniform(0.5, 1, n))


def scene(seed=0, images=40, classes=3, noise=6.0):
    """Return objects, some difficult, and detections around them and elsewhere."""
    rng = np.random.default_rng(seed)
    n = 4 * images
    corner = rng.uniform(0, 150, (n, 2))
    boxes = np.hstack([corner, corner + rng.uniform(20, 60, (n, 2))])
    image, label = rng.integers(0, images, n), rng.integers(0, classes, n)
    names = [str(i) for i in range(images)]
    truth = GroundTruth.build(list("abcdef"[:classes]), names, image, label, boxes, rng.random(n) < 0.1)
    which = np.repeat(np.arange(n), 2)
    moved = boxes[which] + rng.normal(0, noise, (2 * n, 4))
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
    other = rng.random(2 * n) < 0.2
    labels = np.where(other, rng.integers(0, classes, 2 * n), label[which])
    return truth, Detections.build(truth, image[which], labels, rng.random(2 * n) ** 2, moved)


def test_errors_are_those_of_scikit_learn_and_netcal():
    metrics = pytest.importorskip("sklearn.metrics")
    calibration = pytest.importorskip("sklearn.calibration")
    s = drawn()
    found = reliability(s)
    assert found.brier == pytest.approx(metrics.brier_score_loss(s.target, s.score), abs=1e-12)
    assert found.nll == pytest.approx(metrics.log_loss(s.target, s.score), abs=1e-9)
    target, score = calibration.calibration_curve(s.target, s.score, n_bins=BINS)
    assert found.target[found.count > 0] == pytest.approx(target) and found.score[found.count > 0] == pytest.approx(
        score
    )
    assert found.ece == pytest.approx(np.sum(np.abs(target - score) * found.count[found.count > 0]) / len(s))


def test_ece_is_that_of_netcal():
    netcal = pytest.importorskip("netcal.metrics", reason="netcal is not installed")
    s = drawn()
    other = netcal.ECE(BINS, detection=True).measure(s.score, s.target)
    assert reliability(s).ece == pytest.approx(other, abs=1e-9)


def test_laece_is_that_of_its_definition():
    s = drawn()
    classes = np.array([5, 0, 7])  # class 1 has no object
    errors = []
    for k in (0, 2):
        total, error = np.sum(s.label == k), 0.0
        for i in range(LA_BINS):
            rows = [j for j in range(len(s)) if s.label[j] == k and i / LA_BINS < s.score[j] <= (i + 1) / LA_BINS]
            if rows:
                error += len(rows) / total * abs(np.mean(s.score[rows]) - np.mean(s.overlap[rows]))
        errors.append(error)
    assert reliability(s, classes).laece == pytest.approx(np.mean(errors), abs=1e-12)


def test_probabilities_are_calibrated():
    rng = np.random.default_rng(1)
    p = rng.random(200_000)
    hit = (rng.random(len(p)) < p).astype(float)
    found = reliability(Samples(p, hit, np.zeros(len(p), int), np.arange(len(p)), hit))
    assert found.ece < 0.005 and found.laece < 0.008
    entropy = -(p * np.log(p) + (1 - p) * np.log1p(-p)).mean()
    assert found.nll == pytest.approx(entropy, abs=0.005) and found.brier == pytest.approx(1 / 6, abs=0.002)


def test_scores_at_the_ends_have_a_finite_error():
    found = reliability(Samples(*(np.array(x) for x in ([0.0, 1.0], [1.0, 0.0], [0, 0], [0, 1], [0.9, 0.0]))))
    assert found.nll == pytest.approx(24 * math.log(2)) and found.ece == 1.0
    assert found.count[[0, -1]].tolist() == [1, 1]


def test_hits_are_the_true_positives_of_the_devkit():
    truth, found = scene()
    matches = Matches.of(truth, found)
    for iou in (0.5, 0.75):
        s = samples_of(matches, iou)
        true, neutral = matches.judge(iou)
        assert s.target.sum() == true[found.score >= LEAST_SCORE].sum() > 20
        assert len(s) == np.sum(~neutral & (found.score >= LEAST_SCORE)) < len(found)
        curves = voc_result(matches, iou).curves
        assert true.sum() == pytest.approx(
            sum(c.recall[-1] * p for c, p in zip(curves, truth.positives(), strict=True))
        )
    assert samples_of(matches).overlap.max() <= 1 and not samples_of(matches).overlap[0 > 1].any()


def test_one_detection_of_each_kind():
    truth = GroundTruth.build(
        "ab", "xy", [0, 0, 1], [0, 0, 1], [[0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 9, 9]], [0, 1, 0]
    )
    rows = [  # image, class, score, box, what it is
        (0, 0, 0.9, [0, 0, 10, 8], "hit, IoU 0.8"),
        (0, 0, 0.8, [0, 0, 10, 10], "duplicate"),
        (0, 0, 0.7, [50, 50, 60, 60], "difficult"),
        (0, 1, 0.6, [0, 0, 10, 10], "no object of its class"),
        (1, 1, 0.5, [0, 0, 9, 3], "IoU 1/3"),
        (1, 1, 0.005, [0, 0, 9, 9], "score too low to take part"),
    ]
    image, label, score, boxes, _ = zip(*rows, strict=True)
    matches = Matches.of(truth, Detections.build(truth, image, label, score, boxes))
    s = samples_of(matches)
    assert s.score.tolist() == [0.9, 0.8, 0.6, 0.5] and s.target.tolist() == [1, 0, 0, 0]
    assert s.overlap == pytest.approx([0.8, 0, 0, 1 / 3])  # LaECE asks for no least IoU
    soft = samples_of(matches, "soft")
    # The second takes the object at the thresholds that the first does not reach.
    reached = sum(iou <= 0.8 for iou in SOFT_IOUS)
    assert soft.target == pytest.approx([reached / 10, 0 if reached == 10 else soft.target[1], 0, 0])
    assert soft.score.tolist() == s.score.tolist()


def test_thresholds_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    truth, found = scene()
    matches = Matches.of(truth, found)
    true, neutral = matches.judge(0.5)
    for k, t in enumerate(thresholds(matches, 0.4)):
        of = (found.label == k) & ~neutral
        precision, recall, at = metrics.precision_recall_curve(true[of], found.score[of])
        recall = recall * true[of].sum() / truth.positives()[k]  # scikit-learn knows no objects that are not found
        f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-12))[:-1]
        assert t["f1"] == pytest.approx(f1.max()) and t["best_f1"] == pytest.approx(at[f1 == f1.max()].max())
        enough = precision[:-1] >= 0.4
        assert t["precision"] == pytest.approx(at[enough].min())
        assert t["recall"] == pytest.approx(recall[:-1][enough].max())


def test_thresholds_where_there_are_none():
    nothing = Curve(np.zeros(0), np.zeros(0), np.zeros(0))
    assert all(map(math.isnan, (*best_f1(nothing), *threshold_of(nothing, 0.5))))
    no_objects = Curve(np.array([0.9]), np.array([np.nan]), np.array([0.0]))
    assert all(map(math.isnan, (*best_f1(no_objects), *threshold_of(no_objects, 0.5))))
    missed = Curve(np.array([0.9, 0.8]), np.zeros(2), np.zeros(2))
    assert best_f1(missed) == (0.9, 0.0) and all(map(math.isnan, threshold_of(missed, 0.5)))


def test_no_threshold_parts_equal_scores():
    tied = Curve(np.array([0.9, 0.5, 0.5]), np.array([0.0, 0.5, 0.5]), np.array([0.0, 0.5, 1 / 3]))
    assert best_f1(tied) == (0.5, pytest.approx(0.4))
    assert all(map(math.isnan, threshold_of(tied, 0.5)))  # reached between the two, which is nowhere


def test_a_classifier():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), 500)
    labels = np.array([rng.choice(4, p=row) for row in p])
    found = classifier_reliability(p, labels)
    assert found.nll == pytest.approx(metrics.log_loss(labels, p))
    assert found.brier == pytest.approx(np.mean(((p - np.eye(4)[labels]) ** 2).sum(1)))
    assert found.samples == 500 and found.ece < 0.08 and math.isnan(found.laece)
    assert np.nansum(found.target * found.count) == (p.argmax(1) == labels).sum()


def test_without_samples():
    with pytest.raises(ValueError, match=r"no detection has a score of at least 0\.01"):
        reliability(drawn(0))


def test_scores_that_are_no_probabilities_are_not_judged():
    truth, found = scene()
    for scores in (found.score * 10, found.score - 0.5, found.score * 0):
        detections = Detections.build(truth, found.image, found.label, scores, found.boxes)
        assert calibration_of(Matches.of(truth, detections), 0.5, 0.9) is None
    assert calibration_of(Matches.of(truth, found), 0.5, 0.9).reliability.samples > 100


def test_the_picture(tmp_path):
    r = reliability(drawn())
    plot_reliability(tmp_path / "r.png", {"one": {"before": r, "a$b$": r}, "two": {"before": r}})
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def files(tmp_path):
    """COCO annotations and results."""
    from yolo_sos.evaluate import write_coco_detections, write_coco_truth

    truth, found = scene()
    write_coco_truth(tmp_path / "truth.json", truth)
    write_coco_detections(tmp_path / "found.json", truth, found)
    return truth, found, tmp_path


def test_tables_of_several_runs():
    """Of one training the table of thresholds has their mean; of other models each has its own."""
    truth, found = scene()
    runs = []
    for name, shift in ("one", 0.0), ("two", 0.004):
        moved = Detections.build(truth, found.image, found.label, found.score * (1 - shift), found.boxes)
        judged = calibration_of(Matches.of(truth, moved), 0.5, 0.6)
        runs.append(Scores(name, {}, {"calibration": judged.to_dict()}))
    runs.append(Scores("logits", {}, {"calibration": None}))
    text = calibration_tables(truth.classes, runs, 0.6)
    assert text.count("precision 0.6 at") == text.count("| **mean** ") == 1 and "±" in text and "logits" not in text
    apart = calibration_tables(truth.classes, runs, 0.6, averaged=False)
    assert apart.count("precision 0.6 at") == 2 and "±" not in apart and "mean" not in apart
    for run in runs[:2]:
        (own,) = re.findall(rf"^{run.name}\n\n((?:\|.*\n)+)", apart, re.MULTILINE)
        first = run.details["calibration"]["thresholds"][0]
        assert f"{first['best_f1']:.4f}" in own and f"{first['recall']:.4f}" in own
    assert calibration_tables(truth.classes, runs[2:], 0.6) == ""


def test_the_command_reports_it(files, capsys):
    truth, found, folder = files
    options = {"annotations": folder / "truth.json", "json": folder / "out.json", "reliability": folder / "r.png"}
    command.run(detections=folder / "found.json", precision=0.6, **options)
    out = capsys.readouterr().out
    assert "LaECE" in out and "precision 0.6 at" in out and "score of at least 0.01" in out
    (one,) = json.loads((folder / "out.json").read_text())["runs"]
    expected = calibration_of(Matches.of(truth, found), 0.5, 0.6)
    assert one["calibration"]["ECE"] == pytest.approx(expected.reliability.ece)
    assert one["calibration"]["thresholds"][0] == pytest.approx(expected.thresholds[0])
    assert sum(one["calibration"]["curve"]["count"]) == one["calibration"]["samples"] == expected.reliability.samples
    assert (folder / "r.png").is_file()
    with pytest.raises(ValueError, match=r"'precision=1\.5' is invalid: precision must be a number above 0"):
        command.run(detections=folder / "found.json", annotations=folder / "truth.json", precision=1.5)
