# yolo-sos, AGPL-3.0
"""See what SOS does: curvature with a baseline, neural collapse, spectra of the layers' inputs, loss landscapes."""

from yolo_sos.analyze.comparison import Comparison, analyze_checkpoints
from yolo_sos.analyze.curves import Curves

__all__ = ["Comparison", "Curves", "analyze_checkpoints"]
