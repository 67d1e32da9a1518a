# yolo-sos, AGPL-3.0
"""``yolo-sos analyze``: compare checkpoints on the same images, or draw what runs have measured while training."""

from __future__ import annotations

from typing import Any

from yolo_sos.arguments import Argument
from yolo_sos.cli.grammar import Mode, refusing

OF_CHECKPOINTS = (
    Argument("model", None, "str | list", "checkpoints, with commas between them"),
    Argument("data", None, "str", "data set; that of the first checkpoint's training if not given"),
    Argument("scope", "all", "str", "parameters of the curvature: all, before (the final layers) or final"),
    Argument("probes", 24, "int", "most random vectors of a trace's estimate"),
    Argument("stderr", None, "float", "relative standard error at which an estimate stops earlier"),
    Argument("images", 8, "int", "images of curvature and landscape"),
    Argument("landscape", True, "bool", "slices of the loss around and between the models"),
    Argument("weighting", "balanced", "str", "of the rows, in spectra: balanced, confidence or uniform"),
    Argument("fraction", None, "float", "share of the images whose features are read; at most 256 if not given"),
    Argument("imgsz", None, "int", "image size in pixels; that of the training if not given"),
    Argument("batch", None, "int", "images at a time; that of the training if not given"),
    Argument("device", None, "int | str", "such as cpu or 0; what Ultralytics picks if not given"),
    Argument("seed", 0, "int", "chooses images and random vectors"),
)
OF_RUNS = (Argument("runs", None, "str | list", "folders of runs with sos_analyze=…, with commas between them"),)
OF_BOTH = (
    Argument("project", None, "str", "folder to write to, as in Ultralytics"),
    Argument("name", None, "str", "folder in it"),
    Argument("exist_ok", False, "bool", "write into a folder that exists"),
)


def run(arguments: dict[str, Any]) -> None:
    """Write report.html, its figures and analysis.json."""
    with refusing():
        from yolo_sos.analyze import Comparison, Curves

        if arguments.get("runs"):
            if other := sorted(arguments.keys() & {a.name for a in OF_CHECKPOINTS}):
                raise ValueError(f"{', '.join(other)} have no effect with runs=…, which reads what runs have measured.")
            job: Any = Curves(**arguments)
        elif arguments.get("model"):
            job = Comparison(**arguments)
        else:
            raise ValueError(
                "analyze needs checkpoints, model=best.pt,best-sos.pt, or runs=runs/detect/a,runs/detect/b"
            )
    with refusing(ValueError, OSError):
        job.run()


MODE = Mode(
    "analyze",
    "compare checkpoints: curvature, collapse, spectra, landscapes",
    ["analyze model=best.pt,best-sos.pt data=VOC.yaml", "analyze runs=runs/detect/train,runs/detect/train2"],
    lambda: {"To compare checkpoints:": OF_CHECKPOINTS, "To draw runs:": OF_RUNS, "For both:": OF_BOTH},
    run,
    result="Writes report.html, its figures and analysis.json into runs/<task>/analyze. All are measured on the "
    "same images and random vectors, so that differences have their own, smaller, standard errors.",
)
