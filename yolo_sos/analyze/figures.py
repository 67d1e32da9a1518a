# yolo-sos, AGPL-3.0
"""The figures of a comparison, each with the sentences that say what it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yolo_sos.analyze.collapse import MEASURES
from yolo_sos.analyze.estimate import RESOLVED
from yolo_sos.analyze.report import Section, digits, number
from yolo_sos.files import atomic_path

DPI = 110
FLOOR = 1e-9  # least share that is drawn: less is rounding
WHERE = {"before": "before the final layers", "final": "in the final layers", "all": "all parameters"}
WHAT = {"hessian": "Hessian", "gauss_newton": "Gauss-Newton", "gap": "gap"}
TITLES = {
    "nc1": "NC1  within / between",
    "nc2_norms": "NC2  spread of lengths",
    "nc2_angles": "NC2  distance from a simplex",
    "nc3": "NC3  distance of V from means",
    "nc4": "NC4  decisions that differ",
}


def subplots(lines: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure of panels of a size in inches, and their axes ``(lines, columns)``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False)


def save(figure: Any, path: Path) -> Path:
    """Write a figure in 64 colours, which makes a report that holds it a third of the size."""
    from PIL import Image

    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI)
        with Image.open(temporary) as image:
            small = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
        small.save(temporary, optimize=True)
    return path


def _bars(ax: Any, models: Sequence[dict[str, Any]], estimates: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Draw groups of bars, each of one bar per model, with standard errors; ``estimates`` are by model and group."""
    for i, (model, of) in enumerate(zip(models, estimates, strict=True)):
        xs = [group + (i - (len(models) - 1) / 2) * 0.8 / len(models) for group in range(len(of))]
        heights, errors = ([e[key] for e in of] for key in ("estimate", "stderr"))
        ax.bar(xs, heights, 0.75 / len(models), color=f"C{i}", label=model["name"])
        ax.errorbar(xs, heights, errors, fmt="none", color="black", capsize=3, linewidth=1)


def _header(result: dict[str, Any]) -> list[str]:
    return ["", *(model["name"] for model in result["models"])]


# Curvature ------------------------------------------------------------------------------------------------------------
def trace_figure(result: dict[str, Any], folder: Path) -> Section:
    """Draw the traces of all models by block of parameters, and their paired differences from the first model."""
    models, changes = result["models"], result["differences"]
    blocks = list(models[0]["trace"])
    panels = len(blocks) + bool(changes)
    fig, (axes,) = subplots(1, panels, 4.3, 4.2)
    for ax, block in zip(axes, blocks, strict=False):
        _bars(ax, models, [[model["trace"][block][key] for key in WHAT] for model in models])
        ax.set_xticks(range(len(WHAT)), WHAT.values())
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set_title(f"trace, {WHERE[block]}", fontsize=10)
    axes[0].legend(fontsize=8)
    if changes:
        _draw_differences(axes[-1], models[0], changes, blocks)
    path = save(fig, folder / "trace.png")
    text = [
        "The trace of the Hessian of the loss per image, and of its Gauss-Newton part, with standard errors over "
        f"{models[0]['trace'][blocks[0]]['hessian']['samples']} probes on {result['images']['curvature']} training "
        "images without augmentation. The gap between the two is the part that comes from the curvature of the network "
        "itself. All models were measured with the same probes on the same images, so their differences, on the right, "
        "have smaller standard errors than the traces. These are the errors of the probes alone: two trainings also "
        "differ by their seeds."
    ]
    text += [sentence(change, block, key) for change in changes for block in blocks for key in WHAT if key != "gap"]
    hessians = [m["trace"][b]["hessian"] for m in models for b in blocks]
    if any(e["estimate"] + RESOLVED * e["stderr"] < 0 for e in hessians):
        text.append(
            "A Hessian trace below zero says that the model is not at a minimum of this loss: directions that curve "
            "down outweigh those that curve up. There, lower does not mean flatter; compare the Gauss-Newton traces."
        )
    if any(m["trace"][b]["gauss_newton"]["estimate"] < 0 for m in models for b in blocks):
        text.append("A Gauss-Newton trace below zero comes from the overlap of boxes, which is not convex.")
    rows = [["loss per image", *(number(m["loss"]) for m in models)]]
    for block in blocks:
        rows += [[f"{WHAT[k]} trace, {WHERE[block]}", *(number(m["trace"][block][k]) for m in models)] for k in WHAT]
        if block in models[0]["largest_eigenvalue"]:
            title = f"largest eigenvalue, {WHERE[block]} (± residual)"
            rows.append([title, *(number(m["largest_eigenvalue"][block]) for m in models)])
            title = f"norm of all parameters {WHERE[block]}"
            rows.append([title, *(number(m["parameter_norm"][block]) for m in models)])
    rows.append(["‖V‖, weights of the final layers without biases", *(number(m["weight_norm"]) for m in models)])
    return Section("Curvature", text, path, _header(result), rows)


def _draw_differences(ax: Any, first: dict[str, Any], changes: Sequence[dict[str, Any]], blocks: Sequence[str]) -> None:
    ticks: list[str] = []
    for i, change in enumerate(changes, start=1):
        for block in blocks:
            for key in ("hessian", "gauss_newton"):
                e = change["trace"][block][key]
                percent = 100 / (abs(first["trace"][block][key]["estimate"]) or 1.0)
                style = {"fmt": "o" if e["resolved"] else "x", "color": f"C{i}", "capsize": 3}
                ax.errorbar(percent * e["estimate"], -len(ticks), xerr=percent * e["stderr"], **style)
                ticks.append(f"{WHAT[key]}, {block}")
    ax.axvline(0, color="black", linewidth=0.6)
    ax.set_yticks([-i for i in range(len(ticks))], ticks, fontsize=8)
    ax.set_title(f"change against {first['name']}, %\n(●: at least 3 standard errors from 0; ×: not)", fontsize=10)


def sentence(change: dict[str, Any], block: str, key: str) -> str:
    """Return in words by how much a trace differs, or that no difference was resolved."""
    e = change["trace"][block][key]
    subject = f"{WHAT[key]} trace, {WHERE[block]}, {change['model']} against {change['against']}: "
    if e["estimate"] == 0 == e["stderr"]:
        return subject + "the same for every probe."
    verdict = ("lower" if e["estimate"] < 0 else "higher") if e["resolved"] else "not resolved"
    figure = f"{digits(e['estimate'], 3, '+')} ± {digits(e['stderr'], 2)} ({e['relative']:+.1%})"
    why = "" if e["resolved"] else ", less than three standard errors"
    return f"{subject}{figure}, {verdict}{why}; without pairing it would be ± {digits(e['unpaired'], 2)}."


# Neural collapse ------------------------------------------------------------------------------------------------------
def collapse_figure(result: dict[str, Any], folder: Path) -> Section:
    """Draw NC1 to NC4 of all models, by layer."""
    models = result["models"]
    layers = [_place(c) for c in models[0]["collapse"]]
    if not layers:
        return Section(
            "Neural collapse",
            ["The data set has one class: there are no class means to compare, and NC1 to NC4 are not defined."],
        )
    fig, (axes,) = subplots(1, len(MEASURES), 3.1, 3.4)
    for ax, name in zip(axes, MEASURES, strict=True):
        _bars(ax, models, [[c[name] for c in model["collapse"]] for model in models])
        ax.set_xticks(range(len(layers)), layers, fontsize=8)
        ax.set_title(TITLES[name], fontsize=9)
    axes[0].legend(fontsize=8)
    path = save(fig, folder / "collapse.png")
    detector = result["config"]["task"] != "classify"
    whose = (
        "anchor points that the training's own assigner gives to an object, by detection level (1 is the finest)"
        if detector
        else "images, before the final layer"
    )
    text = [
        f"Neural collapse of the features of {whose}, over {result['images']['features']} training images. Each "
        "measure is 0 in the collapsed state: features at their class mean (NC1), means of one length and at the "
        "angles of a simplex (NC2), classifier rows along the means (NC3), decisions as by the nearest mean (NC4). "
        "Standard errors: jackknife over blocks of images; binomial for NC4."
    ]
    if detector:
        text.append(
            "A detector's background is no class, and its classes are scored one by one: NC2 and NC3 need not reach 0."
        )
    if any(c["classes"] == 2 for m in models for c in m["collapse"]):
        text.append(
            "Where features of two classes were found, NC2 is 0 by definition: two means lie opposite each other."
        )
    rows = []
    for i, place in enumerate(layers):
        of = [model["collapse"][i] for model in models]
        rows += [[f"{TITLES[name]}, {place}", *(number(c[name]) for c in of)] for name in MEASURES]
        rows.append([f"features and classes, {place}", *(f"{c['features']}, {c['classes']}" for c in of)])
    return Section("Neural collapse", text, path, _header(result), rows)


def _place(collapse: dict[str, Any]) -> str:
    branch = " 1:1" if "one2one" in collapse["layer"] else ""
    return f"level {collapse['level'] + 1}{branch}"


# Spectrum -------------------------------------------------------------------------------------------------------------
def spectrum_figure(model: dict[str, Any], folder: Path, index: int = 0) -> Section:
    """Draw the spectrum of each final layer's inputs against the weights, with what each setting would do."""
    layers = model["spectrum"]
    columns = min(3, len(layers))
    lines = math.ceil(len(layers) / columns)
    fig, axes = subplots(lines, columns, 4.9, 3.9)
    for ax, layer in zip(axes.flat, layers, strict=False):
        _draw_spectrum(ax, layer)
    axes.flat[0].plot([], [], "D", color="C2", markersize=4, label="‖V‖² removed by sos_budget=ε")
    fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    for ax in list(axes.flat)[len(layers) :]:
        ax.set_axis_off()
    path = save(fig, folder / f"spectrum-{index + 1}.png")
    text = [
        "What a shift can remove. Blue: the share of the inputs' energy beyond a rank. Red: the share of ‖V‖² there. "
        "Where red lies far above blue, weights stand in directions that the inputs hardly use. Dotted lines: what "
        "sos_rank (method principal) would keep, ‖V*‖²/‖V‖² and the relative change of the layer's outputs; green: "
        "what sos_budget would remove, at its effective rank.",
        _summary(layers),
    ]
    rows = []
    for layer in layers:
        energy = next(s for s in layer["weighted"]["levels"] if s["energy"] == 0.999)
        cells = [
            f"{layer['kind']} {layer['level'] + 1}",
            f"{layer['d']}",
            f"{layer['weighted']['effective_rank']:.1f}",
            f"{layer['unweighted']['effective_rank']:.1f}",
            f"{energy['rank']:g}",
            f"{energy['outside']:.1%}",
        ]
        rows.append(cells + [f"×{s['squared_norm_ratio']:.2f}, {s['deviation']:.2%}" for s in layer["settings"]])
    header = ["layer", "d", "effective rank", "unweighted", "rank for 99.9 %", "‖V‖² outside it"]
    header += [f"{s['setting'].removeprefix('sos_')} {s['value']:g}" for s in layers[0]["settings"]]
    return Section(f"Spectrum of the final layers' inputs: {model['name']}", text, path, header, rows)


def _draw_spectrum(ax: Any, layer: dict[str, Any]) -> None:
    ranks = range(1, layer["d"] + 1)
    for key, style in (("weighted", "-"), ("unweighted", "--")):
        energy, left = 1.0, []
        for sigma in layer[key]["singular_values"]:
            energy -= sigma**2
            left.append(max(energy, FLOOR))
        ax.plot(ranks, left, style, color="C0", linewidth=1.3, label=f"input energy left out ({key})")
    ax.plot(ranks, [max(x, FLOOR) for x in layer["weighted"]["outside"]], color="C3", label="‖V‖² left out")
    for j, s in enumerate(layer["settings"]):
        if s["setting"] == "sos_rank":
            ax.axvline(s["rank"], color="0.6", linewidth=0.7, linestyle=":")
            note = f"rank {s['value']:g}\n‖V‖² ×{s['squared_norm_ratio']:.2f}\noutputs {s['deviation']:.1%}"
            ax.annotate(note, (s["rank"], (1e-7, 2e-6)[j % 2]), fontsize=6, ha="left", color="0.25")
        else:
            at = (s["rank"], max(1 - s["squared_norm_ratio"], FLOOR))
            ax.plot(*at, "D", color="C2", markersize=4)
            ax.annotate(f"ε={s['value']:g}", at, (3, 3), textcoords="offset points", fontsize=6, color="C2")
    ax.set_yscale("log")
    ax.set_ylim(3e-8, 3)
    ax.set_title(f"{layer['kind']} {layer['level'] + 1}, d={layer['d']}, ‖V‖={layer['norm']:.2f}", fontsize=9)
    ax.set_xlabel("rank kept")


def _summary(layers: Sequence[dict[str, Any]]) -> str:
    """Return what the settings would do to all layers together."""
    norms = [layer["norm"] ** 2 for layer in layers]
    parts = []
    for i, s in enumerate(layers[0]["settings"]):
        of = [layer["settings"][i] for layer in layers]
        ratio = sum(n * o["squared_norm_ratio"] for n, o in zip(norms, of, strict=True)) / (sum(norms) or 1.0)
        worst = max(o["deviation"] for o in of)
        parts.append(f"{s['setting']}={s['value']:g} removes {1 - ratio:.0%} (outputs change by up to {worst:.1%})")
    return "Of ‖V‖² over all layers, " + "; ".join(parts) + "."


# Landscape ------------------------------------------------------------------------------------------------------------
def landscape_figure(result: dict[str, Any], folder: Path) -> Section:
    """Draw the slices of the loss around each model, all with the same range of colours, and the way to its shift."""
    import numpy as np

    models = result["models"]
    fig, (axes,) = subplots(1, 2 + len(models), 4, 3.8)
    planes = [np.log10(np.array(m["landscape"]["plane"]["loss"])) for m in models]
    finite = np.concatenate([p[np.isfinite(p)] for p in planes])
    levels = np.linspace(finite.min(), finite.max() + 1e-9, 13)
    text = [
        "Filter-normalised slices of the loss: the same random directions, scaled to each model's own filters, all "
        f"with one range of colours, over {result['images']['curvature']} training images. A wider valley is a flatter "
        "minimum in these two directions out of many: an illustration, not a measurement."
    ]
    for i, (model, plane) in enumerate(zip(models, planes, strict=True)):
        line, way = model["landscape"]["line"], model["interpolation"]
        axes[0].plot(line["x"], line["loss"], color=f"C{i}", label=model["name"])
        axes[1].plot(way["t"], way["loss"], "o-", color=f"C{i}", markersize=3, label=model["name"])
        ax = axes[2 + i]
        contours = ax.contourf(*(model["landscape"]["plane"][k] for k in "xy"), plane, levels=levels, cmap="viridis")
        ax.plot(0, 0, "+", color="white", markersize=10)
        ax.set_title(f"log10 loss, {model['name']}", fontsize=10)
        fig.colorbar(contours, ax=ax, format="%.2f")
        start, end = (way["loss"][way["t"].index(t)] for t in (0.0, 1.0))
        ratio = way["squared_norm_ratio"][way["t"].index(1.0)]
        best = min(zip(way["loss"], way["t"], strict=True))[1]
        text.append(
            f"{model['name']}: a full shift (principal, half of d) takes ‖V‖² to ×{ratio:.2f} and the loss from "
            f"{start:.4g} to {end:.4g} ({end / start - 1:+.2%}); along the way it is least at t={best:g}."
        )
    axes[0].set_title("loss along a random direction", fontsize=10)
    axes[0].set_xlabel("step, relative to each filter's norm")
    for t in (0, 1):
        axes[1].axvline(t, color="0.6", linewidth=0.7, linestyle=":")
    axes[1].set_title("loss from the model (t=0) to its shift (t=1)", fontsize=10)
    axes[1].set_xlabel("t of V + t(V* − V)")
    axes[0].legend(fontsize=8)
    return Section("Loss landscape", text, save(fig, folder / "landscape.png"))
