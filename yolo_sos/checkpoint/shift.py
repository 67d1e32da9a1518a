# yolo-sos, AGPL-3.0
"""Shift a trained checkpoint and write it beside the original."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from ultralytics.utils import LOGGER

from yolo_sos.checkpoint.job import PREFIX, CheckpointJob
from yolo_sos.checkpoint.report import CheckpointLayer, CheckpointReport
from yolo_sos.checkpoint.workbench import Candidate
from yolo_sos.config import SHIFT_SETTINGS
from yolo_sos.core.gram import as_float64
from yolo_sos.core.shift import Collector
from yolo_sos.files import atomic_path, write_text


class CheckpointShift(CheckpointJob):
    """A shift of a checkpoint, checked and ready to ``run``. See ``shift_checkpoint``."""

    draws = 10
    names = ("{}-sos.pt", "shift.json")

    def run(self) -> CheckpointReport:
        """Shift, and write the result unless the guard forbids it.

        Returns:
            (CheckpointReport): What happened.
        """
        bench, method = self.bench, self.config.method()
        rows = method.name == "rows"
        seeds = range(self.seed, self.seed + (self.draws if rows else 1))
        collector = bench.capture([(method, seed) for seed in seeds])
        candidates = [bench.solve(collector, method, seed) for seed in seeds]
        losses = [bench.loss(bench.weights(c)) if c.solved else math.inf for c in candidates]
        order = sorted(range(len(candidates)), key=lambda i: (not math.isfinite(losses[i]), losses[i]))
        winner, full = candidates[order[0]], losses[order[0]]
        draws = tuple(self._draw(candidates[i], losses[i]) for i in order) if rows else ()
        step, before, after = bench.guard(winner, self.config.sos_guard)
        bench.watch.lap("guard")
        weights = bench.weights(winner, step)
        metrics: list[dict[str, float]] = [{}, {}]
        if step > 0 and self.splits:
            metrics, _ = bench.score([weights], *self.splits)
            bench.watch.milliseconds["val"] = 0.0
            bench.watch.lap("val")
        output, json = self.outputs
        settings = {key: getattr(self.config, f"sos_{key}") for key in SHIFT_SETTINGS if rows or key != "solver"}
        settings |= {"images": len(bench.images.fit), "seed": self.seed, **({"draws": self.draws} if rows else {})}
        report = CheckpointReport(
            layers=self._records(winner, collector, weights, step),
            heldout_before=before,
            heldout_after=after,
            step=step,
            milliseconds=bench.watch.milliseconds,
            heldout_saved=math.nan,
            heldout_full=full,
            model=str(bench.checkpoint.path),
            data=bench.images.args["data"],
            output=None,
            settings=settings,
            images={"fit": len(bench.images.fit), "heldout": len(bench.images.heldout)},
            draws=draws,
            metrics_before=metrics[0],
            metrics_after=metrics[1],
        )
        if step == 0:
            LOGGER.warning(f"{PREFIX}{report.refusal()}")
            return report
        with atomic_path(output) as temporary:
            bench.checkpoint.save(temporary, weights, {"settings": settings, "step": step})
            rounding, saved = bench.rounding(temporary, weights)
            bench.watch.lap("write")
            layers = tuple(replace(r, rounding=rounding[r.name]) for r in report.layers)
            report = replace(report, layers=layers, heldout_saved=saved, output=str(output))
            write_text(json, report.to_json())
        LOGGER.info(f"\n{report.table()}\n\n{PREFIX}wrote {output} and {json}")
        return report

    def _draw(self, candidate: Candidate, loss: float) -> dict[str, float]:
        deviations = self.bench.deviations(self.bench.weights(candidate)).values()
        heldout = {"deviation_heldout": sum(deviations) / len(deviations), "heldout_loss": loss}
        return {"seed": candidate.seed, **candidate.summary(), **heldout}

    def _records(
        self, winner: Candidate, collector: Collector, weights: dict[str, Tensor], step: float
    ) -> tuple[CheckpointLayer, ...]:
        """Return what happened to the layers, but for the rounding."""
        deviations = self.bench.deviations(weights)
        results = winner.results
        return tuple(
            CheckpointLayer(
                name=layer.name,
                kind=layer.kind,
                scale=layer.scale,
                d=weights[layer.name].shape[1],
                rows=collector.rows(layer),
                rank=results[layer.name].rank,
                norm_before=results[layer.name].norm_before,
                norm_after=float(as_float64(weights[layer.name]).norm()),
                deviation=step * results[layer.name].deviation,
                status=results[layer.name].status,
                deviation_heldout=deviations[layer.name],
                rounding=math.nan,
                milliseconds=winner.milliseconds[layer.name],
            )
            for layer in self.bench.shifted
        )


def shift_checkpoint(model: str | Path, data: str | Path | None = None, **options: Any) -> CheckpointReport:
    """Shift the final layers of a trained checkpoint and write ``{stem}-sos.pt`` and ``shift.json`` beside it.

    Args:
        model (str | Path): A checkpoint of Ultralytics, trained with or without SOS.
        data (str | Path, optional): The data set, as the host names it. None: the one that the model was trained on.
        **options (Any): ``method``, ``rank``, ``weighting``, ``budget``, ``solver``, ``layers`` and ``guard`` as in
            ``cfg/sos.yaml``, with or without ``sos_`` before them; ``images`` (int | str): training images to fit on,
            or ``all``, 512 by default; ``draws`` (int): for method ``rows``, how many to try, 10 by default: the one
            of least held-out loss is taken; ``imgsz``, ``batch`` (int): those of the training by default; ``device``
            (str); ``seed`` (int): 0 by default; ``val`` (bool): whether to score the val split before and after, on by
            default; ``exist_ok`` (bool): whether to replace files that are there.

    Returns:
        (CheckpointReport): What happened. Its ``output`` is None if nothing was written.

    Raises:
        FileNotFoundError: If the checkpoint, the data set or its images are missing.
        FileExistsError: If a result is there already.
        PermissionError: If the checkpoint's folder cannot be written to.
        TypeError: If the file is no checkpoint, or of a model that SOS cannot shift.
        ValueError: If a setting is wrong, the model is fused or not finite, or the data do not fit it.

    Examples:
        >>> report = shift_checkpoint("runs/detect/train/weights/best.pt", "VOC.yaml", rank=0.5)
        >>> print(report.norm_ratio, report.metrics_before, report.metrics_after)
    """
    return CheckpointShift(model, data, **options).run()
