# yolo-sos, AGPL-3.0
"""The figures of a comparison, each with the sentences and the table that belong to it."""

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
WIDTH = 10.6  # inches of a figure, as wide as the page at this resolution, so that its text is not shrunk
WHERE = {"before": "before the final layers", "final": "in the final layers", "all": "all parameters"}
WHAT = {"hessian": "Hessian", "gauss_newton": "Gauss-Newton", "gap": "gap"}
TITLES = {
    "nc1": "NC1: within / between classes",
    "nc2_norms": "NC2: spread of lengths",
    "nc2_angles": "NC2: distance from a simplex",
    "nc3": "NC3: distance of V from means",
    "nc4": "NC4: decisions that differ",
}


def panels(count: int, columns: int, height: float) -> tuple[Any, list[Any]]:
    """Return a figure as wide as the page, and the axes of its panels, each of a height in inches."""
    from matplotlib.figure import Figure

    lines = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, list(axes[:count])


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
        ax.set_xlim(-0.5, len(of) - 0.5)


# Curvature ------------------------------------------------------------------------------------------------------------
def trace_figure(result: dict[str, Any], folder: Path) -> Section:
    """Draw the traces of all models by block of parameters, and their paired differences from the first model."""
    models, changes = result["models"], result["differences"]
    first = models[0]
    blocks = list(first["trace"])
    fig, axes = panels(len(blocks) + bool(changes), 2, 3.2)
    for ax, block in zip(axes, blocks, strict=False):
        _bars(ax, models, [[model["trace"][block][key] for key in WHAT] for model in models])
        ax.set_xticks(range(len(WHAT)), WHAT.values())
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set_title(f"trace, {WHERE[block]}")
    axes[0].legend()
    if changes:
        _draw_differences(axes[-1], first, changes, blocks)
    text = [
        "The trace of the Hessian of the loss per image, and of its Gauss-Newton part, with standard errors over "
        f"{first['trace'][blocks[0]]['hessian']['samples']} probes on {result['images']['curvature']} training images "
        "without augmentation. The gap between the two comes from the curvature of the network itself. All models were "
        "measured with the same probes on the same images, so their differences have smaller standard errors than the "
        "traces. These are the errors of the probes alone: two trainings also differ by their seeds."
    ]
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
        for key in WHAT:
            cells = [number(m["trace"][block][key]) for m in models]
            cells += [_difference(change["trace"][block][key]) for change in changes]
            rows.append([f"{WHAT[key]} trace, {WHERE[block]}", *cells])
        if block in first["largest_eigenvalue"]:
            cells = [number(m["largest_eigenvalue"][block]) for m in models]
            rows.append([f"largest eigenvalue, {WHERE[block]} (± residual)", *cells])
            biases = ", biases included" if block == "final" else ""
            cells = [number(m["parameter_norm"][block]) for m in models]
            rows.append([f"norm of all parameters {WHERE[block]}{biases}", *cells])
    rows.append(["norm ‖V‖ of the final layers' weights, without biases", *(number(m["weight_norm"]) for m in models)])
    header = ["", *(m["name"] for m in models), *(f"{c['model']} less {c['against']}" for c in changes)]
    return Section("Curvature", text, save(fig, folder / "trace.png"), header, rows)


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
    ax.set_yticks([-i for i in range(len(ticks))], ticks)
    ax.set_title(f"change against {first['name']}, %\n(●: at least 3 standard errors from 0; ×: not)", fontsize=10)


def _difference(e: dict[str, Any]) -> str:
    """Return a paired difference in words."""
    if e["estimate"] == 0 == e["stderr"]:
        return "the same for every probe"
    verdict = ("lower" if e["estimate"] < 0 else "higher") if e["resolved"] else "not resolved"
    return f"{digits(e['estimate'], 3, '+')} ± {digits(e['stderr'], 2)} ({e['relative']:+.1%}), {verdict}"


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
    fig, axes = panels(len(MEASURES), 3, 3.0)
    for ax, name in zip(axes, MEASURES, strict=True):
        _bars(ax, models, [[c[name] for c in model["collapse"]] for model in models])
        ax.set_xticks(range(len(layers)), layers)
        ax.set_title(TITLES[name])
    axes[0].legend()
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
        "Standard errors: jackknife over blocks of images; binomial for NC4. A level at which fewer than two classes "
        "have two features has none."
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
        if any(c["classes"] > 1 for c in of):
            rows += [[f"{TITLES[name]}, {place}", *(number(c[name]) for c in of)] for name in MEASURES]
        rows.append([f"features and classes, {place}", *(f"{c['features']}, {c['classes']}" for c in of)])
    header = ["", *(model["name"] for model in models)]
    return Section("Neural collapse", text, save(fig, folder / "collapse.png"), header, rows)


def _place(collapse: dict[str, Any]) -> str:
    branch = " 1:1" if "one2one" in collapse["layer"] else ""
    return f"level {collapse['level'] + 1}{branch}"


# Spectrum -------------------------------------------------------------------------------------------------------------
def spectrum_figure(model: dict[str, Any], folder: Path, index: int = 0) -> Section:
    """Draw the spectrum of each final layer's inputs against the weights, with what each setting would do."""
    layers = model["spectrum"]
    fig, axes = panels(len(layers), min(3, len(layers)), 2.9)
    for ax, layer in zip(axes, layers, strict=True):
        _draw_spectrum(ax, layer)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    settings = layers[0]["settings"]
    ranks, budgets = (
        ", ".join(f"{s['value']:g}" for s in settings if s["setting"] == setting)
        for setting in ("sos_rank", "sos_budget")
    )
    text = [
        "What a shift can remove. Blue: the share of the inputs' energy beyond a rank. Red: the share of the squared "
        "norm ‖V‖² there. Where red lies far above blue, weights stand in directions that the inputs hardly use. "
        f"Dotted lines: the ranks of sos_rank={ranks}. Green: what sos_budget={budgets} would remove, at its effective "
        "rank, from right to left. The table has for each setting the factor of ‖V‖² and the relative change of the "
        "outputs."
    ]
    energy = [next(s for s in of["weighted"]["levels"] if s["energy"] == 0.999) for of in layers]
    rows = [
        ["length d of an input", *(f"{layer['d']}" for layer in layers)],
        ["effective rank of the inputs", *(f"{layer['weighted']['effective_rank']:.1f}" for layer in layers)],
        ["the same, all rows alike", *(f"{layer['unweighted']['effective_rank']:.1f}" for layer in layers)],
        ["rank for 99.9 % of the energy", *(f"{e['rank']:g}" for e in energy)],
        ["‖V‖² outside of it", *(f"{e['outside']:.1%}" for e in energy)],
    ]
    for i, s in enumerate(settings):
        of = [layer["settings"][i] for layer in layers]
        cells = [f"×{o['squared_norm_ratio']:.2f}, {o['deviation']:.1%}" for o in of]
        ratio, worst = overall(layers, i)
        rows.append([f"{s['setting']}={s['value']:g}", *cells, f"×{ratio:.2f}, ≤ {worst:.1%}"])
    header = ["", *(f"{layer['kind']} {layer['level'] + 1}" for layer in layers), "all layers"]
    path = save(fig, folder / f"spectrum-{index + 1}.png")
    return Section(f"Spectrum of the final layers' inputs: {model['name']}", text, path, header, rows)


def _draw_spectrum(ax: Any, layer: dict[str, Any]) -> None:
    ranks = range(1, layer["d"] + 1)
    for key, style in (("weighted", "-"), ("unweighted", "--")):
        energy, left = 1.0, []
        for sigma in layer[key]["singular_values"]:
            energy -= sigma**2
            left.append(energy)
        ax.plot(ranks, left, style, color="C0", linewidth=1.3, label=f"input energy left out ({key})")
    ax.plot(ranks, layer["weighted"]["outside"], color="C3", label="squared norm ‖V‖² left out")
    for s in layer["settings"]:
        if s["setting"] == "sos_rank":
            ax.axvline(s["rank"], color="0.6", linewidth=0.8, linestyle=":")
    budgets = [s for s in layer["settings"] if s["setting"] == "sos_budget"]
    removed = [1 - s["squared_norm_ratio"] for s in budgets]
    ax.plot([s["rank"] for s in budgets], removed, "D", color="C2", markersize=4, label="‖V‖² removed by sos_budget")
    ax.set_yscale("log")
    ax.set_ylim(1e-4, 1.5)  # what is zero lies below
    ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    ax.set_title(f"{layer['kind']} {layer['level'] + 1}, norm ‖V‖ = {layer['norm']:.2f}", fontsize=10)
    ax.set_xlabel("rank kept")


def overall(layers: Sequence[dict[str, Any]], index: int) -> tuple[float, float]:
    """Return what a setting does to all layers: the factor of their squared norm, the largest change of outputs."""
    norms, of = [layer["norm"] ** 2 for layer in layers], [layer["settings"][index] for layer in layers]
    kept = sum(n * o["squared_norm_ratio"] for n, o in zip(norms, of, strict=True))
    return kept / (sum(norms) or 1.0), max(o["deviation"] for o in of)


# Landscape ------------------------------------------------------------------------------------------------------------
def landscape_figure(result: dict[str, Any], folder: Path) -> Section:
    """Draw the slices of the loss around each model, all with the same range of colours, and the way to its shift."""
    import numpy as np
    from matplotlib.colors import LogNorm

    models = result["models"]
    fig, axes = panels(2 + len(models), 2, 3.4)
    planes = [np.ma.masked_invalid(m["landscape"]["plane"]["loss"]) for m in models]
    levels = np.geomspace(min(p.min() for p in planes), max(p.max() for p in planes) * (1 + 1e-9), 13)
    text = [
        "Filter-normalised slices of the loss: the same random directions, scaled to each model's own filters, all "
        f"with one range of colours, over {result['images']['curvature']} training images. A wider valley is a flatter "
        "minimum in these two directions out of many: an illustration, not a measurement."
    ]
    for i, (model, plane) in enumerate(zip(models, planes, strict=True)):
        line, way = model["landscape"]["line"], model["interpolation"]
        axes[0].plot(line["x"], line["loss"], color=f"C{i}", label=model["name"])
        axes[1].plot(way["t"], way["loss"], "o-", color=f"C{i}", markersize=3, label=model["name"])
        ax, sides = axes[2 + i], model["landscape"]["plane"]
        contours = ax.contourf(sides["x"], sides["y"], plane, levels=levels, norm=LogNorm(), cmap="viridis")
        ax.plot(0, 0, "+", color="white", markersize=10)
        ax.set_title(f"loss around {model['name']}")
        fig.colorbar(contours, ax=ax, format="%.3g", ticks=levels[::3])
        start, end = (way["loss"][way["t"].index(t)] for t in (0.0, 1.0))
        ratio = way["squared_norm_ratio"][way["t"].index(1.0)]
        best = min(zip(way["loss"], way["t"], strict=True))[1]
        text.append(
            f"{model['name']}: a full shift (principal, half of d) takes the squared norm ‖V‖² to ×{ratio:.2f} and the "
            f"loss from {start:.4g} to {end:.4g} ({end / start - 1:+.2%}); along the way it is least at t={best:g}."
        )
    axes[0].set_title("loss along a random direction")
    axes[0].set_xlabel("step, relative to each filter's norm")
    for t in (0, 1):
        axes[1].axvline(t, color="0.6", linewidth=0.7, linestyle=":")
    axes[1].set_title("loss from the model (t=0) to its shift (t=1)")
    axes[1].set_xlabel("t of V + t(V* − V)")
    axes[1].ticklabel_format(useOffset=False)
    for ax in axes:
        ax.locator_params(axis="x", nbins=6)
    axes[0].legend()
    return Section("Loss landscape", text, save(fig, folder / "landscape.png"))
