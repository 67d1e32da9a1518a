# yolo-sos, AGPL-3.0
"""Classification with SOS."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchvision.models import VisionTransformer
from ultralytics.data.augment import classify_transforms
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from yolo_sos.core import weight_matrix
from yolo_sos.heads import final_layers
from yolo_sos.train.backbones import set_head
from yolo_sos.train.mixin import PREFIX, SOSMixin
from yolo_sos.train.sampling import Source


class Mixup:
    """Collates a batch and mixes it with itself: ``x ← m x + (1−m) x'``, labels alike, m drawn from Beta(α, α).

    Source: Zhang, Cissé, Dauphin, Lopez-Paz, *mixup: Beyond Empirical Risk Minimization*, ICLR 2018.

    Args:
        alpha (float): α, above 0.
        classes (int): C.
    """

    def __init__(self, alpha: float, classes: int):
        """Keep the settings."""
        self.alpha = alpha
        self.classes = classes

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return ``img`` ``(B, 3, H, W)`` and ``cls`` ``(B, C)``, rows of which sum to 1: targets of cross-entropy."""
        batch = default_collate(items)
        share = float(torch.distributions.Beta(self.alpha, self.alpha).sample())
        other = torch.randperm(len(items))
        targets = nn.functional.one_hot(batch["cls"], self.classes).to(batch["img"].dtype)
        return {
            **batch,
            "img": share * batch["img"] + (1 - share) * batch["img"][other],
            "cls": share * targets + (1 - share) * targets[other],
        }


class SOSClassificationTrainer(SOSMixin, ClassificationTrainer):
    """Ultralytics' classification trainer with stochastic optimum shifting.

    Examples:
        >>> from ultralytics import YOLO
        >>> YOLO("yolo11n-cls.pt").train(trainer=SOSClassificationTrainer, data="cifar100", sos=True)
    """

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """Build the model as the host does, with the head that its YAML asks for.

        Raises:
            ValueError: If the model takes images of another size only, as a ViT does.
        """
        model = super().get_model(cfg, weights, verbose)
        for size in {m.image_size for m in model.modules() if isinstance(m, VisionTransformer)}:
            if size != self.args.imgsz:
                raise ValueError(f"imgsz={self.args.imgsz}: {self.args.model} takes imgsz={size} and no other.")
        if set_head(model):
            if weights and (self.args.pretrained is not False or self.resume):
                model.load(weights)  # the host found no place for those of this head
            if verbose:
                model.info()  # the host told the size with its own head
        return model

    def build_dataset(self, img_path: str, mode: str = "train", batch: Any = None) -> Any:
        """Build the set as the host does; one to train on mixes its batches if ``mixup_alpha`` is set."""
        dataset = super().build_dataset(img_path, mode, batch)
        if mode == "train" and self.sos.mixup_alpha is not None:
            dataset.collate_fn = Mixup(self.sos.mixup_alpha, self.data["nc"])
        return dataset

    def plot_training_samples(self, batch: dict[str, Tensor], ni: int) -> None:
        """Plot as the host does; a mixed image shows the class of which it has most."""
        if batch["cls"].ndim == 2:
            batch = {**batch, "cls": batch["cls"].argmax(1)}
        super().plot_training_samples(batch, ni)

    def _setup_train(self) -> None:
        """Set up as the mixin does, and warn of a rank that cannot keep the classes apart."""
        super()._setup_train()
        if self.sos.sos and RANK in {-1, 0} and 0 < self._rank() < self.data["nc"]:
            LOGGER.warning(
                f"{PREFIX}sos_rank={self.sos.sos_rank} keeps {self._rank()} dimensions, fewer than the "
                f"{self.data['nc']} classes: their means alone span as many, so outputs will change."
            )

    def _rank(self) -> int:
        """Return the dimensions that the method is told to keep, 0 if it is not told."""
        method = self.sos.method()
        if method.name not in {"principal", "expected", "rows"}:
            return 0
        (final,) = final_layers(unwrap_model(self.model))
        return method.rank_of(weight_matrix(final.module).shape[1])

    def shift_source(self) -> Source:
        """Return the training set without augmentation; each class gets its share of a sample."""
        dataset = self.train_loader.dataset
        view = copy(dataset)  # shallow: nothing is scanned or loaded again
        view.torch_transforms = classify_transforms(size=self.args.imgsz)
        view.collate_fn = default_collate
        return Source(view, self.shift_images(), [sample[1] for sample in dataset.samples])

    def shift_images(self) -> int:
        """Return how many images to fit on; an image is one row here, so by default no fewer than the rank."""
        return self.sos.sos_images or max(super().shift_images(), self._rank())
