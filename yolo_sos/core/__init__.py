# yolo-sos, AGPL-3.0
"""The method, on torch alone: solvers, accumulators, capture, and the shift of a model's final layers."""

from yolo_sos.core.capture import InputCapture
from yolo_sos.core.gram import Gram
from yolo_sos.core.layers import FinalLayer, input_rows, weight_matrix
from yolo_sos.core.plain import ModelTask, last_linear, shift_model
from yolo_sos.core.shift import METHODS, LayerRecord, Method, ShiftReport, shift_layers
from yolo_sos.core.solver import (
    NON_FINITE,
    OK,
    RANK_ZERO,
    SOLVERS,
    ShiftResult,
    budgeted_shift,
    expected_shift,
    minimum_norm_shift,
    principal_shift,
)
from yolo_sos.core.task import ClassifierTask, Task
from yolo_sos.core.weighting import WEIGHTINGS, GroupedGram, RowSample, has_background, row_weights

__all__ = [
    "METHODS",
    "NON_FINITE",
    "OK",
    "RANK_ZERO",
    "SOLVERS",
    "WEIGHTINGS",
    "ClassifierTask",
    "FinalLayer",
    "Gram",
    "GroupedGram",
    "InputCapture",
    "LayerRecord",
    "Method",
    "ModelTask",
    "RowSample",
    "ShiftReport",
    "ShiftResult",
    "Task",
    "budgeted_shift",
    "expected_shift",
    "has_background",
    "input_rows",
    "last_linear",
    "minimum_norm_shift",
    "principal_shift",
    "row_weights",
    "shift_layers",
    "shift_model",
    "weight_matrix",
]
