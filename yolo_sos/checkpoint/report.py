# yolo-sos, AGPL-3.0
"""What the shift of a checkpoint did, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from yolo_sos.checkpoint.score import headline
from yolo_sos.core import LayerRecord, ShiftReport
from yolo_sos.files import finite

HEADER = [
    *("layer", "kind", "d", "rows", "rank", "‖V‖ before", "after"),
    *("deviation: fit", "held-out", "rounding", "ms"),
]


@dataclass(frozen=True)
class CheckpointLayer(LayerRecord):
    """What happened to one layer; norms and deviations at the accepted step, all zero steps included.

    Attributes:
        deviation_heldout (float): ``‖A(V_t−V)ᵀ‖_F / ‖AVᵀ‖_F`` on all rows of the held-out images.
        rounding (float): Change of the outputs by half precision alone, relative, on the same rows; nan if nothing was
            written.
        milliseconds (float): Time to solve.
    """

    deviation_heldout: float
    rounding: float
    milliseconds: float


@dataclass(frozen=True)
class CheckpointReport(ShiftReport):
    """What the shift of a checkpoint did.

    Attributes:
        layers (tuple[CheckpointLayer, ...]): One record per layer.
        heldout_saved (float): Held-out loss of the written file: ``heldout_after`` but for rounding.
        heldout_full (float): Held-out loss after the full step, accepted or not.
        model (str): The checkpoint.
        data (str): The data set.
        output (str | None): The file written; None if the guard let nothing pass or a solve failed.
        settings (dict): The settings, as in ``shift_checkpoint``.
        images (dict[str, int]): Number of images to fit on (``fit``) and held out (``heldout``).
        draws (tuple[dict, ...]): For method ``rows``: seed, norm ratio, deviation and held-out loss of every draw, the
            full step each; the first is the one that won.
        metrics_before (dict[str, float]): The host's metrics on the val split; empty without ``val``.
        metrics_after (dict[str, float]): The same after the shift.
    """

    layers: tuple[CheckpointLayer, ...]
    heldout_saved: float
    heldout_full: float
    model: str
    data: str
    output: str | None
    settings: dict[str, Any]
    images: dict[str, int]
    draws: tuple[dict[str, float], ...]
    metrics_before: dict[str, float]
    metrics_after: dict[str, float]

    @property
    def deviation_heldout(self) -> float:
        """Mean held-out deviation over the layers."""
        return sum(r.deviation_heldout for r in self.layers) / len(self.layers)

    @property
    def rounding(self) -> float:
        """Mean deviation by rounding over the layers."""
        return sum(r.rounding for r in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        totals = ("status", "norm_ratio", "rank", "deviation", "deviation_heldout", "rounding")
        return {**{k: getattr(self, k) for k in totals}, **asdict(self)}

    def to_json(self) -> str:
        """Return the report as JSON; what is not a number there is null."""
        return json.dumps(finite(self.to_dict()), indent=2) + "\n"

    def table(self) -> str:
        """Return the report as text: a row per layer, then the totals."""
        rows = [
            [r.name, r.kind, str(r.d), str(r.rows), f"{r.rank:.1f}"]
            + [f"{norm:.4g}" for norm in (r.norm_before, r.norm_after)]
            + [f"{change:.2e}" for change in (r.deviation, r.deviation_heldout, r.rounding)]
            + [f"{r.milliseconds:.1f}"]
            for r in self.layers
        ]
        lines = _aligned([HEADER, *rows], left=2)
        loss, change = self.heldout_after, self.heldout_after / self.heldout_before - 1
        lines += [
            "",
            f"norm² ×{self.norm_ratio:.3f}, mean rank {self.rank:.1f}, step t={self.step:g}",
            f"held-out loss {self.heldout_before:.5g} → {loss:.5g} ({change:+.2%}); of the file, rounded to half "
            f"precision: {self.heldout_saved:.5g}",
            f"mean deviation {self.deviation:.2e} on {self.images['fit']} fit images, {self.deviation_heldout:.2e} on "
            f"{self.images['heldout']} held-out images; {self.rounding:.1e} by rounding alone",
        ]
        if self.draws:
            losses = sorted(d["heldout_loss"] for d in self.draws)
            lines.append(
                f"{len(losses)} draws, held-out loss after a full step {losses[0]:.5g} to {losses[-1]:.5g}; seed "
                f"{self.draws[0]['seed']} won"
            )
        if self.metrics_before:
            main = headline(self.metrics_before)
            rows = [["val split", "before", "after", "change", ""]]
            for name, before in self.metrics_before.items():
                after = self.metrics_after[name]
                mark = "*" if name == main else ""
                rows.append([name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}", mark])
            lines += ["", *_aligned(rows, left=1)]
        return "\n".join(lines)

    def refusal(self) -> str:
        """Return why nothing was written, and what would change that."""
        if self.status != "guarded":
            return f"Nothing was written: {self.status}."
        rise = self.heldout_full / self.heldout_before - 1
        guard = self.settings["guard"]
        return (
            f"Nothing was written: no step keeps the held-out loss of {self.heldout_before:.5g} within "
            f"sos_guard={guard:g} ({guard:+.2%}). A full step takes it to {self.heldout_full:.5g} ({rise:+.2%}). Keep "
            "more (a larger rank, a smaller budget), allow more (sos_guard), or switch the guard off (sos_guard=none)."
        )


def _aligned(rows: list[list[str]], left: int) -> list[str]:
    """Return the rows as lines, the first ``left`` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
