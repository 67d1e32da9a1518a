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
    "core/test_weighting.py::test_groups_without_rows_add_nothing": ("a class without any row", "adds nothing"),
    "core/test_solvers.py::test_rows_that_span_nothing_change_nothing": (
        "rows that are all zero",
        "not shifted; reported",
    ),
    "core/test_engine.py::test_rows_see_a_single_bad_pixel": ("one pixel of the features NaN", "not shifted; reported"),
    "core/test_solvers.py::test_overflow_on_the_way_changes_nothing": ("overflow in a solve", "not shifted; reported"),
    "core/test_engine.py::test_an_exception_leaves_everything_as_it_was": (
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
    "core/test_sos.py::test_tied_weights_are_refused_by_name": (
        "a layer whose weight another module holds, too",
        "refused; names both",
    ),
    "core/test_sos.py::test_a_layer_that_does_not_run_once_is_refused_by_name": (
        "a layer that runs twice in a forward pass, or not at all",
        "refused; names the layer",
    ),
    "core/test_sos.py::test_a_compiled_model_is_judged_as_it_was_written": (
        "torch.compile, of the model or a part, before a shift",
        "works: the original code runs; the loss reported is the true one",
    ),
    "core/test_sos.py::test_batches_of_any_form_give_the_same_shift": (
        "batches that are dictionaries, namedtuples, packed sequences",
        "work; they keep their types",
    ),
    "core/test_sos.py::test_targets_of_none_and_a_criterion_without_reduction": (
        "targets of None; a criterion that returns no scalar",
        "refused; says what to pass",
    ),
    "core/test_sos.py::test_wrong_settings_name_value_and_range": (
        "SOS, Method: a value out of range",
        "refused; names value and range",
    ),
    "core/test_layers.py::test_what_runs_last_and_cannot_be_shifted_is_named": (
        "an adapter, a Conv1d or another module as the last layer",
        "refused; names it",
    ),
    "core/test_layers.py::test_a_quantized_head_is_named": (
        "a quantized head",
        "refused; names it",
    ),
    "yolo/test_training_end.py::test_both_files_are_shifted_whatever_ends_a_run": (
        "patience, trainer.stop or time= before the first shift",
        "last.pt and best.pt are shifted at the end",
    ),
    "yolo/test_training_end.py::test_a_second_run_in_one_folder_has_no_shifts_of_the_first": (
        "a second run in one folder, exist_ok=True",
        "nothing of the first is taken for its own",
    ),
    "yolo/test_training_end.py::test_a_run_that_saves_nothing_leaves_the_checkpoints_of_another_alone": (
        "save=False in the folder of another run",
        "its checkpoints stay",
    ),
    "yolo/test_training_end.py::test_layers_are_looked_at_when_a_shift_is_made": (
        "layers frozen while training goes on",
        "not shifted from then on",
    ),
    "yolo/test_training_end.py::test_settings_of_a_shift_without_sos_are_refused_as_by_the_command": (
        "sos_rank without sos=True, in Python",
        "refused, as by the command",
    ),
    "cli/test_cli_help.py::test_a_reader_that_stops_early": (
        "yolo-sos cfg \\| head",
        "no traceback",
    ),
    "cli/test_cli_train.py::test_wrong_commands_are_refused_before_a_model_is_loaded": (
        "a word or a key that yolo-sos does not know",
        "refused in one line, exit status 2",
    ),
    "experiment/test_grid.py::test_what_is_due_after_the_last_epoch_is_done_when_a_run_was_killed_then": (
        "experiment: killed after the last epoch was saved",
        "what is left is done: shift, stripping, judgement",
    ),
    "experiment/test_grid.py::test_a_try_that_failed_before_training_does_not_stand_in_the_way": (
        "experiment: a try that failed before training",
        "does not block the next one",
    ),
    "experiment/test_grid.py::test_whether_a_shift_reached_the_model_judged": (
        "experiment: an arm with sos whose model was not shifted",
        "told in record and table; left out of comparisons",
    ),
    "evaluate/test_evaluate_command.py::test_images_that_ultralytics_drops_are_not_left_out_in_silence": (
        "eval: images cut short, empty, too small, of another format, or with invalid labels",
        "refused; count, first file and reason",
    ),
    "evaluate/test_evaluate_command.py::test_annotations_without_an_image_are_not_left_out_in_silence": (
        "eval: annotations whose image is missing",
        "refused; names the first",
    ),
    "evaluate/test_evaluate_command.py::test_classes_that_ultralytics_renames": (
        "class names that Ultralytics renames (ImageNet)",
        "work",
    ),
    "evaluate/test_evaluate_command.py::test_converter_and_evaluator_see_the_same_objects": (
        "VOC boxes without area; objects listed twice",
        "left out by converter and evaluator, told; counted and told",
    ),
    "evaluate/test_evaluate_command.py::test_numbers_are_safe_before_what_is_decorative": (
        "class names with $ or \\|; a plot that fails",
        "numbers are written and printed first",
    ),
    "evaluate/test_evaluate_command.py::test_class_names_are_checked_before_a_model_runs": (
        "a class name with / and --save-voc",
        "refused before a model runs",
    ),
    "evaluate/test_evaluate_command.py::test_keys_are_checked_by_name": (
        "eval: a wrong argument or value",
        "refused; names the key",
    ),
    "evaluate/test_evaluate_files.py::test_bad_coco_annotations": (
        "COCO annotations: values of a wrong type; one file under two ids",
        "refused; names the entry",
    ),
    "evaluate/test_evaluate_files.py::test_the_file_name_decides_which_image_is_meant": (
        "COCO detections whose file_name contradicts the id",
        "file_name decides, or refused",
    ),
    "evaluate/test_evaluate_files.py::test_a_number_that_two_ids_share_is_refused": (
        "COCO detections: 12 among the images 12 and 012",
        "refused; names both",
    ),
    "evaluate/test_evaluate_files.py::test_encodings_of_voc_detections": (
        "the devkit's detections in UTF-16 or Latin-1",
        "UTF-16 is read; else names file and line",
    ),
    "data/test_voc_reading.py::test_names_that_end_in_a_number_keep_it": (
        'image names that end in " 0", " 1" or " -1"',
        "kept",
    ),
    "data/test_voc_reading.py::test_encodings_of_image_sets": (
        "an image set in UTF-16 or Latin-1",
        "UTF-16 is read; else names file and line",
    ),
    "data/test_voc_reading.py::test_flags_in_words_have_a_rule_and_are_told": (
        "VOC difficult flags in words",
        "one rule, told once per set",
    ),
    "data/test_voc_reading.py::test_what_is_not_used_is_not_judged": (
        "VOC truncated or size that is no number",
        "read; not used",
    ),
    "data/test_voc_reading.py::test_upper_and_lower_case_and_namespaces_lose_no_object": (
        "VOC tags in another case, or with a namespace",
        "no object is lost",
    ),
    "data/test_voc_conversion.py::test_broken_images_and_doubtful_ids_are_named": (
        "conversion: an image that is empty, unknown or enormous",
        "refused; names the file",
    ),
    "experiment/test_judge.py::test_what_stops_a_judgement_can_be_found_before_the_training": (
        "experiment: a split that cannot be judged as a whole",
        "refused before training",
    ),
    "experiment/test_judge.py::test_images_of_a_class_are_not_left_out_in_silence": (
        "classification images or classes that Ultralytics drops",
        "refused; names the first",
    ),
    "experiment/test_judge.py::test_a_training_that_validated_on_a_part_is_refused": (
        "experiment with fraction=[…]",
        "refused; names the setting",
    ),
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
