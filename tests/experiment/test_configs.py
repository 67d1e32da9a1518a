# yolo-sos, AGPL-3.0
"""The experiments of yolo-sos: every file resolves, holds what it changes and nothing else, and can be run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import YAML
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

from yolo_sos.arguments import read_cfg
from yolo_sos.builtin import CFG_DIR, resolve_data, resolve_model
from yolo_sos.config import SOSConfig
from yolo_sos.experiment.arms import DEFAULT, find_experiment, read_arms

FOLDER = CFG_DIR / "experiments"
FILES = {str(path.relative_to(FOLDER)): path for path in sorted(FOLDER.rglob("*.yaml"))}
DEFAULTS = {str(path.parent.relative_to(FOLDER)): path for path in FILES.values() if path.name == DEFAULT}
EXPERIMENTS = {name: path for name, path in DEFAULTS.items() if read_cfg(path).get("model")}  # others are built on
CIFAR = {f"cifar/{model}-cifar{n}": n for model in ("vgg16bn", "resnet18", "densenet121", "vit") for n in (10, 100)}
VOC = {"voc/yolov5s": "yolov5s.pt", "voc/yolov5x": "yolov5x.pt"}
VOC07 = {
    "voc07": {"imgsz": 320, "epochs": 3, "batch": 16, "workers": 0},
    "voc07/long": {"imgsz": 320, "epochs": 10, "batch": 16, "workers": 0},
    "voc07/gpu": {"imgsz": 224, "epochs": 10, "batch": 64, "workers": 2},
}


def arms_folder(default: Path) -> Path:
    """Return the folder of the arms of an experiment."""
    return (default.parent / YAML.load(default).get("arms", ".")).resolve()


def test_the_experiments_are_there():
    assert {*CIFAR, *VOC, *VOC07} <= EXPERIMENTS.keys()
    used = {path for default in EXPERIMENTS.values() for path in arms_folder(default).glob("*.yaml")}
    assert set(FILES.values()) == used | set(DEFAULTS.values())  # no arm that nothing runs


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_it_is(name):
    text = FILES[name].read_text(encoding="utf-8")
    assert re.match(r"# \w.{20}", text)
    for experiment in re.findall(r"yolo-sos experiment (\S+)", text):
        assert find_experiment(experiment) == (FOLDER / experiment).resolve()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_resolves(name):
    assert find_experiment(name) == EXPERIMENTS[name].parent
    arms = read_arms(EXPERIMENTS[name].parent)
    assert next(iter(arms)) == "baseline" and len(arms) > 1
    assert not arms["baseline"].config["sos"]
    configs = [arm.config for arm in arms.values()]  # read by Ultralytics' get_cfg and by SOSConfig
    assert all(config not in configs[:i] for i, config in enumerate(configs))
    for config in configs:
        data, model = str(resolve_data(config["data"])), str(resolve_model(config["model"]))
        assert Path(data).is_file() or (data in {"cifar10", "cifar100"} and config["task"] == "classify")
        assert model.endswith(".pt") or yaml_model_load(model)
        assert config["optimizer"] != "auto" or name.startswith("fit")  # which asks what Ultralytics' own settings do
        if model.endswith(".pt"):  # one that Ultralytics downloads; it adds the u of YOLOv5u itself
            assert {model, model.replace(".pt", "u.pt")} & GITHUB_ASSETS_NAMES


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_arm_holds_only_what_it_changes(name):
    default = EXPERIMENTS[name]
    shared = read_cfg(default)
    for path in arms_folder(default).glob("*.yaml"):
        if path.name == DEFAULT:
            continue
        content = YAML.load(path)
        base = content.pop("cfg", DEFAULT)
        below = {**shared, **({} if base == DEFAULT else read_cfg(path.parent / base, default))}
        assert content and all(key not in below or below[key] != value for key, value in content.items()), path
        assert {"model", "data", "epochs", "seed"}.isdisjoint(content), path


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_is_plain_mixup_and_sam_each_with_and_without_sos(name):
    arms = {arm: found.config for arm, found in read_arms(EXPERIMENTS[name].parent).items()}
    assert set(arms) == {
        *("baseline", "mixup", "sam", "rows", "rows-mixup", "sam-rows"),
        *("principal", "principal-mixup", "sam-principal"),
    }
    for arm, config in arms.items():
        assert config["sos"] == ("rows" in arm or "principal" in arm)
        assert config["mixup_alpha"] == (1.0 if "mixup" in arm else None)
        assert (config["sharpness_aware"], config["rho"]) == (("sam", 0.05) if "sam" in arm else (None, None))
        assert config["data"] == f"cifar{CIFAR[name]}" and config["model"] == name[6:].split("-")[0] + "-cifar.yaml"
        assert config["epochs"] == 300 and config["lr_steps"] == [0.5, 0.75]
        if "rows" in arm:
            assert (config["sos_method"], config["sos_rank"], config["sos_guard"]) == ("rows", 3 * CIFAR[name], None)
        elif config["sos"]:
            ours = {k: v for k, v in config.items() if k.startswith("sos")}
            principal = {"sos": True, "sos_method": "principal", "sos_rank": 0.5, "sos_guard": 0.01}
            assert ours == {k: v for k, v in SOSConfig.from_dict(principal).to_dict().items() if k in ours}


@pytest.mark.parametrize("name", VOC)
def test_voc_is_the_recipe_for_fine_tuning(name):
    arms = read_arms(EXPERIMENTS[name].parent)
    assert list(arms) == ["baseline", "rows", "sos"]
    assert VOC[name] in GITHUB_ASSETS_NAMES or VOC[name].replace(".pt", "u.pt") in GITHUB_ASSETS_NAMES
    for arm in arms.values():
        assert (arm.config["model"], arm.config["data"]) == (VOC[name], "VOC-devkit.yaml")
        assert (arm.config["optimizer"], arm.config["lr0"], arm.config["epochs"]) == ("SGD", 0.00334, 50)
        assert arm.config["pretrained"] is True
    assert arms["sos"].differences == ("sos",)
    ours = SOSConfig.from_dict({"sos": True}).to_dict()
    assert {k: arms["sos"].config[k] for k in ours} == ours


@pytest.mark.parametrize("name", VOC07)
def test_voc07_is_the_same_recipe_but_smaller(name):
    arms = read_arms(EXPERIMENTS[name].parent)
    sos = ["loss", "rows-balanced", "rows-uniform", "sos", "sos-middle"]
    assert list(arms) == sorted(["baseline", "fit", "sam", "swa", *sos])
    recipe = read_cfg(FOLDER / "voc/default.yaml")
    sized = {"data": "VOC07.yaml", "model": "yolov8n.pt", "warmup_epochs": 0.5, **VOC07[name]}
    shared = {**recipe, **sized, "mosaic": 0, "mixup": 0, "val": False}
    for arm in arms.values():
        assert {k: v for k, v in arm.config.items() if k in shared and k not in arm.differences} == {
            k: v for k, v in shared.items() if k not in arm.differences
        }
    assert arms["loss"].differences == ("sos",)
    assert arms["sos"].differences == ("sos", "sos_images", "sos_method")
    assert arms["sos-middle"].differences == ("sos", "sos_images", "sos_interval", "sos_method", "sos_start")
    uniform, balanced = (arms[f"rows-{weighting}"].config for weighting in ("uniform", "balanced"))
    assert {key for key in uniform if uniform[key] != balanced[key]} == {"sos_weighting"}
    assert (balanced["sos_weighting"], uniform["sos_weighting"]) == ("balanced", "uniform")
    published = read_arms(EXPERIMENTS["voc/yolov5s"].parent)["rows"].config
    assert all(uniform[key] == value for key, value in published.items() if key.startswith("sos"))
    assert arms["sam"].differences == ("sharpness_aware",)
    assert arms["fit"].differences == ("fit_head",)
    assert (arms["swa"].config["lrf"], arms["swa"].config["swa"]) == (1.0, 0.5)  # constant, as published
