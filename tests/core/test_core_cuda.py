# yolo-sos, AGPL-3.0
"""The method on a GPU: the same as on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from yolo_sos.core import (
    METHODS,
    SOLVERS,
    Method,
    Moments,
    RowSample,
    budgeted_shift,
    expected_shift,
    fit_model,
    minimum_norm_shift,
    principal_shift,
    shift_model,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
D, OUT = 24, 5
ROWS = {"n < d": 15, "n > d": 60, "repeated": 15}


def data(n=60, *, repeated=False, dtype=torch.float64):
    """Return rows ``(n, D)``, a weight ``(OUT, D)`` and three columns of weights of rows."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(n, D, generator=g, dtype=torch.float64) * torch.logspace(0, -2, D, dtype=torch.float64)
    if repeated:
        a = a[: n - n // 2].repeat(2, 1)[:n]
    v = torch.randn(OUT, D, generator=g, dtype=torch.float64)
    return a.to(dtype), v.to(dtype), torch.rand(n, 3, generator=g, dtype=torch.float64).pow(4).to(dtype)


def assert_same(there, here, tolerance):
    """Compare two results, the first of them of a GPU."""
    assert there.weight.is_cuda and there.weight.dtype == here.weight.dtype
    assert (there.status, there.rank) == (here.status, pytest.approx(here.rank))
    assert there.norm_after == pytest.approx(here.norm_after, rel=tolerance)
    assert there.deviation == pytest.approx(here.deviation, rel=1e-3, abs=1e-9)
    difference = (there.weight.cpu().double() - here.weight.double()).norm()
    assert float(difference / here.weight.double().norm()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("method", SOLVERS)
def test_rows(method, rows, dtype):
    a, v, _ = data(ROWS[rows], repeated=rows == "repeated", dtype=dtype)
    here = minimum_norm_shift(a, v, solver=method)
    assert here.rank == (8 if rows == "repeated" else min(ROWS[rows], D))
    half = dtype in {torch.float16, torch.bfloat16}  # where the last digit may round either way
    assert_same(minimum_norm_shift(a.cuda(), v.cuda(), solver=method), here, 1e-2 if half else 1e-7)


@pytest.mark.parametrize(
    "shift",
    [
        lambda g, v: principal_shift(g, v, rank=10),
        lambda g, v: expected_shift(g, v, rows=10),
        lambda g, v: budgeted_shift(g, v, budget=0.05),
    ],
    ids=["principal", "expected", "budget"],
)
def test_spectrum(shift):
    a, v, weights = data()
    here = shift(Moments(D).update(a, weights[:, 0]), v)
    assert_same(shift(Moments(D).update(a.cuda(), weights[:, 0].cuda()), v.cuda()), here, 1e-9)


@pytest.mark.parametrize("size", [12, 400], ids=["drawn", "all"])
def test_drawn_rows(size):
    """Drawn on the CPU: the same rows stay."""
    a, _, weights = data(400, dtype=torch.float32)
    samples = {}
    for device in "cpu", "cuda":
        samples[device] = RowSample(D, 3, size, torch.Generator().manual_seed(1), background=True)
        for part, w in zip(a.split(50), weights.split(50), strict=True):
            samples[device].update(part.to(device), w.argmax(1).to(device), w.amax(1).to(device))
    assert samples["cuda"].sample.is_cuda
    assert torch.equal(samples["cuda"].sample.cpu(), samples["cpu"].sample)
    here, there = samples["cpu"].moments, samples["cuda"].moments
    assert there.matrix.is_cuda
    torch.testing.assert_close(there.matrix.cpu(), here.matrix, rtol=1e-5, atol=1e-7)
    assert there.mass == pytest.approx(here.mass)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "loss"])  # which asks for a replay
def test_a_model(name, autocast):
    """From batches on the CPU, and where the forward pass is autocast: what it rounds is float16's last digit."""
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(8, D), nn.Tanh(), nn.Linear(D, OUT))
    there = copy.deepcopy(here).cuda()
    batches = [(torch.randn(40, 8), torch.arange(40) % OUT) for _ in range(3)]
    options = {"heldout": batches[2:], "method": Method(name=name, rank=10, budget=0.05), "guard": 1.0}
    expected = shift_model(here, batches[:2], **options)
    with torch.autocast("cuda", torch.float16, enabled=autocast):
        report = shift_model(there, batches[:2], **options)
    assert report.status == expected.status == "ok"
    assert there[2].weight.is_cuda and there[2].weight.dtype == torch.float32
    tolerance = 2e-2 if autocast else 1e-4
    assert report.squared_norm_ratio == pytest.approx(expected.squared_norm_ratio, rel=tolerance)
    assert report.heldout_before == pytest.approx(expected.heldout_before, rel=tolerance)
    assert report.heldout_after == pytest.approx(expected.heldout_after, rel=tolerance)
    change = (there[2].weight.cpu() - here[2].weight).norm() / here[2].weight.norm()
    assert float(change.detach()) < (0.1 if autocast else 1e-3)


def test_a_fit():
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(8, D), nn.Tanh(), nn.Linear(D, OUT))
    there = copy.deepcopy(here).cuda()
    centres = 2 * torch.randn(OUT, 8)
    labels = torch.arange(40) % OUT
    batches = [(centres[labels] + torch.randn(40, 8), labels) for _ in range(6)]
    expected, report = (fit_model(model, batches[:4], batches[4:]) for model in (here, there))
    assert there[2].weight.is_cuda and not expected.refusal and not report.refusal
    assert report.layers[0].ridge == pytest.approx(expected.layers[0].ridge, rel=1e-4)
    assert report.heldout_before == pytest.approx(expected.heldout_before, rel=1e-4)
    assert report.heldout_after == pytest.approx(expected.heldout_after, rel=1e-3)
