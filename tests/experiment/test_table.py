"""Tables from records: the figures, what is refused, and the files."""

from __future__ import annotations

import csv
import json

import cv2
import numpy as np
import pytest
from scipy import stats

from yolo_sos.experiment.record import record_path, write_record
from yolo_sos.experiment.statistics import holm
from yolo_sos.experiment.table import ResultTable

NAME = "bccd/screen"
MAIN = "metrics/mAP50-95(B)"
ARMS = {
    "baseline": {"sos": False},
    "principal": {"sos": True, "sos_rank": 0.25},
    "rows": {"sos": True, "sos_method": "rows"},
}
CONFIG = {"data": "bccd.yaml", "model": "yolov5n.pt", "epochs": 15, "imgsz": 192, "batch": 16, "optimizer": "SGD"}
CONFIG |= {"sos": False, "sos_method": "principal", "sos_rank": 0.5}


def value(arm: str, seed: int, split: str) -> float:
    """A metric of four digits: noise of the seed, a gain of the arm, and noise of the run."""
    own = np.random.default_rng([seed, len(arm), len(split)]).normal(0.0, 0.002)
    common = np.random.default_rng([seed, len(split)]).normal(0.44, 0.02)
    return round(common + own + {"principal": 0.004}.get(arm, 0.0), 4)


def record(arm: str, seed: int, splits=("val", "test"), **changes) -> dict:
    metrics = {split: {"metrics/mAP50(B)": 0.8 + 0.01 * seed, MAIN: value(arm, seed, split)} for split in splits}
    return {
        "experiment": NAME,
        "arm": arm,
        "seed": seed,
        "metrics": metrics,
        "config": {**CONFIG, **ARMS[arm]},
        "differences": list(ARMS[arm]),
        "versions": {"yolo-sos": "0.1.0", "ultralytics": "8.4.190"},
        "git_commit": None,
        "device": "cpu",
        "wall_time": 100.0 * (1 + 0.01 * seed**2 if arm == "rows" else 1),
        "norm2": 20.0 - seed if arm == "baseline" else 10.0,
        "sos": [],
        **changes,
    }


def write(results, *records) -> None:
    for r in records:
        write_record(record_path(results, NAME, r["arm"], r["seed"]), r)


def grid(seeds=6, arms=tuple(ARMS), **changes) -> list[dict]:
    return [record(arm, seed, **changes) for arm in arms for seed in range(seeds)]


def read_csv(folder) -> dict[tuple[str, str, str], dict[str, str]]:
    with open(folder / "table.csv", encoding="utf-8", newline="") as f:
        return {(line["split"], line["metric"], line["arm"]): line for line in csv.DictReader(f)}


def section(text: str, title: str) -> dict[str, list[str]]:
    """Return the cells of each arm's line below a title."""
    lines = text.split(f"## {title}\n")[1].split("##")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {line[0]: line[1:] for line in cells[2:]}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    write(results, *grid())
    return ResultTable(NAME, results).run()


@pytest.mark.parametrize("split", ["val", "test"])
def test_figures_of_the_csv_are_scipys(built, split):
    found = read_csv(built)
    assert len(found) == 2 * 2 * 3
    values = {arm: np.array([value(arm, seed, split) for seed in range(6)]) for arm in ARMS}
    oracles = {}
    for arm, x in values.items():
        line = found[split, MAIN, arm]
        assert [int(line["n"]), float(line["mean"]), float(line["std"])] == pytest.approx([6, x.mean(), stats.tstd(x)])
        if arm == "baseline":
            assert (line["diff"], line["low"], line["p"], line["p_holm"], line["n_pairs"]) == ("", "", "", "", "0")
            continue
        d = x - values["baseline"]
        interval = stats.ttest_rel(x, values["baseline"]).confidence_interval(0.95)
        # Four digits tie, which SciPy does not see through rounding: whole ten-thousandths
        whole = np.rint(1e4 * d)
        oracles[arm] = stats.permutation_test((whole,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
        figures = [float(line[key]) for key in ("diff", "low", "high", "p", "n_pairs")]
        assert figures == pytest.approx([d.mean(), interval.low, interval.high, oracles[arm], 6])
        assert found[split, "metrics/mAP50(B)", arm]["p_holm"] == ""  # of the primary metric only
    corrected = holm(list(oracles.values()))
    assert [float(found[split, MAIN, arm]["p_holm"]) for arm in oracles] == pytest.approx(corrected)


def test_json_holds_the_csv_and_what_is_behind_it(built):
    content = json.loads((built / "table.json").read_text())
    lines = read_csv(built)
    assert len(content["rows"]) == len(lines)
    for row in content["rows"]:
        line = lines[row["split"], row["metric"], row["arm"]]
        assert {k: "" if row[k] is None else str(row[k]) for k in line} == line
        assert np.mean(list(row["values"].values())) == pytest.approx(row["mean"])
        assert row["p_least"] == (None if row["arm"] == "baseline" else 2 / 2**6)
        if row["arm"] != "baseline":
            assert np.mean(list(row["differences"].values())) == pytest.approx(row["diff"])
    row = next(r for r in content["rows"] if (r["split"], r["metric"], r["arm"]) == ("test", MAIN, "rows"))
    assert row["values"] == {str(seed): value("rows", seed, "test") for seed in range(6)}
    assert content["primary"] == MAIN and content["command"] == f"yolo-sos table {NAME}"
    assert content["arms"]["rows"]["differences"] == ARMS["rows"]
    assert content["arms"]["rows"]["seeds"] == list(range(6))
    assert content["arms"]["rows"]["time_ratio"] == pytest.approx({"median": 1.065, "min": 1.0, "max": 1.25})
    assert content["arms"]["rows"]["norm2"] == [10.0] * 6
    left = {"median": (10 / 18 + 10 / 17) / 2, "min": 0.5, "max": 2 / 3}  # of six seeds
    assert content["arms"]["rows"]["norm2_ratio"] == pytest.approx(left)
    assert content["arms"]["baseline"]["norm2_ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert set(content["config"]) == set(CONFIG) - {"sos", "sos_rank", "sos_method"}
    assert content["origin"]["ultralytics"] == {"8.4.190": 18}


def test_markdown_tells_the_same(built):
    text = (built / "table.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {NAME}\n\n    yolo-sos table {NAME}\n\ndata=bccd.yaml, model=yolov5n.pt, epochs=15, ")
    assert "yolo-sos 0.1.0, ultralytics 8.4.190, device cpu, commit unknown\n" in text
    assert "do not agree" not in text
    for split in ("val", "test"):
        found = section(text, f"{split} mAP50-95(B)")
        assert list(found) == ["baseline", "principal", "rows"]
        assert found["baseline"][0] == "sos=false" and found["baseline"][3:] == ["–"] * 5
        for arm, cells in found.items():
            words = ("split", "metric", "arm")
            line = {k: float(v) for k, v in read_csv(built)[split, MAIN, arm].items() if v and k not in words}
            assert cells[1] == "6"
            assert cells[2] == f"{line['mean']:.4f} ± {line['std']:.4f}".replace("0.", ".")
            if arm == "baseline":
                continue
            told = f"{line['diff']:+.4f} [{line['low']:+.4f}, {line['high']:+.4f}]"
            assert cells[3] == told.replace("0.", ".").replace("-", "−")
            assert cells[4] == f"{line['p']:.3g} (0.0312)".replace("0.", ".")
            assert cells[5] == f"{line['p_holm']:.3g}".replace("0.", ".")
        assert found["rows"][6:] == ["0.572 (0.500–0.667)", "1.065 (1.000–1.250)"]
        assert found["principal"][0] == "sos=true, sos_rank=0.25"
        assert section(text, f"{split}, further metrics")["rows"] == [".8250 ± .0187"]
    assert "corrected for the 2 arms of this table" in text


def test_a_picture_with_a_panel_per_split(built, tmp_path):
    picture = cv2.imread(str(built / "table.png"))
    assert picture.shape[:2] == (round(200 * (1.8 + 0.34 * 2)), round(200 * (2.2 + 4.2 * 2)))
    blue, orange = ((np.abs(picture.astype(int) - c).sum(2) < 60) for c in ((180, 119, 31), (110, 178, 255)))
    half = picture.shape[1] // 2
    for colour in blue, orange:  # intervals and seeds in either panel
        assert colour[:, :half].sum() > 100 and colour[:, half:].sum() > 100
    write(tmp_path, *grid(splits=("val",)))
    assert cv2.imread(str(ResultTable(NAME, tmp_path).run() / "table.png")).shape[1] < half * 1.3


def test_the_picture_shows_seeds_means_and_intervals(built, tmp_path, monkeypatch):
    drawn = []

    def look(figure, path, **options):
        for ax in figure.axes:
            drawn.append((ax.get_title(), [list(map(float, line.get_xdata())) for line in ax.get_lines()]))
            assert ax.get_xlabel() == "Δ mAP50-95(B) to the baseline"
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["principal", "rows"]
        path.write_bytes(b"")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", look)
    ResultTable(NAME, built.parents[1]).plot(tmp_path / "table.png")
    assert [split for split, _ in drawn] == ["val", "test"]
    for split, (zero, *lines) in drawn:
        assert zero == [0, 0]
        for arm, (seeds, mean, interval) in zip(["principal", "rows"], (lines[:3], lines[3:]), strict=True):
            line = read_csv(built)[split, MAIN, arm]
            assert seeds == [value(arm, s, split) - value("baseline", s, split) for s in range(6)]
            assert mean == [float(line["diff"])] and interval == [float(line["low"]), float(line["high"])]


def test_it_prints_and_writes_the_same_each_time(built, monkeypatch):
    printed = []
    monkeypatch.setattr("yolo_sos.experiment.table.LOGGER.info", printed.append)
    before = {path.name: path.read_bytes() for path in built.iterdir() if path.is_file()}
    assert set(before) == {"table.md", "table.csv", "table.json", "table.png"}
    ResultTable(NAME, built.parents[1]).run()
    assert {path.name: path.read_bytes() for path in built.iterdir() if path.is_file()} == before
    assert printed[0].startswith(before["table.md"].decode())


def test_the_check_writes_nothing(tmp_path):
    write(tmp_path, *grid(2))
    ResultTable(NAME, tmp_path)
    assert [path.name for path in (tmp_path / NAME).iterdir()] == ["records"]


def test_one_seed_gives_a_mean_and_no_claim(tmp_path):
    write(tmp_path, *grid(1))
    folder = ResultTable(NAME, tmp_path).run()
    cells = section((folder / "table.md").read_text(encoding="utf-8"), "val mAP50-95(B)")["principal"]
    difference = value("principal", 0, "val") - value("baseline", 0, "val")
    told = f"{difference:+.4f}".replace("0.", ".").replace("-", "−")
    assert cells[1:6] == ["1", f"{value('principal', 0, 'val'):.4f}"[1:], told, "1 (1)", "1"]
    line = read_csv(folder)["val", MAIN, "principal"]
    assert (line["std"], line["low"], line["high"], line["p"]) == ("", "", "", "1.0")


def test_seeds_without_a_partner_count_for_the_mean_alone(tmp_path):
    write(tmp_path, *(record("baseline", seed) for seed in (0, 1, 2, 5)))
    write(tmp_path, *(record("principal", seed) for seed in (1, 2, 3)), record("rows", 4))
    folder = ResultTable(NAME, tmp_path).run()
    found = section((folder / "table.md").read_text(encoding="utf-8"), "test mAP50-95(B)")
    assert found["baseline"][1] == "4"
    assert found["principal"][1] == "3, 2 paired" and found["principal"][4].endswith(" (.5)")
    assert found["rows"][1] == "1, 0 paired" and found["rows"][3:] == ["–"] * 5
    line = read_csv(folder)["test", MAIN, "principal"]
    assert float(line["mean"]) == pytest.approx(np.mean([value("principal", s, "test") for s in (1, 2, 3)]))
    paired = [value("principal", s, "test") - value("baseline", s, "test") for s in (1, 2)]
    assert float(line["diff"]) == pytest.approx(np.mean(paired)) and line["n_pairs"] == "2"
    assert line["p_holm"] == line["p"]  # rows was not tested


def test_a_split_that_some_runs_lack(tmp_path):
    write(tmp_path, *grid(3, ["baseline", "principal"]), *grid(3, ["rows"], splits=("val",)))
    folder = ResultTable(NAME, tmp_path).run()
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert section(text, "test mAP50-95(B)")["rows"][1:6] == ["0", "–", "–", "–", "–"]
    assert section(text, "test, further metrics")["rows"] == ["–"]
    assert section(text, "val mAP50-95(B)")["rows"][1] == "3"


def test_without_any_test_split(tmp_path):
    write(tmp_path, *grid(3, splits=("val",)))
    folder = ResultTable(NAME, tmp_path).run()
    assert "## test" not in (folder / "table.md").read_text(encoding="utf-8")
    assert {split for split, _, _ in read_csv(folder)} == {"val"}


def test_a_run_without_a_number_is_not_passed_over(tmp_path):
    broken = record("principal", 1)
    broken["metrics"]["val"][MAIN] = float("nan")  # null in the file
    write(tmp_path, *grid(3), broken)
    folder = ResultTable(NAME, tmp_path).run()
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert section(text, "val mAP50-95(B)")["principal"][1:6] == ["3", "–", "–", "–", "–"]
    assert "- principal-1.json has no number on val" in text
    assert section(text, "val mAP50-95(B)")["rows"][3] != "–"
    row = next(r for r in json.loads((folder / "table.json").read_text())["rows"] if r["arm"] == "principal")
    assert row["mean"] is None and row["values"]["1"] is None and row["values"]["2"] is not None


def test_a_model_that_no_shift_reached_is_not_compared(tmp_path):
    same = record("principal", 1)["metrics"] | record("baseline", 1)["metrics"]
    lost = record("principal", 1, shifted=False, metrics=same, norm2=19.0)
    write(tmp_path, *grid(3, shifted=None), *grid(3, ["principal"], shifted=True), lost)
    folder = ResultTable(NAME, tmp_path).run()
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert "- principal-1.json: its arm shifts, but no shift reached the model that was judged" in text
    assert section(text, "test mAP50-95(B)")["principal"][1] == "3, 2 paired"
    line = read_csv(folder)["test", MAIN, "principal"]
    paired = [value("principal", s, "test") - value("baseline", s, "test") for s in (0, 2)]
    assert float(line["diff"]) == pytest.approx(np.mean(paired)) and line["n_pairs"] == "2"
    arms = json.loads((folder / "table.json").read_text())["arms"]
    assert arms["principal"]["shifted"] == [True, False, True] and arms["rows"]["shifted"] == [None] * 3
    assert arms["principal"]["norm2_ratio"]["max"] < 0.6  # that of the unshifted model would be 1

    write(tmp_path, *(record("principal", s, shifted=False) for s in range(3)))
    row = section(ResultTable(NAME, tmp_path).markdown(), "test mAP50-95(B)")["principal"]
    assert row[1] == "3, 0 paired" and row[3:] == ["–"] * 5


def test_an_arm_may_be_called_anything_that_a_file_may(tmp_path):
    write(tmp_path, *grid(2, ["baseline"]), *({**record("rows", s), "arm": "ca$$h"} for s in range(2)))
    folder = ResultTable(NAME, tmp_path).run()
    assert "ca$$h" in section((folder / "table.md").read_text(encoding="utf-8"), "test mAP50-95(B)")
    assert cv2.imread(str(folder / "table.png")) is not None


def test_metrics_of_a_classifier(tmp_path):
    metrics = {"val": {"metrics/accuracy_top1": 0.5, "metrics/accuracy_top5": 0.9, "fitness": 0.7}}
    write(tmp_path, *grid(2, metrics=metrics))
    table = ResultTable(NAME, tmp_path)
    assert table.primary == "metrics/accuracy_top1"
    assert section(table.markdown(), "val, further metrics")["rows"] == [".9000 ± .0000", ".7000 ± .0000"]
    assert section(table.markdown(), "val accuracy_top1")["rows"][3:6] == ["+.0000 [+.0000, +.0000]", "1 (.5)", "1"]


def test_what_ran_elsewhere_is_told(tmp_path):
    versions = {"yolo-sos": "0.1.0", "ultralytics": "8.4.189"}
    write(tmp_path, *grid(2), record("rows", 0, device="cuda:0", versions=versions, git_commit="f00d"))
    text = ResultTable(NAME, tmp_path).markdown()
    assert "- The 6 records do not agree in ultralytics: 5 × 8.4.190; 1 × 8.4.189." in text
    assert "- The 6 records do not agree in device: 5 × cpu; 1 × cuda:0." in text
    assert "- The 6 records do not agree in commit: 5 × unknown; 1 × f00d." in text
    assert "\nyolo-sos 0.1.0\n" in text


def test_a_record_being_written_is_not_read(tmp_path):
    write(tmp_path, *grid(2))
    (tmp_path / NAME / "records" / ".rows-2.1a2b3c4d.json").write_text('{"experiment": ')
    assert len(ResultTable(NAME, tmp_path).records) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 30}, r"rows-0.json and .*rows-1.json: 'epochs' differs: 15 and 30"),
        # Within an arm nothing may differ, not even what the arm sets
        ({"sos_method": "full"}, r"'sos_method' differs: \"rows\" and \"full\"\. They may differ in the seed alone"),
        ({"new": 1}, r"'new' differs: null and 1"),
    ],
)
def test_records_of_one_arm_with_other_configs_are_refused(tmp_path, changes, message):
    write(tmp_path, *grid(2), record("rows", 1, config={**CONFIG, **ARMS["rows"], **changes}))
    with pytest.raises(ValueError, match=message):
        ResultTable(NAME, tmp_path)
    assert not (tmp_path / NAME / "table.md").exists()


def test_arms_that_differ_in_what_neither_sets_are_refused(tmp_path):
    write(tmp_path, *grid(2, ["baseline", "principal"]))
    write(tmp_path, *grid(2, ["rows"], config={**CONFIG, **ARMS["rows"], "imgsz": 320}))
    message = r"baseline-0.json and .*rows-0.json: 'imgsz' differs: 192 and 320. .*\(sos, sos_method\) alone"
    with pytest.raises(ValueError, match=message):
        ResultTable(NAME, tmp_path)


def test_arms_are_compared_with_each_other_too(tmp_path):
    # Either may differ from the baseline, which sets sos_rank, but not from one another
    write(tmp_path, *grid(2, ["baseline"], differences=["sos", "sos_rank"]), *grid(2, ["rows"]))
    write(tmp_path, *grid(2, ["principal"], differences=["sos"]))
    with pytest.raises(ValueError, match=r"principal-0.json and .*rows-0.json: 'sos_rank' differs: 0.25 and 0.5"):
        ResultTable(NAME, tmp_path)


def without(key):
    def drop(content):
        del content[key]

    return drop


def put(*place):
    *way, last, new = place

    def change(content):
        for key in way:
            content = content[key]
        content[last] = new

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((without(key), f"has no '{key}'") for key in ("experiment", "arm", "seed", "metrics", "config", "wall_time")),
        (put("experiment", "bccd/final"), f"'experiment' is 'bccd/final', not '{NAME}'"),
        (put("arm", "principal"), r"'arm' and 'seed' are principal and 1; the record of that run is principal-1.json"),
        (put("seed", 4), r"'arm' and 'seed' are rows and 4; the record of that run is rows-4.json"),
        (put("seed", "1"), "'seed' must be of type int, not str"),
        (put("config", None), "'config' must be of type dict, not NoneType"),
        (put("differences", ["sos", "sos_start"]), "'config' lacks \"sos_start\", which 'differences' names"),
        (put("wall_time", 0), "'wall_time' must be a number of seconds above 0, not 0"),
        (put("norm2", "7"), "'norm2' must be a number above 0, or null, not \"7\""),
        (put("shifted", 3), "'shifted' must be true, false or null, not 3"),
        (put("norm2", -1.0), "'norm2' must be a number above 0, or null, not -1.0"),
        (put("metrics", {"test": {MAIN: 0.4}}), "'metrics.val' is missing"),
        (put("metrics", "test", [0.4]), r"'metrics.test' must hold a value per metric, not \[0.4\]"),
        (put("metrics", "val", MAIN, "0.4"), r"'metrics.val.metrics/mAP50-95\(B\)' must be a number or null, not \"0"),
        (put("metrics", "val", MAIN, True), r"'metrics.val.metrics/mAP50-95\(B\)' must be a number or null, not true"),
        (put("metrics", "test", {"fitness": 0.4}), r"'metrics.test.metrics/mAP50-95\(B\)' is missing"),
    ],
)
def test_damaged_records_are_named(tmp_path, change, message):
    write(tmp_path, *grid(2))
    path = record_path(tmp_path, NAME, "rows", 1)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"rows-1\.json: .*{message}"):
        ResultTable(NAME, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "7"])
def test_what_is_no_record_is_named(tmp_path, text):
    write(tmp_path, *grid(2))
    record_path(tmp_path, NAME, "rows", 1).write_text(text)
    with pytest.raises(ValueError, match=r"rows-1\.json.*: not "):
        ResultTable(NAME, tmp_path)


def test_metrics_must_hold_one_to_compare(tmp_path):
    write(tmp_path, *grid(2, metrics={"val": {"metrics/recall(B)": 0.5}}))
    with pytest.raises(ValueError, match=r"baseline-0.json: 'metrics.val' holds none of metrics/mAP50-95\(B\), "):
        ResultTable(NAME, tmp_path)


def test_there_must_be_something_to_compare(tmp_path):
    with pytest.raises(FileNotFoundError, match="records: there are no records of experiment 'bccd/screen'"):
        ResultTable(NAME, tmp_path)
    write(tmp_path, *grid(2, ["principal"]))
    with pytest.raises(ValueError, match=r"no arm 'baseline' to compare with; there are records of principal\."):
        ResultTable(NAME, tmp_path)
    write(tmp_path, *grid(2, ["rows"]))
    with pytest.raises(ValueError, match="there are records of principal, rows"):
        ResultTable(NAME, tmp_path)


def test_a_baseline_alone_is_no_comparison(tmp_path):
    write(tmp_path, *grid(2, ["baseline"]))
    with pytest.raises(ValueError, match="only an arm 'baseline'"):
        ResultTable(NAME, tmp_path)
