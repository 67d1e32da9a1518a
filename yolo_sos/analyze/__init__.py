# yolo-sos, AGPL-3.0
"""Diagnostics: curvature, neural collapse, spectra of the final layers' inputs, loss landscapes, and a report."""

from yolo_sos._lazy import lazy_exports

__all__, __getattr__, __dir__ = lazy_exports(
    __name__, {"comparison": ("Comparison", "analyze_checkpoints"), "curves": ("Curves",)}
)
