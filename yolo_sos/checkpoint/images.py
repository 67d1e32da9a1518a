# yolo-sos, AGPL-3.0
"""The images of a shift: the training split as validation would see it, in two disjoint parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from ultralytics.data.utils import check_class_names, check_cls_dataset, check_det_dataset, check_image
from ultralytics.utils import TQDM

from yolo_sos.checkpoint.file import Checkpoint
from yolo_sos.config import resolve_data
from yolo_sos.core.shift import HELD_OUT


class Images:
    """The data set of a checkpoint, checked, and its training images in batches.

    Args:
        checkpoint (Checkpoint): The model that the images are for.
        data (str, optional): The data set as the host names it. None: the one that the model was trained on.
        images (int, optional): Images to fit on. None: all but those held out.
        imgsz (int, optional): Their size. None: that of the training.
        batch (int, optional): Images in a batch. None: that of the training.
        device (torch.device): Where batches go.
        seed (int): Chooses the images.
        splits (Sequence[str]): Splits that are scored later, to be checked now.

    Attributes:
        args (dict): The host's arguments for a validation on this data set.
        fit (list[int]): Positions of the images to fit on.
        heldout (list[int]): Positions of others: a third of the set, at most 32, the same whatever ``images`` is.

    Raises:
        FileNotFoundError: If the data set, a split or its images are missing.
        ValueError: If classes differ from the model's, images cannot be read, or there are too few.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: str | Path | None,
        *,
        images: int | None,
        imgsz: int | None,
        batch: int | None,
        device: torch.device,
        seed: int,
        splits: tuple[str, ...],
    ):
        """Check the data set and choose the images."""
        trained = checkpoint.args
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
        if data is None and trained["data"] is None:
            raise ValueError(f"{checkpoint.path} does not say what it was trained on. Add data=…")
        self.data = self._read(checkpoint)
        with TemporaryDirectory() as folder:  # a validator makes a folder for its results as soon as it exists
            self.host = checkpoint.validator(args=self.args, save_dir=Path(folder))
        self.host.device, self.host.data, self.host.names = device, self.data, checkpoint.model.names
        self.host.stride = max(int(checkpoint.model.stride.max()), 32)  # type: ignore[operator, union-attr]
        self.dataset = self._open("train")
        for split in splits:
            self._open(split)
        if len(self.dataset) < 2:
            raise ValueError(
                f"{self.args['data']}: a shift needs at least 2 training images, one to fit on and one to hold out; "
                f"there is {len(self.dataset)}."
            )
        held = min(HELD_OUT, max(1, len(self.dataset) // 3))
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        self.heldout = order[:held]
        self.fit = order[held:][:images]

    def _read(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the data set as the host describes it, after comparing its classes with the model's."""
        name = self.args["data"]
        if checkpoint.task == "classify":
            if Path(name).is_absolute() and not Path(name).is_dir():  # which the host would try to download
                raise FileNotFoundError(f"{name}: there is no such folder of images.")
            data = check_cls_dataset(name)
        else:
            data = check_det_dataset(name)
        ours, theirs = check_class_names(checkpoint.model.names), check_class_names(data["names"])
        if not self.args["single_cls"] and ours != theirs:
            first = next(i for i in range(max(len(ours), len(theirs))) if ours.get(i) != theirs.get(i))
            raise ValueError(
                f"The classes of {checkpoint.path} and {name} do not match: {len(ours)} and {len(theirs)}, and class "
                f"{first} is {ours.get(first)!r} and {theirs.get(first)!r}. Give the data set that the model was "
                "trained on."
            )
        return data

    def _open(self, split: str) -> Any:
        """Return a split as the host reads it; images that it would skip because they cannot be read are an error."""
        path = self.data.get(split)
        if not path:
            raise FileNotFoundError(f"{self.args['data']} has no '{split}' split.")
        try:
            dataset = self.host.build_dataset(path)
        except RuntimeError as e:  # the host's way to say that no image is left
            raise ValueError(str(e)) from e
        if hasattr(dataset, "samples"):  # a classification data set
            listed, kept = [s[0] for s in dataset.base.samples], {s[0] for s in dataset.samples}
        else:
            listed, kept = dataset.get_img_files(dataset.img_path), set(dataset.im_files)
        if not listed:
            raise FileNotFoundError(f"{path}: no images.")
        unreadable = [file for file in listed if file not in kept and not _readable(file)]
        if unreadable:
            more = f" and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
            raise ValueError(f"{unreadable[0]}{more}: not a readable image. Repair or remove it.")
        return dataset

    def batches(self, which: str) -> Iterator[dict[str, Any]]:
        """Yield the preprocessed batches of ``fit`` or ``heldout``, one in memory at a time, and show progress."""
        chosen = self.fit if which == "fit" else self.heldout
        loader = DataLoader(
            Subset(self.dataset, chosen),
            batch_size=self.batch,
            collate_fn=getattr(self.dataset, "collate_fn", None),
            num_workers=0 if self.host.device.type in {"cpu", "mps"} else min(self.args["workers"], len(chosen)),
        )
        with TQDM(total=len(chosen), desc=f"{which} images", unit="img") as bar:
            for batch in loader:
                size = len(batch["img"])
                yield self.host.preprocess(batch)
                bar.update(size)


def _readable(file: str) -> bool:
    try:
        check_image(file)
    except Exception:  # whatever PIL raises for a broken file
        return False
    return True
