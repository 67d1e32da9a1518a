# yolo-sos, AGPL-3.0
"""The options of a comparison, each declared once: default, check and help. Without torch, so that help is fast."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from yolo_sos.core import WEIGHTINGS
from yolo_sos.core.checks import Check, boolean, choice, number, optional

SCOPES = {"all": ("before", "final"), "before": ("before",), "final": ("final",)}  # scope → blocks of parameters
_SHARE = optional(number("a number above 0 and up to 1, or none", lambda x: 0 < x <= 1))


def _integer(least: int) -> Check:
    return number(f"an integer of at least {least}", lambda x: x >= least, integer=True)


def _option(default: Any, kind: str, check: Check, text: str) -> Any:
    return field(default=default, metadata={"type": kind, "check": check, "help": text})


@dataclass(frozen=True)
class AnalyzeOptions:
    """The options of a comparison of checkpoints, checked.

    Raises:
        ValueError: If a value is out of range; names the key, the value and what would be right.
    """

    scope: str = _option(
        "all", "str", choice(*SCOPES), "parameters whose curvature is measured: all, before the final layers, or final"
    )
    probes: int = _option(24, "int", _integer(2), "random vectors for each trace, at most")
    stderr: float | None = _option(
        None, "float | none", _SHARE, "standard error relative to its trace at which sampling ends before that"
    )
    images: int = _option(8, "int", _integer(1), "training images for the curvature and the landscape")
    landscape: bool = _option(True, "bool", boolean, "draw slices of the loss")
    weighting: str = _option("balanced", "str", choice(*WEIGHTINGS), f"of the spectra: {', '.join(WEIGHTINGS)}")
    fraction: float | None = _option(
        None, "float | none", _SHARE, "share of the training images whose features are read; none: at most 256 images"
    )
    imgsz: int | None = _option(None, "int | none", optional(_integer(32)), "size of the images; none: of the training")
    batch: int | None = _option(None, "int | none", optional(_integer(1)), "images in a batch; none: of the training")
    device: str | int | None = _option(None, "str | int | none", lambda key, value: value, "as Ultralytics names it")
    seed: int = _option(0, "int", _integer(0), "chooses images, probes and directions")
    project: str | None = _option(None, "str | none", lambda key, value: value, "folder of the result's folder")
    name: str | None = _option(None, "str | none", lambda key, value: value, "name of the result's folder")
    exist_ok: bool = _option(False, "bool", boolean, "write into that folder if it exists")

    def __post_init__(self):
        """Check every value."""
        for f in fields(self):
            object.__setattr__(self, f.name, f.metadata["check"](f.name, getattr(self, f.name)))
