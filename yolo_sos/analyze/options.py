# yolo-sos, AGPL-3.0
"""The options of a comparison of checkpoints. Without torch, so that help is fast."""

from __future__ import annotations

from dataclasses import dataclass

from yolo_sos.arguments import Options, option
from yolo_sos.core import WEIGHTINGS
from yolo_sos.core.checks import at_least, boolean, choice, number, optional

SCOPES = {"all": ("before", "final"), "before": ("before",), "final": ("final",)}  # scope → blocks of parameters
OUTPUT = "output"  # section of what a comparison of runs takes, too
_SHARE = optional(number("a number above 0 and up to 1, or none", lambda x: 0 < x <= 1))


@dataclass(frozen=True)
class AnalyzeOptions(Options):
    """The options, checked."""

    scope: str = option(
        "all", "parameters whose curvature is measured: all, before (the final layers) or final", choice(*SCOPES)
    )
    probes: int = option(24, "most random vectors of a trace's estimate", at_least(2))
    stderr: float | None = option(None, "relative standard error at which an estimate stops earlier", _SHARE)
    images: int = option(8, "training images of curvature and landscape", at_least(1))
    landscape: bool = option(True, "slices of the loss around and between the models", boolean)
    weighting: str = option("balanced", f"of the rows, in spectra: {', '.join(WEIGHTINGS)}", choice(*WEIGHTINGS))
    fraction: float | None = option(
        None, "share of the training images whose features are read; at most 256 images if not given", _SHARE
    )
    imgsz: int | None = option(None, "image size in pixels; that of the training if not given", optional(at_least(32)))
    batch: int | None = option(None, "images at a time; that of the training if not given", optional(at_least(1)))
    device: str | int | None = option(None, "such as cpu or 0; what Ultralytics picks if not given")
    seed: int = option(0, "chooses images and random vectors", at_least(0))
    project: str | None = option(None, "folder to write to, as in Ultralytics", section=OUTPUT)
    name: str | None = option(None, "folder in it", section=OUTPUT)
    exist_ok: bool = option(False, "write into a folder that exists", boolean, OUTPUT)
