# yolo-sos, AGPL-3.0
"""Class layers for other classes, and the rows that they are fitted on."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG_DICT, IterableSimpleNamespace
from ultralytics.utils.torch_utils import intersect_dicts

from yolo_sos.core import Engine, affine_matrix, input_rows
from yolo_sos.core.capture import InputCapture
from yolo_sos.yolo.class_rows import BACKGROUND, Assignments, ClassRows
from yolo_sos.yolo.classes import (
    append_classes,
    class_layers,
    in_order,
    known_classes,
    listed,
    priors,
    resized,
    take_over,
)
from yolo_sos.yolo.heads import YoloTask, head_of

NAMES = dict(enumerate(["cat", "Dog ", "bird"]))


def detector(cfg="yolov8n.yaml", nc=80):
    torch.manual_seed(0)
    model = DetectionModel(cfg, nc=nc, verbose=False)
    model.names = {k: f"thing {k}" for k in range(nc)}
    model.args = IterableSimpleNamespace(**DEFAULT_CFG_DICT)
    return model.eval()


def batch_of(images=2, size=64, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    return {
        "img": rand(images, 3, size, size),
        "batch_idx": torch.arange(images).repeat_interleave(3).float(),
        "cls": (rand(3 * images, 1) * classes).floor(),
        "bboxes": torch.cat([0.3 + 0.4 * rand(3 * images, 2), 0.2 + 0.3 * rand(3 * images, 2)], 1),
    }


def test_classes_are_known_by_name_but_not_by_number():
    assert known_classes(NAMES, {0: "dog", 1: "horse", 2: "CAT"}) == {0: 2, 1: 0}
    assert known_classes({0: "0", 1: "1"}, {0: "0", 1: "1", 2: "2"}) == {}  # placeholders, of other sets
    assert known_classes({0: "0", 1: "1"}, {0: "0", 1: "1"}) == {0: 0, 1: 1}  # the same set


def test_many_names_are_counted():
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed([f"c{i}" for i in range(97)]) == "'c0', 'c1', 'c2', 'c3', 'c4', 92 more"
    assert listed(list("abcde")) == "'a', 'b', 'c', 'd', 'e'"


@pytest.mark.parametrize("cfg", ["yolov8n.yaml", "yolov10n.yaml", "yolo26n.yaml"])
def test_a_resized_model_keeps_towers_and_known_rows(cfg):
    source = detector(cfg)
    before = deepcopy(source.state_dict())
    model = resized(source, {0: "new", 1: "thing 7", 2: "Thing 3"}, seed=1)
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items())
    assert (head_of(model).nc, head_of(model).no, model.yaml["nc"]) == (3, 3 + 4 * head_of(model).reg_max, 3)
    assert [len(of) for of in class_layers(model).values()] == [3] * (1 if cfg == "yolov8n.yaml" else 2)
    for ours, theirs in zip(in_order(model), in_order(source), strict=True):
        own, rows = affine_matrix(ours.module), affine_matrix(theirs.module)
        assert own.shape == (3, rows.shape[1]) and torch.equal(own[1:], rows[[7, 3]])
        assert own[0, :-1].norm() > 0 and not torch.equal(own[0], rows[0])
        stride = float(head_of(model).stride[ours.level])
        assert float(own[0, -1]) == pytest.approx(math.log(5 / 3 / (640 / stride) ** 2))
    rows = {layer.name for layer in in_order(model)}
    towers = {k: v for k, v in model.state_dict().items() if k.rsplit(".", 1)[0] not in rows}
    assert len(towers) > 300 and all(torch.equal(v, before[k]) for k, v in towers.items())
    again = resized(source, model.names, seed=1)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert model.eval()(torch.rand(1, 3, 64, 64))[1] is not None


def test_the_bias_of_an_untrained_head_is_ultralytics_own():
    model = detector(nc=80)
    for layer, prior in zip(in_order(model), priors(model, {}).values(), strict=True):
        assert torch.allclose(prior[:, -1].float(), layer.module.bias) and prior[:, :-1].norm() == 0
    known = priors(model, {5: 0})
    for layer in in_order(model):
        assert torch.equal(known[layer.name][5].float(), affine_matrix(layer.module)[5])


def test_appended_classes_leave_old_scores_bit_identical():
    source = detector(nc=80)
    new = resized(source, NAMES, seed=3)
    both = append_classes(source, new)
    assert list(both.names.values())[78:] == ["thing 78", "thing 79", *NAMES.values()]
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        old, fresh, whole = (m.eval()(x)[0] for m in (source, new, both))
    assert torch.equal(whole[:, :84], old)
    assert torch.allclose(whole[:, 84:], fresh[:, 4:], atol=1e-6)


def test_a_tower_that_an_older_release_loses_is_taken_over():
    """Before 8.4.190, `load` left out what had another width: here by hand, so that it holds on every release."""
    source = detector(nc=80)
    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
    model.load_state_dict(intersect_dicts(source.state_dict(), model.state_dict()), strict=False)
    assert model.model[-1].cv3[0][-1].in_channels == 64  # which is why
    model.names = {0: "new", 1: "thing 7", 2: "other"}
    take_over(model, source, known_classes(model.names, source.names), seed=0)
    for ours, theirs in zip(in_order(model), in_order(source), strict=True):
        assert ours.module.in_channels == 80
        assert torch.equal(affine_matrix(ours.module)[1], affine_matrix(theirs.module)[7])
    tower, right = model.model[-1].cv3[0][0].state_dict(), source.model[-1].cv3[0][0].state_dict()
    assert all(torch.equal(v, right[k]) for k, v in tower.items())
    assert all(p.requires_grad for p in model.model[-1].cv3.parameters())
    other = DetectionModel("yolov8s.yaml", nc=3, verbose=False)
    kept = deepcopy(other.state_dict())
    take_over(other, source, {}, seed=0)  # of another size
    assert all(torch.equal(v, kept[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("cfg", ["yolov8n.yaml", "yolo26n.yaml"])
def test_rows_are_those_of_the_assigner_and_stand_for_every_anchor_point(cfg):
    model = resized(detector(cfg), NAMES, seed=0).eval()
    model.args = IterableSimpleNamespace(**DEFAULT_CFG_DICT)
    task, batch = YoloTask(model), batch_of()
    rows = ClassRows(task, seed=0)
    engine = Engine(model, rows.layers, task)
    found = rows.collect(engine, [batch], 2)
    with torch.no_grad(), InputCapture(rows.layers) as capture:
        output = task.run(model, batch)
        inputs = capture.take()
    for branch, layers in class_layers(model).items():
        right = targets(getattr(task.criterion, branch, task.criterion), output.get(branch, output), batch)
        points = [8 * 8, 4 * 4, 2 * 2]
        for layer, of in zip(layers, right.split(points, 1), strict=True):
            part, of = found[layer.name], of.flatten(0, 1)
            foreground = of.amax(1) > 0
            count = int(foreground.sum())
            assert torch.equal(part.targets[:count], of[foreground]) and not part.targets[count:].any()
            own = input_rows(layer.module, inputs[layer.name])
            assert torch.equal(part.inputs[:count], own[foreground])
            assert part.weights.sum() == pytest.approx(len(of))
            assert len(part) - count == min(len(of) - count, 2 * BACKGROUND)
            background = {tuple(row.tolist()) for row in own[~foreground]}
            assert {tuple(row.tolist()) for row in part.inputs[count:]} <= background
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def targets(criterion, predictions, batch):
    """Ask a criterion's assigner, with all scores alike, as its own code does."""
    from ultralytics.utils.tal import make_anchors

    points, stride = make_anchors(predictions["feats"], criterion.stride, 0.5)
    boxes = criterion.bbox_decode(points, predictions["boxes"].permute(0, 2, 1).contiguous()) * stride
    size = torch.tensor([64.0, 64.0, 64.0, 64.0])
    objects = torch.cat([batch["batch_idx"][:, None], batch["cls"], batch["bboxes"]], 1)
    labels, right = criterion.preprocess(objects, 2, scale_tensor=size).split((1, 4), 2)
    scores = torch.full((2, len(points), 3), 0.5)
    mask = right.sum(2, keepdim=True).gt_(0.0)
    return criterion.assigner(scores, boxes, points * stride, labels, right, mask)[2].float()


def test_known_scores_have_a_say_and_others_do_not():
    model = resized(detector(), NAMES, seed=0).eval()
    model.args = IterableSimpleNamespace(**DEFAULT_CFG_DICT)
    task, batch = YoloTask(model), batch_of()
    with torch.no_grad(), InputCapture(task.layers) as capture:
        output = task.run(model, batch)
        inputs, results = capture.take(), []
        for known in ((), (0, 1, 2)):
            for scale in (1.0, 30.0):
                with Assignments(task, known) as assigned:
                    task.loss({**output, "scores": scale * output["scores"]}, batch)
                    results.append(torch.cat([targets for _, targets, _ in assigned.take(inputs)], 1))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[2], results[3])
    assert not task.criterion.assigner._forward_hooks and not task.criterion.assigner._forward_pre_hooks


def test_the_background_is_drawn_by_the_seed():
    model = resized(detector(), NAMES, seed=0).eval()
    model.args = IterableSimpleNamespace(**DEFAULT_CFG_DICT)
    task = YoloTask(model)

    def drawn(seed):
        rows = ClassRows(task, seed)
        return rows.collect(Engine(model, rows.layers, task), [batch_of(size=160)], 2)[rows.layers[0].name].inputs

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
