# yolo-sos, AGPL-3.0
"""mAP50-95 on val by epoch, with and without fit_head: gathers the runs of the experiments fit/*, and draws them.

    yolo-sos experiment fit/unknown seeds=0,1,2
    python studies/fit/curves.py runs/experiments

writes curves.json, from which curves.png and the table of fit.md are made. Runs in curves.json that are not among those
given stay.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from ultralytics.utils import YAML

from yolo_sos.experiment.record import read_rows
from yolo_sos.files import as_json, read_json, write_text
from yolo_sos.markdown import markdown_table

HERE = Path(__file__).parent
METRIC = "metrics/mAP50-95(B)"
TITLES = {
    "fit/unknown-200": "VOC07, 198 images, unknown names",
    "fit/unknown": "VOC07, 901 images, unknown names",
    "fit/known": "VOC07, 901 images, 14 of 20 names known",
    "fit/bccd": "blood cells, 205 images",
}
ARMS = {
    "baseline": ("stock", "tab:gray"),
    "fit": ("fit_head=true", "tab:blue"),
    "rate": ("twice the rate", "tab:orange"),
}


def gather(project: Path) -> dict[str, list[float]]:
    """Return run → mAP50-95 by epoch of those that are finished; that of a fitted run begins with the fit."""
    curves = {}
    for path in sorted(project.glob("fit/*/*/results.csv")):
        values = [float(row[METRIC]) for row in read_rows(path)]
        if len(values) < YAML.load(path.with_name("args.yaml"))["epochs"]:
            continue  # it is not finished
        fit = path.with_name("fit.json")
        start = [(read_json(fit).get("metrics") or {}).get(METRIC) if fit.exists() else None]
        curves[path.parent.relative_to(project).as_posix()] = start + values
    return curves


def draw(curves: dict[str, list[float]]) -> None:
    """Draw a panel for each experiment, a line for each run."""
    panels = [name for name in TITLES if any(run.startswith(f"{name}/") for run in curves)]
    fig, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4), layout="constrained", sharey=True)
    for ax, name in zip(axes, panels, strict=True):
        for run, values in curves.items():
            if run.startswith(f"{name}/"):
                label, color = ARMS[run.split("/")[-1].rpartition("-")[0]]
                first = 0 if values[0] is not None else 1
                ax.plot(range(first, len(values)), values[first:], ".-", color=color, label=label)
        ax.set(title=TITLES[name], xlabel="epochs trained", xlim=(-0.2, None))
        ax.title.set_fontsize(10)
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("mAP50-95 on val")
    axes[0].set_ylim(0, 1.05 * max(v for values in curves.values() for v in values if v is not None))
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    axes[-1].legend(handles.values(), handles.keys(), loc="lower right")
    fig.savefig(HERE / "curves.png", dpi=150)


def table(curves: dict[str, list[float]]) -> str:
    """Return mAP50-95 of every run, by epoch."""
    most = max(map(len, curves.values()))
    rows = [
        [run.removeprefix("fit/"), *(f"{v:.3f}" if v is not None else "" for v in values), *[""] * (most - len(values))]
        for run, values in curves.items()
    ]
    return markdown_table([["run", "fit", *map(str, range(1, most))], *rows], texts=1)


def main() -> None:
    """Gather, write and draw."""
    path = HERE / "curves.json"
    curves = read_json(path) if path.exists() else {}
    for project in sys.argv[1:]:
        curves |= gather(Path(project))
    write_text(path, as_json(dict(sorted(curves.items()))))
    draw(curves)
    print(table(dict(sorted(curves.items()))))


if __name__ == "__main__":
    main()
