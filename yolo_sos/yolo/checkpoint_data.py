# yolo-sos, AGPL-3.0
"""The data set of an operation on a checkpoint: opened by Ultralytics, and checked against the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ultralytics.data.utils import check_class_names, check_cls_dataset, check_det_dataset

from yolo_sos.builtin import resolve_data
from yolo_sos.data.images import check_complete
from yolo_sos.yolo.checkpoint import Checkpoint
from yolo_sos.yolo.images import ImageSample, draw


class CheckpointData:
    """A data set opened for a checkpoint: checked, and its training images as validation would see them.

    Args:
        checkpoint (Checkpoint): The model that the images are for.
        data (str, optional): The data set as Ultralytics names it. None: the one that the model was trained on.
        imgsz (int, optional): Size of the images. None: that of the training.
        batch (int, optional): Images in a batch. None: that of the training.
        device (torch.device): Where batches go.
        splits (Sequence[str]): Splits that are scored later, to be checked now.

    Attributes:
        args (dict): Ultralytics' arguments for a validation on this data set.
        batch (int): Images in a batch.
        content (dict): The data set as Ultralytics describes it.
        dataset (Dataset): The training split.

    Raises:
        FileNotFoundError: If the data set, a split or its images are missing.
        ValueError: If classes differ from the model's, or images cannot be read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: str | Path | None,
        *,
        imgsz: int | None,
        batch: int | None,
        device: torch.device,
        splits: Sequence[str] = (),
    ):
        """Check the data set and open its splits."""
        trained = checkpoint.args
        if data is None and trained["data"] is None:
            raise ValueError(f"{checkpoint.path} does not say what it was trained on. Add data=…")
        self.batch = batch or (trained["batch"] if isinstance(trained["batch"], int) and trained["batch"] > 0 else 16)
        self.args = {
            "task": checkpoint.task,
            "data": str(resolve_data(data or trained["data"])),
            "imgsz": imgsz or trained["imgsz"],
            "batch": self.batch,
            "device": str(device),
            "single_cls": trained["single_cls"],
            "workers": trained["workers"],
            "plots": False,
            "verbose": False,
            "mode": "val",
        }
        self.content = self._read(checkpoint.task)
        self.check_classes(checkpoint)
        with TemporaryDirectory() as folder:  # a validator makes a folder for its results as soon as it exists
            args = {**self.args, "overlap_mask": trained["overlap_mask"]}  # the masks that the training's loss takes
            self._validator = checkpoint.validator(args=args, save_dir=Path(folder))
        self._validator.device, self._validator.data = device, self.content
        self._validator.names = checkpoint.model.names
        self._validator.stride = max(int(checkpoint.model.stride.max()), 32)  # type: ignore[operator, union-attr]
        self.dataset = self.open("train")
        for split in splits:
            self.open(split)

    def sample(self, sizes: dict[str, int], seed: int) -> ImageSample:
        """Return random sets of the training images, see ``ImageSample``."""
        return ImageSample(self.dataset, self._validator.preprocess, self.batch, sizes, self.order(seed))

    def order(self, seed: int) -> list[int]:
        """Return the positions of the training images in the order in which a sample takes them: a random one."""
        return draw(len(self.dataset), None, seed)

    def validation(self, split: str, **more: Any) -> dict[str, Any]:
        """Return Ultralytics' arguments for a validation on a split, as 'yolo val' has them, and more."""
        return {**self.args, "rect": True, "split": split, **more}

    def check_classes(self, checkpoint: Checkpoint) -> None:
        """Raise a ``ValueError`` if a checkpoint has other classes than the data set."""
        ours, theirs = check_class_names(checkpoint.model.names), check_class_names(self.content["names"])
        if not self.args["single_cls"] and ours != theirs:
            first = next(i for i in range(max(len(ours), len(theirs))) if ours.get(i) != theirs.get(i))
            raise ValueError(
                f"The classes of {checkpoint.path} and {self.args['data']} do not match: {len(ours)} and "
                f"{len(theirs)}, and class {first} is {ours.get(first)!r} and {theirs.get(first)!r}. Give the data set "
                "that the model was trained on."
            )

    def _read(self, task: str) -> dict[str, Any]:
        """Return the data set as Ultralytics describes it."""
        name = self.args["data"]
        if task == "classify":
            if Path(name).is_absolute() and not Path(name).is_dir():  # Ultralytics would try to download it
                raise FileNotFoundError(f"{name}: there is no such folder of images.")
            return check_cls_dataset(name)
        try:
            return check_det_dataset(name)
        except KeyError as e:  # how Ultralytics says that the numbers of the classes have gaps
            raise ValueError(f"{name}: {e.args[0]}") from e

    def open(self, split: str) -> Any:
        """Return a split as Ultralytics reads it; images that it leaves out are an error.

        Raises:
            FileNotFoundError: If there is no such split, or it has no images.
            ValueError: If images cannot be read.
        """
        path = self.content.get(split)
        if not path:
            raise FileNotFoundError(f"{self.args['data']} has no '{split}' split.")
        try:
            dataset = self._validator.build_dataset(path)
        except RuntimeError as e:  # how Ultralytics says that no image is left, and why for each of them
            raise ValueError(" ".join(str(e).splitlines()[:2])) from e
        if hasattr(dataset, "samples"):  # a classification data set
            listed, kept = [s[0] for s in dataset.base.samples], [s[0] for s in dataset.samples]
        else:
            listed, kept = dataset.get_img_files(dataset.img_path), dataset.im_files
        if not listed:
            raise FileNotFoundError(f"{path}: no images.")
        check_complete(listed, kept, f"{self.args['data']}, split '{split}'")
        return dataset
