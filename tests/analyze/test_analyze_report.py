# yolo-sos, AGPL-3.0
"""Whole comparisons: files, figures, the report in a browser, and what is refused."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess

import pytest
import torch
import yaml
from PIL import Image

from yolo_sos.analyze import Comparison, Curves, analyze_checkpoints, comparison, curves, figures, hessian, spectrum
from yolo_sos.analyze.curves import columns
from yolo_sos.analyze.report import digits, number
from yolo_sos.analyze.verdict import verdict
from yolo_sos.core import weight_matrix
from yolo_sos.versions import versions
from yolo_sos.yolo import memory
from yolo_sos.yolo.heads import final_layers

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,5200"),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few points and iterations."""
    monkeypatch.setattr(comparison, "LINE", 3)
    monkeypatch.setattr(comparison, "PLANE", 3)
    monkeypatch.setattr(comparison, "STEPS", [0.0, 1.0])
    monkeypatch.setattr(spectrum, "RANKS", (0.5,))
    monkeypatch.setattr(spectrum, "BUDGETS", (0.01,))
    monkeypatch.setattr(figures, "DPI", 50)
    monkeypatch.setattr(
        hessian.largest_eigenvalue, "__kwdefaults__", {**hessian.largest_eigenvalue.__kwdefaults__, "iterations": 2}
    )


@pytest.fixture
def pair(checkpoint, tiny):
    """Two checkpoints of one run: the second with smaller final layers."""
    first = checkpoint("run/weights/best.pt", tiny)
    ckpt = torch.load(first, weights_only=False)
    for layer in final_layers(ckpt["model"]):
        weight_matrix(layer.module).mul_(0.5)
    torch.save(ckpt, first.with_name("best-sos.pt"))
    return first, first.with_name("best-sos.pt")


def test_a_comparison(pair, digits, tmp_path):
    first, second = pair
    folder = tmp_path / "out/one"
    options = {"probes": 3, "images": 2, "batch": 2, "fraction": 0.5, "seed": 1, "device": "cpu"}
    analyze_checkpoints(f"{first},{second}", digits, **options, project=str(tmp_path / "out"), name="one")
    names = {p.name for p in folder.iterdir()}
    assert names == {"analysis.json", "report.html", "trace.png", "collapse.png", "landscape.png"} | {
        f"spectrum-{i}.png" for i in (1, 2)
    }
    text = (folder / "analysis.json").read_text()
    found = json.loads(text)
    assert str(tmp_path) not in text and str(tmp_path) not in (folder / "report.html").read_text()
    assert [m["name"] for m in found["models"]] == ["best", "best-sos"]
    assert found["config"]["seed"] == found["seed"] == 1 and found["config"]["imgsz"] == 64
    assert found["images"] == {"curvature": 2, "features": 12}
    assert set(found["versions"]) == {"device", *versions()}
    (change,) = found["differences"]
    for block in "before", "final", "all":
        for key, e in change["trace"][block].items():
            a, b = (m["trace"][block][key] for m in found["models"])
            assert e["samples"] == 3
            assert e["estimate"] == pytest.approx(
                b["estimate"] - a["estimate"], rel=1e-3, abs=1e-3 * abs(a["estimate"])
            )
    for m in found["models"]:
        assert m["samples"]["before"]["hessian"] and m["loss"] > 0
        assert len(m["collapse"]) == 3 and len(m["spectrum"]) == 6
        assert set(m["largest_eigenvalue"]) == {"before", "final"}
    a, b = (m["weight_norm"] for m in found["models"])
    assert b == pytest.approx(a / 2, rel=1e-3)
    html = (folder / "report.html").read_text()
    assert "http" not in html.replace("http-equiv", "") and "<script" not in html and 'src="data:' in html
    assert html.count("<img") == 5
    for block in "before the final layers", "in the final layers", "all parameters":
        assert re.search(rf"<td>Hessian trace, {block}</td>.* \([+-].*%\), (not resolved|lower|higher)</td>", html)
    assert "per training image, and the squared norm of the final layers&#x27; weights is 0.25 times as large" in html
    if BROWSER is None:
        pytest.skip("no chromium was found to render the report in")
    shot = tmp_path / "shot.png"
    subprocess.run(
        [
            BROWSER,
            *FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={shot}",
            f"file://{folder}/report.html",
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    with Image.open(shot) as image:
        assert image.size == (1200, 5200)
        assert image.convert("L").crop((1180, 0, 1200, 5200)).getextrema() == (255, 255)  # nothing leaves the page
        colours = image.convert("RGB").resize((300, 1300)).getcolors(1 << 20)
        white = sum(n for n, c in colours if min(c) > 250) / (300 * 1300)
        assert len(colours) > 200 and 0.3 < white < 0.97  # text and figures on a white page


def test_a_classifier_without_a_landscape(checkpoint, tmp_path):
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    for split in "train", "val":
        for c in range(2):
            (tmp_path / "set" / split / str(c)).mkdir(parents=True)
            for i in range(4):
                image = rng.integers(0, 120 * (c + 1), (32, 32, 3)).astype(np.uint8)
                assert cv2.imwrite(str(tmp_path / "set" / split / str(c) / f"{i}.png"), image)
    path = checkpoint("best.pt", "yolov8n-cls.yaml", nc=2, data=tmp_path / "set")
    found = analyze_checkpoints(
        path,
        images=4,
        probes=2,
        scope="final",
        landscape=False,
        imgsz=32,
        device="cpu",
        project=str(tmp_path),
        name="c",
    )
    assert list(found["models"][0]["trace"]) == ["final"] and found["differences"] == []
    # Linear in the parameters, and the criterion is convex.
    trace = found["models"][0]["trace"]["final"]
    assert trace["gap"]["estimate"] == pytest.approx(0, abs=1e-6) and trace["hessian"]["estimate"] > 0
    assert found["models"][0]["collapse"][0]["features"] == 8
    assert not (tmp_path / "c/landscape.png").exists() and (tmp_path / "c/report.html").exists()


def test_one_class_leaves_collapse_out(checkpoint, tiny, digits, tmp_path):
    data = yaml.safe_load(digits.read_text())
    root = tmp_path / "one"
    shutil.copytree(digits.parent / "images", root / "images")
    for file in (digits.parent / "labels").rglob("*.txt"):
        target = root / "labels" / file.relative_to(digits.parent / "labels")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(re.sub(r"(?m)^\d+", "0", file.read_text()))
    (root / "data.yaml").write_text(yaml.safe_dump({**data, "path": str(root), "names": {0: "0"}, "nc": 1}))
    path = checkpoint("best.pt", tiny, nc=1, data=root / "data.yaml")
    found = analyze_checkpoints(
        path, images=2, probes=2, fraction=0.2, landscape=False, device="cpu", project=str(tmp_path), name="o"
    )
    assert found["models"][0]["collapse"] == [] and found["models"][0]["spectrum"]
    assert "has one class" in (tmp_path / "o/report.html").read_text()


def test_what_does_not_fit_is_refused_before_the_first_image(pair, checkpoint, tiny, tmp_path, capsys):
    first, _ = pair
    other = checkpoint("other.pt", tiny, nc=3)
    ckpt = torch.load(first, weights_only=False)
    ckpt["model"].names[3] = "third"  # of as many classes, but others
    renamed, single = tmp_path / "renamed.pt", tmp_path / "single.pt"
    torch.save(ckpt, renamed)
    torch.save({**ckpt, "train_args": {**ckpt["train_args"], "single_cls": True}}, single)
    classifier = checkpoint("classifier.pt", "yolov8n-cls.yaml", nc=10)
    for options, says in [
        ({"model": [first, other]}, r"classes of .*other.pt and .* do not match: 3 and 10"),
        ({"model": [first, renamed]}, r"classes of .*renamed.pt and .* do not match: .* class 3 is 'third' and '3'"),
        ({"model": [first, single]}, r"best.pt was trained with single_cls=False and .*single.pt with single_cls=True"),
        ({"model": [first, classifier]}, r"with task=detect and .*classifier.pt with task=classify"),
        ({"model": [first, first]}, r"best.pt is given twice"),
        ({"model": f"{first},"}, r"best.pt,' is invalid: model must be checkpoints with commas"),
        ({"model": first, "scope": "head"}, r"'scope=head' is invalid: scope must be one of all, before, final"),
        ({"model": first, "probes": 1}, r"'probes=1' is invalid"),
        ({"model": first, "images": 0}, r"'images=0' is invalid"),
        ({"model": first, "fraction": 1.5}, r"'fraction=1.5' is invalid"),
        ({"model": first, "stderr": 0}, r"'stderr=0' is invalid"),
        ({"model": first, "landscape": 3}, r"'landscape=3' is invalid"),
        ({"model": first, "weighting": "some"}, r"'weighting=some' is invalid"),
    ]:
        with pytest.raises(ValueError, match=says):
            Comparison(**options, device="cpu", project=str(tmp_path / "no"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        Comparison(tmp_path / "nowhere.pt")
    assert not (tmp_path / "no").exists()


def test_the_command(pair, tmp_path, capsys):
    from yolo_sos import cli

    first, _ = pair
    cli.main(
        [
            *("analyze", f"model={first}", "probes=2", "images=1", "fraction=0.2", "scope=final", "landscape=false"),
            *("device=cpu", f"project={tmp_path}", "name=command"),
        ]
    )
    assert json.loads((tmp_path / "command/analysis.json").read_text())["config"]["scope"] == "final"
    for command, says in [
        (["analyze"], "analyze needs checkpoints"),
        (["analyze", "probe=3"], "Did you mean 'probes'?"),
        (["analyze", "quickly", f"model={first}"], "'quickly' is not a switch of analyze"),
        (["analyze", "runs=a,b", "probes=3"], "probes have no effect with runs="),
        (["analyze", f"runs={tmp_path}"], "there is no results.csv"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            cli.main(command)
        assert stopped.value.code == 2 and says in capsys.readouterr().err


def test_fewer_images_are_tried_when_memory_runs_out(pair, tmp_path, monkeypatch):
    said, real = [], comparison.traces
    monkeypatch.setattr(memory.LOGGER, "warning", said.append)

    def short(subjects, batches, *args, **kwargs):
        if sum(len(b["img"]) for b in batches) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return real(subjects, batches, *args, **kwargs)

    monkeypatch.setattr(comparison, "traces", short)
    options = {"fraction": 0.1, "probes": 2, "landscape": False, "device": "cpu", "project": str(tmp_path)}
    found = analyze_checkpoints(pair[0], images=8, name="m", **options)
    assert found["images"]["curvature"] == 2 and found["config"]["images"] == 8
    assert [s for s in said if "Out of memory" in s] == [
        "Out of memory with 8 images for the curvature: trying 4.",
        "Out of memory with 4 images for the curvature: trying 2.",
    ]
    monkeypatch.setattr(comparison, "traces", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):  # not even one
        analyze_checkpoints(pair[0], images=2, name="n", **options)
    assert not (tmp_path / "n/report.html").exists()


@pytest.mark.parametrize(
    ("gauss_newton", "hessian", "words"),
    [
        ((-300.0, True), (-5.0, False), "curves less than that of a"),
        ((40.0, True), (90.0, True), "curves more than that of a"),
        ((-300.0, True), (90.0, True), "curves less by one measure and more by the other than that of a"),
        ((-3.0, False), (9.0, False), "curves neither measurably more nor less than that of a"),
    ],
)
def test_the_verdict(gauss_newton, hessian, words):
    def trace(value):
        return {"estimate": value, "stderr": 10.0}

    traces = {"all": {"gauss_newton": trace(1000.0), "hessian": trace(500.0)}}
    pairs = {"gauss_newton": gauss_newton, "hessian": hessian}
    change = {key: {**trace(value), "resolved": resolved} for key, (value, resolved) in pairs.items()}
    models = [{"name": n, "trace": traces, "loss": 2.0, "weight_norm": w} for n, w in (("a", 4.0), ("b", 2.0))]
    (sentence,) = verdict({"models": models, "differences": [{"trace": {"all": change}}]})
    assert sentence.startswith(f"The loss of b {words}") and sentence.endswith("weights is 0.25 times as large.")
    assert f"(Gauss-Newton trace {gauss_newton[0] / 1000:+.1%} ± 1.0% and Hessian trace" in sentence


def test_the_verdict_on_one_model():
    settings = [{"setting": "sos_rank", "value": 0.5, "squared_norm_ratio": r, "deviation": r / 10} for r in (0.2, 0.8)]
    spectrum = [{"norm": n, "settings": [s]} for n, s in zip((1.0, 3.0), settings, strict=True)]
    (sentence,) = verdict({"models": [{"name": "a", "spectrum": spectrum}]})
    assert "weights by 0.74, and change their outputs by up to 8.0%" in sentence  # (0.2 + 9 · 0.8) / 10


def write_run(folder, shift, epochs=6, every=2):
    folder.mkdir(parents=True)
    with open(folder / "results.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["epoch", "time", *columns()])
        writer.writeheader()
        for epoch in range(1, epochs + 1):
            due = epoch % every == 0
            measured = dict.fromkeys((k.removeprefix("sos/") for k in columns()), shift / epoch) if due else {}
            writer.writerow({"epoch": epoch, "time": 1, **columns(measured)})
    (folder / "sos.yaml").write_text(yaml.safe_dump({"sos": shift > 1}))


def test_curves_of_two_runs(tmp_path):
    write_run(tmp_path / "plain", 1.0)
    write_run(tmp_path / "sos", 2.0)
    Curves(f"{tmp_path / 'plain'},{tmp_path / 'sos'}", project=str(tmp_path), name="curves").run()
    found = json.loads((tmp_path / "curves/analysis.json").read_text())
    assert [r["name"] for r in found["runs"]] == ["plain", "sos"]
    assert [p["epoch"] for p in found["runs"][1]["curve"]] == [2, 4, 6]
    assert found["runs"][1]["curve"][0]["trace"] == 1.0 and found["runs"][1]["settings"] == {"sos": True}
    html = (tmp_path / "curves/report.html").read_text()
    assert "sos: from epoch 2 to 6 the Hessian trace went from 1.000 ± 1.0" in html and html.count("<img") == 1
    write_run(tmp_path / "once", 1.0, epochs=3)  # one measurement is no curve
    Curves(tmp_path / "once", project=str(tmp_path), name="once-report").run()
    assert "<img" not in (tmp_path / "once-report/report.html").read_text()
    assert not (tmp_path / "once-report/curves.png").exists()
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock/results.csv").write_text("epoch,time\n1,2\n")
    with pytest.raises(ValueError, match=r"stock.results\.csv: the run was not analyzed while it trained"):
        Curves([tmp_path / "stock"])
    write_run(tmp_path / "short", 1.0, epochs=1)
    with pytest.raises(ValueError, match=r"short has no measurement"):
        Curves(tmp_path / "short")
    with pytest.raises(ValueError, match=r"plain is given twice"):
        Curves([tmp_path / "plain", tmp_path / "plain"])
    (tmp_path / "broken").mkdir()
    lines = (tmp_path / "plain/results.csv").read_text().splitlines()
    (tmp_path / "broken/results.csv").write_text("\n".join([*lines, "7,1,oops"]))
    with pytest.raises(ValueError, match=r"broken.results\.csv: a line holds something else than numbers"):
        Curves(tmp_path / "broken")


def test_numbers_for_tables_and_json():
    assert number({"estimate": 11749.3, "stderr": 761.4}) == "11749 ± 761"
    assert number({"estimate": None, "stderr": None}) == number(None) == number(float("nan")) == "–"
    assert digits(0.0123456, 3) == "0.0123" and digits(-498.2, 4, "+") == "-498.2" and digits(0.0, 4) == "0"
    assert digits(1e-9, 2) == "1e-09" and digits(99.96, 3) == "100"


def test_an_axis_over_orders_of_magnitude_has_plain_numbers(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(curves, "save", lambda figure, path: drawn.append(figure))
    first, last = ({**dict.fromkeys(curves.COLUMNS, 1.0), "epoch": e, "nc1": nc1} for e, nc1 in ((1, 299.0), (2, 20.3)))
    curves.draw({"plain": [first, last]}, tmp_path / "curves.png")
    (axis,) = (ax.yaxis for ax in drawn[0].axes if ax.get_yscale() == "log")
    drawn[0].canvas.draw()
    told = {t.get_text() for t in axis.get_ticklabels(which="both")}
    assert {"30", "100", "300"} <= told and not [text for text in told if "10^" in text or "e" in text]
