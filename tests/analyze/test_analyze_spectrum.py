# yolo-sos, AGPL-3.0
"""Spectra against singular values of the rows themselves, and what settings are said to do against doing it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analyze_targets import targets
from torch import nn

from yolo_sos.analyze.landscape import direction, interpolation, loss_at, slices
from yolo_sos.analyze.spectrum import LEVELS, layer_spectrum, spectrum, spectrum_methods
from yolo_sos.core import (
    WEIGHTINGS,
    Engine,
    InputCapture,
    Method,
    Moments,
    Shift,
    ShiftResult,
    evaluation,
    input_rows,
    weight_matrix,
)


def spectra(of, batches, weighting="balanced"):
    engine = Engine(of.model, of.layers, of.task, spectrum_methods(weighting))
    engine.fit(batches)
    return [layer_spectrum(engine, layer, weighting) for layer in of.layers], engine


def test_a_spectrum_that_is_known():
    moments = Moments(4)
    moments.matrix = torch.diag(torch.tensor([0.9, 0.09, 0.009, 0.001], dtype=torch.float64)) * 50
    weight = torch.diag(torch.tensor([1.0, 1.0, 1.0, 2.0]))
    s = spectrum(moments, weight)
    assert s["singular_values"] == pytest.approx(np.sqrt([0.9, 0.09, 0.009, 0.001]))
    assert s["outside"] == pytest.approx([6 / 7, 5 / 7, 4 / 7, 0.0])
    assert [level["energy"] for level in s["levels"]] == list(LEVELS)
    assert [level["rank"] for level in s["levels"]] == [1, 2, 3, 4]
    assert s["levels"][2]["outside"] == pytest.approx(4 / 7)
    even = Moments(4)
    even.matrix = torch.eye(4, dtype=torch.float64)
    assert spectrum(even, weight)["effective_rank"] == pytest.approx(4)
    p = np.sqrt([0.9, 0.09, 0.009, 0.001])
    p = p / p.sum()
    assert s["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_spectra_of_a_detector(subject, tiny):
    of, batch = subject(str(tiny)), targets("detect", images=4)
    with evaluation(of.model), InputCapture(of.layers) as capture:
        of.task.run(of.model, batch)
        taken = capture.take()
    halves = [{"img": batch["img"][:2]}, {"img": batch["img"][2:]}]  # two halves are the whole
    for s, layer in zip(spectra(of, halves)[0], of.layers, strict=True):
        assert (s["name"], s["kind"], s["level"]) == (layer.name, layer.kind, layer.level)
        rows, v = input_rows(layer.module, taken[layer.name]).double(), weight_matrix(layer.module).double()
        _, sigma, basis = np.linalg.svd(rows.numpy(), full_matrices=True)
        sigma = np.pad(sigma, (0, s["d"] - len(sigma)))
        assert s["rows"] == len(rows) and s["norm"] == pytest.approx(float(v.norm()))
        found = np.array(s["unweighted"]["singular_values"])
        assert np.square(found) == pytest.approx(np.square(sigma / np.linalg.norm(sigma)), abs=1e-10)
        r = max(1, int((sigma > 1e-2 * sigma[0]).sum()))
        kept = v.numpy() @ basis[:r].T
        assert s["unweighted"]["outside"][r - 1] == pytest.approx(1 - np.sum(kept**2) / float(v.norm()) ** 2, abs=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("task", ["detect", "classify"])
def test_settings_do_what_they_are_said_to_do(task, weighting, subject, tiny):
    """The engine shifts; the diagnosis said by how much."""
    of, batch = subject(str(tiny) if task == "detect" else "yolov8n-cls.yaml"), targets(task, images=4)
    before, engine = spectra(of, [batch], weighting)
    shift = engine.solve(Method("principal", rank=0.5, weighting=weighting))
    engine.write(shift, 1.0)
    report = engine.report(shift, 1.0, float("nan"), float("nan"), None)
    assert report.status == "ok"
    for record, said in zip(report.layers, before, strict=True):
        assert record.name == said["name"]
        settings = {(s["setting"], s["value"]): s for s in said["settings"]}
        rank = settings["sos_rank", 0.5]
        assert rank["rank"] == record.rank
        assert rank["squared_norm_ratio"] == pytest.approx((record.norm_after / record.norm_before) ** 2)
        assert rank["deviation"] == pytest.approx(record.deviation, abs=1e-9)
        # A rank beyond that of the inputs is cut: what is outside it is zero energy.
        outside = said["weighted"]["outside"][int(record.rank) - 1]
        assert rank["squared_norm_ratio"] == pytest.approx(1 - outside, abs=1e-6)
        assert settings["sos_budget", 0.01]["deviation"] == pytest.approx(0.01, rel=1e-4)


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


def test_slices_pass_through_the_model_and_leave_it_alone(subject, tiny):
    of, batches = subject(str(tiny)), [targets("detect"), targets("detect", images=1)]
    state = {k: v.clone() for k, v in of.model.state_dict().items()}
    found = slices(of, batches, radius=0.1, line=3, plane=3)
    with evaluation(of.model):
        losses = [(b, float(of.task.loss(of.task.run(of.model, b), b))) for b in batches]
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
    weights = {layer.name: weight_matrix(layer.module) for layer in of.layers}
    halved = {name: ShiftResult(v * 0.5, 1.0, 1.0, 0.5) for name, v in weights.items()}
    shift = Shift(Method(), 0, of.layers, halved, dict.fromkeys(weights, 1), dict.fromkeys(weights, 0.0))
    way = interpolation(Engine(of.model, of.layers, of.task), shift, batches, [0.0, 0.5, 1.0])
    assert way["squared_norm_ratio"] == pytest.approx([1.0, 0.75**2, 0.25])
    assert way["loss"][0] == pytest.approx(loss_at(of, batches, {}), rel=1e-5)
    with torch.no_grad():
        for layer in of.layers:
            layer.module.weight *= 0.5
    assert way["loss"][2] == pytest.approx(loss_at(of, batches, {}), rel=1e-5)
    assert isinstance(of.layers[0].module, nn.Conv2d)
