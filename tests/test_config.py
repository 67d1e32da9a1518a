# yolo-sos, AGPL-3.0
"""The settings: their defaults, their ranges, and errors that say what would be right."""

from __future__ import annotations

import math
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_sos.builtin import CFG_DIR, resolve_data
from yolo_sos.config import KEYS, KINDS, SCHEMA, SOSConfig, is_sos_key, settings_table, settings_yaml
from yolo_sos.core import METHODS, SOLVERS, WEIGHTINGS
from yolo_sos.yolo.heads import KIND_OF_BRANCH

PROPERTY = settings(derandomize=True, max_examples=60, deadline=None, database=None)
ROOT = Path(__file__).parents[1]
SOS_YAML = CFG_DIR / "sos.yaml"
DEFAULTS = yaml.safe_load(SOS_YAML.read_text(encoding="utf-8"))


def test_the_defaults_are_those_of_the_file_and_mean_off():
    assert SOSConfig.from_dict({}).to_dict() == DEFAULTS
    assert list(KEYS) == list(DEFAULTS)
    assert SOSConfig.from_dict({}).sos is False


def test_the_file_says_type_and_meaning_of_every_key():
    lines = [line for line in SOS_YAML.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    described = [
        re.fullmatch(r"(\w+): (\S+) # \((bool|str|int|float|none|list|[| ])+\) .{10,}", line) for line in lines
    ]
    assert all(described), [line for line, match in zip(lines, described, strict=True) if not match]
    assert [match[1] for match in described] == list(KEYS)


def test_committed_files_are_what_the_schema_makes():
    assert SOS_YAML.read_text(encoding="utf-8") == settings_yaml()
    rows = [line.split(" | ") for line in settings_table().splitlines()[2:]]
    assert [row[0].strip("| `") for row in rows] == list(KEYS)


def test_kinds_are_those_of_the_heads():
    assert set(KINDS) == {*KIND_OF_BRANCH.values(), "linear"}


def test_settings_override_the_defaults_and_nothing_else():
    cfg = SOSConfig.from_dict({"sos": True, "sos_rank": 48, "sos_layers": "cls"})
    assert cfg.to_dict() == {**DEFAULTS, "sos": True, "sos_rank": 48, "sos_layers": ["cls"]}
    assert SOSConfig.from_dict(cfg.to_dict()) == cfg
    with pytest.raises(FrozenInstanceError):
        cfg.sos = False


def test_settings_come_back_from_yaml_as_they_were():
    cfg = SOSConfig.from_dict({"sos": True, "sos_rank": 0.25, "sos_layers": "box,cls", "sos_guard": None})
    assert SOSConfig.from_dict(yaml.safe_load(yaml.safe_dump(cfg.to_dict()))) == cfg


GOOD = {
    "sos": [True, False],
    "sos_method": [None, "none", *METHODS],
    "sos_rank": [None, "none", 1, 48, 10**6, 1.0, 0.5, 1e-3],
    "sos_weighting": list(WEIGHTINGS),
    "sos_budget": [None, "none", 0, 0.0, 0.5, 0.999],
    "sos_solver": list(SOLVERS),
    "sos_start": [0, 0.0, 0.5, 1, 1.0],
    "sos_interval": [1, 7],
    "sos_step": [1, 1.0, 0.5, 1e-3],
    "sos_momentum": [True, False],
    "sos_images": [1, 64, None],
    "sos_layers": [
        "all",
        "box",
        "box,cls",
        "box, cls",
        "[box,cls]",
        "[box, cls]",
        "[all]",
        ["box", "cls"],
        ("linear",),
        list(KINDS),
        ["all"],
    ],
    "sos_guard": [None, "none", "None", 0, 0.0, 0.1, 3.0],
    "fit_head": [True, False],
    "lr_steps": [None, "none", [0.5], [0.5, 0.75]],
    "mixup_alpha": [None, "none", 1, 0.2, 1.0],
    "sharpness_aware": [None, "none", "sam", "asam", "gnp"],
    "rho": [None, "none", 1, 0.05, 2.0],
    "swa": [None, "none", 0, 0.0, 0.5, 0.75],
    "sos_analyze": [None, "none", 1, 10],
}
BAD = {
    "sos": [1, 0, "true", None, "yes"],
    "sos_method": ["pca", "", 1, "Principal"],
    "sos_rank": [0, -1, 1.5, 0.0, -0.5, math.nan, math.inf, True, "0.5", [1]],
    "sos_weighting": ["class", None, True],
    "sos_budget": [1, 1.0, -0.1, math.nan, math.inf, True, "0.1"],
    "sos_solver": ["lu", None],
    "sos_start": [-0.1, 1.1, 5, math.nan, True, "0.5", None],
    "sos_interval": [0, -1, 1.0, 0.5, True, "1", None],
    "sos_step": [0, 0.0, -0.5, 1.1, 2, math.nan, math.inf, True, "0.5", None],
    "sos_momentum": [1, 0, "true", None],
    "sos_images": [0, -1, 8.0, True, "8"],
    "sos_layers": ["", "boxes", "box,boxes", [], ["all", "box"], None, 3, True, "box,,cls"],
    "sos_guard": [-0.1, math.nan, math.inf, True, "0.1", "off", []],
    "fit_head": [1, 0, "true", None],
    "lr_steps": [[], [0.0], [1.0], [0.5, 2], [True], [math.nan], 150, "0.5", {}],
    "mixup_alpha": [0, 0.0, -1, math.nan, math.inf, True, "1", [1.0]],
    "sharpness_aware": ["SAM", "", "sgd", True, 1, ["sam"]],
    "rho": [0, 0.0, -1, math.nan, math.inf, True, "1", [1.0]],
    "swa": [1, 1.0, -0.1, math.nan, True, "0.5", []],
    "sos_analyze": [0, -1, 2.0, True, "10", []],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in GOOD.items() for v in values])
def test_good_values(key, value):
    needed = {"sharpness_aware": "sam"} if key == "rho" else {}
    kept = getattr(SOSConfig.from_dict({**needed, key: value}), key)
    if key == "sos_layers":
        assert kept == "all" or set(kept) <= set(KINDS)
    elif value is None or (isinstance(value, str) and value.lower() == "none"):
        assert kept is None
    else:
        assert kept == value
        # 1 is one dimension and 1.0 all of them: an int must not become a float there; elsewhere 0 and 0.0 are one.
        assert type(kept) is (
            type(value)
            if key not in {"sos_budget", "sos_start", "sos_step", "sos_guard", "mixup_alpha", "rho", "swa"}
            else float
        )


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in BAD.items() for v in values])
def test_bad_values_are_refused_by_key_and_value(key, value):
    with pytest.raises(ValueError, match=rf"^'{key}={re.escape(str(value))}' is invalid: {key} must be "):
        SOSConfig.from_dict({key: value})


def test_a_radius_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"'rho=0.1' needs sharpness_aware, one of sam, asam, gnp"):
        SOSConfig.from_dict({"rho": 0.1})
    assert SOSConfig.from_dict({"rho": "none"}).rho is None


def test_every_setting_is_checked():
    assert set(GOOD) == set(BAD) == set(SCHEMA) == set(KEYS)


@pytest.mark.parametrize(
    ("wrong", "right"), [("sos_methd", "sos_method"), ("sos_layer", "sos_layers"), ("sos_gard", "sos_guard")]
)
def test_an_unknown_key_names_the_nearest(wrong, right):
    with pytest.raises(ValueError, match=f"'{wrong}' is not a setting of SOS. Did you mean '{right}'"):
        SOSConfig.from_dict({wrong: 1})


def test_an_unknown_choice_names_the_nearest():
    with pytest.raises(ValueError, match=r"one of loss, expected, principal, budget, full, rows; nearest: expected\."):
        SOSConfig.from_dict({"sos_method": "expectd"})


@PROPERTY
@given(rank=st.one_of(st.integers(-3, 500), st.floats(-1, 2, allow_nan=False)), d=st.integers(1, 400))
def test_a_rank_that_is_accepted_makes_sense_for_every_layer(rank, d):
    try:
        method = SOSConfig.from_dict({"sos_rank": rank}).method_of("detect")
    except ValueError:
        assert not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1)
    else:
        assert 1 <= method.rank_of(d) <= d


def test_the_method_carries_every_setting_that_says_how():
    cfg = SOSConfig.from_dict(
        {"sos_method": "rows", "sos_rank": 7, "sos_budget": 0.2, "sos_solver": "gauss", "sos_weighting": "uniform"}
    )
    method = cfg.method_of("detect")
    assert (method.name, method.rank, method.budget, method.solver, method.weighting) == (
        "rows",
        7,
        0.2,
        "gauss",
        "uniform",
    )


def test_settings_of_a_shift_without_sos_are_refused_for_a_training():
    with pytest.raises(ValueError, match=r"sos_rank=0.3, sos_start=0 without sos=true would train without SOS. Add"):
        SOSConfig.of_training({"sos_rank": 0.3, "sos_start": 0, "lr_steps": [0.5]})
    for own in ({}, {"lr_steps": [0.5]}, {"sos": True, "sos_rank": 0.3}, {"sos": False, "sos_rank": 0.3}):
        assert SOSConfig.of_training(own) == SOSConfig.from_dict(own)


def test_kinds():
    assert SOSConfig.from_dict({}).kinds == KINDS
    assert SOSConfig.from_dict({"sos_layers": "cls, box"}).kinds == ("cls", "box")


def test_which_keys_are_ours():
    assert [key for key in ("sos", "sos_x", "sosx", "so", "epochs", "cos_lr", "SOS") if is_sos_key(key)] == [
        "sos",
        "sos_x",
    ]


def test_data_sets_that_come_along_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = str(CFG_DIR / "datasets/digits.yaml")
    assert resolve_data("digits.yaml") == resolve_data("digits") == packaged
    for other in ("coco8.yaml", "sub/digits.yaml", "/digits.yaml", "", None, ["digits.yaml"], packaged):
        assert resolve_data(other) == other
    (tmp_path / "digits.yaml").touch()  # a file of the user's goes first
    assert resolve_data("digits.yaml") == "digits.yaml"
