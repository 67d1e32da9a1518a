# yolo-sos, AGPL-3.0
"""The table in docs/faults.md, made of the marks of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs/faults.md"
collected = pytest.StashKey[list]()

# Tests elsewhere, by file and name: what they inject, and what must follow
FEATURES_ELSEWHERE = {
    "yolo/test_training_failures.py::test_frozen_final_layers_are_refused": ("freeze, all final layers", "refused"),
    "yolo/test_training_failures.py::test_some_frozen_layers_stay_and_are_named": (
        "freeze, some final layers",
        "works: these stay, with a warning",
    ),
    "yolo/test_training_failures.py::test_distillation_is_refused": ("distill_model", "refused"),
    "yolo/test_training_failures.py::test_rtdetr_is_refused_before_training": ("RT-DETR", "refused"),
    "yolo/test_training_stock.py::test_sos_false_is_the_stock_trainer_bit_for_bit": (
        "sos=false",
        "Ultralytics' run, bit for bit",
    ),
    "yolo/test_training_resume.py::test_it_draws_the_images_that_the_unbroken_run_does": ("resume=", "works"),
    "recipes/test_sharpness.py::test_together_with_sos": ("sharpness_aware=sam, asam, gnp", "works"),
    "recipes/test_averaging.py::test_what_is_shifted_is_the_average": ("swa", "works: the average is shifted"),
    "yolo/test_training_workers.py::test_the_settings_reach_a_worker_which_writes_no_file": (
        "device=0,1, a worker rebuilt from Ultralytics' pickle",
        "works: settings arrive",
    ),
}
FAULTS_ELSEWHERE = {
    "yolo/test_training_failures.py::test_a_shift_that_fails_stops_the_run_with_its_own_error": (
        "an error in a shift",
        "stops with that error; last.pt and weights as before",
    ),
    "yolo/test_training_failures.py::test_a_checkpoint_that_cannot_be_serialised_leaves_the_one_before": (
        "a checkpoint that cannot be serialised",
        "stops with that error; last.pt is whole",
    ),
    "yolo/test_training_failures.py::test_a_disk_that_is_full_half_way_leaves_a_whole_checkpoint": (
        "disk full half way through a checkpoint",
        "stops with that error; last.pt and best.pt are whole",
    ),
    "yolo/test_training_failures.py::test_a_live_model_that_is_not_finite_is_left_alone_and_does_not_stop_the_run": (
        "NaN in the live model alone",
        "it is not shifted, the EMA is; Ultralytics recovers",
    ),
    "yolo/test_training_failures.py::test_a_training_set_of_one_image_is_refused": ("one training image", "refused"),
    "yolo/test_training_failures.py::test_kinds_that_the_model_does_not_have_are_refused": (
        "sos_layers names kinds that the model lacks",
        "refused; names those it has",
    ),
    "yolo/test_training_failures.py::test_wrong_settings_are_refused_before_a_folder_is_made": (
        "a setting that is unknown or out of range",
        "refused before a folder is made",
    ),
    "yolo/test_training_resume.py::test_an_epoch_that_is_recovered_from_nan_is_logged_once": (
        "NaN as training loss",
        "Ultralytics runs the epoch again; it is logged once",
    ),
    "yolo/test_training_resume.py::test_a_run_without_sos_cannot_be_resumed_with_it": (
        "resume with sos=true a run without",
        "refused; nothing is trained",
    ),
    "yolo/test_training_resume.py::test_changed_settings_are_ignored_with_a_warning": (
        "resume with other settings",
        "those of the checkpoint, with a warning",
    ),
    "recipes/test_sharpness.py::test_what_overflows_skips_the_step_and_lowers_the_scale": (
        "sharpness_aware: a gradient that overflows, in either pass",
        "the step is skipped, the scale lowered; weights as before",
    ),
    "recipes/test_sharpness.py::test_an_error_in_the_second_pass_leaves_weights_and_random_numbers_as_they_were": (
        "sharpness_aware: an error in the second pass",
        "stops with that error; weights as before",
    ),
    "recipes/test_sharpness.py::test_the_library_is_asked_for_before_the_data_are_read": (
        "sharpness_aware without pytorch-optimizer",
        "refused; says what to install",
    ),
    "recipes/test_averaging.py::test_an_epoch_that_runs_again_counts_once": (
        "swa: NaN as training loss",
        "Ultralytics runs the epoch again; it counts once in the average",
    ),
    "recipes/test_averaging.py::test_distillation_is_refused": ("swa or sharpness_aware with distill_model", "refused"),
    "core/test_weighting.py::test_groups_without_mass_add_nothing": ("a class without any row", "adds nothing"),
    "core/test_solver.py::test_rows_that_span_nothing_change_nothing": (
        "rows that are all zero",
        "not shifted; reported",
    ),
    "core/test_shift.py::test_rows_see_a_single_bad_pixel": ("one pixel of the features NaN", "not shifted; reported"),
    "core/test_solver.py::test_overflow_on_the_way_changes_nothing": ("overflow in a solve", "not shifted; reported"),
    "core/test_shift.py::test_an_exception_leaves_everything_as_it_was": (
        "an exception at any step of a shift",
        "weights, hooks and modes as before",
    ),
    "data/test_voc_reading.py::test_hostile_and_broken_xml_is_refused": (
        "VOC XML with entities, external or endless, or a DTD",
        "refused; names the file",
    ),
    "yolo/test_checkpoint_images.py::test_unreadable_images_are_named": (
        "yolo-sos shift: images that cannot be read",
        "refused; names the first",
    ),
    "yolo/test_checkpoint_images.py::test_other_classes_are_refused": (
        "yolo-sos shift: data of other classes",
        "refused; names the class",
    ),
    "evaluate/test_evaluate_files.py::test_bad_coco_detections": ("COCO detections that are wrong", "names the entry"),
    "evaluate/test_evaluate_files.py::test_bad_voc_detections": ("the devkit's detections, wrong", "names the line"),
}


def table(items: list[pytest.Item]) -> str:
    """Return docs/faults.md for the tests of this folder."""
    folder = Path(__file__).resolve().parent
    items = [item for item in items if item.path.parent == folder]
    parts = [
        "# Features of Ultralytics, faults and bad input\n\n"
        "Made by the test suite: `YOLO_SOS_WRITE_FAULTS=1 python -m pytest tests/faults`. Each row is a test.\n"
    ]
    for mark, title, elsewhere in (
        ("feature", "Features of Ultralytics together with SOS", FEATURES_ELSEWHERE),
        ("fault", "Faults and bad input", FAULTS_ELSEWHERE),
    ):
        rows = {
            (*m.args, f"faults/{item.path.name}::{item.originalname}")
            for item in items
            for m in item.iter_markers(mark)
        }
        rows |= {(*row, test) for test, row in elsewhere.items()}
        lines = [f"| {what} | {outcome} | `{test}` |\n" for what, outcome, test in sorted(rows, key=lambda r: r[::-1])]
        parts.append(
            f"\n## {title}: {len(rows)}\n\n| what | what follows | test |\n| --- | --- | --- |\n{''.join(lines)}"
        )
    return "".join(parts)
