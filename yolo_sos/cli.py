# yolo-sos, AGPL-3.0
"""The command ``yolo-sos``, in Ultralytics' ``key=value`` grammar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any, NoReturn

from yolo_sos import __version__
from yolo_sos.arguments import check_keys, find_cfg, read_cfg, training_keys
from yolo_sos.config import RECIPE, SHIFT_SETTINGS, SOS_YAML, SOSConfig, is_sos_key, resolve_data, resolve_model

SHIFT_KEYS = (
    *("model", "data", "draws", "sweep", "imgsz", "batch", "device", "seed", "val", "exist_ok"),
    *(*SHIFT_SETTINGS, *(f"sos_{name}" for name in SHIFT_SETTINGS)),
)
ANALYZE_KEYS = (
    *("model", "data", "runs", "scope", "probes", "stderr", "images", "landscape", "weighting", "imgsz", "batch"),
    *("fraction", "device", "seed", "project", "name", "exist_ok"),
)
# Of an experiment's grid; besides, what a training takes and an arm does not settle
EXPERIMENT_KEYS = ("seeds", "arms", "plan", "launcher", "splits", "results")
MODE_KEYS = {"shift": SHIFT_KEYS, "analyze": ANALYZE_KEYS, "table": ("results",)}
NOT_FOR_ALL = ("cfg", "exist_ok", "mode", "name", "resume", "save_dir", "seed")
# What a wrong argument, or a file that an argument names, can raise in the host and here
BAD_INPUT = (ValueError, TypeError, SyntaxError, AssertionError, OSError, OverflowError, RecursionError)
HELP = """
    yolo-sos: Ultralytics YOLO with stochastic optimum shifting (SOS).

        yolo-sos [TASK] MODE ARGS

        Where   TASK (optional), MODE and ARGS are those of 'yolo', and ARGS of train also take the sos settings
                that 'yolo-sos cfg' prints.

    1. Train a detector with SOS:
        yolo-sos train data=VOC.yaml model=yolov5s.pt sos=true

    2. Keep a quarter of each final layer's input dimensions, from the last fifth of the epochs on:
        yolo-sos train data=coco8.yaml model=yolo11n.pt epochs=50 sos=true sos_rank=0.25 sos_start=0.8

    3. The paper's row sampling, half as many rows as a layer has inputs, every epoch:
        yolo-sos train data=VOC.yaml model=yolov5s.pt cfg=voc/rows.yaml

    4. No data at hand: real handwritten digits, made on first use
        yolo-sos train data=digits.yaml model=yolov5n.yaml imgsz=160 epochs=15 sos=true

    5. Train a classifier, with the paper's recipe for CIFAR; no data at hand: data=digits-cls
        yolo-sos train data=cifar100 model=resnet18-cifar.yaml cfg=cifar/rows.yaml sos_rank=300
        yolo-sos train data=digits-cls model=yolo11n-cls.yaml imgsz=32 epochs=10 sos=true

    6. Continue an interrupted run, with the settings it was started with:
        yolo-sos train resume=runs/detect/train/weights/last.pt

    7. Validate, predict, export, track, benchmark: as with 'yolo'
        yolo-sos val model=runs/detect/train/weights/best.pt data=VOC.yaml

    8. Shift a checkpoint that is trained already; writes best-sos.pt and shift.json beside it:
        yolo-sos shift model=runs/detect/train/weights/best.pt data=VOC.yaml
        yolo-sos shift model=best.pt data=VOC.yaml method=rows rank=0.5 draws=10 images=all

        Takes method, rank, weighting, budget, solver, layers and guard as 'yolo-sos cfg' explains them for training
        (their names there work, too); images=512 to fit on, or all; draws=10 for method rows: the one of least
        held-out loss is taken; val=true to score the val split before and after; imgsz and batch, those of the
        training if not given; device, seed=0, exist_ok=false. Exits with 3, and writes nothing, where every step
        along the shift raises the held-out loss by more than guard.

    9. Trace every method over its range instead; writes sweep.csv and sweep.png beside it:
        yolo-sos shift model=best.pt data=VOC.yaml sweep=true

    10. See what a shift or a training with SOS did: curvature, neural collapse, spectra and loss landscapes of
        checkpoints, compared on the same images, in report.html; and curves of runs trained with sos_analyze:
        yolo-sos analyze model=best.pt,best-sos.pt data=VOC.yaml
        yolo-sos train data=VOC.yaml model=yolov5s.pt sos=true sos_analyze=10
        yolo-sos analyze runs=runs/detect/train,runs/detect/train2

        Takes scope=all, before or final (the parameters of the curvature), probes=24 and stderr=0.02 (relative),
        whichever is reached first; images=8 for curvature and landscape; landscape=true; weighting; fraction of the
        images whose features are read, at most 256 images if not given; imgsz, batch, device, seed, project, name,
        exist_ok.

    11. Compare arms over seeds, with a record of each run and a table of all; finished runs are skipped, interrupted
        ones go on. An experiment is a folder with default.yaml and a YAML of differences per arm:
        yolo-sos experiment voc/yolov5s seeds=0,1,2 device=0
        yolo-sos experiment bccd arms=baseline,principal seeds=0,1,2,3,4 plan=true
        yolo-sos table voc/yolov5s

        Takes plan=true, which runs nothing; arms; launcher=ray, a task per run on a Ray cluster; splits=val,test to
        judge on; project for the runs and results for the records; and what train takes, for all arms.

    12. Special commands:
        yolo-sos help
        yolo-sos version
        yolo-sos checks
        yolo-sos cfg
"""


def main(argv: list[str] | None = None) -> None:
    """Run ``yolo-sos``.

    Args:
        argv (list[str], optional): Arguments without the program's name. None: those of the process.
    """
    args = sys.argv[1:] if argv is None else argv
    special = {"help": print_help, "version": print_version, "checks": run_checks, "cfg": print_cfg}
    command = args[0].lstrip("-").lower() if args else "help"
    command = {"h": "help", "v": "version"}.get(command, command)
    if command in special:
        special[command]()
        return
    try:
        check_arguments(args)
        words, overrides = parse(args)
        run = plan(words, overrides)
    except BAD_INPUT as e:
        fail(e)
    run()


def fail(error: Exception) -> NoReturn:
    """Tell what is wrong with the command, without a traceback, and exit with status 2."""
    print(f"yolo-sos: {str(error).strip()}", file=sys.stderr)
    raise SystemExit(2)


def print_help() -> None:
    """Print the help."""
    print(HELP)


def print_version() -> None:
    """Print the versions of yolo-sos and of its host."""
    print(f"yolo-sos {__version__} (ultralytics {version('ultralytics')})")


def print_cfg() -> None:
    """Print every setting with its default and what it does."""
    print(SOS_YAML.read_text(encoding="utf-8"))


def run_checks() -> None:
    """Print the host's system check, and the version of yolo-sos."""
    from ultralytics.utils.checks import collect_system_info

    collect_system_info()
    print_version()


def check_arguments(args: list[str]) -> None:
    """Raise a ``ValueError`` that names a wrong key and the nearest valid one, before anything heavy is loaded."""
    mode = next((mode for mode in MODE_KEYS if mode in args), None)
    keys = [arg.lstrip("-").split("=")[0].strip() for arg in args if "=" in arg]
    valid: Iterable[str] = MODE_KEYS[mode] if mode else training_keys()
    if "experiment" in args:
        valid = [*EXPERIMENT_KEYS, *(key for key in training_keys() if key not in NOT_FOR_ALL)]
    check_keys((key for key in keys if key), valid)


def parse(args: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the bare words and the ``key=value`` pairs, those of a ``cfg=`` file included."""
    from ultralytics.cfg import merge_equals_args, parse_key_value_pair

    words: list[str] = []
    overrides: dict[str, Any] = {}
    try:
        merged = merge_equals_args(args)
    except IndexError:
        raise ValueError("there is no key before '='. Arguments are written key=value.") from None
    for arg in merged:
        arg = arg.lstrip("-").rstrip(",")
        if "=" not in arg:
            words.append(arg)
            continue
        key, value = parse_key_value_pair(arg)
        if key == "cfg" and value is not None:
            overrides = {**read_cfg(find_cfg(value)), **overrides}
        else:
            overrides[key] = value
    check_arguments([*words, *(f"{k}=" for k in overrides)])  # again: 'key = value' is put together only now
    for key, resolve in (("data", resolve_data), ("model", resolve_model)):
        if key in overrides:
            overrides[key] = resolve(overrides[key])
    return words, overrides


def plan(words: list[str], overrides: dict[str, Any]) -> Callable[[], Any]:
    """Return what the command does: train with a trainer of ours, or whatever 'yolo' does.

    Raises:
        ValueError: If settings of SOS are given where they would have no effect, or a word is unknown.
        TypeError: If the model has no final linear layer that SOS can shift.
    """
    from ultralytics.cfg import MODES

    if "shift" in words:
        return plan_shift(words, overrides)
    if "analyze" in words:
        return plan_analyze(words, overrides)
    if "experiment" in words:
        return plan_experiment(words, overrides)
    if "table" in words:
        return plan_table(words, overrides)
    settings = {k: v for k, v in overrides.items() if is_sos_key(k)}
    host = {k: v for k, v in overrides.items() if not is_sos_key(k)}
    if "sos" in words:
        words, settings["sos"] = [w for w in words if w != "sos"], True  # as 'yolo train exist_ok' sets exist_ok
    config = SOSConfig.from_dict(settings)
    given = ", ".join(f"{k}={v}" for k, v in settings.items())
    if next((w for w in words if w in MODES), host.get("mode")) != "train":
        if settings:
            raise ValueError(f"{given}: settings of SOS belong to 'yolo-sos train'.")
        return lambda: run_host(words, host)
    if "sos" not in settings and not settings.keys() <= set(RECIPE):
        raise ValueError(f"{given} without sos=true would train without SOS. Add sos=true.")
    return plan_training(words, host, settings, config)


def plan_training(
    words: list[str], host: dict[str, Any], settings: dict[str, Any], config: SOSConfig
) -> Callable[[], Any]:
    """Return a training by a trainer of ours, which is the host's as long as SOS is off; or by the host's own."""
    from ultralytics import YOLO
    from ultralytics.cfg import DEFAULT_CFG_DICT, MODES, TASK2DATA, TASK2MODEL, TASKS
    from ultralytics.utils import LOGGER

    from yolo_sos.heads import final_layers, select_layers
    from yolo_sos.train import TRAINERS

    task = next((w for w in words if w in TASKS), host.get("task"))
    arguments = {k: v for k, v in host.items() if k not in {"task", "mode"}}
    for word in (w for w in words if w not in TASKS and w not in MODES):
        if not isinstance(DEFAULT_CFG_DICT.get(word), bool):
            raise ValueError(f"'{word}' is not a task, a mode or a switch. Arguments are written key=value.")
        arguments[word] = True
    resume = arguments.get("resume")
    if resume and resume is not True:
        arguments["model"] = resume  # 'yolo' would load its default model first
    elif resume and not arguments.get("model"):
        raise ValueError("resume needs the checkpoint to resume from: resume=path/to/last.pt")
    model_name = arguments.get("model") or TASK2MODEL[task or "detect"]
    try:
        model = YOLO(model_name, task=task)
    except NotImplementedError:  # a YAML of another family, such as RT-DETR
        if not config.stock:
            raise TypeError(
                f"{model_name} is not a YOLO model: it has no final linear layers that SOS can shift."
            ) from None
        return lambda: run_host(words, host)
    if config.sos:
        select_layers(final_layers(model.model), config.kinds())
    if type(model) is not YOLO or model.task not in TRAINERS:
        if not config.stock:
            asked = "sos=true" if config.sos else ", ".join(f"{k}={settings[k]}" for k in RECIPE if k in settings)
            raise ValueError(f"{asked} does not support task={model.task} yet. It does: {', '.join(TRAINERS)}.")
        return lambda: run_host(words, host)
    if not resume and arguments.get("data") is None:
        arguments["data"] = TASK2DATA[model.task]
        LOGGER.warning(f"'data' argument is missing. Using default 'data={arguments['data']}'.")
    arguments["model"] = model_name
    return lambda: run_training(model, {"trainer": TRAINERS[model.task], **arguments, **settings})


def plan_shift(words: list[str], options: dict[str, Any]) -> Callable[[], Any]:
    """Return a shift of a checkpoint, or a sweep over one, with everything checked."""
    from ultralytics.cfg import TASKS

    from yolo_sos.checkpoint import CheckpointShift, CheckpointSweep

    for word in (w for w in words if w not in TASKS and w != "shift"):
        if word not in {"sweep", "val", "exist_ok"}:
            raise ValueError(f"'{word}' is not a switch of shift. Arguments are written key=value.")
        options[word] = True
    if not options.get("model"):
        raise ValueError("shift needs a checkpoint: model=path/to/best.pt")
    sweep = options.pop("sweep", False)
    if not isinstance(sweep, bool):
        raise ValueError(f"'sweep={sweep}' is invalid: sweep must be true or false.")
    job = (CheckpointSweep if sweep else CheckpointShift)(**options)
    return lambda: run_shift(job)


def plan_analyze(words: list[str], options: dict[str, Any]) -> Callable[[], Any]:
    """Return a comparison of checkpoints, or of the curves of runs, with everything checked."""
    from ultralytics.cfg import TASKS

    from yolo_sos.analyze import Comparison, Curves

    for word in (w for w in words if w not in TASKS and w != "analyze"):
        if word not in {"landscape", "exist_ok"}:
            raise ValueError(f"'{word}' is not a switch of analyze. Arguments are written key=value.")
        options[word] = True
    if options.get("runs"):
        if other := sorted(options.keys() - {"runs", "project", "name", "exist_ok"}):
            raise ValueError(f"{', '.join(other)} have no effect with runs=…, which reads what runs have measured.")
        return Curves(**options).run
    if not options.get("model"):
        raise ValueError("analyze needs checkpoints, model=best.pt,best-sos.pt, or runs=runs/detect/a,runs/detect/b")
    return Comparison(**options).run


def plan_experiment(words: list[str], options: dict[str, Any]) -> Callable[[], Any]:
    """Return a grid of runs, with everything checked."""
    from yolo_sos.experiment.grid import Experiment

    names = [w for w in words if w not in {"experiment", "plan"}]
    if len(names) != 1:
        raise ValueError("experiment takes one name, such as voc/yolov5s, or a folder that holds default.yaml.")
    if "plan" in words:
        options["plan"] = True
    grid = Experiment(names[0], **options)
    return lambda: run_experiment(grid)


def plan_table(words: list[str], options: dict[str, Any]) -> Callable[[], Any]:
    """Return a table of the records of an experiment, which are all read and compared already."""
    from yolo_sos.experiment.table import ResultTable

    names = [w for w in words if w != "table"]
    if len(names) != 1:
        raise ValueError("table takes one name of an experiment, such as voc/yolov5s.")
    return ResultTable(names[0], **options).run


def run_training(model: Any, arguments: dict[str, Any]) -> None:
    """Train; what goes wrong before the first epoch lies in arguments or data, and is told without a traceback."""
    started: list[bool] = []
    model.add_callback("on_train_start", lambda _: started.append(True))
    try:
        model.train(**arguments)
    except (*BAD_INPUT, RuntimeError) as e:  # the host's for a data set that it cannot read
        if started:
            raise
        fail(e)


def run_shift(job: Any) -> None:
    """Run a shift or a sweep; exit with status 3 if the guard let nothing pass."""
    try:
        done = job.run()
    except OSError as e:  # an image that cannot be read after all, a disk that is full
        fail(e)
    if getattr(done, "output", "") is None:
        raise SystemExit(3)


def run_experiment(grid: Any) -> None:
    """Run a grid; exit with status 1 if a run failed."""
    if grid.run():
        raise SystemExit(1)


def run_host(words: list[str], overrides: dict[str, Any]) -> None:
    """Run 'yolo' with these arguments."""
    # The host reads sys.argv through a name of its own that it binds once: the same list, so it is filled in place.
    sys.argv[:] = ["yolo", *words, *(f"{k}={v}" for k, v in overrides.items())]
    from ultralytics.cfg import entrypoint

    entrypoint()


if __name__ == "__main__":
    main()
