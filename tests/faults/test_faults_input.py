# yolo-sos, AGPL-3.0
"""Files of strangers and files that are damaged: nothing runs, nothing explodes, and the error names the file."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import YAML
from ultralytics.utils.patches import torch_load

from yolo_sos import cli
from yolo_sos.cli import train as train_mode
from yolo_sos.config import SOSConfig
from yolo_sos.data import digits as digits_set
from yolo_sos.data.voc import read_annotation
from yolo_sos.evaluate.coco_files import read_coco_truth
from yolo_sos.files import read_json

fault = pytest.mark.fault


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """``refused(*args)`` returns the one line with which ``yolo-sos args`` exits with status 2."""
    monkeypatch.chdir(tmp_path)

    def refused(*args):
        with pytest.raises(SystemExit) as e:
            cli.main([str(arg) for arg in args])
        assert e.value.code == 2
        out, err = capsys.readouterr()
        (line,) = (line for line in err.splitlines() if line.startswith("yolo-sos: "))
        assert "Traceback" not in out + err and len(line) < 2000
        return err

    return refused


# YAML ---------------------------------------------------------------------------------------------------------------

TAGS = [
    "!!python/object/apply:os.system ['touch ran']",
    '!!python/object/apply:builtins.exec [\'open("ran", "w")\']',
    "!!python/object/new:os.system ['touch ran']",
    "!!python/name:os.system",
    "!unknown 1",
]
LAUGHS = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
DEEP = "[" * 20_000


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("where", ["cfg", "data"])
@fault("a YAML with Python tags, as cfg= or data=", "nothing runs; exits with 2")
def test_tags(refused, tmp_path, digits, tiny, where, tag):
    (tmp_path / "evil.yaml").write_text(f"path: {tag}\nnames: [a]\n" if where == "data" else f"sos_rank: {tag}\n")
    arguments = ["train", f"model={tiny}", "sos=true", f"data={digits}", f"{where}=evil.yaml", "device=cpu"]
    assert "evil.yaml" in refused(*arguments)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["sos_rank", "sos_method", "sos_layers", "sos_guard", "lr_steps", "sos"])
@fault("a YAML that is endless when written out (billion laughs)", "names the setting, in little memory")
def test_laughs(tmp_path, key):
    (tmp_path / "evil.yaml").write_text(f"{LAUGHS}{key}: *a9\n")
    value = YAML.load(tmp_path / "evil.yaml")[key]  # small as it is: lists of the same lists
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"'{key}=.* is invalid"):
            SOSConfig.from_dict({key: value})
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


@fault("a YAML of brackets in brackets", "exits with 2")
def test_deep_yaml(refused, tmp_path, tiny):
    (tmp_path / "evil.yaml").write_text(f"sos_rank: {DEEP}\n")
    refused("train", f"model={tiny}", "cfg=evil.yaml", "sos=true")


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just words", "a: b: c"])
@fault("a cfg= file that is no mapping, or no YAML", "exits with 2 and names the file")
def test_other_yaml(refused, tmp_path, text):
    (tmp_path / "evil.yaml").write_text(text)
    assert "evil.yaml" in refused("train", "cfg=evil.yaml", "sos=true")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("names: [a]\n", "train", marks=fault("a data YAML without images", "exits with 2; names the key")),
        pytest.param(
            "train: x\nval: x\n", "names", marks=fault("a data YAML without names", "exits with 2; names the key")
        ),
        pytest.param(
            "path: nowhere\ntrain: x\nval: x\nnames: [a]\n",
            "nowhere",
            marks=fault("a data YAML whose folder is missing", "exits with 2; names the folder"),
        ),
        pytest.param("", "evil.yaml", marks=fault("an empty data YAML", "exits with 2")),
    ],
)
def test_data_yaml(refused, tmp_path, tiny, text, says):
    (tmp_path / "evil.yaml").write_text(text)
    assert says in refused("train", f"model={tiny}", "data=evil.yaml", "sos=true", "device=cpu")


@fault("data= names no file", "exits with 2 and names it")
def test_no_data(refused, tiny):
    assert "none.yaml" in refused("train", f"model={tiny}", "data=none.yaml", "sos=true", "device=cpu")


@fault("an error in the middle of a training", "not taken for bad input: its traceback is shown")
def test_errors_of_the_training_itself_keep_their_traceback(monkeypatch, tiny):
    callbacks = {}
    monkeypatch.setattr(YOLO, "add_callback", lambda self, event, callback: callbacks.update({event: callback}))

    def train(self, **_):
        callbacks["on_train_start"](self)
        raise ValueError("of epoch 3")

    monkeypatch.setattr(YOLO, "train", train)
    with pytest.raises(ValueError, match="of epoch 3"):
        train_mode.run({"model": str(tiny), "data": "x.yaml", "sos": True})


@fault("a mode, a key or a word that there is not", "exits with 2; names it, and the nearest key")
def test_unknown_words(refused):
    assert "'foo' is not a mode, a task or a switch" in refused("foo")
    assert "'foo' is not a switch of train" in refused("train", "foo")
    assert "Did you mean 'sos_rank'" in refused("train", "sos_rnk=3")
    assert "mode must be one of convert, fit" in refused("mode=foo")


@fault("an extra that is not installed", "exits with 2 and names the extra, before a download")
def test_extras(refused, monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    monkeypatch.setattr(YOLO, "__init__", lambda *_, **__: pytest.fail("a model was loaded"))
    assert "pip install 'yolo-sos[peers]'" in refused("train", "model=yolov5s.pt", "sharpness_aware=sam")


@fault("data=digits-cls without scikit-learn", "exits with 2 and names the extra")
def test_digits_without_scikit_learn(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits_set.source_digits.cache_clear()
    monkeypatch.setattr("ultralytics.utils.DATASETS_DIR", Path("sets").absolute())
    assert "pip install 'yolo-sos[digits]'" in refused(
        *("train", "data=digits-cls", "model=yolo11n-cls.yaml", "imgsz=32", "device=cpu")
    )


@fault("experiment bccd without BCCD_ROOT", "exits with 2; says what to set and where to get the images")
def test_bccd_without_its_images(refused, monkeypatch):
    monkeypatch.delenv("BCCD_ROOT", raising=False)
    monkeypatch.setattr("ultralytics.data.utils.DATASETS_DIR", Path("sets").absolute())
    assert "BCCD_ROOT: set this environment variable" in refused("experiment", "bccd", "arms=baseline", "seeds=0")


# XML and JSON -------------------------------------------------------------------------------------------------------


@fault("a VOC annotation of elements in elements", "read; what is unknown is skipped")
def test_deep_xml(tmp_path):
    path = tmp_path / "deep.xml"
    path.write_text("<annotation>" + "<a>" * 50_000 + "</a>" * 50_000 + "</annotation>")
    assert read_annotation(path).objects == ()


@fault("a VOC annotation in an encoding that nobody knows", "an error that names the file")
def test_encoding(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text('<?xml version="1.0" encoding="klingon"?><annotation/>')
    with pytest.raises(ValueError, match=r"a\.xml: not a readable XML file"):
        read_annotation(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("[" * 100_000, marks=fault("JSON of brackets in brackets", "an error that names the file")),
        pytest.param("9" * 5000, marks=fault("JSON with a number of 5 000 digits", "an error that names the file")),
        pytest.param('{"a": 1', marks=fault("JSON that is cut off", "an error that names file and line")),
        pytest.param(b"\xff\xfe\x00", marks=fault("JSON that is no text", "an error that names the file")),
    ],
)
def test_json(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"a\.json"):
        read_json(path)


@fault("COCO annotations without any image or category", "an error that names the file")
def test_coco_without_images(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"images": [], "categories": [], "annotations": []}')
    with pytest.raises(ValueError, match=r"a\.json: there is no image id"):
        read_coco_truth(path)


# Checkpoints and logs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", marks=fault("model= is an empty file", "exits with 2")),
        pytest.param(b"not a checkpoint", marks=fault("model= is no checkpoint", "exits with 2")),
        pytest.param(b"PK\x03\x04" + bytes(100), marks=fault("model= is a checkpoint that is cut off", "exits with 2")),
    ],
)
@pytest.mark.parametrize("mode", ["shift", "train", "analyze"])
def test_checkpoints(refused, tmp_path, digits, mode, content):
    (tmp_path / "bad.pt").write_bytes(content)
    refused(mode, "model=bad.pt", f"data={digits}", "device=cpu", *(["sos=true"] if mode == "train" else []))


@pytest.fixture
def cut(train):
    """The run that was interrupted after its first epoch."""

    def interrupt(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    return train(callbacks={"on_train_epoch_start": interrupt}, error=KeyboardInterrupt)


@fault("resume with a sos.csv that is none", "an error that names it and what to do")
def test_resume_with_a_damaged_log(train, cut):
    (cut.save_dir / "sos.csv").write_text("epoch,model\nthree,ema\n")
    run = train(model=str(cut.save_dir / "weights/last.pt"), resume=True, error=ValueError)
    assert "sos.csv: not a log of shifts. Remove it" in str(run.error)


@fault("resume without sos.csv and results.csv", "works; earlier shifts are not told")
def test_resume_without_logs(train, cut):
    for name in "sos.csv", "results.csv":
        (cut.save_dir / name).unlink()
    run = train(model=str(cut.save_dir / "weights/last.pt"), resume=True)
    assert {row["epoch"] for row in run.rows("sos.csv")} == {"2"}


@fault("resume with a results.csv whose last line is cut off", "the line goes")
def test_resume_with_a_line_cut_off(train, cut):
    with open(cut.save_dir / "results.csv", "a") as f:
        f.write("1")
    run = train(model=str(cut.save_dir / "weights/last.pt"), resume=True)
    assert [row["epoch"] for row in run.rows("results.csv")] == ["1", "2"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        pytest.param(
            {"sos": True, "sos_rank": -3},
            "sos_rank=-3",
            marks=fault("a checkpoint with a setting out of range", "resume names the setting"),
        ),
        pytest.param(
            {"sos": True, "sos_future": 1},
            "sos_future",
            marks=fault("a checkpoint with a setting that is unknown", "resume names the setting"),
        ),
    ],
)
def test_resume_with_other_settings(train, cut, settings, says):
    last = cut.save_dir / "weights/last.pt"
    ckpt = torch_load(last, map_location="cpu")
    ckpt["sos"]["settings"] = settings
    torch.save(ckpt, last)
    run = train(model=str(last), resume=True, error=ValueError)
    assert says in str(run.error)
