# yolo-sos, AGPL-3.0
"""The final linear layers of every model of Ultralytics, and predictions replayed from other final weights."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import ultralytics
from torch import nn
from ultralytics.nn.tasks import (
    ClassificationModel,
    DetectionModel,
    OBBModel,
    PoseModel,
    RTDETRDetectionModel,
    SegmentationModel,
    parse_model,
    yaml_model_load,
)
from ultralytics.utils import DEFAULT_CFG_DICT, IterableSimpleNamespace

from yolo_sos.core import SOS, FinalLayer, InputCapture, write_weight
from yolo_sos.yolo.heads import YoloTask, final_layers, head_of, layers_of_kinds

MODELS = Path(ultralytics.__file__).parent / "cfg/models"
KINDS = {  # head -> kinds of its final layers
    "Detect": "box cls",
    "v10Detect": "box cls",
    "Segment": "box cls mask",
    "Segment26": "box cls mask",
    "Pose": "box cls kpt",
    "Pose26": "box cls kpt",
    "OBB": "box cls angle",
    "OBB26": "box cls angle",
    "Classify": "linear",
}
REFUSED = {
    *("RTDETRDecoder", "WorldDetect", "YOLOEDetect", "YOLOESegment", "YOLOESegment26"),
    *("SemanticSegment", "Depth"),
}
# What was found when this was written, branches × levels × kinds: no release of Ultralytics may change it unnoticed.
TABLE = {
    "1 × 1 × linear": "yolo11-cls yolo11-cls-resnet18 yolo12-cls yolo26-cls yolov8-cls yolov8-cls-resnet50 "
    "yolov8-cls-resnet101",
    "1 × 2 × box cls": "yolov3-tiny",
    "1 × 3 × box cls": "yolov3 yolov3-spp yolov5 yolov6 yolov8 yolov8-ghost yolov9t yolov9s yolov9m yolov9c yolov9e "
    "yolo11 yolo12",
    "1 × 4 × box cls": "yolov5-p6 yolov8-p2 yolov8-p6 yolov8-ghost-p2 yolov8-ghost-p6",
    "2 × 3 × box cls": "yolov10n yolov10s yolov10m yolov10b yolov10l yolov10x yolo26",
    "2 × 4 × box cls": "yolo26-p2 yolo26-p6",
    "1 × 3 × box cls mask": "yolov8-seg yolov9c-seg yolov9e-seg yolo11-seg yolo12-seg",
    "1 × 4 × box cls mask": "yolov8-seg-p6",
    "2 × 3 × box cls mask": "yolo26-seg",
    "1 × 3 × box cls kpt": "yolov8-pose yolo11-pose yolo12-pose",
    "1 × 4 × box cls kpt": "yolov8-pose-p6",
    "2 × 3 × box cls kpt": "yolo26-pose",
    "1 × 3 × box cls angle": "yolov8-obb yolo11-obb yolo12-obb",
    "2 × 3 × box cls angle": "yolo26-obb",
    "refused": "rtdetr-l rtdetr-x rtdetr-resnet50 rtdetr-resnet101 yolov8-rtdetr yolov8-world yolov8-worldv2 yoloe-v8 "
    "yoloe-v8-seg yoloe-11 yoloe-11-seg yoloe-26 yoloe-26-seg yolo26-sem yolo26-depth",
}


def build_shapes(file: Path) -> tuple[nn.Module, dict]:
    """Return a model of the first scale of a YAML, without any weights, and the YAML's content."""
    spec = yaml_model_load(file)
    spec["scale"] = next(iter(spec.get("scales", {"": None})))
    for layer in spec["backbone"]:  # torchvision's pretrained weights would be downloaded
        if layer[2] == "TorchVision":
            layer[3] = [None if arg == "DEFAULT" else arg for arg in layer[3]]
    model = nn.Module()
    with torch.device("meta"):
        model.model = parse_model(deepcopy(spec), ch=3, verbose=False)[0]
    return model, spec


def summary(layers: list[FinalLayer]) -> str:
    """Return branches × levels × kinds."""
    kinds = dict.fromkeys(layer.kind for layer in layers)
    levels = {layer.level for layer in layers}
    assert levels == set(range(len(levels)))
    return f"{len(layers) // len(kinds) // len(levels)} × {len(levels)} × {' '.join(kinds)}"


@pytest.mark.parametrize("file", sorted(MODELS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_model_has_its_final_layers_found_or_is_refused(file):
    model, spec = build_shapes(file)
    head = head_of(model)
    inputs, _, name, _ = spec["head"][-1]
    assert type(head).__name__ in KINDS or type(head).__name__ in REFUSED, "a head that yolo-sos does not know"
    known = {model: found for found, models in TABLE.items() for model in models.split()}
    if type(head).__name__ in REFUSED:
        with pytest.raises(TypeError, match=f"ends in {type(head).__name__}.*It looks for the last 1×1 convolutions"):
            final_layers(model)
        assert known.get(file.stem, "refused") == "refused"
        return

    layers = final_layers(model)
    modules = dict(model.named_modules())
    assert known.get(file.stem, summary(layers)) == summary(layers)
    # What the YAML says, read another way
    branches = 1 + bool(spec.get("end2end") or name == "v10Detect")
    levels = 1 if name == "Classify" else len(inputs)
    assert summary(layers) == f"{branches} × {levels} × {KINDS[type(head).__name__]}"
    assert len({layer.name for layer in layers}) == len({layer.module for layer in layers}) == len(layers)
    nk = spec.get("kpt_shape", (0, 0))[0] * spec.get("kpt_shape", (0, 0))[1]
    width = {"box": 4 * spec.get("reg_max", 16), "cls": spec["nc"], "linear": spec["nc"], "mask": 32, "angle": 1}
    for layer in layers:
        module = layer.module
        assert modules[layer.name] is module
        assert isinstance(module, nn.Linear) or module.kernel_size == (1, 1)
        assert module.weight.shape[0] == (nk if layer.kind == "kpt" else width[layer.kind])
        classifiers = [other for other in layers if other.name == layer.classifier]
        assert [(c.kind, c.level) for c in classifiers] == [("linear" if name == "Classify" else "cls", layer.level)]
        assert ("one2one" in layer.name) == ("one2one" in layer.classifier)


def test_a_model_of_another_family_is_refused_by_its_own_name():
    spec = {
        "nc": 10,
        "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]],
        "head": [[[0, 1], 1, "RTDETRDecoder", ["nc", 32, 5, 2, 2, 1, 32]]],
    }
    model = RTDETRDetectionModel(spec, verbose=False)
    with pytest.raises(TypeError, match=r"RTDETRDetectionModel ends in RTDETRDecoder.*linear layer of a Classify head"):
        final_layers(model)
    with pytest.raises(TypeError, match=r"Linear ends in Linear"):
        final_layers(nn.Linear(3, 2))


def test_kinds_choose_layers_and_an_absent_kind_is_named():
    layers = final_layers(build_shapes(MODELS / "11/yolo11-seg.yaml")[0])
    assert [layer.kind for layer in layers_of_kinds(layers, ["mask", "box"])] == ["box"] * 3 + ["mask"] * 3
    with pytest.raises(ValueError, match=r"sos_layers=kpt,angle chooses no layer.*It has: box, cls, mask\."):
        layers_of_kinds(layers, ["kpt", "angle"])


# Replay -------------------------------------------------------------------------------------------------------------

CASES = {
    "v5": ("v5/yolov5.yaml", DetectionModel),
    "v10": ("v10/yolov10n.yaml", DetectionModel),
    "11": ("11/yolo11.yaml", DetectionModel),
    "26": ("26/yolo26.yaml", DetectionModel),
    "11 segment": ("11/yolo11-seg.yaml", SegmentationModel),
    "26 segment": ("26/yolo26-seg.yaml", SegmentationModel),
    "11 pose": ("11/yolo11-pose.yaml", PoseModel),
    "26 pose": ("26/yolo26-pose.yaml", PoseModel),
    "11 obb": ("11/yolo11-obb.yaml", OBBModel),
    "26 obb": ("26/yolo26-obb.yaml", OBBModel),
    "11 classify": ("11/yolo11-cls.yaml", ClassificationModel),
}
CLASSES, IMAGES, SIZE = 4, 3, 64


def make_batch(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Return random images with two objects each, with everything that any task asks of an object."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=g)

    objects = 2 * IMAGES
    boxes = torch.cat([0.3 + 0.4 * rand(objects, 2), 0.3 + 0.3 * rand(objects, 2)], 1)  # xywh
    if isinstance(model, OBBModel):
        boxes = torch.cat([boxes, rand(objects, 1)], 1)
    labels = torch.randint(CLASSES, (objects, 1), generator=g).float()
    return {
        "img": rand(IMAGES, 3, SIZE, SIZE),
        "batch_idx": torch.arange(IMAGES).repeat_interleave(2).float(),
        "cls": labels[:IMAGES, 0].long() if isinstance(model, ClassificationModel) else labels,
        "bboxes": boxes,
        "masks": torch.randint(3, (IMAGES, SIZE // 4, SIZE // 4), generator=g).float(),  # overlap: 1 + object
        "keypoints": torch.cat([rand(objects, 17, 2), torch.ones(objects, 17, 1)], 2),
    }


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """A model in evaluation mode, its task and a batch."""
    file, family = CASES[request.param]
    spec = yaml_model_load(MODELS / file)
    spec["scale"] = next(iter(spec.get("scales", {"": None})))
    torch.manual_seed(0)
    model = family(spec, nc=CLASSES, verbose=False)
    model.args = IterableSimpleNamespace(**DEFAULT_CFG_DICT)
    batch = make_batch(model, seed=1)
    for module in model.modules():  # or features would fade away from layer to layer, and nothing depend on weights
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(batch["img"])
    return model.eval(), YoloTask(model), batch


def forward(model, task, batch, layers):
    """Return the output and the inputs of the final layers."""
    with torch.no_grad(), InputCapture(layers) as capture:
        output = task.run(model, batch)
        return output, capture.take()


def replayed_loss(task, batch, output, inputs, layers, weights):
    """Return the loss of the captured inputs under other final weights, none of which is written."""
    with torch.no_grad():
        outputs = {
            layer.name: torch.func.functional_call(layer.module, {"weight": weights[layer.name]}, inputs[layer.name])
            for layer in layers
        }
        batch, rest = task.replay_state(batch, output)
        return task.loss(task.replay(rest, outputs), batch)


def test_replay_of_the_same_weights_is_the_direct_loss_bit_for_bit(case):
    model, task, batch = case
    layers = final_layers(model)
    output, inputs = forward(model, task, batch, layers)
    direct = task.loss(output, batch)
    same = replayed_loss(task, batch, output, inputs, layers, {layer.name: layer.module.weight for layer in layers})
    assert torch.isfinite(direct) and direct > 0
    assert torch.equal(same, direct)


def test_replay_of_other_weights_is_a_full_forward_with_those_weights(case):
    model, task, batch = case
    layers = final_layers(model)
    output, inputs = forward(model, task, batch, layers)
    base = task.loss(output, batch)
    g = torch.Generator().manual_seed(2)
    for kind in dict.fromkeys(layer.kind for layer in layers):  # one kind at a time: none may be left out
        weights = {layer.name: layer.module.weight.detach().clone() for layer in layers}
        for layer in layers:
            if layer.kind == kind:
                noise = torch.randn(layer.module.weight.shape, generator=g)
                weights[layer.name] += 0.3 * noise
        replayed = replayed_loss(task, batch, output, inputs, layers, weights)
        other = deepcopy(model)
        for layer in final_layers(other):
            write_weight(layer.module, weights[layer.name])
        with torch.no_grad():
            direct = task.loss(task.run(other, batch), batch)
        torch.testing.assert_close(replayed, direct, rtol=1e-6, atol=0)
        assert not torch.isclose(direct, base, rtol=1e-4), f"the loss does not depend on the {kind} layers"


def tensors(output):
    """Yield the tensors of raw predictions."""
    if isinstance(output, torch.Tensor):
        yield output
    elif output is not None:
        for value in output.values() if isinstance(output, dict) else output:
            yield from tensors(value)


def test_the_rest_of_an_output_holds_nothing_that_final_layers_make(case):
    model, task, batch = case
    layers = final_layers(model)
    output, _ = forward(model, task, batch, layers)
    other = deepcopy(model)
    for layer in final_layers(other):
        write_weight(layer.module, 2 * layer.module.weight.detach() + 1)
    changed, _ = forward(other, task, batch, final_layers(other))
    kept, same = task.replay_state(batch, output), task.replay_state(batch, changed)
    made, rest, others = (list(tensors(x)) for x in (output, kept[1], same[1]))
    assert len(rest) == len(others) < len(made)
    assert all(torch.allclose(a, b, equal_nan=True) for a, b in zip(rest, others, strict=True))
    assert kept[0]["img"].shape == batch["img"].shape
    shapes = [x for x in (kept[0]["img"], *rest) if x.isnan().all()]  # of these no more than the shape
    assert len(shapes) == 1 + (0 if rest == [] else len(layers) // len({layer.kind for layer in layers}))
    assert {x.untyped_storage().nbytes() for x in shapes} == {4}


def test_a_custom_loss_gets_images_and_features_whole(case):
    model, task, batch = case

    def own(output, batch):
        features = [] if isinstance(output, torch.Tensor) else output.get("one2many", output)["feats"]
        return task.criterion(output, batch)[0] * (batch["img"].mean() + sum(x.mean() for x in features)), None

    layers, custom_task = final_layers(model), YoloTask(model, own)
    output, inputs = forward(model, custom_task, batch, layers)
    weights = {layer.name: layer.module.weight for layer in layers}
    same = replayed_loss(custom_task, batch, output, inputs, layers, weights)
    direct = custom_task.loss(output, batch)
    assert torch.isfinite(direct) and torch.equal(same, direct)


def first(output):
    """Return the predictions of a model's output in eval mode."""
    return output[0][0] if isinstance(output[0], tuple) else output[0]


def test_decoding_a_replay_is_what_the_model_returns_with_those_weights(case):
    model, task, batch = case
    layers = final_layers(model)
    g = torch.Generator().manual_seed(4)
    weights = {layer.name: torch.randn(layer.module.weight.shape, generator=g) for layer in layers}
    with torch.no_grad(), InputCapture(layers) as capture:
        output = model(batch["img"])
        inputs = capture.take()
        outputs = {
            layer.name: torch.func.functional_call(layer.module, {"weight": weights[layer.name]}, inputs[layer.name])
            for layer in layers
        }
        decoded = task.decode(output, task.replay(output[1], outputs))
    other = deepcopy(model)
    for layer in final_layers(other):
        write_weight(layer.module, weights[layer.name])
    with torch.no_grad():
        expected = other(batch["img"])
    torch.testing.assert_close(decoded[0], expected[0])
    assert not torch.allclose(first(expected), first(output))


@pytest.mark.parametrize("end2end", [True, False])
def test_of_a_fused_model_the_branch_that_is_left_is_found_and_replayed(end2end):
    torch.manual_seed(0)
    model = DetectionModel(str(MODELS / "26/yolo26n.yaml"), nc=CLASSES, verbose=False).eval()
    model.model[-1].end2end = end2end
    model = model.fuse(verbose=False)
    layers = final_layers(model)
    assert summary(layers) == "1 × 3 × box cls"
    assert all(("one2one" in layer.name) == end2end for layer in layers)
    images, task = torch.rand(2, 3, SIZE, SIZE), YoloTask(model, criterion=lambda *_: None)
    with torch.no_grad(), InputCapture(layers) as capture:
        output, inputs = model(images), capture.take()
        outputs = {layer.name: 2 * layer.module(inputs[layer.name]) for layer in layers}
        capture.clear()
        replayed = task.replay(task.replay_state({"img": images}, output[1])[1], outputs)
    branch = "one2one" if end2end else "one2many"
    was, now = (raw.get(branch, raw) for raw in (output[1], replayed))
    assert torch.equal(now["scores"], 2 * was["scores"]) and torch.equal(now["boxes"], 2 * was["boxes"])


def test_the_loss_is_the_one_that_ultralytics_minimises_per_image(case):
    model, task, batch = case
    with torch.no_grad():
        theirs = model.loss(batch)[0].sum()
        ours = task.loss(task.run(model, batch), batch)
    assert task.size(batch) == IMAGES
    # Detection losses come times the batch size, a classifier's is a mean already.
    torch.testing.assert_close(ours, theirs / (1 if isinstance(model, ClassificationModel) else IMAGES))


def test_class_probabilities_are_labels_or_those_of_the_class_layer(case):
    model, task, batch = case
    layer = final_layers(model)[-1]
    logits = torch.randn(IMAGES, CLASSES)
    p = task.probabilities(layer, logits.clone(), batch)
    if isinstance(model, ClassificationModel):
        assert torch.equal(p.argmax(1), batch["cls"]) and torch.equal(p.sum(1), torch.ones(IMAGES))
    else:
        torch.testing.assert_close(p, 1 / (1 + (-logits).exp()))


def test_a_shift_of_every_family_reports_the_losses_of_full_forwards(case):
    model, task, batch = deepcopy(case[0]), case[1], case[2]
    task = YoloTask(model, task.criterion)
    layers, heldout = final_layers(model), make_batch(model, seed=3)

    def loss():
        with torch.no_grad():
            return float(task.loss(task.run(model, heldout), heldout))

    before = loss()
    report = SOS(model, layers, task=task, rank=0.25, guard=10.0).shift([batch], [heldout])
    assert report.heldout_before == pytest.approx(before, rel=1e-6)
    assert report.step == 1.0 and report.squared_norm_ratio < 0.9
    assert report.heldout_after == pytest.approx(loss(), rel=1e-6)
    assert [record.name for record in report.layers] == [layer.name for layer in layers]
