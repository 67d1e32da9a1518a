"""Reading and writing Pascal VOC annotations and image sets."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolo_sos.data.voc import (
    Selection,
    VOCAnnotation,
    VOCObject,
    clipped_box,
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
            VOCObject("person", (53.4, 87, 471, 420), difficult=True),
            VOCObject("horse", (158, 44, 289, 167)),  # no flag in the file, and no part among the objects
        ),
    )


def test_what_may_be_missing_is_missing(tmp_path):
    assert read_annotation(write(tmp_path / "a.xml", "<annotation/>")) == VOCAnnotation("a", "", 0, 0, ())


coordinate = st.floats(-1e4, 1e4) | st.integers(-5, 5000).map(float)
name = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1)


@given(
    objects=st.lists(st.builds(VOCObject, name, st.tuples(*[coordinate] * 4), st.booleans())),
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
        ("<difficult>1</difficult>", "<difficult>maybe</difficult>", "<difficult> is 'maybe': a flag is 0 or 1"),
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


@pytest.mark.parametrize("width", ["Unspecified", "0.0597", "-1", "wide", "1e999", "nan", ""])
def test_what_is_not_used_is_not_judged(tmp_path, width):
    text = PERSON.replace("<truncated>1", f"<truncated>{width}").replace("<width>500", f"<width>{width}")
    annotation = read_annotation(write(tmp_path / "a.xml", text))
    assert (annotation.width, annotation.height) == (0, 442)  # 0: the file does not say
    assert len(annotation.objects) == 2
    assert read_annotation(write(tmp_path / "a.xml", PERSON.replace("500<", "500.0<"))).width == 500


@pytest.mark.parametrize(
    ("flag", "difficult", "word"),
    [
        *(("1", True, False), ("0", False, False), ("1.0", True, False), ("0.0", False, False), (" 1 ", True, False)),
        *(("true", True, True), ("Yes", True, True), ("FALSE", False, True), ("no", False, True)),
        ("Unspecified", False, True),
    ],
)
def test_flags_in_words_have_a_rule_and_are_told(tmp_path, flag, difficult, word):
    path = write(tmp_path / "a.xml", PERSON.replace("<difficult>1", f"<difficult>{flag}"))
    annotation = read_annotation(path)
    assert annotation.objects[0].difficult is difficult
    assert annotation.words == ((f"object 1 (person): '{flag}'",) if word else ())
    selection = Selection()
    assert list(selection.of(annotation)) == [0, 1]
    assert ["Flags 'difficult' are words" in note for note in selection.notes()] == [True] * word


def test_upper_and_lower_case_and_namespaces_lose_no_object(tmp_path):
    expected = read_annotation(write(tmp_path / "a.xml", PERSON))
    mixed = re.sub(r"(</?)([a-z])", lambda m: m[1] + m[2].upper(), PERSON).replace("Xmin", "XMin")
    assert "<Difficult>" in mixed and read_annotation(write(tmp_path / "a.xml", mixed)).objects == expected.objects
    space = PERSON.replace("<annotation>", '<annotation xmlns="http://example.org">')
    assert read_annotation(write(tmp_path / "a.xml", space)) == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_encodings_of_annotations(tmp_path, encoding):
    text = PERSON.replace("person", "ménage")
    path = tmp_path / "a.xml"
    declared = f'<?xml version="1.0" encoding="{encoding}"?>' if encoding == "latin-1" else ""
    path.write_bytes((declared + text).encode(encoding))
    assert read_annotation(path).objects[0].name == "ménage"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.xml: not a readable XML file: .*line 5"):
        read_annotation(path)


def test_boxes_are_clipped_where_the_size_is_known():
    assert clipped_box((0, 3, 12, 8), 10, 20) == (0, 2, 10, 8)
    assert clipped_box((0, 3, 12, 8)) == (0, 2, 12, 8)
    assert clipped_box((11, 3, 12, 8), 10, 20) is None and clipped_box((11, 3, 12, 8)) is not None
    for box in (5, 5, 5, 9), (9, 5, 2, 8), (5, 9, 8, 2), (-3, 1, 0, 8):
        assert clipped_box(box) is None


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


@pytest.mark.parametrize("name", ["train", "night_train"])
def test_names_that_end_in_a_number_keep_it(tmp_path, name):
    """A flag is a second column of a class's set; `shot 1.jpg` is the name of an image."""
    image_set(tmp_path, "shot\nshot 1\nshot 0\n", name)
    assert read_image_set(tmp_path, name) == ["shot", "shot 1", "shot 0"]
    image_set(tmp_path, "shot 1\nshot 0\nshot -1\n", name)
    (tmp_path / "Annotations").mkdir()
    for image_id in "shot 1", "shot 0", "shot -1":
        (tmp_path / "Annotations" / f"{image_id}.xml").touch()
    assert read_image_set(tmp_path, name) == ["shot 1", "shot 0", "shot -1"]


def test_encodings_of_image_sets(tmp_path):
    path = image_set(tmp_path, "") / "ImageSets/Main/train.txt"
    path.write_bytes("été 1\r\nb\r\n".encode("utf-16"))
    assert read_image_set(tmp_path, "train") == ["été 1", "b"]
    path.write_bytes("a\nété\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.txt, line 2: not a text file in UTF-8"):
        read_image_set(tmp_path, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", "lists no image"),
        ("a\n\nb\na\n", "line 4: lists 'a' twice; it is on line 1 already"),
        ("b\n../../a\n", "line 2: .* no image id"),
        ("..\n", "no image id"),
        ("c:a\n", "no image id"),
    ],
)
def test_malformed_image_sets_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"train\.txt.*{message}"):
        read_image_set(image_set(tmp_path, text), "train")
