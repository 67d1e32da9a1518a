# yolo-sos, AGPL-3.0
"""Arms × seeds from end to end: finished runs stay, interrupted ones resume, failed ones do not stop the others."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from ultralytics import YOLO
from ultralytics.utils.patches import torch_load

from yolo_sos.cli import main
from yolo_sos.experiment import run as running
from yolo_sos.experiment.grid import Experiment
from yolo_sos.experiment.judge import judge
from yolo_sos.experiment.record import FIELDS, read_record, read_rows
from yolo_sos.trainers import SOSDetectionTrainer
from yolo_sos.yolo import final_layers

RECORDS = Path("results/little/records")


def epochs(folder: Path) -> list[int]:
    with open(folder / "results.csv", newline="") as f:
        return [int(row["epoch"]) for row in csv.DictReader(f, skipinitialspace=True)]


@pytest.fixture
def trainings(monkeypatch):
    """The names of the runs that are trained, in order; a callable put into ``before`` is called with each."""
    names: list[str] = []

    def train(run):
        names.append(run.name)
        return real(run)

    real = running.train
    monkeypatch.setattr(running, "train", train)
    return names


def test_two_arms_and_two_seeds(experiment, trainings, capsys):
    main(["experiment", "little", "seeds=0,1"])
    assert trainings == ["baseline-0", "shift-0", "baseline-1", "shift-1"]
    records = {path.stem: read_record(path) for path in RECORDS.glob("*.json")}
    assert sorted(records) == sorted(trainings)
    for name, record in records.items():
        assert {*FIELDS, "sos", "norm2"} <= record.keys()
        assert record["shifted"] is (True if record["arm"] == "shift" else None)
        assert f"{record['arm']}-{record['seed']}" == name and record["experiment"] == "little"
        assert record["metrics"].keys() == {"val", "test"}
        assert record["wall_time"] > 0 and record["versions"]["torch"]
        assert record["config"]["epochs"] == 2 and record["config"]["sos"] == (record["arm"] == "shift")
        assert [row["epoch"] for row in record["sos"] if row["model"] == "ema"] == (
            ["1"] * 6 if record["arm"] == "shift" else []
        )
        best = Path("runs/experiments/little") / name / "weights/best.pt"
        layers = final_layers(YOLO(best).model)
        assert record["norm2"] == pytest.approx(sum(float(x.module.weight.square().sum()) for x in layers), rel=1e-5)
        found = YOLO(best).val(
            data=record["config"]["data"], split="test", imgsz=64, batch=8, device="cpu", plots=False, project="again"
        )
        assert record["metrics"]["test"].items() >= found.results_dict.items()
    losses = {(Path("runs/experiments/little") / name / "results.csv").read_text().split(",", 2)[2] for name in records}
    assert len(losses) == 4  # each run is one of its own

    before = {path: path.stat().st_mtime_ns for path in RECORDS.glob("*.json")}
    main(["experiment", "little", "seeds=0,1"])
    assert len(trainings) == 4 and before == {path: path.stat().st_mtime_ns for path in RECORDS.glob("*.json")}

    capsys.readouterr()
    main(["table", "little"])
    table = json.loads((RECORDS.parent / "table.json").read_text())
    assert {"table.md", "table.csv", "table.png"} <= {p.name for p in RECORDS.parent.iterdir()}
    assert "shift" in (RECORDS.parent / "table.md").read_text() and table


def test_a_plan_runs_nothing(experiment, trainings, capsys):
    main(["experiment", "little", "seeds=3", "plan=true"])
    assert not trainings and not Path("runs").exists() and not Path("results").exists()
    grid = Experiment("little", seeds=(3, 4))
    assert [grid.state(run) for run in grid.runs] == ["to do"] * 4
    assert "no estimate" in grid.estimate()


def test_an_interrupted_run_goes_on_where_it_was(experiment, trainings, monkeypatch):
    grid = Experiment("little", seeds=0, arms="shift", epochs=4, splits="val")
    with monkeypatch.context() as patch:
        patch.setattr(SOSDetectionTrainer, "_setup_train", stop_after(2))
        with pytest.raises(KeyboardInterrupt):
            grid.run()
    (run,) = grid.runs
    assert not RECORDS.exists() and epochs(run.folder) == [1, 2]
    again = Experiment("little", seeds=0, arms="shift", epochs=4, splits="val")
    assert again.state(run) == "2 of 4 epochs" and "h left" in again.estimate()
    assert again.run() == 0
    record = read_record(RECORDS / "shift-0.json")
    assert epochs(run.folder) == [1, 2, 3, 4]
    assert {row["epoch"] for row in record["sos"]} == {"2"}

    Experiment("little", seeds=0, arms="shift", epochs=4, splits="val,test").run()  # trained already: judged alone
    assert read_record(RECORDS / "shift-0.json")["metrics"].keys() == {"val", "test"}
    assert epochs(run.folder) == [1, 2, 3, 4]


# The first epoch is the best, so that best.pt is from before the shift of the last epoch, which is still due then.
FIRST_IS_BEST = """
def validate(self):
    metrics, _ = real(self)
    fitness = 1 / (self.epoch + 1)
    self.best_fitness = max(self.best_fitness or 0, fitness)
    return metrics, fitness

trainer, real = running.TRAINERS["detect"], running.TRAINERS["detect"].validate
"""
KILLED = f"""
import os, signal
from yolo_sos.experiment import run as running
from yolo_sos.experiment.grid import Experiment
{FIRST_IS_BEST}
trainer.validate = validate
trainer.final_eval = lambda self: os.kill(os.getpid(), signal.SIGKILL)
Experiment("little", seeds=0, arms="shift", splits="val", val=True, project="killed", results="killed").run()
"""


@pytest.mark.slow
def test_what_is_due_after_the_last_epoch_is_done_when_a_run_was_killed_then(experiment, monkeypatch):
    (experiment / "shift.yaml").write_text("sos: true\nsos_guard: 1.0\n")
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    patch: dict = {"running": running}
    exec(FIRST_IS_BEST, patch)
    records, weights = [], []
    for project in "whole", "killed":
        grid = Experiment("little", seeds=0, arms="shift", splits="val", val=True, project=project, results=project)
        (run,) = grid.runs
        assert grid.state(run) == ("2 of 2 epochs" if project == "killed" else "to do")
        with monkeypatch.context() as m:
            m.setattr(patch["trainer"], "validate", patch["validate"])
            assert grid.run() == 0
        assert epochs(run.folder) == [1, 2]  # no epoch was trained again
        records.append(read_record(grid.record_path(run)))
        weights.append([torch_load(run.folder / "weights" / name) for name in ("best.pt", "last.pt")])
    whole, killed = records
    assert whole["shifted"] is killed["shifted"] is True
    assert killed["norm2"] == whole["norm2"] and killed["metrics"] == whole["metrics"]
    lines = [[{k: v for k, v in row.items() if k != "ms"} for row in record["sos"]] for record in records]
    assert lines[0] == lines[1] and {row["model"] for row in lines[0]} == {"ema", "model", "best"}
    for one, other in zip(*weights, strict=True):
        assert one["epoch"] == other["epoch"] == -1 and other["optimizer"] is None
        state = other["model"].state_dict()
        assert all(torch.equal(v, state[k]) for k, v in one["model"].state_dict().items())


@pytest.mark.parametrize(
    ("state", "shifted"),
    [
        ({"shifts": []}, False),
        ({"shifts": [{"epoch": 1, "step": 0.0}, {"epoch": 2, "step": 0}]}, False),  # the guard refused both
        ({"shifts": [{"epoch": 1, "step": 0.0}, {"epoch": 2, "step": 0.25}]}, True),
        ({"settings": {}}, None),  # of an older release
        (None, None),
    ],
)
def test_whether_a_shift_reached_the_model_judged(state, shifted, tmp_path):
    torch.save({"epoch": -1, **({"sos": state} if state is not None else {})}, tmp_path / "best.pt")
    assert running.was_shifted(tmp_path / "best.pt") is shifted


@pytest.mark.parametrize(
    ("epoch", "patience", "stopper", "trained"),
    [
        (8, 100, None, True),  # the last of nine
        (7, 100, None, False),
        (4, 2, {"best_epoch": 3, "best_fitness": 0.5}, True),  # epochs 4 and 5 were no better than 3
        (3, 2, {"best_epoch": 3, "best_fitness": 0.5}, False),
        (4, 2, {"best_epoch": 0, "best_fitness": 0.0}, False),  # val=False
        (4, 0, {"best_epoch": 1, "best_fitness": 0.5}, False),  # no early stopping
    ],
)
def test_when_a_run_has_no_epoch_left(epoch, patience, stopper, trained):
    saved = {"epoch": epoch, "train_args": {"epochs": 9, "patience": patience}, "stopper": stopper}
    assert running.is_trained(saved) is trained


def stop_after(epoch: int):
    """Return a ``_setup_train`` after which the run is interrupted at the end of an epoch, when it is saved."""
    real = SOSDetectionTrainer._setup_train

    def stop(trainer):
        if trainer.epoch + 1 == epoch:
            raise KeyboardInterrupt

    def setup(self):
        self.add_callback("on_model_save", stop)
        real(self)

    return setup


def test_two_processes_share_a_grid(experiment, trainings, caplog):
    grid, other = (Experiment("little", seeds=0, splits="val") for _ in range(2))
    first = grid.runs[0]
    first.folder.mkdir(parents=True)
    with FileLock(first.folder / running.LOCK):
        assert grid.run() == 0
    assert trainings == ["shift-0"]  # the one that no other process executed
    assert (
        "another process is executing this run" in caplog.text
        and "1 of 2 runs finished, 1 left to others" in caplog.text
    )
    assert not (first.folder / "weights").exists() and not (first.folder / running.BEGUN).exists()
    assert other.run() == 0  # planned when nothing was finished
    assert trainings == ["shift-0", "baseline-0"]
    assert sorted(path.stem for path in RECORDS.iterdir()) == ["baseline-0", "shift-0"]


def test_a_run_that_fails_is_told_and_the_others_go_on(experiment, trainings, capsys):
    (experiment / "broken.yaml").write_text("sos: true\nsos_layers: [mask]\n")
    with pytest.raises(SystemExit) as exit:
        main(["experiment", "little", "seeds=0"])
    assert exit.value.code == 1
    assert trainings == ["baseline-0", "broken-0", "shift-0"]
    assert sorted(path.stem for path in RECORDS.iterdir()) == ["baseline-0", "shift-0"]
    assert "Traceback" in Path("runs/experiments/little/broken-0/log.txt").read_text()


def test_data_that_cannot_be_judged_on_stop_an_experiment_before_it_trains(experiment, trainings, digits):
    broken = Path(shutil.copytree(digits.parent, "broken"))
    annotation = sorted((broken / "annotations/test").iterdir())[0]
    annotation.write_text(annotation.read_text().replace("<name>", "<name>not-", 1))
    data = broken / "data.yaml"
    data.write_text(re.sub("^path:.*", f"path: {broken.resolve()}", data.read_text(), flags=re.MULTILINE))
    grid = Experiment("little", seeds=0, data=str(data.resolve()))
    with pytest.raises(ValueError, match="not-"):
        grid.run()
    assert not trainings and not Path("runs").exists()
    assert Experiment("little", seeds=0, arms="baseline", splits="val", data=str(data.resolve())).run() == 0


def test_a_try_that_failed_before_training_does_not_stand_in_the_way(experiment):
    assert Experiment("little", seeds=0, arms="baseline", splits="val", model="missing.pt", epochs=9).run() == 1
    assert not RECORDS.exists()
    grid = Experiment("little", seeds=0, arms="baseline", splits="val")
    assert grid.run() == 0 and epochs(grid.runs[0].folder) == [1, 2]
    assert json.loads((grid.runs[0].folder / running.BEGUN).read_text())["epochs"] == 2


def test_records_judge_with_the_settings_of_the_training(experiment, weights, digits):
    seen = digits.with_name("seen.yaml")  # judged on what the model knows, so that there is something to score
    seen.write_text(digits.read_text().replace("val: images/val", "val: images/train"))
    still = {"model": str(weights), "data": str(seen), "lr0": 1e-6, "warmup_epochs": 0}
    grid = Experiment("little", seeds=0, arms="baseline", splits="val", classes=[1], max_det=3, **still)
    assert grid.run() == 0
    found = read_record(RECORDS / "baseline-0.json")["metrics"]["val"]
    last = read_rows(grid.runs[0].folder / "results.csv")[-1]
    plain = judge(grid.runs[0].best, grid.runs[0].data, "val", task="detect", imgsz=64, device="cpu")
    for key in "metrics/mAP50(B)", "metrics/mAP50-95(B)", "metrics/recall(B)":
        assert found[key] == pytest.approx(float(last[key]), rel=1e-2) and found[key] > 0.05
        assert found[key] != pytest.approx(plain[key], rel=5e-2)
    assert Experiment("little", seeds=1, arms="baseline", splits="val", single_cls=True).run() == 0


def test_a_record_of_other_settings_is_refused_and_kept(experiment, trainings):
    Experiment("little", seeds=0, arms="baseline", splits="val").run()
    record = (RECORDS / "baseline-0.json").read_bytes()
    with pytest.raises(ValueError, match=r"baseline-0.json: was run with epochs=2, now it is 3"):
        Experiment("little", seeds=0, epochs=3)
    assert (RECORDS / "baseline-0.json").read_bytes() == record
    (RECORDS / "baseline-0.json").unlink()
    with pytest.raises(ValueError, match=r"run.json: was begun with epochs=2, now it is 3. Move the folder away"):
        Experiment("little", seeds=0, epochs=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["little", "seeds=a"], "seeds must be different integers"),
        (["little", "seeds=1,1"], "seeds must be different integers"),
        (["little", "seeds=-1"], "seeds must be different integers"),
        (["little", "arms=shft"], "Did you mean 'shift'"),
        (["little", "splits=tst"], "splits must be of train, val, test"),
        (["little", "launcher=slurm"], "launcher must be one of local, ray"),
        (["little", "plan=maybe"], "plan must be true or false"),
        (["little", "resume=true"], "'resume' is not a valid argument"),
        (["little", "epochs=none"], "epochs"),
        (["litle"], "'litle' is not an experiment"),
        ([], "experiment takes one name"),
        (["little", "little"], "'little' is not a switch of experiment"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(experiment, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(["experiment", *arguments])
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert not Path("runs").exists() and not Path("results").exists()


def test_one_seed_gives_one_result(experiment):
    for results in "one", "two":
        main(["experiment", "little", "seeds=5", "arms=shift", f"results={results}", f"project={results}"])
    one, two = (read_record(Path(name) / "little/records/shift-5.json") for name in ("one", "two"))
    assert one["metrics"] == two["metrics"] and one["config"] == two["config"]


def test_the_command_works_from_a_shell(experiment):
    command = [sys.executable, "-m", "yolo_sos.cli", "experiment", "little", "seeds=0", "plan"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "baseline-0" in done.stdout and "to do" in done.stdout
