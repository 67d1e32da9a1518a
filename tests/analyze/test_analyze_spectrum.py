# yolo-sos, AGPL-3.0
"""Spectra against singular values of the rows themselves, and what settings are said to do against doing it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analyze_targets import targets
from torch import nn

from yolo_sos.analyze.landscape import direction, interpolation, loss_at, slices
from yolo_sos.analyze.spectrum import LEVELS, Inputs, Spectrum
from yolo_sos.core import WEIGHTINGS, Gram, InputCapture, Method, input_rows, shift_layers, weight_matrix
from yolo_sos.core.shift import evaluation


def test_a_spectrum_that_is_known():
    gram = Gram(4)
    gram.matrix = torch.diag(torch.tensor([0.9, 0.09, 0.009, 0.001], dtype=torch.float64)) * 50
    weight = torch.diag(torch.tensor([1.0, 1.0, 1.0, 2.0]))
    s = Spectrum.of(gram, weight)
    assert s.singular_values == pytest.approx(np.sqrt([0.9, 0.09, 0.009, 0.001]))
    assert s.outside == pytest.approx([6 / 7, 5 / 7, 4 / 7, 0.0])
    assert [level["energy"] for level in s.levels] == list(LEVELS)
    assert [level["rank"] for level in s.levels] == [1, 2, 3, 4]
    assert s.levels[2]["outside"] == pytest.approx(4 / 7)
    even = Gram(4)
    even.matrix = torch.eye(4, dtype=torch.float64)
    assert Spectrum.of(even, weight).effective_rank == pytest.approx(4)
    p = np.sqrt([0.9, 0.09, 0.009, 0.001])
    p = p / p.sum()
    assert s.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_spectra_of_a_detector(subject, tiny):
    of, batch = subject(str(tiny)), targets("detect", images=4)
    inputs = Inputs(of.task, of.layers)
    with evaluation(of.model), InputCapture(of.layers) as capture:
        of.task.forward(of.model, batch)
        taken = capture.take()
        for part in range(2):  # streaming: two halves are the whole
            half = {k: v[2 * part : 2 * part + 2] for k, v in taken.items()}
            inputs.update(half, batch)
    spectra = inputs.spectra()
    assert [s.name for s in spectra] == [layer.name for layer in of.layers]
    for s, layer in zip(spectra, of.layers, strict=True):
        rows, v = input_rows(layer.module, taken[layer.name]).double(), weight_matrix(layer.module).double()
        _, sigma, basis = np.linalg.svd(rows.numpy(), full_matrices=True)
        sigma = np.pad(sigma, (0, s.d - len(sigma)))
        assert s.rows == len(rows) and s.norm == pytest.approx(float(v.norm()))
        found = np.array(s.unweighted.singular_values)
        assert np.square(found) == pytest.approx(np.square(sigma / np.linalg.norm(sigma)), abs=1e-10)
        r = max(1, int((sigma > 1e-2 * sigma[0]).sum()))
        kept = v.numpy() @ basis[:r].T
        assert s.unweighted.outside[r - 1] == pytest.approx(1 - np.sum(kept**2) / float(v.norm()) ** 2, abs=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("task", ["detect", "classify"])
def test_settings_do_what_they_are_said_to_do(task, weighting, subject, tiny):
    """The core shifts; the diagnosis said by how much."""
    of, batch = subject(str(tiny) if task == "detect" else "yolov8n-cls.yaml"), targets(task, images=4)
    inputs = Inputs(of.task, of.layers, weighting)
    with evaluation(of.model), InputCapture(of.layers) as capture:
        of.task.forward(of.model, batch)
        inputs.update(capture.take(), batch)
    before = {s.name: s for s in inputs.spectra()}
    method = Method("principal", rank=0.5, weighting=weighting)
    planned = inputs.shifts(method)
    report = shift_layers(of.model, of.layers, [batch], of.task, method=method, guard=None)
    assert report.status == "ok"
    for record, layer in zip(report.layers, of.layers, strict=True):
        said = next(s for s in before[record.name].settings if (s["setting"], s["value"]) == ("sos_rank", 0.5))
        assert said["rank"] == record.rank
        assert said["norm_ratio"] == pytest.approx((record.norm_after / record.norm_before) ** 2)
        assert said["deviation"] == pytest.approx(record.deviation, abs=1e-9)
        # A rank beyond that of the inputs is cut: what is outside it is zero energy.
        outside = before[record.name].weighted.outside[int(record.rank) - 1]
        assert said["norm_ratio"] == pytest.approx(1 - outside, abs=1e-6)
        assert torch.allclose(planned[record.name], weight_matrix(layer.module), atol=1e-6)
        budget = next(s for s in before[record.name].settings if (s["setting"], s["value"]) == ("sos_budget", 0.01))
        assert budget["deviation"] == pytest.approx(0.01, rel=1e-4)


# Landscape ------------------------------------------------------------------------------------------------------------
def test_directions_are_normalised_filter_by_filter(subject, tiny):
    of = subject(str(tiny))
    drawn, again, other = direction(of, 0), direction(of, 0), direction(of, 1)
    own = dict(of.model.named_parameters())
    assert set(drawn) == {k for k, p in own.items() if p.ndim > 1}
    for name, d in drawn.items():
        assert torch.allclose(d.flatten(1).norm(dim=1), own[name].flatten(1).norm(dim=1), rtol=1e-4)
        assert torch.equal(d, again[name]) and not torch.equal(d, other[name])
    with torch.no_grad():
        for p in of.model.parameters():
            p *= 2
    twice = direction(of, 0)
    assert all(torch.allclose(twice[k], 2 * drawn[k], rtol=1e-4, atol=1e-7) for k in drawn)  # the same draw


def test_slices_meet_the_model_and_leave_it_alone(subject, tiny):
    of, batches = subject(str(tiny)), [targets("detect"), targets("detect", images=1)]
    state = {k: v.clone() for k, v in of.model.state_dict().items()}
    found = slices(of, batches, radius=0.1, line=3, plane=3)
    with evaluation(of.model):
        losses = [(b, float(of.task.loss(of.task.forward(of.model, b), b))) for b in batches]
    here = sum(len(b["img"]) * loss for b, loss in losses) / 3
    assert loss_at(of, batches, {}) == pytest.approx(here)
    assert found["line"]["x"] == pytest.approx([-0.1, 0, 0.1])
    assert found["line"]["loss"][1] == pytest.approx(here)
    plane = found["plane"]["loss"]
    assert plane[1] == pytest.approx(found["line"]["loss"]) and plane[0][1] != plane[1][0]
    drawn = direction(of, 1)
    with torch.no_grad():  # the same point, by writing it
        for name, p in of.model.named_parameters():
            if name in drawn:
                p += 0.1 * drawn[name]
    assert loss_at(of, batches, {}) == pytest.approx(plane[2][1], rel=1e-4)
    of.model.load_state_dict(state)


def test_the_way_to_the_shifted_self(subject, tiny):
    of, batches = subject(str(tiny)), [targets("detect")]
    shifted = {layer.name: weight_matrix(layer.module) * 0.5 for layer in of.layers}
    way = interpolation(of, batches, shifted, [0.0, 0.5, 1.0])
    assert way["norm_ratio"] == pytest.approx([1.0, 0.75**2, 0.25])
    assert way["loss"][0] == pytest.approx(loss_at(of, batches, {}), rel=1e-5)
    with torch.no_grad():
        for layer in of.layers:
            layer.module.weight *= 0.5
    assert way["loss"][2] == pytest.approx(loss_at(of, batches, {}), rel=1e-5)
    assert isinstance(of.layers[0].module, nn.Conv2d)
