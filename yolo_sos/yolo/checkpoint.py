# yolo-sos, AGPL-3.0
"""A checkpoint of Ultralytics: read, checked, and written with other weights in its final layers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.nn.tasks import torch_safe_load
from ultralytics.utils import IterableSimpleNamespace
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

from yolo_sos import __version__
from yolo_sos.config import CHECKPOINT_KEY, SOSConfig
from yolo_sos.core import write_weights
from yolo_sos.core.checks import invalid
from yolo_sos.yolo.heads import final_layers

# What a checkpoint holds under our key that was not trained with SOS: its training goes on without SOS. Plain values
# only, since a class of ours would make it unreadable without yolo_sos.
UNTRAINED = {"version": __version__, "settings": SOSConfig().to_dict()}


class Checkpoint:
    """A trained checkpoint whose final layers can be rewritten; anything else is refused with the reason.

    Args:
        path (str | Path): A ``.pt`` of Ultralytics, finished or to be resumed, of half or full precision.

    Attributes:
        path (Path): The file.
        model (nn.Module): What Ultralytics runs of it: the EMA where there is one. In float32 and eval mode.
        task (str): ``detect``, ``segment``, ``pose``, ``obb`` or ``classify``.
        args (dict): Ultralytics' arguments of the training, the defaults where the checkpoint holds none.
        layers (list[FinalLayer]): All final layers of the model.
        validator (type): Ultralytics' validator for the task.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If it is no checkpoint of Ultralytics, or its head has no final linear layer.
        ValueError: If the path is none, the model is fused or its weights are not numbers.
    """

    def __init__(self, path: str | Path):
        """Read and check the file."""
        if not isinstance(path, (str, Path)):
            raise invalid("model", path, "the path of a checkpoint, a .pt")
        if Path(path).suffix.lower() != ".pt":
            raise TypeError(
                f"{path} is not a checkpoint, a .pt that a training wrote. Exports (ONNX, TorchScript, …) stay as they "
                "are: take the .pt that they were made from, and export again."
            )
        if "://" not in str(path) and not Path(path).is_file() and Path(path).name not in GITHUB_ASSETS_NAMES:
            raise FileNotFoundError(f"{path}: there is no such checkpoint.")  # Ultralytics would try to download it
        try:
            yolo = YOLO(path)
        except (AttributeError, KeyError, OSError) as e:  # a pickle of something else; some truncated archives
            if getattr(e, "filename", None):  # not the content's fault
                raise
            raise TypeError(f"{path} is not a checkpoint of Ultralytics, or damaged: {type(e).__name__}: {e}") from e
        self.path = Path(yolo.ckpt_path)
        self.model: nn.Module = yolo.model
        self.layers = final_layers(self.model)
        if self.model.is_fused():  # type: ignore[operator]
            raise ValueError(
                f"{self.path} holds a fused model: its BatchNorm layers are folded into the convolutions, so it can "
                "neither be trained further nor keep the statistics that its features rest on. Take the checkpoint "
                "that the training wrote."
            )
        for name, tensor in self.model.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{self.path}: {name} holds values that are not finite (NaN or Inf).")
        self.task: str = yolo.task
        self.validator: type[Any] = yolo._smart_load("validator")
        self.args: dict[str, Any] = {**DEFAULT_CFG_DICT, **(yolo.ckpt.get("train_args") or {})}
        self.model.args = IterableSimpleNamespace(**self.args)  # Ultralytics' losses read their gains here

    def save(self, path: Path, weights: dict[str, Tensor], note: dict[str, Any], key: str = "shifts") -> None:
        """Write the checkpoint as it is, but for other weights and a note; in half precision, as Ultralytics saves.

        Whatever else it holds (optimizer, epoch, arguments) stays, so that an unfinished run can be resumed.

        Args:
            path (Path): The file to write.
            weights (dict[str, Tensor]): Layer name → ``(out, d)``, or ``[V b]``.
            note (dict): Plain values that tell of what was done.
            key (str): The list in the checkpoint that the note is added to.
        """
        ckpt, _ = torch_safe_load(self.path)  # again: Ultralytics alters in place what it loads
        model = ckpt.get("ema") or ckpt["model"]
        model.half()
        write_weights(model, weights)
        before = ckpt.get(CHECKPOINT_KEY) or UNTRAINED
        ckpt[CHECKPOINT_KEY] = {**before, key: [*before.get(key, []), {"version": __version__, **note}]}
        write_checkpoint(path, ckpt)


def write_checkpoint(path: Path, ckpt: dict[str, Any]) -> None:
    """Write the content of a checkpoint; the same content gives the same file."""
    buffer = io.BytesIO()  # torch.save to a path puts the path's name into every record
    torch.save(ckpt, buffer)
    path.write_bytes(buffer.getbuffer())
