# yolo-sos, AGPL-3.0
"""The task of any PyTorch model."""

from collections import UserDict, namedtuple
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from yolo_sos.core import FinalLayer, ModelTask
from yolo_sos.core.tasks import to_device

LAYER = FinalLayer("fc", nn.Linear(5, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 2)])
def test_labels_are_one_hot_rows(shape, dtype):
    labels = torch.tensor([2, 0, 1, 2]).view(shape)
    p = ModelTask().probabilities(LAYER, torch.randn(4, 3, dtype=dtype), (None, labels))
    assert p.dtype == dtype
    assert p.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_labels_that_name_no_class_weigh_nothing():
    p = ModelTask().probabilities(LAYER, torch.zeros(3, 3), (None, torch.tensor([-100, 1, 255])))
    assert p.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("targets", "columns"),
    [
        (torch.tensor([0.5, 1.0]), 3),  # regression
        (torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]), 3),  # soft labels
        (torch.tensor([0, 1, 2, 0]), 3),  # not one per row
        (torch.tensor([0, 1]), 1),  # a single output
        (["a", "b"], 3),
    ],
)
def test_without_labels_the_prediction_stands_in(targets, columns):
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]], dtype=torch.float64)[:, :columns]
    p = ModelTask().probabilities(LAYER, logits, (None, targets))
    expected = logits.exp() / logits.exp().sum(1, keepdim=True)
    assert torch.allclose(p, expected, rtol=1e-12, atol=0)


def test_the_loss_is_the_criterion():
    task, x, z = ModelTask(), torch.zeros(2, 5), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    batch = x, torch.tensor([1, 1])
    assert task.run(lambda inputs: inputs + 1, batch).tolist() == (x + 1).tolist()
    assert task.replay_state(batch, z) is None
    # −log softmax of the true class, by hand
    by_hand = (torch.log(torch.exp(z).sum(1)) - z[:, 1]).mean()
    assert float(task.loss(z, batch)) == pytest.approx(float(by_hand), rel=1e-6)
    assert ModelTask(lambda z, y: z.sum() + y.sum()).loss(z, batch) == 5.0


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("batch", "size", "called"),
    [
        ((torch.zeros(3, 5), torch.zeros(3)), 3, "positional"),
        ([torch.zeros(3, 5), None], 3, "positional"),
        (((torch.zeros(3, 5), torch.zeros(3, 2)), torch.zeros(3)), 3, "positional"),
        (Pair(torch.zeros(3, 5), torch.zeros(3)), 3, "positional"),
        ((pack_sequence([torch.zeros(4, 5), torch.zeros(2, 5)]), torch.zeros(2)), 2, "positional"),
        ((pack_sequence([torch.zeros(4, 5), torch.zeros(2, 5)]), None), 2, "positional"),
        ({"input_ids": torch.zeros(3, 5), "labels": torch.zeros(3)}, 3, "keywords"),
        (UserDict({"input_ids": torch.zeros(3, 5)}), 3, "keywords"),
    ],
    ids=["tuple", "no targets", "two inputs", "namedtuple", "packed", "packed, no targets", "dict", "mapping"],
)
def test_forms_of_a_batch(batch, size, called):
    task = ModelTask()
    assert task.size(batch) == size
    seen = task.run(lambda *args, **kwargs: (args, kwargs), batch)
    if called == "keywords":
        assert seen[0] == () and seen[1].keys() == batch.keys()
    else:
        assert seen[0][0] is batch[0] and len(seen[0]) == 1 and seen[1] == {}
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    leaves = [x for x in (moved.values() if called == "keywords" else moved) if x is not None]
    leaves = [x for leaf in leaves for x in (leaf if type(leaf) is tuple else [leaf])]
    assert all((x.data if isinstance(x, PackedSequence) else x).device.type == "meta" for x in leaves)
    assert all(x.device.type == "cpu" for x in (batch.values() if called == "keywords" else ()))  # a copy


def test_what_holds_no_tensor_is_left_as_it_is():
    moved = to_device((torch.ones(2), ["text", 5], {"k": torch.ones(4), "n": None}), torch.device("meta"))
    assert moved[1] == ["text", 5]
    assert (moved[2]["k"].device.type, moved[2]["n"]) == ("meta", None)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(3, 5), r"A batch is a Tensor; expected \(inputs, targets\) or a mapping\. Pass forward="),
        ((1, 2, 3), "A batch is a tuple of 3; expected"),
        ("text", "A batch is a str"),
    ],
)
def test_other_forms_are_named(batch, message):
    with pytest.raises(TypeError, match=message):
        ModelTask().run(nn.Identity(), batch)
    assert ModelTask(forward=lambda model, batch: (model, batch)).run(None, batch)[1] is batch


def test_what_the_criterion_cannot_take_or_return_is_named():
    x, y = torch.zeros(3, 5), torch.zeros(3, dtype=torch.long)
    each = partial(nn.functional.cross_entropy, reduction="none")
    with pytest.raises(ValueError, match=r"criterion returned \(3,\); it must return a scalar .*reduction='mean'"):
        ModelTask(each).loss(x, (x, y))
    with pytest.raises(ValueError, match="criterion returned float"):
        ModelTask(lambda z, y: 1.0).loss(x, (x, y))
    with pytest.raises(TypeError, match="the targets are a NoneType; cross_entropy, the default criterion, takes two"):
        ModelTask().loss(x, (x, None))
    with pytest.raises(TypeError, match="The model returned a dict"):
        ModelTask().loss({"logits": x}, {"x": x, "labels": y})
    with pytest.raises(TypeError, match="its size is not known"):
        ModelTask().size(("a", "b"))
