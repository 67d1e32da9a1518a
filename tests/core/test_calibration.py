# yolo-sos, AGPL-3.0
"""Calibration maps: against two other implementations, by their properties, and where there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from yolo_sos.core import NoMapError, fit_logistic, fit_softmax, fold
from yolo_sos.core.calibration import ENOUGH, OWN_MAP

ONE = torch.zeros(600, dtype=torch.long)


def detections(n=600, a=0.6, b=-0.5, seed=0):
    """Return logits, and hits that are drawn with probability σ(az + b)."""
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(n, generator=g, dtype=torch.float64)
    return z, torch.bernoulli((a * z + b).sigmoid(), generator=g)


def nll(z, t):
    return float(torch.nn.functional.binary_cross_entropy_with_logits(z, t))


def test_the_map_is_that_of_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    z, t = detections()
    found = fit_logistic(z, t, ONE, 1)
    other = linear.LogisticRegression(C=math.inf, tol=1e-12, max_iter=1000).fit(z[:, None].numpy(), t.numpy())
    assert float(found.scale[0]) == pytest.approx(float(other.coef_[0, 0]), abs=1e-6)
    assert float(found.shift[0]) == pytest.approx(float(other.intercept_[0]), abs=1e-6)


def test_the_map_is_that_of_netcal():
    scaling = pytest.importorskip("netcal.scaling", reason="netcal is not installed")
    z, t = detections()
    found = fit_logistic(z, t, ONE, 1)
    other = scaling.LogisticCalibration(method="mle").fit(z.sigmoid().numpy(), t.numpy())
    ours = found(z, ONE).sigmoid().numpy()
    assert np.abs(np.asarray(other.transform(z.sigmoid().numpy())).ravel() - ours).max() < 1e-3


def test_standard_errors_are_the_spread_over_samples():
    found = [fit_logistic(*detections(seed=s), ONE, 1) for s in range(200)]
    for what in ("scale", "shift"):
        values = torch.stack([getattr(f, what)[0] for f in found])
        stated = torch.stack([getattr(f, f"{what}_error")[0] for f in found]).mean()
        assert float(values.std()) == pytest.approx(float(stated), rel=0.15)  # 200 samples: ± 5 %
    assert float(torch.stack([f.scale[0] for f in found]).mean()) == pytest.approx(0.6, abs=0.02)
    assert float(torch.stack([f.shift[0] for f in found]).mean()) == pytest.approx(-0.5, abs=0.02)


def test_no_other_map_is_likelier():
    z, t = detections()
    found = fit_logistic(z, t, ONE, 1)
    least = nll(found(z, ONE), t)
    a, b = float(found.scale[0]), float(found.shift[0])
    assert all(nll((a + da) * z + b + db, t) > least for da in (-0.01, 0, 0.01) for db in (-0.01, 0, 0.01) if da or db)
    assert least < nll(z, t)


def test_a_calibrated_score_stays():
    z, t = detections(40_000, 1.0, 0.0)
    found = fit_logistic(z, t, torch.zeros(40_000, dtype=torch.long), 1)
    assert abs(float(found.scale[0]) - 1) < 4 * float(found.scale_error[0]) < 0.1
    assert abs(float(found.shift[0])) < 4 * float(found.shift_error[0]) < 0.1


def test_the_same_map_twice_is_no_map():
    z, t = detections()
    found = fit_logistic(z, t, ONE, 1)
    again = fit_logistic(found(z, ONE), t, ONE, 1)
    assert float(again.scale[0]) == pytest.approx(1, abs=1e-6) and float(again.shift[0]) == pytest.approx(0, abs=1e-6)


def test_soft_targets_are_weighted_hits():
    z, t = detections()
    soft = fit_logistic(z[:300], (t[:300] + t[300:]) / 2, ONE[:300], 1)
    twice = fit_logistic(z[:300].repeat(2), t, ONE, 1)
    assert torch.allclose(soft.scale, twice.scale, atol=1e-7) and torch.allclose(soft.shift, twice.shift, atol=1e-7)


def test_each_class_has_its_own_map_or_the_shared_one():
    z, t = zip(*(detections(a=a, seed=s) for s, a in enumerate((0.5, 2.0))), strict=True)
    few_z, few_t = detections(60, seed=5)
    few_t[(few_t == 1).nonzero()[ENOUGH - 1 :, 0]] = 0  # one hit too few
    labels = torch.tensor([0, 1]).repeat_interleave(600)
    zs, ts, cs = torch.cat([*z, few_z]), torch.cat([*t, few_t]), torch.cat([labels, torch.full((60,), 2)])
    found = fit_logistic(zs, ts, cs, 4, per_class=True)
    shared = fit_logistic(zs, ts, cs, 4)
    for c in (0, 1):
        alone = fit_logistic(z[c], t[c], ONE, 1)
        assert float(found.scale[c]) == float(alone.scale[0]) and found.status[c] == OWN_MAP
    assert torch.equal(found.scale[2:], shared.scale[2:]) and torch.equal(found.shift[2:], shared.shift[2:])
    assert found.status[2] == f"shared: {ENOUGH - 1} hits and {60 - ENOUGH + 1} misses, fewer than {ENOUGH} of one"
    assert found.status[3].startswith("shared: 0 hits")


def test_a_class_whose_hits_fall_with_the_score_takes_the_shared_map():
    z, t = detections(2000, 1.0, 0.0)
    falling, ft = detections(200, -1.0, 0.0, seed=1)
    labels = torch.cat([torch.zeros(2000), torch.ones(200)]).long()
    found = fit_logistic(torch.cat([z, falling]), torch.cat([t, ft]), labels, 2, per_class=True)
    assert "hits do not become more frequent as the score rises" in found.status[1]
    assert float(found.scale[1]) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, t: (z[:0], t[:0]), "There are no detections"),
        (lambda z, t: (z, t * 0), "all detections are misses"),
        (lambda z, t: (z, t * 0 + 1), "all detections are hits"),
        (lambda z, t: (z, t * 0 + 0.5), "all targets are the same"),
        (lambda z, t: (z.where(z > 0, torch.nan), t), "Scores are not finite"),
        (lambda z, t: (z, t + 0.5), r"Targets must lie in \[0, 1\]"),
        (lambda z, t: (z, (z > 0).double()), "one score separates hits and misses"),
        (lambda z, t: (z, (z < 0).double()), "one score separates hits and misses"),
        (lambda z, t: (-z, t), "hits do not become more frequent as the score rises"),
    ],
)
def test_without_a_map(change, message):
    z, t = change(*detections())
    with pytest.raises(ValueError, match=message):
        fit_logistic(z, t, ONE[: len(z)], 1)


def images(n=3000, c=5, scale=1.0, shift=0.0, seed=0):
    """Return logits of a classifier, and classes drawn with probability softmax(scale ∘ z + shift)."""
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(n, c, generator=g, dtype=torch.float64)
    return z, torch.multinomial((scale * z + shift).softmax(1), 1, generator=g)[:, 0]


def test_one_temperature():
    optimize = pytest.importorskip("scipy.optimize")
    z, y = images(scale=0.4)
    found = fit_softmax(z, y)
    assert (found.scale == found.scale[0]).all() and not found.shift.any()
    best = optimize.minimize_scalar(
        lambda a: float(torch.nn.functional.cross_entropy(a * z, y)), bounds=(0.01, 3), options={"xatol": 1e-9}
    )
    assert float(found.scale[0]) == pytest.approx(best.x, abs=1e-5)
    assert abs(float(found.scale[0]) - 0.4) < 4 * float(found.scale_error[0]) < 0.1


def test_vector_scaling():
    optimize = pytest.importorskip("scipy.optimize")
    scale, shift = torch.tensor([0.5, 1.0, 0.7, 1.5, 0.9]), torch.tensor([1.0, 0.0, -1.0, 0.5, -0.5])
    z, y = images(scale=scale, shift=shift)
    found = fit_softmax(z, y, per_class=True)
    assert found.status == (OWN_MAP,) * 5
    best = optimize.minimize(
        lambda x: float(torch.nn.functional.cross_entropy(torch.tensor(x[:5]) * z + torch.tensor(x[5:]), y)),
        np.concatenate([np.ones(5), np.zeros(5)]),
        method="BFGS",
        options={"gtol": 1e-7},
    )
    assert torch.nn.functional.cross_entropy(found(z), y) <= best.fun + 1e-9
    assert found.scale.numpy() == pytest.approx(best.x[:5], abs=1e-3)
    assert found.shift.numpy() == pytest.approx(best.x[5:] - best.x[5:].mean(), abs=1e-3)
    assert (((found.scale - scale).abs() / found.scale_error) < 4).all() and float(found.scale_error.max()) < 0.1
    assert (((found.shift - shift).abs() / found.shift_error) < 4).all()


def test_a_class_of_few_images_keeps_the_temperature():
    z, y = images()
    keep = (y != 3) | (torch.cumsum(y == 3, 0) < ENOUGH)
    found = fit_softmax(z[keep], y[keep], per_class=True)
    assert found.status[3] == f"shared: {ENOUGH - 1} images, fewer than {ENOUGH}"
    assert float(found.scale[3]) == float(fit_softmax(z[keep], y[keep]).scale[3]) and float(found.shift[3]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, y: (z[:0], y[:0]), "There are no images"),
        (lambda z, y: (z / 0, y), "Logits are not finite"),
        (lambda z, y: (z, z.argmax(1)), "every image is recognized"),
        (lambda z, y: (-z, y), "the data do not determine a map that rises"),
    ],
)
def test_without_a_map_of_a_classifier(change, message):
    z, y = change(*images())
    with pytest.raises(ValueError, match=message):
        fit_softmax(z, y)


def test_vector_scaling_that_the_data_do_not_determine():
    z, y = images(c=3)
    z[:, 2] = torch.where(y == 2, 5.0, -5.0).double() + 0.1 * z[:, 2]  # of this class every image is told apart
    with pytest.raises(NoMapError, match="scale of class 2"):
        fit_softmax(z, y, per_class=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_fold_maps_the_outputs(dtype):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 8, generator=g), torch.randn(4, 9, generator=g).to(dtype)
    scale, shift = torch.rand(4, generator=g) + 0.5, torch.randn(4, generator=g)
    rows = torch.cat([x, torch.ones(50, 1)], 1)
    folded = fold(weight, scale.double(), shift.double())
    assert folded.dtype == dtype
    expected = scale * (rows @ weight.float().T) + shift
    assert torch.allclose(rows @ folded.float().T, expected, atol=1e-4 if dtype == torch.float32 else 3e-2)
    assert torch.equal(fold(weight, torch.ones(4), torch.zeros(4)), weight)
