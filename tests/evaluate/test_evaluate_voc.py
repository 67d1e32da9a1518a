"""The devkit metric against a plain transcription of the devkit, and against cases worked by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from devkit_oracle import devkit
from hypothesis import example, given, settings
from hypothesis import strategies as st

from yolo_sos.evaluate import Detections, GroundTruth, mean_ap, voc, voc_ap

TO_CONTINUOUS = np.array([-1.0, -1.0, 0.0, 0.0])


def scene(objects, detections, classes=1, images=1):
    """Build data from (image, class, VOC box, difficult) and (image, class, VOC box, score)."""
    image, label, boxes, difficult = zip(*objects, strict=True) if objects else ([], [], [], [])
    truth = GroundTruth.build(
        [f"c{k}" for k in range(classes)],
        [f"i{i}" for i in range(images)],
        np.array(image, int),
        np.array(label, int),
        np.array(boxes, float).reshape(-1, 4) + TO_CONTINUOUS,
        np.array(difficult, bool),
    )
    image, label, boxes, score = zip(*detections, strict=True) if detections else ([], [], [], [])
    boxes = np.array(boxes, float).reshape(-1, 4) + TO_CONTINUOUS
    return truth, Detections.build(truth, np.array(image, int), np.array(label, int), score, boxes)


# Few coordinates and scores, so that equal overlaps, equal scores and overlaps of exactly 1/2 are common. A VOC box
# with xmax = xmin has one pixel, one with xmax = xmin - 1 none.
side = st.tuples(st.integers(1, 4), st.sampled_from([-1, 0, 1, 2, 3, 0.5, 4.25])).map(lambda s: (s[0], s[0] + s[1]))
box = st.tuples(side, side).map(lambda s: (s[0][0], s[1][0], s[0][1], s[1][1]))
at = (st.integers(0, 1), st.integers(0, 2))
objects = st.lists(st.tuples(*at, box, st.booleans()), max_size=12)
detections = st.lists(st.tuples(*at, box, st.sampled_from([0.1, 0.5, 0.5000001, 0.9, -1.0])), max_size=20)


@settings(max_examples=400, deadline=None)
@given(objects, detections, st.sampled_from([0.1, 0.5, 0.7, 1.0]))
@example([], [], 0.5)
@example([(0, 0, (1, 1, 5, 5), False)], [], 0.5)
@example([], [(0, 0, (1, 1, 5, 5), 0.5)], 0.5)
@example([(0, 0, (1, 1, 5, 5), True)], [(0, 0, (1, 1, 5, 5), 0.5)], 0.5)
@example([(0, 0, (3, 3, 2, 2), False)], [(0, 0, (3, 3, 2, 2), 0.5)], 0.5)
@example([(0, 0, (3, 3, 3, 3), False)], [(0, 0, (3, 3, 3, 3), 0.5)], 0.5)
def test_agrees_with_the_devkit(objects, detections, iou):
    truth, found = scene(objects, detections, classes=3, images=2)
    result = voc_ap(truth, found, iou)
    expected = np.array(devkit(truth, found, iou))
    np.testing.assert_allclose(np.stack([result.ap, result.ap07], 1), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("pairs", [1, 2, 7])
def test_is_the_same_in_pieces(monkeypatch, pairs):
    rng = np.random.default_rng(0)
    corner = rng.integers(1, 20, (400, 2))
    boxes = np.hstack([corner, corner + rng.integers(5, 20, (400, 2))]).tolist()
    at = rng.integers(0, 3, (400, 2))
    truth, found = scene(
        [(*at[i], boxes[i], i % 7 == 0) for i in range(100)],
        [(*at[i], boxes[i], round(rng.random(), 1)) for i in range(100, 400)],
        classes=3,
        images=3,
    )
    whole = voc.best_objects(truth, found)
    monkeypatch.setattr(voc, "PAIRS", pairs)
    for a, b in zip(whole, voc.best_objects(truth, found), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(voc_ap(truth, found).ap, [ap for ap, _ in devkit(truth, found, 0.5)], atol=1e-14)


A, B, FAR = (1, 1, 10, 10), (101, 1, 110, 10), (201, 201, 210, 210)


def one_class(objects, detections):
    truth, found = scene([(0, 0, *o) for o in objects], [(0, 0, *d) for d in detections])
    return voc_ap(truth, found)


def test_true_false_true():
    result = one_class([(A, False), (B, False)], [(A, 0.9), (FAR, 0.8), (B, 0.7)])
    assert result.ap[0] == pytest.approx(float(Fraction(1, 2) * 1 + Fraction(1, 2) * Fraction(2, 3)), abs=1e-15)
    assert result.ap07[0] == pytest.approx(float((6 * 1 + 5 * Fraction(2, 3)) / 11), abs=1e-15)  # recalls 0 to 0.5, 1
    np.testing.assert_allclose(result.curves[0].recall, [1 / 2, 1 / 2, 1])
    np.testing.assert_allclose(result.curves[0].precision, [1, 1 / 2, 2 / 3])
    np.testing.assert_allclose(result.curves[0].score, [0.9, 0.8, 0.7])


def test_a_duplicate_is_false():
    result = one_class([(A, False), (B, False)], [(A, 0.9), (A, 0.8), (B, 0.7)])
    assert result.ap[0] == pytest.approx(5 / 6, abs=1e-15)


def test_a_difficult_object_is_neutral():
    result = one_class([(A, True), (B, False)], [(A, 0.9), (A, 0.8), (B, 0.7)])
    assert result.positives.tolist() == [1]
    assert (result.ap[0], result.ap07[0]) == (1, 1)
    assert len(result.curves[0].score) == 1


def test_the_best_object_counts_even_if_taken():
    """COCO would give the second detection the free object beside it; the devkit calls it a duplicate."""
    beside = (3, 1, 12, 10)  # overlaps A by 80/120
    result = one_class([(A, False), (beside, False)], [(A, 0.9), (A, 0.8)])
    assert result.ap[0] == 0.5


@pytest.mark.parametrize(
    ("box", "other", "found"),
    [
        ((1, 1, 10, 10), (1, 1, 10, 5), True),  # exactly 50 of 100 pixels
        ((1, 1, 10, 10), (1, 1, 10, 4), False),
        ((1, 1, 4, 1), (3, 1, 4, 1), True),  # 2 of 4 pixels; without the last pixel it would be 1 of 3
        ((5, 5, 5, 5), (5, 5, 5, 5), True),  # one pixel; without it there would be no area
        ((5, 5, 4, 4), (5, 5, 4, 4), False),  # no pixel
    ],
)
def test_boxes_include_their_last_pixel(box, other, found):
    assert one_class([(box, False)], [(other, 0.5)]).ap[0] == found


@pytest.mark.parametrize("found", range(11))
def test_recall_of_exactly_a_tenth_reaches_its_threshold(found):
    places = [(20 * i + 1, 1, 20 * i + 10, 10) for i in range(10)]
    result = one_class([(p, False) for p in places], [(p, 0.9 - 0.01 * i) for i, p in enumerate(places[:found])])
    assert result.ap07[0] == pytest.approx((found + 1) / 11 if found else 0, abs=1e-15)
    assert result.ap[0] == pytest.approx(found / 10, abs=1e-15)


def test_np_arange_would_miss_recall_of_3_6_and_7_tenths():
    """Why the thresholds are integers: this is what ports of the devkit do."""
    missed = [k for k, threshold in enumerate(np.arange(0, 1.1, 0.1)) if k / 10 < threshold]
    assert missed == [3, 6, 7]


def test_ties_keep_the_order_of_the_detections():
    assert one_class([(A, False)], [(A, 0.5), (FAR, 0.5)]).ap[0] == 1
    assert one_class([(A, False)], [(FAR, 0.5), (A, 0.5)]).ap[0] == 0.5


def test_of_equal_overlaps_the_first_object_counts():
    first = one_class([(A, True), (A, False)], [(A, 0.5)])
    assert first.ap[0] == 0 and len(first.curves[0].score) == 0
    assert one_class([(A, False), (A, True)], [(A, 0.5)]).ap[0] == 1


def test_the_threshold_is_an_option():
    truth, found = scene([(0, 0, A, False)], [(0, 0, (1, 1, 10, 7), 0.5)])
    assert [voc_ap(truth, found, iou).ap[0] for iou in (0.5, 0.7, 0.71)] == [1, 1, 0]
    for iou in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            voc_ap(truth, found, iou)


def test_a_class_without_positives_is_undefined_and_not_in_the_mean():
    truth, found = scene([(0, 0, A, False), (0, 1, A, True)], [(0, k, A, 0.5) for k in range(3)], classes=3)
    result = voc_ap(truth, found)
    np.testing.assert_array_equal(result.ap, [1, np.nan, np.nan])
    assert mean_ap(result.ap) == 1
    assert np.isnan(mean_ap(result.ap[1:]))


def test_detections_are_checked():
    truth, _ = scene([(0, 0, A, False)], [])
    good = {"image": [0], "label": [0], "score": [0.5], "boxes": [[0, 0, 1, 1]]}
    for field, value, message in [
        ("image", [1], "detection 0: image index 1 is out of range; there are 1"),
        ("image", [-1], "out of range"),
        ("image", [0.0], "must be integers"),
        ("label", [3], "detection 0: class index 3"),
        ("label", [0, 0], r"class indices have shape \(2,\)"),
        ("score", [float("nan")], "detection 0: score is nan; it must be a finite number"),
        ("score", [], "scores have shape"),
        ("boxes", [[2, 0, 1, 1]], "detection 0: the box x1=2, y1=0, x2=1, y2=1 .* has x2 < x1 or y2 < y1"),
        ("boxes", [[0, 0, 1, float("inf")]], "is not finite"),
        ("boxes", [[0, 0, 1]], r"shape \(N, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            Detections.build(truth, **{**good, field: value})


def test_ground_truth_is_checked():
    good = {"classes": ["a"], "images": ["i"], "image": [0], "label": [0], "boxes": [[0, 0, 1, 1]]}
    for field, value, message in [
        ("classes", ["a", "a"], "class 'a' comes twice"),
        ("images", ["i", "i"], "image 'i' comes twice"),
        ("classes", [], "at least one class"),
        ("boxes", [[5, 0, 1, 1]], "object 0: the box x1=5"),
        ("difficult", [0, 1], "difficult flags have shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            GroundTruth.build(**{**good, field: value})
    assert not GroundTruth.build(**good).difficult_known
    assert GroundTruth.build(**good, difficult=[False]).difficult_known
