# yolo-sos, AGPL-3.0
"""What the shift of a checkpoint did, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from yolo_sos.core import LayerReport, ShiftReport
from yolo_sos.files import as_json
from yolo_sos.yolo.score import headline

HEADER = "layer", "kind", "d", "rows", "rank", "‖V‖ before", "after", "deviation: fit", "held-out", "rounding", "ms"


@dataclass(frozen=True)
class CheckpointLayer(LayerReport):
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
    """What the shift of a checkpoint did; ``heldout_after`` is of the file as it was written.

    Attributes:
        layers (tuple[CheckpointLayer, ...]): One per layer.
        heldout_full (float): Held-out loss after the full step, accepted or not.
        model (str): The checkpoint.
        data (str): The data set.
        output (str | None): The file written; None if the guard let nothing pass or a solve failed.
        settings (dict): The settings, as in ``shift_checkpoint``.
        images (dict[str, int]): Number of images to fit on (``fit``), held out (``heldout``) and, for several draws,
            set aside to choose between them (``selection``).
        draws (tuple[dict, ...]): For several draws of method ``rows``: seed, squared norm ratio, deviation and loss on
            the images set aside, the full step each; the first is the one that was taken.
        metrics_before (dict[str, float]): Ultralytics' metrics on the val split; empty without ``val``.
        metrics_after (dict[str, float]): The same after the shift.
    """

    layers: tuple[CheckpointLayer, ...]
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
        totals = ("status", "squared_norm_ratio", "rank", "deviation", "deviation_heldout", "rounding")
        return {**{k: getattr(self, k) for k in totals}, **asdict(self)}

    def to_json(self) -> str:
        """Return the report as JSON; what is not a number there is null."""
        return as_json(self.to_dict())

    def table(self) -> str:
        """Return the report as text: a row per layer, then the totals."""
        rows = [
            [r.name, r.kind, str(r.d), str(r.rows), f"{r.rank:.1f}"]
            + [f"{norm:.4g}" for norm in (r.norm_before, r.norm_after)]
            + [f"{change:.2e}" for change in (r.deviation, r.deviation_heldout, r.rounding)]
            + [f"{r.milliseconds:.1f}"]
            for r in self.layers
        ]
        lines = aligned([[*HEADER], *rows], left=2)
        loss, change = self.heldout_after, self.heldout_after / self.heldout_before - 1
        lines += [
            "",
            f"squared norm ×{self.squared_norm_ratio:.3f}, mean rank {self.rank:.1f}, step size t={self.step:g}",
            f"held-out loss {self.heldout_before:.5g} → {loss:.5g} ({change:+.2%}), of the written file",
            f"mean deviation {self.deviation:.2e} on {self.images['fit']} fit images, {self.deviation_heldout:.2e} on "
            f"{self.images['heldout']} held-out images; {self.rounding:.1e} by rounding alone",
        ]
        if self.draws:
            losses = [d["selection_loss"] for d in self.draws]
            lines.append(
                f"{len(losses)} draws: loss {losses[0]:.5g} to {losses[-1]:.5g} after a full step, on "
                f"{self.images['selection']} images set aside for the choice; seed {self.draws[0]['seed']} was taken"
            )
        if self.metrics_before:
            main = headline(self.metrics_before)
            rows = [["val split", "before", "after", "change", ""]]
            for name, before in self.metrics_before.items():
                after = self.metrics_after[name]
                mark = "*" if name == main else ""
                rows.append([name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}", mark])
            lines += ["", *aligned(rows, left=1)]
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


def aligned(rows: list[list[str]], left: int) -> list[str]:
    """Return the rows as lines, the first ``left`` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
