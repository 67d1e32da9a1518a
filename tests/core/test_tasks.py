# yolo-sos, AGPL-3.0
"""The plain task: a classifier and its labels."""

import pytest
import torch
from torch import nn

from yolo_sos.core import ClassifierTask, FinalLayer

LAYER = FinalLayer("fc", nn.Linear(5, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 2)])
def test_labels_are_one_hot_rows(shape, dtype):
    labels = torch.tensor([2, 0, 1, 2]).view(shape)
    p = ClassifierTask().probabilities(LAYER, torch.randn(4, 3, dtype=dtype), (None, labels))
    assert p.dtype == dtype
    assert p.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_labels_that_name_no_class_weigh_nothing():
    p = ClassifierTask().probabilities(LAYER, torch.zeros(3, 3), (None, torch.tensor([-100, 1, 255])))
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
    p = ClassifierTask().probabilities(LAYER, logits, (None, targets))
    expected = logits.exp() / logits.exp().sum(1, keepdim=True)
    assert torch.allclose(p, expected, rtol=1e-12, atol=0)


def test_the_other_answers():
    task, x, z = ClassifierTask(), torch.zeros(2, 5), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    batch = x, torch.tensor([1, 1])
    assert task.forward(lambda inputs: inputs + 1, batch).tolist() == (x + 1).tolist()
    assert task.replay(None, {"fc": z}) is z
    assert task.size(batch) == 2
    # −log softmax of the true class, by hand
    by_hand = (torch.log(torch.exp(z).sum(1)) - z[:, 1]).mean()
    assert float(task.loss(z, batch)) == pytest.approx(float(by_hand), rel=1e-6)
    assert ClassifierTask(lambda z, y: z.sum() + y.sum()).loss(z, batch) == 5.0
    with pytest.raises(ValueError, match="too many values to unpack"):
        task.replay(None, {"a": z, "b": z})  # it would have to choose
