# yolo-sos, AGPL-3.0
"""Neural collapse: features that are collapsed, a plain reference, and a detector's own assignment."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from analyze_targets import targets
from torch import nn

from yolo_sos.analyze.collapse import (
    JACKKNIFE,
    MEASURES,
    Collapse,
    collect,
    mean_measures,
    nc1,
)
from yolo_sos.analyze.estimate import Estimate
from yolo_sos.core import FinalLayer, InputCapture, evaluation
from yolo_sos.yolo.class_rows import Assignments
from yolo_sos.yolo.heads import CLASS_KINDS, layers_of_kinds


def layer_of(weight, bias=None):
    module = nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return FinalLayer("final", module)


def simplex(c, d, length=2.0):
    """Return C means at the corners of a simplex around 0, in d dimensions."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, c).double()).Q.T
    means = basis - basis.mean(0)
    return length * means / means.norm(dim=1, keepdim=True)


def plain(h, y, weight, bias):
    """Return the measures by loops over classes and features, with a pseudo-inverse."""
    classes = [c for c in range(len(weight)) if (y == c).sum() >= 2]
    means = {c: h[y == c].mean(0) for c in classes}
    centre = np.mean(list(means.values()), 0)
    m = np.array([means[c] - centre for c in classes])
    used = [i for i in range(len(h)) if y[i] in classes]
    within = sum(np.outer(h[i] - means[y[i]], h[i] - means[y[i]]) for i in used) / len(used)
    between = sum(np.outer(v, v) for v in m) / len(m)
    lengths = [np.linalg.norm(v) for v in m]
    n = len(classes)
    angles = [abs(m[i] @ m[j] / lengths[i] / lengths[j] + 1 / (n - 1)) for i in range(n) for j in range(n) if i != j]
    v = weight[classes]
    decided = [classes[int(np.argmax(x @ v.T + bias[classes]))] for x in h]
    nearest = [classes[int(np.argmin([np.linalg.norm(x - means[c]) for c in classes]))] for x in h]
    return {
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / n,
        "nc2_norms": np.std(lengths) / np.mean(lengths),
        "nc2_angles": np.mean(angles),
        "nc3": np.linalg.norm(v / np.linalg.norm(v) - m / np.linalg.norm(m)),
        "nc4": np.mean(np.array(decided) != np.array(nearest)),
    }


def test_exact_collapse_is_zero():
    means = simplex(4, 9)
    collapse = Collapse(layer_of(3 * means, -3 * means @ torch.full((9,), 7.0).double()))
    for _ in range(3):
        y = torch.arange(4).repeat(5)
        collapse.update(means[y] + 7.0, y)  # wherever the centre is
    found = collapse.measures()
    for name in MEASURES:
        assert found[name].estimate == pytest.approx(0, abs=1e-10), name
        assert found[name].stderr == pytest.approx(0, abs=1e-10), name
    assert collapse.features == 60


def test_known_values_off_collapse():
    means = simplex(4, 9, length=2.0)
    noise = torch.eye(9).double() * 0.3
    features = torch.cat([means.repeat_interleave(18, 0) + torch.cat([noise, -noise]).repeat(4, 1)])
    y = torch.arange(4).repeat_interleave(18)
    collapse = Collapse(layer_of(-means))  # every row of V points away from its mean
    collapse.update(features, y)
    found = collapse.measures()
    # Σ_W = (0.3²/9) I; Σ_B has C − 1 eigenvalues of ‖m‖²/(C − 1): tr(Σ_W Σ_B⁺)/C = (0.01 · 3 · 3/4) / 4.
    assert found["nc1"].estimate == pytest.approx(0.01 * 3 * (3 / 4) / 4)
    assert found["nc3"].estimate == pytest.approx(2.0)
    assert found["nc4"].estimate == 1.0
    stretched = Collapse(layer_of(means))
    scaled = means * torch.tensor([1.0, 1.0, 3.0, 3.0]).double()[:, None]
    stretched.update(scaled[y], y)
    assert stretched.measures()["nc2_norms"].estimate > 0.3


def test_the_plain_reference_and_any_cut_into_batches():
    rng = np.random.default_rng(0)
    c, d, n = 5, 7, 300
    centres = rng.normal(size=(c, d))
    y = rng.integers(0, c - 1, n)
    y[0] = c - 1  # a class with one feature takes no part
    h = centres[y] + 0.7 * rng.normal(size=(n, d))
    weight, bias = rng.normal(size=(c, d)), rng.normal(size=c)
    expected = plain(h, y, weight, bias)
    layer = layer_of(torch.tensor(weight), torch.tensor(bias))
    for cuts in ([n], [1, 50, 120, 300], range(20, 320, 20)):
        collapse, start = Collapse(layer), 0
        for end in cuts:
            background = torch.full((end - start,), -1)
            features, labels = torch.tensor(h[start:end]), torch.tensor(y[start:end])
            collapse.update(torch.cat([features, features + 100]), torch.cat([labels, background]))
            start = end
        found = collapse.measures()
        for name in MEASURES:
            assert found[name].estimate == pytest.approx(expected[name], rel=1e-9), name


def test_standard_errors_by_the_jackknife_are_those_of_repeated_sets():
    def once(seed):
        rng = np.random.default_rng(seed)
        y = np.tile(np.arange(3), 80)
        h = np.eye(3, 6)[y] * 3 + rng.normal(size=(240, 6))
        collapse = Collapse(layer_of(torch.eye(3, 6).double()))
        for part in np.array_split(rng.permutation(240), JACKKNIFE):
            collapse.update(torch.tensor(h[part]), torch.tensor(y[part]))
        return collapse.measures()["nc1"]

    found = [once(seed) for seed in range(40)]
    spread = np.std([e.estimate for e in found], ddof=1)
    assert np.mean([e.stderr for e in found]) == pytest.approx(spread, rel=0.35)
    assert Estimate.jackknife(lambda x: 1.0 * x, [3.0]).estimate == 3.0
    blocks = [1.0, 4.0, 7.0]
    # Of a sum, the jackknife's is n times the standard error of the mean.
    assert Estimate.jackknife(lambda x: x, blocks).stderr == pytest.approx(
        (2 / 3 * sum((b - 4) ** 2 for b in blocks)) ** 0.5
    )


def test_one_class_is_no_collapse():
    collapse = Collapse(layer_of(simplex(4, 9)))
    collapse.update(torch.randn(20, 9).double(), torch.zeros(20, dtype=torch.long))
    assert all(math.isnan(e.estimate) for e in collapse.measures().values())
    assert all(math.isnan(v) for v in mean_measures([collapse]).values())
    assert all(math.isnan(e.estimate) for e in Collapse(layer_of(simplex(4, 9))).measures().values())


def test_equal_means_are_infinitely_far_from_collapse():
    collapse = Collapse(layer_of(simplex(2, 3)))
    x = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]).double()
    collapse.update(torch.cat([x, x]), torch.tensor([0, 0, 1, 1]))
    assert nc1(collapse.blocks[0]) == math.inf


@pytest.mark.parametrize(("name", "branches"), [("tiny", 1), ("yolo26n.yaml", 2)])
def test_a_detector_takes_what_its_assigner_assigns(subject, tiny, name, branches):
    of, batch = subject(str(tiny) if name == "tiny" else name), targets("detect")
    layers = layers_of_kinds(of.layers, CLASS_KINDS)
    assert len(layers) == 3 * branches
    collapses = [Collapse(layer) for layer in layers]
    with evaluation(of.model), InputCapture(of.layers) as capture:
        output = of.task.run(of.model, batch)
        inputs = capture.take()
        collect(collapses, of.task, output, inputs, batch)
        seen = []

        def keep(assigner, args, decided):
            seen.append(torch.where(decided[3].bool(), decided[0].long(), -1))

        for branch in ("one2many", "one2one")[:branches]:
            getattr(of.task.criterion, branch, of.task.criterion).assigner.register_forward_hook(keep)
        of.task.loss(output, batch)
    assert len(seen) == branches
    for b, labels in enumerate(seen):
        counts = [c.features for c in collapses[3 * b : 3 * b + 3]]
        sizes = [inputs[layer.name][0, 0].numel() for layer in layers[3 * b : 3 * b + 3]]
        assert sum(sizes) == labels.shape[1]
        for count, part in zip(counts, labels.split(sizes, 1), strict=True):
            assert count == int((part >= 0).sum())
        # Every object's class is the one of the image that its points lie in.
        for i in range(2):
            there = set(labels[i][labels[i] >= 0].tolist())
            assert there <= set(batch["cls"][batch["batch_idx"] == i].flatten().long().tolist())
    assert all(int((labels >= 0).sum()) for labels in seen[:1])
    first = next(c for c in collapses if c.features)
    index = collapses.index(first)
    start = sum(inputs[layer.name][0, 0].numel() for layer in layers[index // 3 * 3 : index])
    x = inputs[first.layer.name]
    total = torch.zeros_like(first.blocks[0].sums)
    for i in range(2):  # by hand: point k of a scale is pixel (k // W, k % W)
        for k in range(x.shape[2] * x.shape[3]):
            label = int(seen[index // 3][i, start + k])
            if label >= 0:
                total[label] += x[i, :, k // x.shape[3], k % x.shape[3]].double()
    assert torch.allclose(first.blocks[0].sums, total)


def test_hooks_are_removed_whatever_happens(subject, tiny):
    of = subject(str(tiny))
    with pytest.raises(RuntimeError, match="half way"), Assignments(of.task, [0]):
        raise RuntimeError("half way")
    assigner = of.task.criterion.assigner
    assert not assigner._forward_hooks and not assigner._forward_pre_hooks


def test_a_classifier_takes_images_by_their_labels(subject):
    of, batch = subject("yolov8n-cls.yaml"), targets("classify", images=6)
    (layer,) = layers_of_kinds(of.layers, CLASS_KINDS)
    collapse = Collapse(layer)
    with evaluation(of.model), InputCapture(of.layers) as capture:
        output = of.task.run(of.model, batch)
        inputs = capture.take()
        collect([collapse], of.task, output, inputs, batch)
    assert collapse.features == 6
    assert collapse.blocks[0].counts.tolist() == torch.bincount(batch["cls"], minlength=10).tolist()
    assert torch.allclose(collapse.blocks[0].sums.sum(0), inputs[layer.name].double().sum(0))
