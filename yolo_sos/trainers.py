# yolo-sos, AGPL-3.0
"""Ultralytics' trainers, a class per task, extended by all that our settings can ask for."""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import Tensor, nn
from torch.utils.data import default_collate
from torchvision.models import VisionTransformer
from ultralytics.data.augment import classify_transforms
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.obb import OBBTrainer
from ultralytics.models.yolo.pose import PoseTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from yolo_sos.analyze.watch import Watching
from yolo_sos.core import weight_matrix
from yolo_sos.recipes.averaging import WeightAveraging
from yolo_sos.recipes.mixup import Mixup
from yolo_sos.recipes.networks import set_head
from yolo_sos.recipes.schedule import SteppedLearningRate
from yolo_sos.recipes.sharpness import SharpnessAware
from yolo_sos.yolo.fitting import Fitting
from yolo_sos.yolo.heads import final_layers
from yolo_sos.yolo.shifting import Shifting
from yolo_sos.yolo.training import PREFIX


class SOSMixin(WeightAveraging, Fitting, Shifting, Watching, SharpnessAware, SteppedLearningRate):
    """All extensions, for a trainer of Ultralytics: put it before the trainer among the base classes.

    Before the first epoch class layers are fitted. At the end of an epoch the extensions act in this order: weights are
    averaged, shifted, measured. With none of our settings the trainer is the stock one.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """Refuse a recipe of another task."""
        super().__init__(*args, **kwargs)
        if self.sos.mixup_alpha is not None and self.args.task != "classify":
            raise ValueError(
                f"mixup_alpha={self.sos.mixup_alpha} is for task=classify; for task={self.args.task} there is mixup."
            )


class SOSDetectionTrainer(SOSMixin, DetectionTrainer):
    """Ultralytics' detection trainer with stochastic optimum shifting.

    Examples:
        >>> from ultralytics import YOLO
        >>> YOLO("yolov5s.pt").train(trainer=SOSDetectionTrainer, data="VOC.yaml", sos=True)
    """


class SOSSegmentationTrainer(SOSMixin, SegmentationTrainer):
    """Ultralytics' segmentation trainer with stochastic optimum shifting; mask coefficients are shifted too."""


class SOSPoseTrainer(SOSMixin, PoseTrainer):
    """Ultralytics' pose trainer with stochastic optimum shifting; the keypoints' layers are shifted too."""


class SOSOBBTrainer(SOSMixin, OBBTrainer):
    """Ultralytics' trainer for oriented boxes with stochastic optimum shifting; the angles' layers are shifted too."""


class SOSClassificationTrainer(SOSMixin, ClassificationTrainer):
    """Ultralytics' classification trainer with stochastic optimum shifting.

    Examples:
        >>> from ultralytics import YOLO
        >>> YOLO("yolo11n-cls.pt").train(trainer=SOSClassificationTrainer, data="cifar100", sos=True)
    """

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """Build the model as Ultralytics does, with the head that its YAML asks for.

        Raises:
            ValueError: If the model takes images of another size only, as a ViT does.
        """
        model = super().get_model(cfg, weights, verbose)
        for size in {m.image_size for m in model.modules() if isinstance(m, VisionTransformer)}:
            if size != self.args.imgsz:
                raise ValueError(f"imgsz={self.args.imgsz}: {self.args.model} takes imgsz={size} and no other.")
        if set_head(model):
            if weights and (self.args.pretrained is not False or self.resume):
                model.load(weights)  # Ultralytics found no place for those of this head
            if verbose:
                model.info()  # Ultralytics has logged the size with its own head
        return model

    def build_dataset(self, img_path: str, mode: str = "train", batch: Any = None) -> Any:
        """Build the set as Ultralytics does; one to train on mixes its batches if ``mixup_alpha`` is set."""
        dataset = super().build_dataset(img_path, mode, batch)
        if mode == "train" and self.sos.mixup_alpha is not None:
            dataset.collate_fn = Mixup(self.sos.mixup_alpha, self.data["nc"])
        return dataset

    def plot_training_samples(self, batch: dict[str, Tensor], ni: int) -> None:
        """Plot as Ultralytics does; a mixed image shows the class that has the largest share."""
        if batch["cls"].ndim == 2:
            batch = {**batch, "cls": batch["cls"].argmax(1)}
        super().plot_training_samples(batch, ni)

    def _setup_train(self) -> None:
        """Set up, and warn of a rank that cannot keep the classes apart."""
        super()._setup_train()
        if self.sos.sos and self.sos.sos_rank is not None and RANK in {-1, 0} and 0 < self._rank() < self.data["nc"]:
            LOGGER.warning(
                f"{PREFIX}sos_rank={self.sos.sos_rank} keeps {self._rank()} dimensions, fewer than the "
                f"{self.data['nc']} classes: their means alone span as many, so outputs will change."
            )

    def _rank(self) -> int:
        """Return the number of dimensions that the method keeps, half of d if the guard finds it; 0 if it has none."""
        method = self.sos.method_of(self.args.task)
        if method.name not in {"principal", "expected", "rows"}:
            return 0
        (final,) = final_layers(unwrap_model(self.model))
        return method.rank_of(weight_matrix(final.module).shape[1])

    def plain_images(self) -> tuple[Any, list[int] | None]:
        """Return the training set without augmentation, and the class of each image."""
        dataset = self.train_loader.dataset
        view = copy(dataset)  # shallow: nothing is scanned or loaded again
        view.torch_transforms = classify_transforms(size=self.args.imgsz)
        view.collate_fn = default_collate
        return view, [sample[1] for sample in dataset.samples]

    def shift_images(self) -> int:
        """Return how many images to fit on; an image is one row here, so by default no fewer than the rank."""
        return self.sos.sos_images or max(super().shift_images(), self._rank())


TRAINERS = {  # by task
    "detect": SOSDetectionTrainer,
    "segment": SOSSegmentationTrainer,
    "pose": SOSPoseTrainer,
    "obb": SOSOBBTrainer,
    "classify": SOSClassificationTrainer,
}
