"""Files: what is written is read back to the last bit, and what is wrong is named with its place."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from yolo_sos.data.voc import VOCAnnotation, VOCObject
from yolo_sos.evaluate import (
    Detections,
    GroundTruth,
    coco_ap,
    read_coco_detections,
    read_coco_truth,
    read_voc_detections,
    snap,
    voc_ap,
    voc_truth,
    write_coco_detections,
    write_coco_truth,
    write_voc_detections,
)
from yolo_sos.files import atomic_path


def annotation(image_id: str, *objects: VOCObject) -> VOCAnnotation:
    return VOCAnnotation(image_id, f"{image_id}.jpg", 0, 0, objects, Path("Annotations", f"{image_id}.xml"))


CAT, DOG = VOCObject("cat", (1, 1, 10, 20)), VOCObject("dog", (5.5, 6, 6.5, 7), True)


@pytest.fixture
def truth():
    return voc_truth([annotation("000012", CAT, DOG), annotation("000007", CAT), annotation("000100")])


@pytest.fixture
def found(truth):
    rng = np.random.default_rng(0)
    image, label = rng.integers(3, size=30), rng.integers(2, size=30)
    corner = rng.uniform(-3, 10, (30, 2))
    boxes = np.hstack([corner, corner + rng.uniform(0, 12, (30, 2))])
    boxes[3, 2:] = boxes[3, :2]
    score = rng.random(30).astype(np.float32)
    score[5:9] = score[5]
    return Detections.build(truth, image, label, score, snap(boxes))


def test_voc_truth(truth):
    assert truth.classes == ("cat", "dog")
    assert truth.images == ("000007", "000012", "000100")  # sorted, and one without objects
    np.testing.assert_array_equal(truth.image, [0, 1, 1])
    np.testing.assert_array_equal(truth.label, [0, 0, 1])
    np.testing.assert_array_equal(truth.boxes, [[0, 0, 10, 20], [0, 0, 10, 20], snap([4.5, 5, 6.5, 7])])
    np.testing.assert_array_equal(truth.area, [200, 200, 4])  # the last pixel counts
    np.testing.assert_array_equal(truth.difficult, [False, False, True])
    assert truth.difficult_known and truth.category_ids == (1, 2)
    assert voc_truth([annotation("a", CAT)], ["dog", "cat"]).label.tolist() == [1] and truth.remarks == ()


def test_voc_truth_names_file_and_object():
    with pytest.raises(ValueError, match=r"Annotations/b.xml, object 2 \(dog\): unknown class 'dog'; .* are cat"):
        voc_truth([annotation("b", CAT, DOG)], ["cat"])
    with pytest.raises(ValueError, match="image 'b' comes twice"):
        voc_truth([annotation("b", CAT), annotation("b")])


def test_boxes_without_area_are_left_out_and_told():
    """As by the converter, so that the labels and the ground truth hold the same objects."""
    bad = [VOCObject("cat", box) for box in ((9, 1, 5, 20), (4, 4, 4, 9), (-5, 1, 0, 9), (70, 1, 80, 9))]
    whole = voc_truth([annotation("b", *bad, CAT)])
    assert whole.boxes.tolist() == [[69, 0, 80, 9], [0, 0, 10, 20]]  # how wide the image is, nobody says
    known = voc_truth([annotation("b", *bad, CAT)], sizes=lambda image_id: {"b": (64, 48)}[image_id])
    assert known.boxes.tolist() == [[0, 0, 10, 20]]
    (remark,) = known.remarks
    assert remark.startswith(
        "Boxes without area within their image are left out (4): Annotations/b.xml, object 1 (cat)"
    )


def test_the_devkits_format(tmp_path, truth):
    found = Detections.build(truth, [1, 0], [0, 0], [0.75, 0.1], [[0, 0, 10, 20], [0.5, 1, 2.25, 3]])
    cat, dog = write_voc_detections(tmp_path, truth, found, "val")
    assert (cat.name, dog.name) == ("comp4_det_val_cat.txt", "comp4_det_val_dog.txt")
    assert cat.read_text() == "000012 0.75 1.0 1.0 10.0 20.0\n000007 0.1 1.5 2.0 2.25 3.0\n"
    assert dog.read_text() == ""  # there, and empty


def test_cocos_format(tmp_path, truth):
    found = Detections.build(truth, [1], [1], [0.75], [[0.5, 1, 2.25, 3]])
    write_coco_detections(tmp_path / "d.json", truth, found)
    entry = {"image_id": 12, "category_id": 2, "bbox": [0.5, 1.0, 1.75, 2.0], "score": 0.75}
    assert json.loads((tmp_path / "d.json").read_text()) == [entry]


def same(truth, a, b):
    """Whether two sets of detections are the same to the last bit; by class, the order within which breaks ties."""
    order = np.argsort(a.label, kind="stable"), np.argsort(b.label, kind="stable")
    for x, y in ((getattr(d, f)[o] for d, o in zip((a, b), order, strict=True)) for f in ("image", "label", "score")):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(a.boxes[order[0]], b.boxes[order[1]])
    np.testing.assert_array_equal(voc_ap(truth, a).ap, voc_ap(truth, b).ap)
    assert coco_ap(truth, a).stats == pytest.approx(coco_ap(truth, b).stats, abs=0, nan_ok=True)


def test_detections_come_back_to_the_last_bit(tmp_path, truth, found):
    write_coco_detections(tmp_path / "d.json", truth, found)
    write_voc_detections(tmp_path, truth, found)
    same(truth, found, read_coco_detections(tmp_path / "d.json", truth))
    same(truth, found, read_voc_detections(tmp_path, truth))


coordinate = st.floats(-100, 5000, width=32)


@settings(max_examples=200, deadline=None)
@given(st.tuples(coordinate, coordinate, coordinate, coordinate))
def test_conversions_are_exact_on_the_grid(values):
    x1, y1, x2, y2 = snap(np.sort(np.reshape(values, (2, 2)), axis=0).ravel()).tolist()
    assert (x1 + 1) - 1 == x1 and y1 + (y2 - y1) == y2  # VOC and back, COCO and back
    assert x2 - (x1 + 1) + 1 == x2 - x1  # the devkit's width is ours
    assert abs(x1 - np.min(values[::2])) <= 2.0**-21


def test_ground_truth_comes_back(tmp_path, truth):
    write_coco_truth(tmp_path / "a.json", truth)
    back = read_coco_truth(tmp_path / "a.json")
    assert back.classes == truth.classes and back.images == ("7", "12", "100") and back.stems == truth.stems
    for field in "image", "label", "boxes", "difficult", "area":
        np.testing.assert_array_equal(getattr(back, field), getattr(truth, field))


def test_pycocotools_reads_what_is_written_and_gives_the_same(tmp_path, truth, found):
    write_coco_truth(tmp_path / "a.json", truth)
    write_coco_detections(tmp_path / "d.json", truth, found)
    with contextlib.redirect_stdout(io.StringIO()):
        objects = COCO(str(tmp_path / "a.json"))
        evaluator = COCOeval(objects, objects.loadRes(str(tmp_path / "d.json")), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    ours = np.nan_to_num(list(coco_ap(truth, found).stats.values()), nan=-1)
    np.testing.assert_allclose(ours, evaluator.stats, atol=1e-12)


def test_cocos_own_annotations(tmp_path):
    """Ids with gaps, in any order, areas of masks, other fields."""
    content = {
        "images": [{"id": 9, "file_name": "b/x.jpg"}, {"id": 3, "file_name": "y.jpg"}],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 18, "name": "dog", "supercategory": "animal"}],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 18, "bbox": [1, 2, 3, 4], "area": 5.5, "iscrowd": 1},
            {"id": 2, "image_id": 3, "category_id": 90, "bbox": [1, 2, 3, 4]},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    truth = read_coco_truth(tmp_path / "a.json")
    assert truth.classes == ("dog", "toothbrush") and truth.category_ids == (18, 90)
    assert truth.images == ("3", "9") and truth.stems == ("y", "x")
    np.testing.assert_array_equal(truth.image, [1, 0])
    np.testing.assert_array_equal(truth.boxes, [[1, 2, 4, 6]] * 2)
    np.testing.assert_array_equal(truth.area, [5.5, 12])
    np.testing.assert_array_equal(truth.difficult, [True, False])
    (tmp_path / "d.json").write_text(json.dumps([{"image_id": 3, "category_id": 90, "bbox": [0, 0, 1, 1], "score": 1}]))
    assert read_coco_detections(tmp_path / "d.json", truth).label.tolist() == [1]


def test_a_number_is_found_among_ids_with_zeros(tmp_path, truth):
    """Ultralytics writes the image 000012 as 12."""
    entries = [{"image_id": i, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5} for i in (12, "000012", 7, 100)]
    (tmp_path / "d.json").write_text(json.dumps(entries))
    assert read_coco_detections(tmp_path / "d.json", truth).image.tolist() == [1, 1, 0, 2]


ENTRY = {"image_id": 12, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{,}]", "line 1, column 3: not JSON"),
        ({"a": 1}, "expected a list"),
        ([ENTRY, {"image_id": 12}], r"entry \[1\]: has no 'category_id'"),
        ([ENTRY, 3], r"entry \[1\]: has no 'image_id'"),
        (
            [ENTRY, {**ENTRY, "image_id": 13}],
            r"entry \[1\]: image_id 13 is not in the annotations, which have 000007, 000012, 000100",
        ),
        ([{**ENTRY, "category_id": 3}], r"entry \[0\]: category_id 3 is not in the annotations, which have 1, 2"),
        ([ENTRY, {**ENTRY, "score": float("nan")}], r"entry \[1\]: score is nan; it must be a finite number"),
        ([{**ENTRY, "score": None}], r"entry \[0\]: score is None; it must be a number"),
        ([ENTRY, {**ENTRY, "bbox": [5, 0, -1, 1]}], r"entry \[1\]: the box x1=5, .* has x2 < x1"),
        ([{**ENTRY, "bbox": [5, 0, 1]}], r"entry \[0\]: bbox is \[5, 0, 1\]; it must be a list of x, y, width, height"),
        ([ENTRY, {**ENTRY, "bbox": [5, 0, "1", 1]}], r"entry \[1\]: bbox is '1'; it must be a number"),
        ([{**ENTRY, "score": True}], r"entry \[0\]: score is True; it must be a number"),
        ([{**ENTRY, "image_id": None}], r"entry \[0\]: image_id is None; it must be a whole number or a string"),
        ([{**ENTRY, "category_id": "1"}], r"entry \[0\]: category_id '1' is not in the annotations"),
        ([ENTRY, {**ENTRY, "file_name": "000013.jpg"}], r"entry \[1\]: file_name '000013.jpg' is not in"),
        ([{**ENTRY, "file_name": 5.5}], r"entry \[0\]: file_name is 5.5; it must be a string"),
    ],
)
def test_bad_coco_detections(tmp_path, truth, content, message):
    path = tmp_path / "detections.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=f"detections.json[:,] {message}"):
        read_coco_detections(path, truth)


def test_values_that_mean_the_same_to_pycocotools(tmp_path):
    content = {
        "images": [{"id": 1.0}, {"id": 2}],
        "categories": [{"id": 1, "name": 7}],
        "annotations": [
            {"image_id": 1, "category_id": 1.0, "bbox": [0, 0, 1, 1], "iscrowd": True, "ignore": 1},
            {"image_id": 2.0, "category_id": 1, "bbox": [0, 0, 1, 1], "iscrowd": 0.0, "ignore": 1},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    truth = read_coco_truth(tmp_path / "a.json")
    assert truth.images == ("1", "2") and truth.image.tolist() == [0, 1] and truth.classes == ("7",)
    assert truth.difficult.tolist() == [True, False]  # pycocotools overwrites `ignore` with `iscrowd`


def detections_in(tmp_path, truth, *entries):
    box = {"category_id": truth.category_ids[0], "bbox": [0, 0, 1, 1], "score": 0.5}
    (tmp_path / "d.json").write_text(json.dumps([{**box, **entry} for entry in entries]))
    return read_coco_detections(tmp_path / "d.json", truth).image.tolist()


def test_the_file_name_decides_which_image_is_meant(tmp_path):
    """Ultralytics makes the id of a detection of the file's name, whatever id the annotations give that file."""
    images = [{"id": i, "file_name": f"{8 - i:06d}.jpg"} for i in range(1, 8)]
    content = {"images": images, "categories": [{"id": 1, "name": "cat"}], "annotations": []}
    (tmp_path / "a.json").write_text(json.dumps(content))
    truth = read_coco_truth(tmp_path / "a.json")
    assert detections_in(tmp_path, truth, {"image_id": 2, "file_name": "000002.jpg"}, {"image_id": 2}) == [5, 1]
    with pytest.raises(ValueError, match=r"entry \[0\]: file_name '000009.jpg' is not in the annotations"):
        detections_in(tmp_path, truth, {"image_id": 2, "file_name": "000009.jpg"})
    content["images"] = [{"id": 1, "file_name": "a/x.jpg"}, {"id": 2, "file_name": "b/x.jpg"}, {"id": 3}]
    (tmp_path / "a.json").write_text(json.dumps(content))
    truth = read_coco_truth(tmp_path / "a.json")
    assert detections_in(tmp_path, truth, {"image_id": 2, "file_name": "x.jpg"}) == [1]  # both say so
    assert detections_in(tmp_path, truth, {"image_id": 3, "file_name": "z.jpg"}) == [2]  # its file has no name
    with pytest.raises(ValueError, match=r"entry \[0\]: file_name 'x.jpg' may be any of 1, 2 of the annotations"):
        detections_in(tmp_path, truth, {"image_id": 9, "file_name": "x.jpg"})


def test_a_number_that_two_ids_share_is_refused(tmp_path):
    truth = voc_truth([annotation("12", CAT), annotation("012")])
    assert detections_in(tmp_path, truth, {"image_id": "12"}, {"image_id": 12, "file_name": "012.jpg"}) == [1, 0]
    with pytest.raises(ValueError, match=r"entry \[0\]: image_id 12 may be any of 012, 12 of the annotations"):
        detections_in(tmp_path, truth, {"image_id": 12})


IMAGE, CATEGORY = {"id": 1}, {"id": 1, "name": "cat"}
OBJECT = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [IMAGE, {"id": 2}, IMAGE]}, "image id '1' comes twice"),
        ({"images": [{"id": None}]}, r"images\[0\]: id is None; it must be a whole number or a string"),
        ({"categories": [CATEGORY, {"id": 1, "name": "dog"}]}, "category id '1' comes twice"),
        ({"categories": [CATEGORY, {"id": 2, "name": "cat"}]}, "category name 'cat' comes twice"),
        ({"annotations": [OBJECT, {**OBJECT, "image_id": 5}]}, r"annotations\[1\]: image_id 5 is not in"),
        ({"annotations": [{**OBJECT, "category_id": 5}]}, r"annotations\[0\]: category_id 5 is not in"),
        ({"annotations": [{**OBJECT, "bbox": [0, 0, 1, -1], "area": 1}]}, r"annotations\[0\]: the box .* y2 < y1"),
        ({"images": [IMAGE, {"id": 1.0}]}, "image id '1' comes twice"),
        ({"images": [IMAGE, {"id": True}]}, r"images\[1\]: id is True"),
        ({"images": [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "a"}]}, "image file 'a' comes twice"),
        ({"images": [{"id": 1, "file_name": None}]}, "image 1: file_name is None; it must be a string"),
        ({"categories": [{"id": 1, "name": None}]}, "category 1: name is None; it must be a string"),
        *(
            ({"annotations": [OBJECT, {**OBJECT, key: value}]}, rf"annotations\[1\]: {key} {message}")
            for key, value, message in [
                ("image_id", "1", "'1' is not in the annotations, which have 1"),
                ("image_id", True, "is True; it must be a whole number or a string"),
                ("category_id", None, "is None; it must be a whole number or a string"),
                ("category_id", 1.5, "is 1.5; it must be a whole number or a string"),
                ("bbox", [0, 0, True, 1], "is True; it must be a number"),
                ("bbox", [0, 0, 10**400, 1], "is a number of 401 digits"),
                ("area", None, "is None; it must be a number"),
                ("area", -1, "is -1; it must be a finite number of at least 0"),
                ("iscrowd", "0", "is '0'; it must be 0 or 1"),
                ("iscrowd", None, "is None; it must be 0 or 1"),
                ("iscrowd", 2, "is 2; it must be 0 or 1"),
            ]
        ),
        ({"annotations": None}, "expected an object with a list 'annotations'"),
    ],
)
def test_bad_coco_annotations(tmp_path, change, message):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"images": [IMAGE], "categories": [CATEGORY], "annotations": [OBJECT], **change}))
    with pytest.raises(ValueError, match=f"truth.json[:,] {message}"):
        read_coco_truth(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("000013 0.5 1 1 5 5", "line 2: image '000013' is not in the annotations, which have 3 images"),
        ("000012 nan 1 1 5 5", "line 2: score is nan"),
        ("000012 0.5 7 1 5 5", "line 2: the box x1=6, .* has x2 < x1"),
        ("000012 0.5 1 1 5", "line 2: '000012 0.5 1 1 5' is not 'id score xmin ymin xmax ymax'"),
        ("000012 0.5 1 1 5 x", "line 2: .* is not 'id score"),
    ],
)
def test_bad_voc_detections(tmp_path, truth, line, message):
    (tmp_path / "comp4_det_test_dog.txt").write_text("")
    (tmp_path / "comp4_det_test_cat.txt").write_text(f"000012 0.5 1 1 5 5\n{line}\n")
    with pytest.raises(ValueError, match=f"comp4_det_test_cat.txt, {message}"):
        read_voc_detections(tmp_path, truth)


def test_encodings_of_voc_detections(tmp_path, truth):
    (tmp_path / "comp4_det_test_dog.txt").write_text("")
    path = tmp_path / "comp4_det_test_cat.txt"
    path.write_bytes("000012 0.5 1 1 5 5\r\n".encode("utf-16"))
    assert read_voc_detections(tmp_path, truth).boxes.tolist() == [[0, 0, 5, 5]]
    path.write_bytes("000012 0.5 1 1 5 5\né 0.5 1 1 5 5\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"comp4_det_test_cat.txt, line 2: not a text file in UTF-8"):
        read_voc_detections(tmp_path, truth)


def test_bad_sets_of_voc_detections(tmp_path, truth):
    (tmp_path / "comp4_det_test_cat.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"comp4_det_test_dog.txt: no such file; .* has an empty one"):
        read_voc_detections(tmp_path, truth)
    (tmp_path / "comp4_det_test_dog.txt").write_text("")
    (tmp_path / "comp3_det_test_dog.txt").write_text("")
    with pytest.raises(ValueError, match=r"comp4_det_test_dog.txt: class 'dog' already has comp3_det_test_dog.txt"):
        read_voc_detections(tmp_path, truth)
    (tmp_path / "comp3_det_test_dog.txt").rename(tmp_path / "comp4_det_test_cow.txt")
    with pytest.raises(ValueError, match=r"comp4_det_test_cow.txt: unknown class 'cow'; the classes are cat, dog"):
        read_voc_detections(tmp_path, truth)
    with pytest.raises(ValueError, match="class 'a/b' cannot be part of a file's name"):
        write_voc_detections(tmp_path, GroundTruth.build(["a/b"], ["i"], [], [], []), None)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert [p.read_text() for p in path.parent.iterdir()] == ["whole"]
