# yolo-sos, AGPL-3.0
"""What a run with SOS does to the weights, and what it leaves: columns, files, checkpoints, a line in the log."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
import yaml
from ultralytics import YOLO
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.patches import torch_load
from ultralytics.utils.torch_utils import unwrap_model
from watched import EPOCHS, read_csv, same, weights_of

import yolo_sos
from yolo_sos.config import SOSConfig
from yolo_sos.yolo.heads import YoloTask, final_layers
from yolo_sos.yolo.shift_log import columns

SHIFTED = (2, 3, 4)  # epochs, with sos_start=0.5
SOS = list(columns({}))


@pytest.fixture(scope="module")
def layers(tiny):
    """The final layers of the tiny model."""
    return final_layers(YOLO(tiny).model)


def norm(weights, layers):
    return sum(float(weights[f"{layer.name}.weight"].double().norm()) ** 2 for layer in layers) ** 0.5


# Weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "ema"])
def test_live_model_and_ema_lose_norm_in_every_layer_and_nothing_else_changes(shifted, layers, name):
    names = {f"{layer.name}.weight" for layer in layers}
    for epoch in SHIFTED:
        before, after = shifted.trained[epoch][name], shifted.ended[epoch][name]
        for key in before:
            if key in names:
                # Not <: a layer whose inputs span fewer dimensions than are kept has nothing more to lose.
                assert after[key].norm() <= before[key].norm() * (1 + 1e-6), (epoch, key)
            else:
                assert torch.equal(after[key], before[key]), (epoch, key)
        assert norm(after, layers) < norm(before, layers)
    assert same(shifted.trained[1][name], shifted.ended[1][name])


@pytest.mark.parametrize("name", ["model", "ema"])
def test_each_of_the_two_is_shifted_from_its_own_features(shifted, tiny, digits, name):
    """The whole shift once more, in NumPy: principal, half of the dimensions, balanced."""
    model = YOLO(tiny).model.eval()
    model.load_state_dict(shifted.trained[2][name])
    files = [str(digits.parent / "images/train" / file) for file in shifted.images[2][0]]
    images = np.stack([cv2.imread(file)[..., ::-1].transpose(2, 0, 1) for file in files])
    layers = final_layers(model)
    inputs: dict[str, np.ndarray] = {}
    for layer in layers:
        layer.module.register_forward_pre_hook(
            lambda _, args, key=layer.name: inputs.__setitem__(key, args[0].double().numpy())
        )
    with torch.no_grad():
        model(torch.from_numpy(images).float() / 255)
    rows = {key: x.transpose(0, 2, 3, 1).reshape(-1, x.shape[1]) for key, x in inputs.items()}
    modules = dict(model.named_modules())
    for layer in layers:
        v, a = layer.module.weight.detach().double().numpy()[:, :, 0, 0], rows[layer.name]
        classifier = modules[layer.classifier]
        logits = rows[layer.classifier] @ classifier.weight.detach().double().numpy()[:, :, 0, 0].T
        p = 1 / (1 + np.exp(-(logits + classifier.bias.detach().double().numpy())))
        # A row belongs to its likeliest class. Quotas are not exhausted by 8 images: nothing is drawn.
        weights = [np.where(p.argmax(1) == c, p.max(1), 0) for c in range(p.shape[1])]
        if layer.kind == "cls":
            weights.append(np.ones(len(p)))  # the background
        gram = sum((a * w[:, None]).T @ a / w.sum() for w in weights if w.any())
        u = np.linalg.eigh(gram)[1][:, ::-1][:, : len(gram) // 2]
        u = u[:, : np.linalg.matrix_rank(a)]
        expected = v @ u @ u.T
        found = shifted.ended[2][name][f"{layer.name}.weight"].double().numpy()[:, :, 0, 0]
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(v).max(), err_msg=layer.name)


def test_the_shift_comes_before_validation_and_saving(shifted):
    for epoch in range(1, EPOCHS + 1):
        for name in "model", "ema":
            assert same(shifted.validated[epoch][name], shifted.ended[epoch][name]), (epoch, name)
        saved = torch_load(shifted.save_dir / f"weights/epoch{epoch - 1}.pt", map_location="cpu")["ema"].state_dict()
        for key, value in shifted.ended[epoch]["ema"].items():
            assert torch.equal(saved[key], value.half() if value.is_floating_point() else value), (epoch, key)


def test_the_final_checkpoints_hold_the_shifted_weights(shifted, layers):
    last = torch_load(shifted.save_dir / "weights/last.pt", map_location="cpu")["model"]
    for layer in layers:
        expected = shifted.ended[EPOCHS]["ema"][f"{layer.name}.weight"].half()
        assert torch.equal(last.state_dict()[f"{layer.name}.weight"], expected)


def test_both_models_see_the_same_images_fit_and_held_out_apart(shifted):
    assert sorted(shifted.images) == list(SHIFTED)
    for epoch in SHIFTED:
        fit, held, fit_again, held_again = shifted.images[epoch]
        assert (fit, held) == (fit_again, held_again)
        assert (len(set(fit)), len(set(held))) == (8, 4)
        assert not set(fit) & set(held)
    assert len({tuple(shifted.images[epoch][0]) for epoch in SHIFTED}) == len(SHIFTED)  # new ones each time


def test_one_seed_gives_the_same_weights(shifted, train):
    again = train(sos=True)
    for epoch in shifted.ended:
        assert same(again.ended[epoch]["model"], shifted.ended[epoch]["model"]), epoch
        assert same(again.ended[epoch]["ema"], shifted.ended[epoch]["ema"]), epoch
    assert again.images == shifted.images
    other = train(sos=True, seed=1, epochs=2, sos_start=1.0)
    assert next(iter(other.images.values())) != shifted.images[2]


# results.csv --------------------------------------------------------------------------------------------------------


def check_columns(results, due):
    """Assert that every line has the SOS columns last, with numbers where a shift was due and nan elsewhere."""
    assert [int(row["epoch"]) for row in results] == list(range(1, len(results) + 1))
    for row in results:
        assert list(row)[-len(SOS) :] == SOS
        numbers = [not math.isnan(float(row[column])) for column in SOS]
        assert all(numbers) if int(row["epoch"]) in due else not any(numbers), row


def test_every_line_of_the_results_has_the_same_columns(shifted, stock):
    check_columns(shifted.results, SHIFTED)
    assert list(shifted.results[0]) == [*stock.results[0], *SOS]


def test_columns_are_the_same_without_validation(train):
    run = train(sos=True, val=False, sos_interval=2)
    check_columns(run.results, (2, 4))
    assert len(run.validated) == 1  # the last epoch
    assert float(run.results[-1]["metrics/mAP50-95(B)"]) >= 0


def test_the_columns_tell_of_the_ema(shifted, layers):
    for row in shifted.results[1:]:
        epoch = int(row["epoch"])
        before, after = shifted.trained[epoch]["ema"], shifted.ended[epoch]["ema"]
        assert float(row["sos/squared_norm_ratio"]) == pytest.approx(
            (norm(after, layers) / norm(before, layers)) ** 2, rel=1e-4
        )
        assert 0 < float(row["sos/squared_norm_ratio"]) < 1
        assert float(row["sos/t"]) == 1
        assert float(row["sos/ms"]) > 0


def test_no_column_looks_like_a_loss_or_a_metric_to_the_plot_of_ultralytics():
    assert not [column for column in SOS if "loss" in column or "metric" in column]


# Files --------------------------------------------------------------------------------------------------------------


def test_sos_csv_has_a_line_per_shift_model_and_layer(shifted, layers):
    lines = [(int(row["epoch"]), row["model"], row["name"]) for row in shifted.shifts]
    assert lines == [(e, m, layer.name) for e in SHIFTED for m in ("ema", "model") for layer in layers]
    kinds = {layer.name: (layer.kind, layer.level) for layer in layers}
    for row in shifted.shifts:
        assert (row["kind"], int(row["level"])) == kinds[row["name"]]
        assert row["status"] == "ok"
        assert 0 < float(row["norm_after"]) <= float(row["norm_before"]) * (1 + 1e-6)
        assert float(row["rank"]) <= min(int(row["rows"]), int(row["d"]) / 2)
        assert int(row["rows"]) == 8 * (8, 4, 2)[int(row["level"])] ** 2
    one = next(row for row in shifted.shifts if row["model"] == "ema")
    assert float(one["norm_after"]) == pytest.approx(float(shifted.ended[2]["ema"][f"{one['name']}.weight"].norm()))


def test_sos_yaml_holds_the_settings(shifted):
    saved = yaml.safe_load((shifted.save_dir / "sos.yaml").read_text(encoding="utf-8"))
    assert SOSConfig.from_dict(saved) == shifted.trainer.sos
    assert saved["sos"] is True and saved["sos_images"] == 8


def test_sos_png_is_a_picture(shifted, train):
    image = cv2.imread(str(shifted.save_dir / "sos.png"))
    assert image.shape[0] > 300 and image.shape[1] > 900
    assert image.std() > 5  # curves, not a blank page
    assert shifted.save_dir / "sos.png" in shifted.trainer.plots
    assert not (train(sos=True, epochs=1).save_dir / "sos.png").exists()  # plots=False


def test_one_line_in_the_log_per_shift(shifted):
    told = [line for line in shifted.log if "SOS: " in line]
    assert [("squared norm" in line) for line in told] == [False, True, True, True]  # settings, then shifts
    assert "sos_rank=0.5" in told[0]
    for line, row in zip(told[1:], shifted.results[1:], strict=True):
        assert f"squared norm ×{float(row['sos/squared_norm_ratio']):.3f}, rank" in line
        assert "t=1 (live ×" in line and "\n" not in line


def test_arguments_of_ultralytics_never_hold_a_setting_of_sos(shifted):
    """Ultralytics refuses keys that it does not know wherever it reads its arguments again, as in a validation."""
    assert set(vars(shifted.trainer.args)) <= {*DEFAULT_CFG_DICT, "save_dir"}
    assert not [k for k in yaml.safe_load((shifted.save_dir / "args.yaml").read_text()) if k.startswith("sos")]
    for name in "last", "best":
        ckpt = torch_load(shifted.save_dir / f"weights/{name}.pt", map_location="cpu")
        assert not [k for k in (*ckpt["train_args"], *ckpt["model"].args) if k.startswith("sos")]


def test_checkpoints_hold_the_settings_as_plain_values(shifted):
    settings = {"version": yolo_sos.__version__, "settings": shifted.trainer.sos.to_dict()}
    for name, epochs in ("last", SHIFTED), *((f"epoch{i}", range(2, i + 2)) for i in range(EPOCHS)):
        saved = torch_load(shifted.save_dir / f"weights/{name}.pt", map_location="cpu")["sos"]
        assert saved == {**settings, "shifts": [{"epoch": epoch, "step": 1.0} for epoch in epochs]}, name
    assert torch_load(shifted.save_dir / "weights/best.pt", map_location="cpu")["sos"]["shifts"]
    assert sorted(p.name for p in (shifted.save_dir / "weights").iterdir()) == [
        *("best.pt", "epoch0.pt", "epoch1.pt", "epoch2.pt", "epoch3.pt", "last.pt"),
    ]
    assert not list(shifted.save_dir.glob(".*"))


# Settings -----------------------------------------------------------------------------------------------------------


def test_kinds_of_layers_that_are_not_chosen_stay(train, layers):
    run = train(sos=True, sos_layers="cls")
    assert {row["kind"] for row in run.shifts} == {"cls"}
    for name in "model", "ema":
        before, after = run.trained[4][name], run.ended[4][name]
        for layer in layers:
            key = f"{layer.name}.weight"
            assert torch.equal(after[key], before[key]) == (layer.kind == "box"), key


@pytest.mark.slow
def test_interval_and_start(train):
    run = train(sos=True, epochs=5, sos_start=0.3, sos_interval=2)
    assert sorted(run.images) == [2, 4]
    run = train(sos=True, epochs=2, sos_start=0.01, sos_interval=9)
    assert sorted(run.images) == [1]


def test_a_start_of_0_shifts_before_the_first_epoch(train, layers):
    seen = {}

    def note(event):
        return {event: lambda trainer: seen.update({event: weights_of(trainer)})}

    run = train(
        sos=True,
        epochs=2,
        sos_start=0.0,
        sos_interval=2,
        callbacks={**note("on_pretrain_routine_end"), **note("on_train_start")},
    )
    assert sorted(run.images) == [0, 2]
    before, after = seen["on_pretrain_routine_end"], seen["on_train_start"]
    names = {f"{layer.name}.weight" for layer in layers}
    for name in "model", "ema":
        assert norm(after[name], layers) < norm(before[name], layers)
        assert same(*({k: v for k, v in state[name].items() if k not in names} for state in (before, after)))
    assert same(after["model"], after["ema"])  # two copies of one model, and the same images
    assert {int(row["epoch"]) for row in run.shifts} == {0, 2}
    check_columns(run.results, (2,))
    assert len([line for line in run.log if "squared norm" in line]) == 2


def test_a_resumed_run_does_not_shift_before_its_first_epoch(train, interrupt):
    first = train(
        sos=True, sos_start=0.0, sos_interval=9, callbacks=interrupt("on_train_epoch_start", 3), error=KeyboardInterrupt
    )
    run = train(model=str(first.save_dir / "weights/last.pt"), resume=True)
    assert run.trainer.start_epoch == 2 and not run.images
    assert {int(row["epoch"]) for row in run.shifts} == {0}


@pytest.mark.parametrize("name", ["model", "ema"])
def test_a_step_below_1_goes_part_of_the_way(train, layers, name):
    whole = train(sos=True, epochs=1)
    part = train(sos=True, epochs=1, sos_step=0.25)
    assert float(part.results[0]["sos/t"]) == 0.25
    for layer in layers:
        key = f"{layer.name}.weight"
        v, target = whole.trained[1][name][key], whole.ended[1][name][key]
        assert torch.equal(part.trained[1][name][key], v)
        torch.testing.assert_close(part.ended[1][name][key], v + 0.25 * (target - v))


def momentum_of(trainer):
    """Return the optimizer's momentum of the final layers' weights, none before its first step."""
    layers = final_layers(unwrap_model(trainer.model))
    states = {layer.name: trainer.optimizer.state.get(layer.module.weight, {}) for layer in layers}
    return {name: s["momentum_buffer"].flatten(1).clone() for name, s in states.items() if "momentum_buffer" in s}


@pytest.mark.parametrize("momentum", [False, True])
def test_momentum_is_shifted_with_the_weights_if_asked_for(train, layers, momentum):
    seen = {}

    def note(event):
        return {event: lambda trainer: seen.update({event: momentum_of(trainer)})}

    run = train(
        **{"sos": True, "epochs": 1, "nbs": 8, "sos_momentum": momentum, "sos_layers": "cls"},
        callbacks={**note("on_train_batch_end"), **note("on_train_epoch_end")},
    )
    before, after = seen["on_train_batch_end"], seen["on_train_epoch_end"]
    weights = run.trained[1]["model"], run.ended[1]["model"]
    assert list(before) == [layer.name for layer in layers]
    for name in before:
        if not momentum or "cv3" not in name:  # the class layers
            assert torch.equal(before[name], after[name])
            continue
        # Both were projected on the subspace of the weight: what it has lost has no part in either.
        v, target = (w[f"{name}.weight"].flatten(1).double() for w in weights)
        lost = v - target
        assert after[name].norm() < before[name].norm()
        assert (after[name].double() @ lost.T).norm() < 1e-5 * before[name].norm() * lost.norm()
        kept = before[name].double() - after[name].double()
        assert (kept @ target.T).norm() < 1e-5 * before[name].norm() * target.norm()


def test_without_a_guard_the_heldout_losses_are_reported_all_the_same(train, shifted):
    run = train(sos=True, epochs=2, sos_guard=None)
    assert [len(images) for images in run.images[1]] == [8, 4, 8, 4]
    assert float(run.results[1]["sos/heldout_before"]) > 0 and float(run.results[1]["sos/t"]) == 1
    assert any("no guard" in line for line in run.log) and not any("no guard" in line for line in shifted.log)


@pytest.mark.parametrize(("slope", "guarded"), [(1, True), (-1, False)])
def test_a_loss_that_rises_leaves_the_weights_and_is_reported(train, monkeypatch, slope, guarded):
    """The loss is 100 as long as the class layers are those before the shift, and 100 ± 1 with others."""

    def loss(self, output, batch):
        scores = vars(self).setdefault("scores", output["scores"].clone())  # of the only batch, before the shift
        return torch.tensor(100.0 if torch.equal(scores, output["scores"]) else 100.0 + slope)

    monkeypatch.setattr(YoloTask, "loss", loss)
    run = train(sos=True, epochs=1, sos_guard=0.0)
    (row,) = run.results
    for name in "model", "ema":
        assert same(run.trained[1][name], run.ended[1][name]) == guarded
    assert float(row["sos/t"]) == (0 if guarded else 1)
    assert (float(row["sos/squared_norm_ratio"]) == 1) == guarded
    assert float(row["sos/heldout_after"]) == 100 - (0 if guarded else 1)
    assert any("t=0, guarded" in line for line in run.log) == guarded
    assert {float(shift["t"]) for shift in run.shifts} == {0 if guarded else 1}


@pytest.mark.slow
def test_the_trainer_of_the_readme(train, digits, tmp_path):
    from yolo_sos import SOSDetectionTrainer

    model = YOLO(str(train(sos=True, epochs=1).save_dir / "weights/last.pt"))
    model.train(
        trainer=SOSDetectionTrainer,
        **{"data": str(digits), "sos": True, "epochs": 1, "imgsz": 64, "batch": 8, "device": "cpu", "plots": False},
        project=str(tmp_path),
    )
    assert model.trainer.sos.sos and read_csv(model.trainer.save_dir / "sos.csv")
    # The settings are those of one call: the next one of the same model starts from the defaults again.
    model.train(
        trainer=SOSDetectionTrainer,
        **{"data": str(digits), "epochs": 1, "imgsz": 64, "batch": 8, "device": "cpu", "plots": False},
        project=str(tmp_path),
    )
    assert model.trainer.sos == SOSConfig.from_dict({})
    assert not (model.trainer.save_dir / "sos.csv").exists()
