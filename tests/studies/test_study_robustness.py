# yolo-sos, AGPL-3.0
"""The study of robustness: what it does to models and images, what it makes of detections, and all of it end to end."""

from __future__ import annotations

import colorsys
import csv
import json
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel

from yolo_sos.core import InputCapture
from yolo_sos.evaluate import Detections, GroundTruth
from yolo_sos.experiment.grid import Experiment
from yolo_sos.experiment.record import read_record, record_path
from yolo_sos.yolo.heads import final_layers


@pytest.fixture(scope="module")
def tool(load_study):
    return load_study("robustness")


@pytest.fixture(scope="module")
def model(tiny):
    torch.manual_seed(0)
    return DetectionModel(str(tiny), verbose=False).eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ranges(model, images):
    with torch.no_grad(), InputCapture(final_layers(model)) as capture:
        model(images)
        return {name: (min(0, x.min().item()), x.max().item()) for name, x in capture.take().items()}


def test_quantized_weights_and_inputs_lie_on_grids_and_half_a_step_away(tool, model, images, ranges):
    for bits in 8, 4:
        quantized = deepcopy(model)
        tool.quantize(quantized, ranges, bits)
        with torch.no_grad(), InputCapture(final_layers(quantized)) as capture:
            quantized(images)
            inputs = capture.take()  # the hooks of the study come first
        with torch.no_grad(), InputCapture(final_layers(model)) as capture:
            model(images)
            before = capture.take()
        for old, new in zip(final_layers(model), final_layers(quantized), strict=True):
            v, w = old.module.weight.detach().flatten(1), new.module.weight.detach().flatten(1)
            step = v.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            assert ((v - w).abs() <= step * 0.5001).all() and (v != w).any()
            assert ((w / step).round() - w / step).abs().max() < 1e-3
            assert len(inputs[new.name].unique()) <= 2**bits
            low, high = ranges[old.name]
            assert (inputs[new.name] - before[old.name]).abs().max() <= (high - low) / (2**bits - 1) * 1.001
        others = {layer.module.weight for layer in final_layers(quantized)}
        same = dict(model.named_parameters())
        assert all(p.equal(same[name]) for name, p in quantized.named_parameters() if p not in others)


def test_more_bits_are_nearer_to_the_model(tool, model, images, ranges):
    def scores(network):
        with torch.no_grad():
            return network(images)[1]["scores"]

    errors = []
    for bits in 4, 8, 16:
        quantized = deepcopy(model)
        tool.quantize(quantized, ranges, bits)
        errors.append((scores(quantized) - scores(model)).abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_an_input_beyond_its_range_is_cut_off_and_zero_stays_zero(tool):
    out = tool._round_input((-1.0, 3.0), 255, nn.Identity(), (torch.tensor([-5.0, 0.0, 1.0, 9.0]),))
    torch.testing.assert_close(out, torch.tensor([-1.0, 0.0, 1.0, 3.0]), atol=4 / 255, rtol=0)
    assert out[1] == 0
    assert tool._round_input((0.0, 0.0), 255, nn.Identity(), (torch.zeros(3),)).equal(torch.zeros(3))


def test_weight_noise_is_a_share_of_each_tensor_and_seeded(tool, model):
    noisy = {}
    for name, sigma, seed in ("none", 0.0, 0), ("some", 0.05, 0), ("again", 0.05, 0), ("other", 0.05, 1):
        noisy[name] = deepcopy(model)
        tool.add_noise(noisy[name], sigma=sigma, seed=seed)
        noisy[name] = noisy[name].state_dict()
    touched = 0
    for key, clean in model.state_dict().items():
        assert noisy["none"][key].equal(clean) and noisy["some"][key].equal(noisy["again"][key])
        if key.endswith("weight") and clean.ndim > 1 and ".dfl." not in key:
            touched += 1
            assert not noisy["some"][key].equal(noisy["other"][key])
            noise = noisy["some"][key] - clean
            if clean.numel() > 1000:
                assert (noise.norm() / clean.norm()).item() == pytest.approx(0.05, rel=0.1)
        else:
            assert noisy["some"][key].equal(clean)
    assert touched > 10


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)


def test_corruptions_are_those_of_imagenet_c(tool, picture):
    def corrupt(kind, severity, seed=0):
        return tool.corrupted(picture, np.random.default_rng(seed), partial(kind, severity=severity))

    for kind in tool.CORRUPTIONS:
        first = corrupt(kind, 1)
        assert first.dtype == np.uint8 and first.shape == picture.shape
        np.testing.assert_array_equal(first, corrupt(kind, 1))
        differences = [np.abs(corrupt(kind, s).astype(int) - picture).mean() for s in range(1, 6)]
        assert differences == sorted(differences) and differences[0] > 1
    assert not np.array_equal(corrupt(tool.gaussian_noise, 1), corrupt(tool.gaussian_noise, 1, seed=1))

    x = picture / 255
    h, s, v = colorsys.rgb_to_hsv(*x[3, 4])
    np.testing.assert_allclose(
        corrupt(tool.brightness, 3)[3, 4] / 255, colorsys.hsv_to_rgb(h, s, min(v + 0.3, 1)), atol=1 / 255
    )
    mean = x.mean((0, 1))
    np.testing.assert_allclose(corrupt(tool.contrast, 3) / 255, (x - mean) * 0.2 + mean, atol=1 / 255)
    grey = np.full((60, 60, 3), 128, np.uint8)
    noise = tool.corrupted(grey, np.random.default_rng(0), partial(tool.gaussian_noise, severity=1)) / 255 - 128 / 255
    assert noise.std() == pytest.approx(0.08, rel=0.05) and abs(noise.mean()) < 0.005
    np.testing.assert_array_equal(
        tool.corrupted(grey, np.random.default_rng(0), partial(tool.gaussian_blur, severity=3)), grey
    )


def test_calibration_error_by_hand(tool):
    # Bins of 1/15: 0.90 and 0.92 lie in (13/15, 14/15], 0.30 in (4/15, 5/15].
    confidence, true = np.array([0.90, 0.92, 0.30]), np.array([1.0, 0.0, 1.0])
    gap = 2 / 3 * abs(0.5 - 0.91) + 1 / 3 * abs(1 - 0.30)
    assert tool.calibration_error(confidence, true) == pytest.approx(gap)
    assert tool.calibration_error(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0
    assert np.isnan(tool.calibration_error(np.empty(0), np.empty(0)))


def test_hits_are_the_devkits(tool):
    truth = GroundTruth.build(
        ["a", "b"],
        ["x"],
        image=[0, 0, 0],
        label=[0, 1, 1],
        boxes=[[0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]],
        difficult=[False, False, True],
    )
    boxes = [[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 24], [20, 20, 30, 30], [40, 40, 50, 50], [20, 20, 30, 30]]
    found = Detections.build(truth, [0] * 6, [0, 0, 1, 1, 1, 0], [0.6, 0.9, 0.8, 0.7, 0.95, 0.04], boxes)
    confidence, true = tool.hits(truth, found)
    # a duplicate, a hit; overlap 0.4, a hit; the difficult object is neutral; 0.04 is too little to count
    assert dict(zip(confidence, true, strict=True)) == {0.6: 0, 0.9: 1, 0.8: 0, 0.7: 1}


def test_temperature_one_changes_nothing_and_the_true_one_is_found(tool):
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, 20000)
    p = 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(tool.scaled(p, 1.0), p, rtol=1e-9)
    np.testing.assert_allclose(tool.scaled(p, 2.0), 1 / (1 + np.exp(-z / 2)), rtol=1e-9)
    true = (rng.random(len(z)) < 1 / (1 + np.exp(-z / 2))).astype(float)
    temperature = tool.fit_temperature(p, true)
    assert temperature == pytest.approx(2, rel=0.05)

    def loss(t):
        q = tool.scaled(p, t)
        return -np.mean(true * np.log(q) + (1 - true) * np.log(1 - q))

    assert loss(temperature) <= min(loss(temperature * 1.01), loss(temperature / 1.01))
    assert tool.calibration_error(tool.scaled(p, temperature), true) < tool.calibration_error(p, true) / 3
    assert np.isfinite(tool.fit_temperature(np.array([1.0, 0.5]), np.array([1.0, 1.0])))


@pytest.fixture(scope="module")
def learned(digits, weights, tmp_path_factory):
    """A detector that knows its images by heart, the arguments to judge it on them, and its clean mAP."""
    folder = tmp_path_factory.mktemp("runs")
    size = {"imgsz": 64, "batch": 8, "device": "cpu", "workers": 0}
    network = YOLO(weights)
    clean = network.val(data=str(digits), split="train", **size, plots=False, project=str(folder), verbose=False)
    args = {
        "task": "detect",
        "data": str(digits),
        "split": "train",
        "mode": "val",
        "rect": True,
        "plots": False,
        **size,
    }
    return network.model.float(), args, clean.results_dict["metrics/mAP50-95(B)"]


def test_conditions_that_do_nothing_leave_the_clean_metric(tool, learned):
    network, args, clean = learned
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert clean > 0.1

    def score(**what):
        return tool.score(network, args, tool.Condition("", **what))

    assert score() == score(alter=partial(tool.add_noise, sigma=0.0, seed=0)) == clean
    assert score(corruption=lambda image, rng: image) == clean
    assert score(alter=partial(tool.add_noise, sigma=0.5, seed=0)) < clean
    noisy = score(corruption=partial(tool.gaussian_noise, severity=5))
    assert noisy < clean and noisy == score(corruption=partial(tool.gaussian_noise, severity=5))
    smaller = tool.score(
        network, {**args, "batch": 3}, tool.Condition("", None, partial(tool.gaussian_noise, severity=5))
    )
    assert smaller == pytest.approx(noisy, abs=1e-4)  # an image's noise does not depend on its batch
    assert all(v.equal(before[k]) for k, v in network.state_dict().items())


@pytest.mark.slow
def test_it_writes_its_files(tool, experiment, workplace, capsys, monkeypatch):
    assert Experiment(str(experiment.name), seeds=(0, 1), splits=("val",), device="cpu").run() == 0
    monkeypatch.setattr(tool, "SEVERITIES", (1,))
    monkeypatch.setattr(tool, "BITS", (16,))
    given = ["little", "--split", "val", "--arms", "shift", "--draws", "2", "--images", "4", "--device", "cpu"]
    given += ["--out", "study"]
    tool.main(given)
    stem = workplace / "study/robustness-little"
    text = stem.with_suffix(".md").read_text()
    assert (
        "python studies/robustness/robustness.py little --arms baseline,shift --split val --draws 2 --images 4" in text
    )
    assert text.rstrip() in capsys.readouterr().out
    record = json.loads(stem.with_suffix(".json").read_text())
    names = ["clean", "head, 16 bits", "weight noise 2%", "weight noise 5%"]
    names += [f"{kind} 1" for kind in ("gaussian noise", "gaussian blur", "contrast", "brightness")]
    for arm in "baseline", "shift":
        for seed in "0", "1":
            figures = record["figures"][arm][seed]
            assert list(figures) == [*names, "ECE", "ECE, T scaled", "temperature"]
            assert [len(v) for v in figures.values()] == [1, 1, 2, 2, *[1] * 7]
            own = read_record(record_path("results", "little", arm, int(seed)))
            assert figures["clean"][0] == pytest.approx(own["metrics"]["val"]["metrics/mAP50-95(B)"], abs=1e-6)
    with open(stem.with_suffix(".csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["metric"] for line in lines[::2]] == [
        *(*names, "ECE", "ECE, T scaled", "temperature"),
        *(f"{name}, change" for name in names[1:]),
    ]
    assert {line["arm"] for line in lines} == {"baseline", "shift"} and {line["n"] for line in lines} == {"2"}


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--arms", "shfit"], "no records of 'shfit'"), (["--runs", "elsewhere"], "best.pt: no such checkpoint")],
)
def test_what_is_missing_is_said_before_anything_runs(given, said, tool, experiment, workplace, monkeypatch):
    config = {"task": "detect", "data": "x", "imgsz": 64, "batch": 8}
    for arm in "baseline", "shift":
        write = {"experiment": "little", "arm": arm, "seed": 0, "config": config, "differences": [], "wall_time": 1.0}
        write |= {"metrics": {"val": {"metrics/mAP50-95(B)": 0.1}}, "versions": {}, "git_commit": None, "device": "cpu"}
        path = record_path("results", "little", arm, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(write))
    monkeypatch.setattr(tool, "measure", None)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        tool.main(["little", "--arms", "shift", *given])


def test_a_checkpoint_of_another_run_is_refused(tool, tmp_path, monkeypatch):
    metrics = {"val": {"metrics/mAP50-95(B)": 0.1}}
    record = tool.Record(tmp_path / "baseline-0.json", "baseline", 0, metrics, {}, (), {}, 1.0, None)
    monkeypatch.setattr(tool, "find_models", lambda *_: {"baseline": [(record, tmp_path / "best.pt")]})
    monkeypatch.setattr(tool, "measure", lambda *_: {"clean": [0.2]})
    with pytest.raises(ValueError, match=r"best.pt: mAP50-95 is 0.2000, but .*baseline-0.json says 0.1000"):
        tool.main(["little", "--split", "val"])
