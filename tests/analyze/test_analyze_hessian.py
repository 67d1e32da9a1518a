# yolo-sos, AGPL-3.0
"""Curvature against exact Hessians, a closed form and a second library."""

from __future__ import annotations

import operator
import os

import pytest
import torch
from analyze_targets import targets
from torch import nn

from yolo_sos.analyze.hessian import (
    Curvature,
    Subject,
    differentiable,
    dot,
    largest_eigenvalue,
    rademacher,
    traces,
)
from yolo_sos.core import FinalLayer, ModelTask
from yolo_sos.yolo.heads import YoloTask

BLOCKS = ("before", "final")


def unit_vectors(parameters):
    flat = torch.eye(sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
    for row in flat:
        parts = row.split([p.numel() for p in parameters])
        yield [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def dense(subject, batches, block):
    """Return the Hessian of the mean loss per image from torch's own dense routine."""
    chosen = {id(p) for p in subject.parameters(block)}
    names = [k for k, p in subject.model.named_parameters() if id(p) in chosen]
    values = tuple(dict(subject.model.named_parameters())[k].detach() for k in names)
    images = sum(len(x) for x, _ in batches)

    def loss(*parameters):
        moved = dict(zip(names, parameters, strict=True))
        return (
            sum(
                nn.functional.cross_entropy(torch.func.functional_call(subject.model, moved, x), y, reduction="sum")
                for x, y in batches
            )
            / images
        )

    subject.model.eval()
    rows = torch.autograd.functional.hessian(loss, values)
    sizes = [v.numel() for v in values]
    return torch.cat([torch.cat([b.reshape(n, -1) for b in row], 1) for row, n in zip(rows, sizes, strict=True)])


@pytest.mark.parametrize("block", BLOCKS)
def test_products_and_exact_trace_are_those_of_the_dense_hessian(small, block):
    subject, batches = small
    exact = dense(subject, batches[:1], block)
    with differentiable(subject, block) as parameters:
        curvature = Curvature(subject.model, subject.task, batches[0], parameters)
        rows = [torch.cat([x.flatten() for x in curvature.product(e)]) for e in unit_vectors(parameters)]
        quadratic = [curvature.quadratic(e) for e in unit_vectors(parameters)]
    assert torch.allclose(torch.stack(rows), exact, atol=1e-12)
    assert sum(h for h, _ in quadratic) == pytest.approx(float(exact.trace()))
    assert all(g >= -1e-12 for _, g in quadratic)  # cross-entropy is convex
    if block == "final":  # outputs linear in the parameters: nothing but Gauss-Newton
        assert [h for h, _ in quadratic] == pytest.approx([g for _, g in quadratic])


@pytest.mark.parametrize("block", BLOCKS)
def test_estimates_lie_within_their_standard_errors(small, block):
    subject, batches = small
    exact = dense(subject, batches, block)
    found = traces([subject], batches, [block], probes=400)[0][block].estimates()
    hessian = found["hessian"]
    assert hessian.samples == 400
    assert abs(hessian.estimate - float(exact.trace())) < 4 * hessian.stderr
    off = exact - torch.diag(exact.diagonal())
    expected = float((2 * off.square().sum() / 400).sqrt())  # Var vᵀHv = 2 Σ_{i≠j} H_ij² for entries ±1
    assert hessian.stderr == pytest.approx(expected, rel=0.2)
    if block == "before":
        assert found["gauss_newton"].stderr < hessian.stderr
    assert found["gap"].estimate == pytest.approx(hessian.estimate - found["gauss_newton"].estimate)


def test_linear_softmax_has_a_closed_form():
    """Of ``z = Va + b``: tr H = mean over images of (‖a‖² + 1)(1 − Σ p²)."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    net = nn.Sequential(layer)
    x, y = torch.randn(9, 6).double(), torch.randint(4, (9,))
    p = net(x).softmax(1).detach()
    closed = float(((x.square().sum(1) + 1) * (1 - p.square().sum(1))).mean())
    subject = Subject("linear", net, ModelTask(), [FinalLayer("0", layer)])
    with differentiable(subject, "final") as parameters:
        curvature = Curvature(net, subject.task, (x, y), parameters)
        both = [curvature.quadratic(e) for e in unit_vectors(parameters)]
    assert sum(h for h, _ in both) == pytest.approx(closed)
    assert sum(g for _, g in both) == pytest.approx(closed)
    found = traces([subject], [(x, y)], ["final"], probes=300)[0]["final"].estimates()["hessian"]
    assert abs(found.estimate - closed) < 4 * found.stderr


def test_largest_eigenvalue(small):
    subject, batches = small
    for block in BLOCKS:
        values = torch.linalg.eigvalsh(dense(subject, batches, block))
        largest = float(values[values.abs().argmax()])
        found = largest_eigenvalue(subject, batches, block, iterations=400, tolerance=1e-5)
        assert found.estimate == pytest.approx(largest, rel=1e-3)
        early = largest_eigenvalue(subject, batches, block, iterations=3)
        assert early.samples == 3
        assert float((values - early.estimate).abs().min()) <= early.stderr  # the residual is a bound


def test_hessian_eigenthings_agrees(small):
    if "CI" not in os.environ:
        pytest.importorskip("hessian_eigenthings")
    from hessian_eigenthings import GGNOperator, HessianOperator, power_iteration_one, supervised_loss
    from hessian_eigenthings.loss_fns import supervised_forward, supervised_loss_of_output

    subject, batches = small
    subject.model.eval()
    loss, batch = nn.functional.cross_entropy, batches[0]
    final = {"5.weight", "5.bias"}
    for block in BLOCKS:
        only = lambda name, _, block=block: (name in final) == (block == "final")  # noqa: E731
        theirs = HessianOperator(subject.model, [batch], supervised_loss(loss), param_filter=only)
        gauss_newton = GGNOperator(
            subject.model, [batch], supervised_forward, supervised_loss_of_output(loss), param_filter=only
        )
        with differentiable(subject, block) as parameters:
            vector = rademacher(parameters, 0, 0)
            curvature = Curvature(subject.model, subject.task, batch, parameters)
            ours, (_, ours_gn) = curvature.product(vector), curvature.quadratic(vector)
            flat = torch.cat([v.flatten() for v in vector])
            with torch.enable_grad():
                assert torch.allclose(theirs.matvec(flat), torch.cat([o.flatten() for o in ours]), atol=1e-10)
                assert float((flat @ gauss_newton.matvec(flat)).detach()) == pytest.approx(ours_gn)
                value = power_iteration_one(theirs, max_iter=300, tol=1e-8)
        value = value[0] if isinstance(value, tuple) else value
        mine = largest_eigenvalue(subject, [batch], block, iterations=300, tolerance=1e-5)
        assert mine.estimate == pytest.approx(float(getattr(value, "eigenvalue", value)), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("tiny", "detect"),
        ("yolo26n.yaml", "detect"),
        ("yolov8n-seg.yaml", "segment"),
        ("yolov8n-pose.yaml", "pose"),
        ("yolov8n-obb.yaml", "obb"),
        ("yolov8n-cls.yaml", "classify"),
    ],
)
def test_every_task_of_ultralytics(subject, tiny, name, task):
    """Against the plain double backward pass through model and criterion together."""
    of, batch = subject(str(tiny) if name == "tiny" else name), targets(task)
    with differentiable(of, "before") as parameters:
        vector = rademacher(parameters, 0, 0)
        curvature = Curvature(of.model, of.task, batch, parameters)
        h, g = curvature.quadratic(vector)
        product = curvature.product(vector)
        with torch.enable_grad():
            loss = of.task.loss(of.task.run(of.model, batch), batch)
            reached = [
                i
                for i, x in enumerate(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
                if x is not None
            ]
            slopes = torch.autograd.grad(loss, [parameters[i] for i in reached], create_graph=True)
            plain = torch.autograd.grad(slopes, [parameters[i] for i in reached], [vector[i] for i in reached])
    assert curvature.loss == pytest.approx(float(loss.detach()))
    size = dot(plain, plain) ** 0.5
    rest = [product[i] - p for i, p in zip(reached, plain, strict=True)]
    assert size > 0 and dot(rest, rest) ** 0.5 < 1e-3 * size
    assert h == pytest.approx(dot([vector[i] for i in reached], plain), abs=1e-3 * size)
    assert h != g


@pytest.mark.parametrize("images", [2, 4])
def test_the_loss_is_per_image_and_its_targets_carry_no_gradient(subject, tiny, images):
    of, batch = subject(str(tiny)), targets("detect", images)
    assert isinstance(of.task, YoloTask)
    assigned = []
    of.task.criterion.assigner.register_forward_hook(lambda module, args, out: assigned.extend(out))
    with differentiable(of, "final") as parameters:
        curvature = Curvature(of.model, of.task, batch, parameters)
    assert assigned and not any(t.requires_grad for t in assigned)
    loss = of.task.criterion(of.task.run(of.model, batch), batch)[0].sum()  # Ultralytics multiplies by the batch size
    assert curvature.loss == pytest.approx(float(loss.detach()) / images, rel=1e-5)


def test_probes_are_shared_and_differences_paired(small):
    subject, batches = small
    other = Subject("other", nn.Sequential(*subject.model), subject.task, subject.layers)
    a, b = traces([subject, other], batches, probes=12, seed=3)
    assert a == b
    assert all(
        e.estimate == 0 and not e.resolved for e in b["before"].combined(operator.sub, a["before"]).estimates().values()
    )
    again = traces([subject], batches, ["final"], probes=12, seed=3)[0]
    assert again["final"] == a["final"]  # whatever else was sampled
    assert traces([subject], batches, ["final"], probes=12, seed=4)[0] != again
    both = a["before"].combined(operator.add, a["final"]).estimates()["hessian"].estimate
    assert both == pytest.approx(sum(a[k].estimates()["hessian"].estimate for k in BLOCKS))


def test_a_close_model_is_told_apart_by_pairing(small):
    subject, batches = small
    import copy

    near = copy.deepcopy(subject.model)
    with torch.no_grad():
        near[5].weight *= 1.02
    b = Subject("near", near, subject.task, [FinalLayer("5", near[5])])
    one, two = (found["before"] for found in traces([subject, b], batches, ["before"], probes=24))
    change = two.combined(operator.sub, one).estimates()["gauss_newton"]
    unpaired = (one.estimates()["gauss_newton"].stderr ** 2 + two.estimates()["gauss_newton"].stderr ** 2) ** 0.5
    assert change.resolved and change.stderr < unpaired / 5


def test_sampling_ends_at_the_first_budget(small):
    subject, batches = small
    told = []
    found = traces([subject], batches, ["final"], probes=400, stderr=0.2, progress=told.append)[0]["final"]
    assert len(found.hessian) == 24  # three rounds at least
    assert found.estimates()["hessian"].stderr <= 0.2 * found.estimates()["hessian"].estimate
    assert sum(told) == 24 * len(batches)
    assert len(traces([subject], batches, ["final"], probes=5, stderr=1e-9)[0]["final"].hessian) == 5


def test_models_come_back_as_they_were(small):
    subject, batches = small
    net = subject.model
    net[1].eval()
    net[0].bias.requires_grad_(False)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]

    class Broken(ModelTask):
        def loss(self, output, batch):
            raise RuntimeError("half way")

    traces([subject], batches, probes=2)
    with pytest.raises(RuntimeError, match="half way"):
        traces([Subject("broken", net, Broken(), subject.layers)], batches, probes=2)
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
