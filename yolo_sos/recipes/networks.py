# yolo-sos, AGPL-3.0
"""Networks for 32 × 32 images that Ultralytics cannot build from its own modules, for the YAMLs under ``cfg/models``.

They are registered with TorchVision, by whose names the ``TorchVision`` rows of Ultralytics' YAMLs build models. All
modules are TorchVision's and torch's: a checkpoint of one loads, validates, predicts and exports without yolo-sos. Only
building it anew, as fine-tuning does, needs ``import yolo_sos.trainers``.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision import models
from torchvision.models import DenseNet, ResNet, VisionTransformer
from torchvision.models._api import register_model  # public by its documentation, but for its place
from ultralytics.nn.modules import Classify

from yolo_sos.yolo.heads import head_of


def _stem(channels: int) -> nn.Conv2d:
    """The usual stem of CIFAR networks: 3 × 3 and stride 1 where those for ImageNet halve the image twice."""
    return nn.Conv2d(3, channels, 3, 1, 1, bias=False)


@register_model()
def resnet18_cifar(*, weights: None = None, **kwargs: Any) -> ResNet:
    """Return a ResNet-18 with a stem for 32 × 32 images (He et al., CVPR 2016; stem as in its section 4.2)."""
    model = models.resnet18(weights=weights, **kwargs)
    model.conv1, model.maxpool = _stem(64), nn.Identity()
    return model


@register_model()
def densenet121_cifar(*, weights: None = None, **kwargs: Any) -> DenseNet:
    """Return a DenseNet-121 with a stem for 32 × 32 images (Huang et al., CVPR 2017)."""
    model = models.densenet121(weights=weights, **kwargs)
    model.features.conv0, model.features.pool0 = _stem(64), nn.Identity()
    return model


@register_model()
def vit_cifar(*, weights: None = None, **kwargs: Any) -> VisionTransformer:
    """Return a ViT for 32 × 32 images: patches of 4 × 4, 9 layers, width 192.

    Source of the size: Lee, Lee, Song, *Vision Transformer for Small-Size Datasets*, arXiv 2112.13492.
    """
    return VisionTransformer(
        image_size=32, patch_size=4, num_layers=9, num_heads=12, hidden_dim=192, mlp_dim=384, **kwargs
    )


def set_head(model: nn.Module) -> bool:
    """Let the final layer see the pooled features themselves, if the model's YAML says ``head_conv: false``.

    Ultralytics' Classify head has a 1 × 1 convolution to 1 280 channels of its own, which none of these networks has.
    Returns whether the head of this classification model was changed; its linear layer is a new one then.
    """
    head = head_of(model)
    if not isinstance(head, Classify) or model.yaml.get("head_conv", True) or isinstance(head.conv, nn.Identity):
        return False
    head.linear = nn.Linear(head.conv.conv.in_channels, head.linear.out_features)
    head.conv = nn.Identity()
    return True
