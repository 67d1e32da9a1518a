# yolo-sos, AGPL-3.0
"""What a shift of a checkpoint and a sweep over one have in common: options, their checks, and where results go."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, ClassVar

from ultralytics.utils import colorstr

from yolo_sos.checkpoint.file import Checkpoint
from yolo_sos.checkpoint.workbench import Workbench
from yolo_sos.config import SHIFT_SETTINGS, SOSConfig

IMAGES = 512  # to fit on, if not told otherwise: several of each class in most data sets
PREFIX = colorstr("SOS: ")


def settings_of(settings: dict[str, Any]) -> tuple[SOSConfig, int | None]:
    """Return the settings of a shift, checked, and the number of images to fit on (None: all).

    Args:
        settings (dict): Settings as in ``cfg/sos.yaml``, with or without ``sos_`` before their names. ``images`` may be
            ``all``. Those of a training alone are refused.

    Raises:
        ValueError: If a setting is unknown, wrong, or given by both of its names.
    """
    full: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"sos_{key}" if key in SHIFT_SETTINGS else key
        if name.removeprefix("sos_") not in SHIFT_SETTINGS:
            raise ValueError(f"'{key}' is not a setting of a checkpoint's shift: {', '.join(SHIFT_SETTINGS)}.")
        if name in full:
            raise ValueError(f"'{name}' is given twice, also as '{name.removeprefix('sos_')}'.")
        full[name] = value
    if full.get("sos_images") == "all":
        del full["sos_images"]
        return SOSConfig.from_dict(full), None
    config = SOSConfig.from_dict({"sos_images": IMAGES, **full})
    return config, config.sos_images


def check_free(paths: list[Path], exist_ok: bool) -> None:
    """Raise before any long work if a result could not be written.

    Args:
        paths (list[Path]): The files, all in one folder.
        exist_ok (bool): Whether files that are there may be replaced.

    Raises:
        FileExistsError: If one is there already and may not be replaced.
        PermissionError: If the folder cannot be written to.
    """
    for path in paths:
        if path.exists() and not exist_ok:
            raise FileExistsError(f"{path} exists already. Move it away, or pass exist_ok=True to replace it.")
    try:
        with TemporaryFile(dir=paths[0].parent):
            pass
    except OSError as e:
        raise PermissionError(f"{paths[0].parent} cannot be written to: {e.strerror}.") from e


class CheckpointJob:
    """Work on a checkpoint, checked and ready to ``run``: whatever can be wrong is told before the first image.

    Attributes:
        config (SOSConfig): The settings.
        draws (int): Drawings of rows.
        seed (int): Chooses the images and the first drawing.
        splits (tuple[str, ...]): Splits to score.
        bench (Workbench): The checkpoint and its data.
        outputs (list[Path]): The files to write, beside the checkpoint.
    """

    draws = 1
    names: ClassVar[tuple[str, ...]] = ()  # of the files to write; {} is the checkpoint's

    def __init__(
        self,
        model: str | Path,
        data: str | Path | None = None,
        *,
        draws: int | None = None,
        imgsz: int | None = None,
        batch: int | None = None,
        device: str | int | None = None,
        seed: int = 0,
        val: bool = True,
        exist_ok: bool = False,
        **settings: Any,
    ):
        """Check the options, the checkpoint, its folder and the data, in this order."""
        self.config, images = settings_of(settings)
        for name, count, least in (("draws", draws, 1), ("imgsz", imgsz, 32), ("batch", batch, 1), ("seed", seed, 0)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < least):
                raise ValueError(f"'{name}={count}' is invalid: {name} must be an integer of at least {least}.")
        for name, flag in (("val", val), ("exist_ok", exist_ok)):
            if not isinstance(flag, bool):
                raise ValueError(f"'{name}={flag}' is invalid: {name} must be true or false.")
        self.draws = draws or self.draws
        self.seed = seed
        self.splits = ("val",) if val else ()
        checkpoint = Checkpoint(model)
        self.outputs = [checkpoint.path.with_name(name.format(checkpoint.path.stem)) for name in self.names]
        check_free(self.outputs, exist_ok)
        self.bench = Workbench(
            checkpoint,
            data,
            kinds=self.config.kinds(),
            images=images,
            imgsz=imgsz,
            batch=batch,
            device=device,
            seed=seed,
            splits=self.splits,
        )

    def run(self) -> Any:
        """Do the work and write its results."""
        raise NotImplementedError
