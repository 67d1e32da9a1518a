# yolo-sos, AGPL-3.0
"""``yolo-sos train``: a trainer of ours, which is Ultralytics' as long as none of our settings asks for more."""

from __future__ import annotations

from typing import Any

from yolo_sos.arguments import DEPRECATED, sos_arguments, ultralytics_arguments, with_file
from yolo_sos.builtin import resolve_model
from yolo_sos.cli import stock
from yolo_sos.cli.grammar import BAD_INPUT, Mode, refusing
from yolo_sos.config import RECIPE, SOSConfig, is_sos_key


def run(arguments: dict[str, Any]) -> None:
    """Train. What is wrong is told before a model or data are downloaded, as far as it can be known by then."""
    with refusing():
        arguments = with_file(arguments)
        if arguments.get("mode", "train") != "train":  # in a file
            return stock.run(arguments)
        settings = {key: arguments.pop(key) for key in list(arguments) if is_sos_key(key)}
        resume = arguments.get("resume")
        config = SOSConfig.from_dict(settings) if resume else SOSConfig.of_training(settings)

        from ultralytics import YOLO
        from ultralytics.cfg import TASK2DATA, TASK2MODEL, get_cfg
        from ultralytics.utils import LOGGER

        from yolo_sos.recipes.sharpness import library
        from yolo_sos.trainers import TRAINERS
        from yolo_sos.yolo.heads import final_layers, layers_of_kinds

        if resume and resume is not True:
            arguments["model"] = resume  # Ultralytics would load its default model first
        elif resume and not arguments.get("model"):
            raise ValueError("resume needs the checkpoint to resume from: resume=path/to/last.pt")
        get_cfg(overrides=arguments)  # refuses wrong values, and replaces deprecated keys
        if config.sharpness_aware:
            library(config.sharpness_aware)
        task = arguments.pop("task", None)
        if task not in {None, *TASK2MODEL}:
            raise ValueError(f"'task={task}' is invalid: task must be one of {', '.join(TASK2MODEL)}.")
        arguments["model"] = resolve_model(arguments.get("model") or TASK2MODEL[task or "detect"])
        asked = ", ".join(f"{key}={settings[key]}" for key in ("sos", *RECIPE) if settings.get(key))
        try:
            model = YOLO(arguments["model"], task=task)
        except NotImplementedError:  # a YAML of another family, such as RT-DETR
            if not config.stock:
                raise TypeError(f"{asked}: {arguments['model']} is not a YOLO model.") from None
            return stock.run({"mode": "train", **arguments})
        if config.sos:
            layers_of_kinds(final_layers(model.model), config.kinds)
        trainer = TRAINERS.get(model.task) if type(model) is YOLO else None
        if trainer is None and not config.stock:
            raise ValueError(f"{asked} does not support task={model.task} yet. It does: {', '.join(TRAINERS)}.")
        if type(model) is not YOLO:  # such as YOLOE, whose classes can be texts
            return stock.run({"mode": "train", **arguments})
        if not resume and arguments.get("data") is None:
            arguments["data"] = TASK2DATA[model.task]
            LOGGER.warning(f"'data' argument is missing. Using default 'data={arguments['data']}'.")

    started: list[bool] = []
    model.add_callback("on_train_start", lambda _: started.append(True))
    # RuntimeError: what Ultralytics raises for a data set that it cannot read
    with refusing(*BAD_INPUT, RuntimeError, unless=lambda: bool(started)):
        model.train(trainer=trainer, **arguments, **settings)


MODE = Mode(
    "train",
    "train a model, with stochastic optimum shifting if sos=true",
    [
        "train data=VOC.yaml model=yolov5s.pt sos=true",
        "train data=coco8.yaml model=yolo11n.pt epochs=50 sos=true sos_rank=0.25 sos_start=0.8",
        "train data=cifar100 model=resnet18-cifar.yaml cfg=cifar/rows.yaml sos_rank=300",
        "train data=digits.yaml model=yolov5n.yaml imgsz=160 epochs=15 sos=true",
        "train resume=runs/detect/train/weights/last.pt",
    ],
    lambda: {"Settings of SOS, and what goes with it:": sos_arguments(), "Ultralytics:": ultralytics_arguments()},
    run,
    also=DEPRECATED,
    result="Without sos=true it is 'yolo train'. cfg=file.yaml may hold any of the arguments. data=digits.yaml, and "
    "data=digits-cls for classifiers, need no download.",
)
