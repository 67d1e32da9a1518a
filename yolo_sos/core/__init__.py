# yolo-sos, AGPL-3.0
"""The method, on torch alone: layers, moments, solvers, the engine, and SOS, the object for a training loop."""

from yolo_sos._lazy import lazy_exports

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {  # imported when first asked for: reading settings must not load torch
        "calibration": ("OWN_MAP", "AffineMap", "NoMapError", "fit_logistic", "fit_softmax", "fold"),
        "capture": ("InputCapture", "evaluation", "original_module"),
        "curvature": ("Curvature", "hessian_diagonal"),
        "engine": ("Engine", "Shift", "Stopwatch"),
        "fit": ("FitReport", "LayerFit", "fit_layer", "fit_model", "judge"),
        "fitting": ("ROUGH", "RidgePath", "RidgeProblem", "Rows", "fit_path"),
        "heldout": ("HeldOut", "layer_outputs", "temporary_weights"),
        "layers": (
            *("FinalLayer", "affine_matrix", "check_linear", "input_rows", "last_layer", "layer_output"),
            *("output_rows", "select_layers", "weight_matrix", "write_weight", "write_weights"),
        ),
        "method": ("METHODS", "SOLVERS", "WEIGHTINGS", "Method"),
        "moments": ("Moments", "RowSample", "as_float64"),
        "report": ("LayerReport", "ShiftReport"),
        "solvers": (
            *("NON_FINITE", "OK", "RANK_ZERO", "ShiftResult", "solve"),
            *("budgeted_shift", "expected_shift", "minimum_norm_shift", "principal_shift"),
        ),
        "sos": ("SEEDS", "SOS", "is_due", "shift_model"),
        "tasks": ("ModelTask", "Task"),
        "weighting": ("LayerRows", "has_background", "row_groups"),
    },
)
