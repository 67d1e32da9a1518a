# yolo-sos, AGPL-3.0
"""Diagnostics: curvature, neural collapse, spectra of the final layers' inputs, loss landscapes, and a report."""

from yolo_sos._lazy import lazy_exports

_MODULES = {
    "Comparison": "yolo_sos.analyze.comparison",
    "Curves": "yolo_sos.analyze.curves",
    "analyze_checkpoints": "yolo_sos.analyze.comparison",
}
__all__ = sorted(_MODULES)
__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
