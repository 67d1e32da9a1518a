"""Reading and writing Pascal VOC annotations and image sets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolo_sos.data.voc import (
    VOCAnnotation,
    VOCObject,
    annotation_paths,
    read_annotation,
    read_image_set,
    write_annotation,
)

PERSON = """<annotation>
  <folder>VOC2012</folder><filename>2008_000008.jpg</filename>
  <size><width>500</width><height>442</height><depth>3</depth></size>
  <object>
    <name>person</name><pose>Left</pose><truncated>1</truncated><difficult>1</difficult>
    <bndbox><xmin>53.4</xmin><ymin>87</ymin><xmax>471</xmax><ymax>420</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></part>
  </object>
  <object>
    <name> horse </name>
    <bndbox><xmax>289</xmax><xmin>158</xmin><ymax>167</ymax><ymin>44</ymin></bndbox>
  </object>
</annotation>
"""


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_objects_flags_and_order_of_coordinates(tmp_path):
    assert read_annotation(write(tmp_path / "2008_000008.xml", PERSON)) == VOCAnnotation(
        image_id="2008_000008",
        filename="2008_000008.jpg",
        width=500,
        height=442,
        objects=(
            VOCObject("person", (53.4, 87, 471, 420), difficult=True, truncated=True),
            VOCObject("horse", (158, 44, 289, 167)),  # neither flag in the file, and no part among the objects
        ),
    )


def test_what_may_be_missing_is_missing(tmp_path):
    assert read_annotation(write(tmp_path / "a.xml", "<annotation/>")) == VOCAnnotation("a", "", 0, 0, ())


coordinate = st.floats(-1e4, 1e4) | st.integers(-5, 5000).map(float)
name = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1)


@given(
    objects=st.lists(st.builds(VOCObject, name, st.tuples(*[coordinate] * 4), st.booleans(), st.booleans())),
    size=st.tuples(st.integers(0, 9999), st.integers(0, 9999)),
)
def test_reading_inverts_writing(tmp_path_factory, objects, size):
    path = tmp_path_factory.getbasetemp() / "round.xml"
    annotation = VOCAnnotation("round", "round.jpg", *size, tuple(objects))
    write_annotation(path, annotation)
    assert read_annotation(path) == annotation


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("<xmin>53.4</xmin>", "", "<bndbox/xmin> is missing"),
        ("<xmin>53.4</xmin>", "<xmin>left</xmin>", "<bndbox/xmin> is 'left'"),
        ("<xmin>53.4</xmin>", "<xmin>nan</xmin>", "<bndbox/xmin> is 'nan': a coordinate is a finite"),
        ("<name>person</name>", "<name> </name>", "object 1: <name> is missing"),
        ("<difficult>1</difficult>", "<difficult>2</difficult>", "<difficult> is '2': a flag is 0 or 1"),
        ("<width>500</width>", "<width>-5</width>", "<size/width> is '-5'"),
        ("<width>500</width>", "<width>wide</width>", "<size/width> is 'wide'"),
        ("<object>", "<objekt>", "not a readable XML file"),
        ("annotation>", "yolo>", "has the root <annotation>, this one has <yolo>"),
    ],
)
def test_errors_name_file_and_field(tmp_path, old, new, field):
    path = write(tmp_path / "bad.xml", PERSON.replace(old, new))
    with pytest.raises(ValueError) as e:
        read_annotation(path)
    assert str(path) in str(e.value)
    assert field in str(e.value)


BILLION_LAUGHS = """<!DOCTYPE a [<!ENTITY a0 "ha">
{}]><annotation><filename>&a9;</filename></annotation>""".format(
    "\n".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
)
EXTERNAL = (
    """<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><annotation><filename>&x;</filename></annotation>"""
)


@pytest.mark.parametrize("text", [BILLION_LAUGHS, EXTERNAL, "<!DOCTYPE annotation><annotation/>", "", "\0"])
def test_hostile_and_broken_xml_is_refused(tmp_path, text):
    path = write(tmp_path / "hostile.xml", text)
    with pytest.raises(ValueError, match=r"hostile\.xml: not a readable XML file"):
        read_annotation(path)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_annotation(tmp_path / "none.xml")


def image_set(root, text, name="train"):
    (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
    (root / f"ImageSets/Main/{name}.txt").write_text(text, encoding="utf-8")
    return root


def test_image_sets_keep_their_order_and_drop_the_column_of_a_class(tmp_path):
    image_set(tmp_path, "\ufeffb 2\r\n\na.1\r\n")
    image_set(tmp_path, "000012 -1\n000017  1\n000023  0\n", "cat_train")
    assert read_image_set(tmp_path, "train") == ["b 2", "a.1"]
    assert read_image_set(tmp_path, "cat_train") == ["000012", "000017", "000023"]


def test_an_unknown_image_set_lists_the_known(tmp_path):
    image_set(image_set(tmp_path, "a", "val"), "b", "trainval")
    with pytest.raises(FileNotFoundError, match=r"test\.txt: no such image set; .* has: trainval, val$"):
        read_image_set(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match="has: none"):
        read_image_set(tmp_path / "nowhere", "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", "lists no image"),
        ("a\nb\na\n", "lists 'a' twice"),
        ("../../a\n", "no image id"),
        ("..\n", "no image id"),
        ("c:a\n", "no image id"),
    ],
)
def test_malformed_image_sets_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"train\.txt: .*{message}"):
        read_image_set(image_set(tmp_path, text), "train")


def test_annotations_are_found_beside_the_images(tmp_path):
    base = tmp_path / "images" / "set"  # the last folder called images counts
    for split, stem in ("a", "2"), ("a", "1"), ("b", "3"), ("c", "1"):
        (base / "annotations" / split).mkdir(parents=True, exist_ok=True)
        (base / "annotations" / split / f"{stem}.xml").touch()
    data = {"voc": "annotations", "yaml_file": "set.yaml", "val": str(base / "images/a")}
    data["train"] = [str(base / "images" / s) for s in "ab"]
    assert annotation_paths(data, "val") == {i: base / f"annotations/a/{i}.xml" for i in "12"}
    assert list(annotation_paths(data, "train")) == ["1", "2", "3"]

    with pytest.raises(ValueError, match=r"set\.yaml: no key 'test'"):
        annotation_paths(data, "test")
    with pytest.raises(ValueError, match=r"set\.yaml: no key 'voc'"):
        annotation_paths({**data, "voc": None}, "val")
    with pytest.raises(ValueError, match="'val' has '1' twice"):
        annotation_paths({**data, "val": [str(base / "images/a"), str(base / "images/c")]}, "val")
    with pytest.raises(ValueError, match="no folder 'images'"):
        annotation_paths({**data, "val": "val.txt"}, "val")
    with pytest.raises(FileNotFoundError, match="no annotations"):
        annotation_paths({**data, "val": str(base / "images/d")}, "val")
