# yolo-sos, AGPL-3.0
"""Shift a trained checkpoint and write it beside the original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from ultralytics.utils import LOGGER

from yolo_sos.config import SHIFT_SETTINGS
from yolo_sos.core import (
    OK,
    Engine,
    FinalLayer,
    HeldOut,
    LayerReport,
    Method,
    Shift,
    as_float64,
    input_rows,
    weight_matrix,
)
from yolo_sos.core.checks import boolean
from yolo_sos.files import atomic_path, write_text
from yolo_sos.yolo.calibrate import CheckpointCalibration
from yolo_sos.yolo.calibrate_report import CalibrationReport
from yolo_sos.yolo.job import ShiftJob, deviations, heldout_moments
from yolo_sos.yolo.recording import Pass
from yolo_sos.yolo.shift_report import CheckpointLayer, CheckpointReport
from yolo_sos.yolo.training import PREFIX


class CheckpointShift(ShiftJob):
    """A shift of a checkpoint, checked and ready to ``run``. See ``shift_checkpoint``."""

    draws = 10
    names = ("{}-sos.pt", "{}-sos.json")
    calibration: CalibrationReport | None = None  # of the shifted checkpoint, after ``run``

    def __init__(self, model: str | Path, data: str | Path | None = None, *, calibrate: bool = False, **options: Any):
        """Check everything as ``ShiftJob``, and the files of a calibration."""
        self.calibrate = boolean("calibrate", calibrate)
        super().__init__(model, data, **options)
        if self.calibrate:
            CheckpointCalibration.check_after(self, options.get("exist_ok", False))

    def run(self) -> CheckpointReport:
        """Shift, and write the result unless the guard forbids it.

        Returns:
            (CheckpointReport): What happened.
        """
        method, guard = self.config.method_of(self.checkpoint.task), self.config.sos_guard
        rows = method.name == "rows"
        trials = [(method, seed) for seed in range(self.seed, self.seed + (self.draws if rows else 1))]
        engine = self.fitted(trials)
        heldout = engine.hold_out(self.images.batches("heldout"))
        if len(trials) > 1:
            shift, draws = self._best_draw(engine, trials)
        else:
            shift, draws = engine.find(*trials[0], heldout, guard), ()
        full = heldout.loss(shift.weights()) if shift.status == OK else math.nan
        step, before, after = engine.accept(shift, heldout, guard)
        weights = shift.weights(step)
        seen: Pass | None = None
        engine.watch.lap("guard")
        if step > 0 and self.splits:
            seen = self.score([weights], *self.splits, keep=self.calibrate)
            engine.watch.lap("val")
        metrics_before, metrics_after = seen.metrics if seen else ({}, {})
        output, record = self.outputs
        sizes = {name: len(of) for name, of in self.images.sets.items() if of}
        settings = {
            **{key: getattr(self.config, f"sos_{key}") for key in SHIFT_SETTINGS if rows or key != "solver"},
            **{"method": method.name, "rank": shift.method.rank, "budget": shift.method.budget},
            **{"found": method.is_found, "images": sizes["fit"], "seed": self.seed},
            **({"draws": self.draws} if rows else {}),
        }
        general = engine.report(shift, step, before, after, guard)
        report = CheckpointReport(
            **{**vars(general), "layers": self._layers(general.layers, shift, heldout, weights)},
            heldout_full=full,
            model=str(self.checkpoint.path),
            data=self.data.args["data"],
            output=None,
            settings=settings,
            images=sizes,
            draws=draws,
            metrics_before=metrics_before,
            metrics_after=metrics_after,
        )
        if step == 0:
            LOGGER.warning(f"{PREFIX}{report.refusal()}")
            return report
        with atomic_path(output) as temporary:
            self.checkpoint.save(temporary, weights, {"settings": settings, "step": step})
            written = self.read_back(temporary)
            rounding = self._rounding(heldout, written, weights)
            if not heldout.allows(written.before, guard):
                raise ValueError(
                    f"Rounded to half precision, the model has a held-out loss of {written.before:.5g}, above the "
                    f"{before:.5g} before the shift by more than sos_guard={guard:g}. Nothing was written."
                )
            engine.watch.lap("write")
            layers = tuple(replace(layer, rounding=rounding[layer.name]) for layer in report.layers)
            report = replace(report, layers=layers, heldout_after=written.before, output=str(output))  # type: ignore[call-arg]
            write_text(record, report.to_json())
        LOGGER.info(f"\n{report.table()}\n\n{PREFIX}wrote {output} and {record}")
        if self.calibrate and seen:
            self.calibration = CheckpointCalibration.after(self, seen.of(1))
        return report

    def _best_draw(
        self, engine: Engine, trials: list[tuple[Method, int]]
    ) -> tuple[Shift, tuple[dict[str, float], ...]]:
        """Return the best draw on images that are set aside for this choice, and figures of all, best first.

        The best is that of least loss or, where the guard finds how many rows are drawn, of least norm. The held-out
        images take no part, so that the loss on them is that of a model not chosen by it.
        """
        guard = self.config.sos_guard
        selection = engine.hold_out(self.images.batches("selection"))
        shifts = [engine.find(*trial, selection, guard) for trial in trials]
        losses = [selection.loss(s.weights()) if s.status == OK else math.inf for s in shifts]
        by_norm = trials[0][0].is_found and guard is not None
        merit = [s.squared_norm_ratio if by_norm else loss for s, loss in zip(shifts, losses, strict=True)]
        moments = heldout_moments(self.layers, selection)
        order = sorted(range(len(shifts)), key=lambda i: (not math.isfinite(losses[i]), merit[i]))
        draws = []
        for i in order:
            changes = deviations(self.layers, moments, shifts[i].weights()).values()
            draws.append(
                {
                    "seed": shifts[i].seed,
                    "squared_norm_ratio": shifts[i].squared_norm_ratio,
                    "rank": shifts[i].rank,
                    "deviation": shifts[i].deviation,
                    "deviation_selection": sum(changes) / len(changes),
                    "selection_loss": losses[i],
                }
            )
        return shifts[order[0]], tuple(draws)

    def _layers(
        self, layers: Sequence[LayerReport], shift: Shift, heldout: HeldOut, weights: dict[str, Tensor]
    ) -> tuple[CheckpointLayer, ...]:
        """Return what happened to the layers, but for the rounding: the file is not written yet."""
        changes = deviations(self.layers, heldout_moments(self.layers, heldout), weights)
        return tuple(
            CheckpointLayer(
                **{**vars(layer), "norm_after": float(as_float64(weights[layer.name]).norm())},
                deviation_heldout=changes[layer.name],
                rounding=math.nan,
                milliseconds=shift.milliseconds[layer.name],
            )
            for layer in layers
        )

    def _rounding(self, heldout: HeldOut, written: HeldOut, weights: dict[str, Tensor]) -> dict[str, float]:
        """Return by how much half precision alone changes the outputs on held-out images, relative, by layer name.

        Args:
            heldout (HeldOut): The inputs of the final layers before the model was rounded.
            written (HeldOut): Those of the file.
            weights (dict[str, Tensor]): The weights before they were rounded.

        Raises:
            ValueError: If the file's outputs are not finite.
        """
        before, after = ({layer.name: layer for layer in of.layers} for of in (heldout, written))
        changed, size = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)
        for old, new in zip(heldout.inputs, written.inputs, strict=True):
            for name, weight in weights.items():
                exact = _outputs(before[name], old[name], weight)
                off = _outputs(after[name], new[name], weight_matrix(after[name].module)) - exact
                changed[name] += float(off.square().sum())
                size[name] += float(exact.square().sum())
        rounding = {name: (changed[name] / size[name]) ** 0.5 if size[name] else 0.0 for name in weights}
        if not all(map(math.isfinite, rounding.values())):
            raise ValueError("Half precision cannot hold the shifted weights: their outputs are not finite.")
        return rounding


def _outputs(layer: FinalLayer, inputs: Tensor, weight: Tensor) -> Tensor:
    """Return a layer's output rows ``(n, out)`` with another weight, in float64: no rounding but that of the weight."""
    bias = layer.module.bias
    out = as_float64(input_rows(layer.module, inputs)) @ as_float64(weight).T
    return out if bias is None else out + as_float64(bias)  # type: ignore[arg-type]


def shift_checkpoint(model: str | Path, data: str | Path | None = None, **options: Any) -> CheckpointReport:
    """Shift the final layers of a trained checkpoint and write ``{stem}-sos.pt`` and ``{stem}-sos.json`` beside it.

    Args:
        model (str | Path): A checkpoint of Ultralytics, trained with or without SOS.
        data (str | Path, optional): The data set, as Ultralytics names it. None: that of the training.
        **options (Any): ``method``, ``rank``, ``weighting``, ``budget``, ``solver``, ``layers`` and ``guard`` as in
            ``cfg/sos.yaml``, with or without ``sos_`` before them; ``images`` (int | str): training images to fit on,
            or ``all``, 512 by default; ``draws`` (int): for method ``rows``, how many to try, 10 by default: the one
            of least loss on images set aside for that is taken; ``imgsz``, ``batch`` (int): those of the training by
            default; ``device`` (str); ``seed`` (int): 0 by default; ``val`` (bool): whether to score the val split
            before and after, on by default; ``calibrate`` (bool): whether to calibrate the shifted checkpoint, too, off
            by default; ``exist_ok`` (bool): whether to replace existing files.

    Returns:
        (CheckpointReport): What happened. Its ``output`` is None if nothing was written.

    Raises:
        FileNotFoundError: If the checkpoint, the data set or its images are missing.
        FileExistsError: If a result exists already.
        PermissionError: If the checkpoint's folder cannot be written to.
        TypeError: If the file is no checkpoint, or of a model that SOS cannot shift.
        ValueError: If a setting is wrong, the model is fused or not finite, or the data do not fit it.

    Examples:
        >>> report = shift_checkpoint("runs/detect/train/weights/best.pt", "VOC.yaml", rank=0.5)
        >>> print(report.squared_norm_ratio, report.metrics_before, report.metrics_after)
    """
    return CheckpointShift(model, data, **options).run()
