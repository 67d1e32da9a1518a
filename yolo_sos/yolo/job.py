# yolo-sos, AGPL-3.0
"""What operations on a trained checkpoint have in common: options, their checks, images, and where results go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, ClassVar

from torch import Tensor
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import TQDM
from ultralytics.utils.torch_utils import select_device

from yolo_sos.config import SHIFT_SETTINGS, SOSConfig
from yolo_sos.core import Engine, FinalLayer, HeldOut, Method, Moments, as_float64, input_rows, weight_matrix
from yolo_sos.core.checks import at_least, boolean, number, optional
from yolo_sos.yolo.checkpoint import Checkpoint
from yolo_sos.yolo.checkpoint_data import CheckpointData
from yolo_sos.yolo.heads import YoloTask, layers_of_kinds
from yolo_sos.yolo.images import IMAGES, counted, split_sizes
from yolo_sos.yolo.recording import Pass, record


def shift_settings(settings: dict[str, Any]) -> tuple[SOSConfig, int | None]:
    """Return the settings of a single shift, checked, and the number of images to fit on (None: all).

    Args:
        settings (dict): Settings as in ``cfg/sos.yaml``, with or without ``sos_`` before their names. ``images`` may be
            ``all``. Those that only a training has are refused.

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


def check_free(paths: Sequence[Path], exist_ok: bool) -> None:
    """Raise before any long work if a result could not be written.

    Args:
        paths (Sequence[Path]): The files.
        exist_ok (bool): Whether existing files may be replaced.

    Raises:
        FileExistsError: If one exists already and may not be replaced.
        PermissionError: If a folder cannot be written to.
    """
    for path in paths:
        if path.exists() and not exist_ok:
            raise FileExistsError(f"{path} exists already. Move it away, or pass exist_ok=True to replace it.")
    for folder in {path.parent for path in paths}:
        try:
            with TemporaryFile(dir=folder):
                pass
        except OSError as e:
            raise PermissionError(f"{folder} cannot be written to: {e.strerror}.") from e


class CheckpointJob:
    """Work on a checkpoint, checked and ready to ``run``: errors are raised before the first image is read.

    Args:
        model (str | Path): A checkpoint of Ultralytics.
        data (str | Path, optional): The data set as Ultralytics names it. None: that of the training.
        kinds (Sequence[str]): Kinds of the final layers to work on.
        sizes (Callable): Number of training images → set → number of its images, see ``split_sizes``.
        imgsz (int, optional): Image size. None: that of the training.
        batch (int, optional): Images at a time. None: that of the training.
        device (str | int, optional): As Ultralytics names it. None: what it picks.
        seed (int): Chooses the images.
        val (bool): Whether to score the val split.
        exist_ok (bool): Whether results that exist may be replaced.

    Attributes:
        splits (tuple[str, ...]): Splits to score.
        checkpoint (Checkpoint): The checkpoint.
        data (CheckpointData): Its data.
        images (ImageSample): The images, in disjoint sets.
        layers (list[FinalLayer]): The layers to work on.
        outputs (list[Path]): The files to write, beside the checkpoint.
    """

    names: ClassVar[tuple[str, ...]] = ()  # of the files to write; {} is the checkpoint's
    opens: ClassVar[type[CheckpointData]] = CheckpointData

    def __init__(
        self,
        model: str | Path,
        data: str | Path | None = None,
        *,
        kinds: Sequence[str],
        sizes: Callable[[int], dict[str, int]],
        imgsz: int | None = None,
        batch: int | None = None,
        device: str | int | None = None,
        seed: int = 0,
        val: bool = True,
        exist_ok: bool = False,
    ):
        """Check the options, the checkpoint, its folder and the data, in this order."""
        imgsz, batch = optional(at_least(32))("imgsz", imgsz), optional(at_least(1))("batch", batch)
        # As many as NumPy takes, which Ultralytics' trainers seed with theirs
        seeds = number("an integer of at least 0 and below 2^32", lambda x: 0 <= x < 2**32, integer=True)
        self.seed = seeds("seed", seed)
        self.splits = ("val",) if boolean("val", val) else ()
        self.checkpoint = Checkpoint(model)
        self.outputs = [self.checkpoint.path.with_name(name.format(self.checkpoint.path.stem)) for name in self.names]
        check_free(self.outputs, boolean("exist_ok", exist_ok))
        self.layers = layers_of_kinds(self.checkpoint.layers, kinds)
        self.device = select_device("" if device is None else device, verbose=False)
        self.data = self.opens(self.checkpoint, data, imgsz=imgsz, batch=batch, device=self.device, splits=self.splits)
        self.images = self.data.sample(sizes(len(self.data.dataset)), seed)
        self.model = self.checkpoint.model.to(self.device)
        self.task = YoloTask(self.model)

    def run(self) -> Any:
        """Do the work and write its results."""
        raise NotImplementedError

    def read_back(self, path: Path) -> HeldOut:
        """Read a checkpoint that was written as Ultralytics does, and return its loss on the held-out images."""
        model, _ = load_checkpoint(path, device=self.device)
        task = YoloTask(model, self.task.criterion)
        return Engine(model, task.layers, task).hold_out(self.images.batches("heldout"))

    def score(self, weights: Sequence[dict[str, Tensor]], split: str, keep: bool = False) -> Pass:
        """Validate on a split, as the model is and with each set of weights, see ``record``.

        Weights are rounded to half precision first, as a checkpoint holds them.
        """
        rounded = [{name: w.half().to(w.dtype) for name, w in one.items()} for one in weights]
        return record(self.checkpoint.validator, self.data.validation(split), self.model, rounded, keep=keep)


class ShiftJob(CheckpointJob):
    """A job that shifts: its images are in sets ``fit``, ``heldout`` and, to choose between draws, ``selection``.

    Attributes:
        config (SOSConfig): The settings.
        draws (int): Drawings of rows, the first by ``seed``.
    """

    draws = 1

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
        """Check the settings of the shift, then everything else as ``CheckpointJob``."""
        self.config, images = shift_settings(settings)
        self.draws = optional(at_least(1))("draws", draws) or self.draws
        several = self.config.sos_method == "rows" and self.draws > 1
        super().__init__(
            model,
            data,
            kinds=self.config.kinds,
            sizes=lambda available: split_sizes(available, images, selection=several),
            imgsz=imgsz,
            batch=batch,
            device=device,
            seed=seed,
            val=val,
            exist_ok=exist_ok,
        )

    def fitted(self, trials: Sequence[tuple[Method, int]]) -> Engine:
        """Return an engine that has seen the images to fit on, each once."""
        engine = Engine(self.model, self.layers, self.task, trials)
        with TQDM(total=len(self.images.sets["fit"]), desc="fit images", unit="img") as bar:
            engine.fit(counted(self.images.batches("fit"), bar))
        return engine


def heldout_moments(layers: Sequence[FinalLayer], heldout: HeldOut) -> dict[str, Moments]:
    """Return the second moment of each layer's rows on held-out images, all alike, by name."""
    moments = {layer.name: Moments(weight_matrix(layer.module).shape[1]) for layer in layers}
    for inputs in heldout.inputs:
        for layer in layers:
            moments[layer.name].update(input_rows(layer.module, inputs[layer.name]))
    return moments


def deviations(layers: Sequence[FinalLayer], moments: dict[str, Moments], weights: dict[str, Any]) -> dict[str, float]:
    """Return ``‖A(V*−V)ᵀ‖_F / ‖AVᵀ‖_F`` of each layer, on the rows whose second moments are given."""
    found = {}
    for layer in layers:
        g = moments[layer.name].matrix
        v = as_float64(weight_matrix(layer.module)).to(g.device)
        change = as_float64(weights[layer.name]).to(g.device) - v
        size, moved = (float((x @ g * x).sum()) for x in (v, change))
        found[layer.name] = (max(moved, 0.0) / size) ** 0.5 if size > 0 else 0.0
    return found
