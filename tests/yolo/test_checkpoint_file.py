# yolo-sos, AGPL-3.0
"""What is read of a checkpoint, what is refused, and what is written."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.utils.patches import torch_load

from yolo_sos.config import SOSConfig
from yolo_sos.core import weight_matrix
from yolo_sos.yolo.checkpoint import Checkpoint


def edited(path: Path, edit) -> Path:
    """Apply ``edit(ckpt, model)`` to a checkpoint."""
    ckpt = torch_load(path, map_location="cpu")
    edit(ckpt, ckpt["ema"] or ckpt["model"])
    torch.save(ckpt, path)
    return path


def saved_model(path: Path, model: nn.Module) -> Path:
    """Write a model as Ultralytics would."""
    torch.save({"model": model, "ema": None, "train_args": {"task": "detect", "imgsz": 64, "data": None}}, path)
    return path


def spoil(value):
    def edit(_, model):
        model.model[0].conv.weight.data[0, 0, 0, 0] = value

    return edit


def fused(path):
    return saved_model(path, YOLO(path).model.fuse(verbose=False))


def other_head(path):
    return saved_model(path, YOLO("yolo26n-sem.yaml").model)


def torchscript(path):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))
    return path


def renamed(suffix):
    return lambda path: path.rename(path.with_suffix(suffix))


def written(content):
    def write(path):
        path.write_bytes(content)
        return path

    return write


def pickled(content):
    def write(path):
        torch.save(content, path)
        return path

    return write


def truncated(share):
    def cut(path):
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        return path

    return cut


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (written(b"not a checkpoint"), TypeError, "best.pt is not a loadable checkpoint"),
        (written(b""), TypeError, "best.pt is not a loadable checkpoint"),
        # Ultralytics lets the second of these through as an OSError without a name.
        (truncated(0.5), TypeError, "best.pt is not a loadable checkpoint"),
        (truncated(0.01), TypeError, "best.pt is not a checkpoint of Ultralytics, or damaged"),
        (pickled([1, 2, 3]), TypeError, "best.pt is not a checkpoint of Ultralytics"),
        (pickled({"weights": torch.zeros(3)}), TypeError, "best.pt"),
        (pickled({"model": {"0.weight": torch.zeros(3)}}), TypeError, "best.pt"),
        (torchscript, TypeError, "best.pt is a TorchScript archive"),
        (renamed(".onnx"), TypeError, "best.onnx is not a checkpoint, a .pt that a training wrote"),
        (renamed(".torchscript"), TypeError, "best.torchscript is not a checkpoint"),
        (lambda path: path.with_name("none.pt"), FileNotFoundError, "none.pt: there is no such checkpoint"),
        (other_head, TypeError, "SemanticSegment, which has no final linear layers"),
        (fused, ValueError, "best.pt holds a fused model"),
        (
            lambda p: edited(p, spoil(float("nan"))),
            ValueError,
            "best.pt: model.0.conv.weight holds values that",
        ),
        (
            lambda p: edited(p, spoil(float("inf"))),
            ValueError,
            "best.pt: model.0.conv.weight holds values that",
        ),
    ],
)
def test_what_cannot_be_shifted_is_refused(weights, contents, make, error, message):
    path = make(weights())
    before = contents(path.parent)
    with pytest.raises(error, match=message):
        Checkpoint(path)
    assert contents(path.parent) == before


@pytest.mark.parametrize("path", [5, True, None, ["best.pt"]])
def test_what_is_no_path_is_refused_by_its_key(path):
    with pytest.raises(ValueError, match=r"'model=.*' is invalid: model must be the path of a checkpoint, a \.pt\."):
        Checkpoint(path)


def test_a_checkpoint_is_read_as_ultralytics_reads_it(weights):
    path = weights()
    checkpoint, stock = Checkpoint(path), YOLO(path)
    assert checkpoint.path == path
    assert checkpoint.task == "detect"
    assert [layer.name for layer in checkpoint.layers] == [f"model.5.cv{t}.{i}.2" for t in (2, 3) for i in range(3)]
    assert checkpoint.args["imgsz"] == 64
    assert not checkpoint.model.training
    state = checkpoint.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in stock.model.state_dict().items())
    assert all(v.dtype == torch.float32 for v in state.values() if v.is_floating_point())


def save(path: Path, scale: float = 0.5) -> tuple[Path, dict, dict, set[str]]:
    """Write a checkpoint with scaled final weights; return its path, both contents and the layers' parameters."""
    checkpoint = Checkpoint(path)
    weights = {layer.name: scale * weight_matrix(layer.module) for layer in checkpoint.layers[:4]}
    new = path.with_name("new.pt")
    checkpoint.save(new, weights, {"settings": {"rank": 0.5}})
    return new, torch_load(path), torch_load(new), {f"{name}.weight" for name in weights}


@pytest.mark.parametrize("name", ["best", "last"])
def test_nothing_but_the_chosen_weights_changes(weights, name):
    _, before, after, chosen = save(weights(name))
    assert [k for k in after if k != "sos"] == list(before)
    which = "ema" if name == "last" else "model"
    assert (before["ema"] is None, before["model"] is None) == (name == "best", name == "last")
    old, new = before.pop(which).state_dict(), after.pop(which).state_dict()
    assert list(new) == list(old)
    for key, value in old.items():
        assert new[key].dtype == value.dtype
        assert torch.equal(new[key], 0.5 * value if key in chosen else value), key
    optimizer, same = before.pop("optimizer"), after.pop("optimizer")
    assert (optimizer is None) == (name == "best")
    if optimizer:
        for i, state in optimizer["state"].items():
            assert all(torch.equal(same["state"][i][k], v) for k, v in state.items())
        assert same["param_groups"] == optimizer["param_groups"]
    note = after.pop("sos")
    assert repr(after) == repr(before)
    assert note["settings"] == SOSConfig.from_dict({}).to_dict()  # as a run that resumes from it without SOS
    assert [shift["settings"] for shift in note["shifts"]] == [{"rank": 0.5}]


def test_the_note_keeps_the_settings_of_the_training_and_earlier_shifts(weights):
    settings = SOSConfig.from_dict({"sos": True}).to_dict()
    path = edited(weights(), lambda ckpt, _: ckpt.update(sos={"version": "0", "settings": settings}))
    once, *_ = save(path)
    twice, *_ = save(once.rename(once.with_name("once.pt")))
    note = torch_load(twice)["sos"]
    assert (note["version"], note["settings"], len(note["shifts"])) == ("0", settings, 2)


def test_full_precision_is_saved_in_half_precision(weights):
    path = edited(weights(), lambda _, model: model.float())
    _, before, after, chosen = save(path)
    old, new = before["model"].state_dict(), after["model"].state_dict()
    for key, value in old.items():
        expected = value.half() if value.is_floating_point() else value
        assert torch.equal(new[key], (0.5 * value).half() if key in chosen else expected), key


def test_no_class_of_ours_is_pickled_and_the_bytes_do_not_depend_on_the_name(weights):
    path = weights()
    new, *_ = save(path)
    with zipfile.ZipFile(new) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        words = [str(arg) for _, arg, _ in pickletools.genops(archive.read(name))]
    assert not any("yolo_sos" in word for word in words)
    first = new.read_bytes()
    new.unlink()
    checkpoint = Checkpoint(path)
    weights = {layer.name: 0.5 * weight_matrix(layer.module) for layer in checkpoint.layers[:4]}
    checkpoint.save(path.with_name("other name.pt"), weights, {"settings": {"rank": 0.5}})
    assert path.with_name("other name.pt").read_bytes() == first
