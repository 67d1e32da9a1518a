# yolo-sos, AGPL-3.0
"""In a fresh clone an experiment has everything to do: the records of our studies are not the user's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from test_configs import EXPERIMENTS

from yolo_sos.experiment.grid import Experiment
from yolo_sos.experiment.table import ResultTable

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    folder = tmp_path_factory.mktemp("fresh") / "clone"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), str(folder)], check=True)
    return folder


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_run_is_finished(clone, name, monkeypatch):
    monkeypatch.chdir(clone)
    experiment = Experiment(name, seeds=tuple(range(10)))
    assert not experiment.finished and {experiment.state(run) for run in experiment.runs} == {"to do"}
    with pytest.raises(FileNotFoundError, match="there are no records"):
        ResultTable(name)


def test_nothing_is_committed_where_the_records_of_users_go(clone):
    assert not (clone / "results").exists() and not (clone / "runs").exists()
    ignored = ["git", "-C", str(clone), "check-ignore", "results/bccd/records/baseline-0.json", "runs/x"]
    assert len(subprocess.run(ignored, capture_output=True, text=True, check=True).stdout.splitlines()) == 2


@pytest.mark.skipif(not (ROOT / "studies").is_dir(), reason="a source distribution holds no studies")
@pytest.mark.parametrize("name", ["bccd", "bccd/screen", "bccd/few", "bccd/long", "digits", "digits/screen"])
def test_the_records_of_the_study_still_make_its_tables(name, tmp_path):
    table = ResultTable(name, ROOT / "studies/training")
    committed = (ROOT / "studies/training" / name / "table.csv").read_text(encoding="utf-8")
    made, kept = ([line.split(",") for line in text.splitlines()] for text in (table.csv(), committed))
    for ours, theirs in zip(made, kept, strict=True):
        texts = 3 if ours is not made[0] else len(ours)  # split, metric and arm
        assert ours[:texts] == theirs[:texts]
        # Quantiles differ in the last digits from one release of SciPy to another.
        numbers = ([float(cell or "nan") for cell in line[texts:]] for line in (ours, theirs))
        assert next(numbers) == pytest.approx(next(numbers), rel=1e-9, nan_ok=True)
