# yolo-sos, AGPL-3.0
"""What the YAML files of an experiment say."""

from __future__ import annotations

import pytest
from ultralytics.cfg import DEFAULT_CFG_DICT

from yolo_sos.arguments import OF_ONE_RUN
from yolo_sos.config import KEYS
from yolo_sos.experiment.arms import find_experiment, read_arms


def test_an_arm_is_the_default_and_its_differences(experiment):
    arms = read_arms(experiment)
    assert list(arms) == ["baseline", "shift"]
    assert arms["baseline"].differences == ()
    assert arms["shift"].differences == ("sos", "sos_guard", "sos_start")
    assert arms["shift"].settings["epochs"] == arms["baseline"].settings["epochs"] == 2
    changed = {k for k in arms["shift"].config if arms["shift"].config[k] != arms["baseline"].config[k]}
    assert changed == {"sos", "sos_guard", "sos_start"}


def test_an_arm_builds_on_the_default_whether_it_names_it_or_not(experiment):
    plain = read_arms(experiment)
    for path in experiment / "shift.yaml", experiment / "baseline.yaml":
        path.write_text(f"cfg: default.yaml\n{path.read_text()}")
    assert read_arms(experiment) == plain
    plain = plain["baseline"].config
    (experiment / "baseline.yaml").write_text("# nothing else\n")
    assert read_arms(experiment)["baseline"].config == plain


def test_a_config_holds_every_setting(experiment):
    config = read_arms(experiment)["shift"].config
    assert set(config) | set(OF_ONE_RUN) >= {*DEFAULT_CFG_DICT, *KEYS}
    assert config["momentum"] == DEFAULT_CFG_DICT["momentum"] and config["sos_interval"] == 5
    assert not {"seed", "device", "project", "name"} & config.keys()


def test_what_is_given_for_all_arms_changes_all_of_them(experiment):
    arms = read_arms(experiment, overrides={"epochs": 3, "sos_rank": 0.25})
    assert [arm.config["epochs"] for arm in arms.values()] == [3, 3]
    assert arms["shift"].differences == ("sos", "sos_guard", "sos_start")
    with pytest.raises(ValueError, match=r"sos_guard=0.5 for all arms: .*shift.yaml sets sos_guard itself"):
        read_arms(experiment, overrides={"sos_guard": 0.5})


def test_arms_may_lie_elsewhere_and_build_on_each_other(experiment):
    variant = experiment / "variants" / "long"
    variant.mkdir(parents=True)
    (variant / "default.yaml").write_text("cfg: ../../default.yaml\narms: ../..\nepochs: 7\n")
    (experiment / "half.yaml").write_text("cfg: shift.yaml\nsos_rank: 0.25\n")
    arms = read_arms(variant)
    assert list(arms) == ["baseline", "half", "shift"]
    assert {arm.config["epochs"] for arm in arms.values()} == {7}
    assert arms["half"].differences == ("sos", "sos_guard", "sos_rank", "sos_start")
    assert read_arms(experiment)["half"].config["epochs"] == 2
    assert list(read_arms(variant, chosen=["half", "baseline", "half"])) == ["baseline", "half"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("shift.yaml", "cfg: default.yaml\nsos_rnk: 3\n", r"shift.yaml: 'sos_rnk' .*sos_rank"),
        ("shift.yaml", "cfg: default.yaml\nsos_rank: -1\n", r"shift.yaml: 'sos_rank=-1' is invalid"),
        ("shift.yaml", "cfg: default.yaml\nepochs: many\n", r"shift.yaml: .*epochs"),
        ("shift.yaml", "cfg: shift.yaml\n", r"shift.yaml: its 'cfg' leads back"),
        ("default.yaml", "data: coco8.yaml\n", r"default.yaml: it names no model. .*model="),
        ("default.yaml", "arms: nowhere\n", r"nowhere: there is no arm"),
    ],
)
def test_what_is_wrong_names_the_file(experiment, file, text, message):
    (experiment / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_arms(experiment)


def test_unknown_names_get_the_nearest(experiment):
    with pytest.raises(ValueError, match=r"'shft' is not an arm of little. Did you mean 'shift'"):
        read_arms(experiment, chosen=["shft"])
    with pytest.raises(FileNotFoundError, match=r"'bcd' is not an experiment: .*Did you mean 'bccd'"):
        find_experiment("bcd")
    assert find_experiment("little") == experiment
