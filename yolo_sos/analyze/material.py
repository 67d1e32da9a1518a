# yolo-sos, AGPL-3.0
"""What an analysis compares, and the images that it does so on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Subset
from ultralytics.utils.torch_utils import select_device

from yolo_sos.analyze.hessian import Subject
from yolo_sos.checkpoint.file import Checkpoint
from yolo_sos.checkpoint.images import Images
from yolo_sos.heads import HostTask

FEATURES = 256  # images whose features are read if fraction is not given: a minute on a laptop


class Material:
    """Checkpoints of one task and one set of classes, and training images without augmentation, the same for all.

    Args:
        paths (Sequence[str | Path]): The checkpoints.
        data (str | Path, optional): The data set as the host names it. None: the first checkpoint's.
        imgsz (int, optional): Size of the images. None: that of the first checkpoint's training.
        batch (int, optional): Images in a batch. None: that of the training.
        fraction (float, optional): Share of the training images whose features are read. None: at most 256 images.
        device (str | int, optional): As the host names devices.
        seed (int): Chooses the images.

    Attributes:
        task (str): The task.
        data (str): The data set.
        imgsz (int): Size of the images.
        batch (int): Images in a batch.
        device (torch.device): Where everything runs.
        classes (dict[int, str]): Names of the classes.
        subjects (list[Subject]): The models.
        features (int): Number of images whose features are read.

    Raises:
        ValueError: If checkpoints differ in task or classes, or are one and the same.
        FileNotFoundError, TypeError: As ``Checkpoint`` and ``Images`` have it.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        data: str | Path | None,
        *,
        imgsz: int | None,
        batch: int | None,
        fraction: float | None,
        device: str | int | None,
        seed: int,
    ):
        """Read the checkpoints, then the data."""
        checkpoints = [Checkpoint(path) for path in paths]
        _check_alike(checkpoints)
        first = checkpoints[0]
        self.device = select_device("" if device is None else device, verbose=False)
        images = Images(first, data, images=None, imgsz=imgsz, batch=batch, device=self.device, seed=seed, splits=())
        self.task, self.data = first.task, images.args["data"]
        self.imgsz, self.batch = images.args["imgsz"], images.batch
        self.classes: dict[int, str] = first.model.names  # type: ignore[assignment]
        self._images = images
        self._order = images.heldout + images.fit  # a random permutation of the training set
        total = len(self._order)
        self.features = min(total, FEATURES) if fraction is None else max(1, round(fraction * total))
        self.subjects = [
            Subject(name, c.model.to(self.device), HostTask(c.model), c.layers)
            for name, c in zip(labels([c.path for c in checkpoints]), checkpoints, strict=True)
        ]

    def batches(self, images: int, size: int) -> Iterator[Any]:
        """Yield the first ``images`` of the chosen order, preprocessed, in batches of at most ``size``."""
        dataset = self._images.dataset
        loader = DataLoader(
            Subset(dataset, self._order[:images]), batch_size=size, collate_fn=getattr(dataset, "collate_fn", None)
        )
        for batch in loader:
            yield self._images.host.preprocess(batch)


def _check_alike(checkpoints: Sequence[Checkpoint]) -> None:
    first, *others = checkpoints
    for other in others:
        if other.task != first.task:
            raise ValueError(
                f"{first.path} is of task={first.task} and {other.path} of task={other.task}: their losses cannot be "
                "compared. Give models of one task."
            )
        ours, theirs = (len(c.model.names) for c in (first, other))  # type: ignore[arg-type]
        if ours != theirs:
            raise ValueError(
                f"{first.path} has {ours} classes and {other.path} has {theirs}: they were not trained on the same "
                "data set, and their losses cannot be compared."
            )
    paths = [c.path.resolve() for c in checkpoints]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"model={path} is given twice: there would be nothing to compare.")


def labels(paths: Sequence[Path]) -> list[str]:
    """Return short names that tell paths apart: their last parts, without ``weights`` and the suffix."""
    parts = [[p for p in path.resolve().with_suffix("").parts if p not in {"weights", "/"}] for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
