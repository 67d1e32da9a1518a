# yolo-sos, AGPL-3.0
"""The study beyond principal: its filters and weightings against their definitions, and all of it on a tiny model."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from ultralytics.nn.tasks import DetectionModel

from yolo_sos.core import Engine, input_rows, output_rows
from yolo_sos.yolo.heads import YoloTask


@pytest.fixture(scope="module")
def tool(load_study):
    return load_study("beyond")


def second_moments(outputs=3, d=8):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(outputs, 20, d, generator=g, dtype=torch.float64)
    return {"layer": torch.randn(outputs, d, generator=g, dtype=torch.float64)}, {"layer": a.mT @ a}


def test_every_filter_grows_and_is_set_to_a_norm(tool):
    weights, moments = second_moments()
    found = tool.spectra(weights, moments)
    torch.testing.assert_close(tool.filtered(found, tool.by_rank)(1.0)["layer"], weights["layer"])
    for name, spectral_filter in tool.FILTERS.items():
        shifted = tool.filtered(found, spectral_filter)
        norms = [tool.norm2(shifted(s)) for s in (0.4, 0.5, 0.6)]
        assert norms == sorted(norms), name
        ratio = tool.norm2(tool.set_to(0.5, weights, shifted)) / tool.norm2(weights)
        # A threshold takes whole eigenvectors away: it comes as near as their number allows, from above.
        assert ratio == pytest.approx(0.5, abs=1e-6) if name != "threshold" else 0.5 <= ratio < 0.7


def test_oblique_keeps_the_leading_subspace_and_is_least_in_the_metric(tool):
    weights, moments = second_moments(outputs=1)
    metric = {"layer": second_moments(outputs=1)[1]["layer"][0] + torch.eye(8, dtype=torch.float64)}
    new = tool.oblique(weights, moments, metric, rank=0.5)
    leading = torch.linalg.eigh(moments["layer"][0]).eigenvectors.flip(1)
    torch.testing.assert_close(new["layer"] @ leading[:, :4], weights["layer"] @ leading[:, :4])
    for direction in leading[:, 4:].T:  # any step along what is not kept makes it larger
        for step in (-0.1, 0.1):
            moved = {"layer": new["layer"] + step * direction}
            assert tool.size_in(moved, metric) > tool.size_in(new, metric)


def test_sensitivities_of_an_image_without_objects_are_those_of_binary_cross_entropy(tool, tiny):
    torch.manual_seed(0)
    model = DetectionModel(str(tiny), verbose=False)
    model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)
    task = YoloTask(model)
    batch = {"img": torch.rand(1, 3, 64, 64), "batch_idx": torch.zeros(0), "cls": torch.zeros(0, 1)}
    batch["bboxes"] = torch.zeros(0, 4)
    found = []

    def add(batch, output, inputs):
        slopes, curvature = tool.sensitivities(task, output, inputs, batch, 0)
        for layer in task.layers:
            z = output_rows(layer.module, input_rows(layer.module, inputs[layer.name]))
            found.append((layer.kind, z.sigmoid(), slopes[layer.name], curvature[layer.name]))

    Engine(model, task.layers, task).run([batch], add)
    assert {kind for kind, *_ in found} == {"box", "cls"}
    for kind, p, slopes, curvature in found:
        if kind == "box":
            assert not slopes.any() and not curvature.any()
        else:  # the loss is 0.5 · Σ log(1 + exp z)
            torch.testing.assert_close(slopes, (0.5 * p).square())
            torch.testing.assert_close(curvature, 0.5 * p * (1 - p))


@pytest.mark.slow
def test_it_writes_its_record(tool, weights, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "RANKS", (0.25, 0.5))
    monkeypatch.setattr(tool, "CURVED", (0.25,))
    monkeypatch.setattr(tool, "PROBES", 2)
    given = ["--weights", str(weights), "--data", str(digits), "--pretrained", str(weights), "--batch", "8"]
    given += ["--seeds", "1", "0", "--fit", "8", "--images", "4", "--probes", "2", "--name", "tiny"]
    tool.main([*given, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "beyond-tiny.json").read_text())
    assert [of["seed"] for of in record["seeds"]] == [of["seed"] for of in record["start"]] == [1, 0]
    for of in record["start"]:
        assert 0 < of["norm_ratio"] < 1 and all(0 <= x <= 1 + 1e-6 for x in of["untrained_trained"].values())
    for of in record["seeds"]:
        base, *points = of["points"]
        assert of["fit"] == 8 and of["heldout"] == 4 and base["norm_ratio"] == 1
        ratios = {p["rank"]: p["norm_ratio"] for p in points if (p["weighting"], p["filter"]) == ("balanced", "rank")}
        assert 0 < ratios[0.25] < ratios[0.5] < 1
        for p in points:
            if p["filter"] not in {"oblique", "ridge-M", "threshold"}:  # these are not set to a norm, or in leaps
                assert p["norm_ratio"] < ratios[p["rank"]] + 1e-6  # outputs that the loss ignores cannot be kept
            if p["weighting"] in {"balanced", ""}:
                assert p["norm_ratio"] == pytest.approx(ratios[p["rank"]], abs=1e-6)
    assert "curvature" not in record["seeds"][1]
    none, *traces = record["seeds"][0]["curvature"]
    assert none["change_gauss_newton"] == [0, 0] and none["gauss_newton"][0] > 0 and none["output_curvature"] > 0
    shrunk = next(row for row in traces if row["filter"] == "scaling")
    assert shrunk["change_hessian"][0] != 0
    assert "principal" in capsys.readouterr().out
