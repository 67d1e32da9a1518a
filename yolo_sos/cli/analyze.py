# yolo-sos, AGPL-3.0
"""``yolo-sos analyze``: compare checkpoints on the same images, or draw what runs have measured while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from yolo_sos.arguments import Argument
from yolo_sos.cli.grammar import Mode, refusing


def arguments() -> Mapping[str, Sequence[Argument]]:
    """Return the arguments by section."""
    from yolo_sos.analyze.options import OUTPUT, AnalyzeOptions

    return {
        "To compare checkpoints:": (
            Argument("model", None, "str | list", "checkpoints, with commas between them"),
            Argument("data", None, "str", "data set; that of the first checkpoint's training if not given"),
            *AnalyzeOptions.arguments(),
        ),
        "To draw runs:": [
            Argument("runs", None, "str | list", "folders of runs with sos_analyze=…, with commas between them")
        ],
        "For both:": AnalyzeOptions.arguments(OUTPUT),
    }


def run(given: dict[str, Any]) -> None:
    """Write report.html, its figures and analysis.json."""
    with refusing():
        from yolo_sos.analyze import Comparison, Curves

        if given.get("runs"):
            if other := sorted(given.keys() & {a.name for a in arguments()["To compare checkpoints:"]}):
                raise ValueError(f"{', '.join(other)} have no effect with runs=…, which reads what runs have measured.")
            job: Any = Curves(**given)
        elif given.get("model"):
            job = Comparison(**given)
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
    arguments,
    run,
    result="Writes report.html, its figures and analysis.json into runs/<task>/analyze. All are measured on the "
    "same images and random vectors, so that differences have their own, smaller, standard errors.",
)
