"""The COCO metric: pycocotools called by hand is the oracle, the other backends agree."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from yolo_sos.evaluate import Detections, GroundTruth, coco_ap
from yolo_sos.evaluate.coco import BACKENDS

MODULES = {name: module.partition(".")[0] for name, ((module, _), _) in BACKENDS.items()}
OTHERS = [
    pytest.param(name, marks=pytest.mark.skipif(not find_spec(MODULES[name]), reason=f"{name} is not installed"))
    for name in BACKENDS
    if name != "pycocotools"
]


def random_data(seed: int, objects: int = 120, detections: int = 600):
    """Boxes of all of COCO's sizes, a fifth of the objects difficult, class 3 without any, scores with ties."""
    rng = np.random.default_rng(seed)

    def boxes(n):
        corner = rng.uniform(0, 200, (n, 2))
        return np.hstack([corner, corner + 10 ** rng.uniform(0.5, 2.3, (n, 2))])

    truth = GroundTruth.build(
        ["a", "b", "c", "none"],
        [str(i) for i in range(8)],
        rng.integers(8, size=objects),
        rng.integers(3, size=objects),
        boxes(objects),
        rng.random(objects) < 0.2,
    )
    near = rng.integers(objects, size=detections // 2) if objects else np.zeros(0, int)
    far = detections - len(near)
    moved = truth.boxes[near] * rng.uniform(0.9, 1.1, (len(near), 1))
    found = Detections.build(
        truth,
        np.concatenate([truth.image[near], rng.integers(8, size=far)]),
        np.concatenate([truth.label[near], rng.integers(4, size=far)]),
        np.round(rng.random(detections), 2),
        np.vstack([moved, boxes(far)]),
    )
    return truth, found


def by_hand(truth: GroundTruth, found: Detections) -> COCOeval:
    """Feed pycocotools as its documentation says, object by object."""
    objects = COCO()
    objects.dataset = {
        "images": [{"id": i} for i in range(len(truth.images))],
        "categories": [{"id": k, "name": name} for k, name in enumerate(truth.classes)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": int(truth.image[i]),
                "category_id": int(truth.label[i]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": int(truth.difficult[i]),
            }
            for i, (x1, y1, x2, y2) in enumerate(truth.boxes.tolist())
        ],
    }
    objects.createIndex()
    results = objects.loadRes(
        [
            {
                "image_id": int(found.image[i]),
                "category_id": int(found.label[i]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(found.score[i]),
            }
            for i, (x1, y1, x2, y2) in enumerate(found.boxes.tolist())
        ]
    )
    evaluator = COCOeval(objects, results, "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_pycocotools_called_by_hand(seed):
    truth, found = random_data(seed)
    expected, result = by_hand(truth, found), coco_ap(truth, found)
    np.testing.assert_allclose(list(result.stats.values()), expected.stats, atol=1e-12)
    assert len(result.stats) == 12
    for k in range(3):
        precision = expected.eval["precision"][:, :, k, 0, 2]
        assert result.ap[k] == pytest.approx(precision.mean(), abs=1e-12)
        assert result.ap50[k] == pytest.approx(precision[0].mean(), abs=1e-12)
    assert np.isnan(result.ap[3]) and np.isnan(result.ap50[3])


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("shape", [(120, 600), (120, 3000), (120, 0), (0, 50), (0, 0)], ids=str)
def test_backends_agree(backend, shape):
    truth, found = random_data(7, *shape)
    expected, result = coco_ap(truth, found), coco_ap(truth, found, backend)
    np.testing.assert_allclose(result.ap, expected.ap, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.ap50, expected.ap50, rtol=0, atol=1e-9)
    np.testing.assert_allclose(list(result.stats.values()), list(expected.stats.values()), rtol=0, atol=1e-9)


def test_difficult_objects_are_crowd():
    boxes = [[0, 0, 10, 10], [50, 50, 60, 60]]
    easy = GroundTruth.build(["a"], ["i"], [0, 0], [0, 0], boxes, [False, False])
    hard = GroundTruth.build(["a"], ["i"], [0, 0], [0, 0], boxes, [True, False])
    found = Detections.build(easy, [0, 0, 0], [0, 0, 0], [0.9, 0.8, 0.7], [boxes[0], boxes[0], boxes[1]])
    assert coco_ap(easy, found).stats["AP"] < 1  # the duplicate is false
    assert coco_ap(hard, found).stats["AP"] == pytest.approx(1)  # any number may fall on a difficult object


def test_what_is_missing_is_named(monkeypatch):
    truth, found = random_data(0, 3, 3)
    with pytest.raises(ValueError, match="unknown COCO backend 'none'; there are pycocotools, "):
        coco_ap(truth, found, "none")
    monkeypatch.setitem(BACKENDS, "hotcoco", (("not_there", "COCO"), ("not_there", "COCOeval")))
    with pytest.raises(ModuleNotFoundError, match="'hotcoco' is not installed: pip install hotcoco"):
        coco_ap(truth, found, "hotcoco")
