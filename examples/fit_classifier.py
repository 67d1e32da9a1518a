# yolo-sos, AGPL-3.0
"""A pretrained classifier is fitted to classes that it has not seen, without training.

The data are scikit-learn's 1 797 handwritten digits. The model learns 0 to 7; then its last layer, with two rows more,
is fitted to all ten from one pass over labelled images. A model of torchvision is fitted likewise: ``grown`` gives
its last layer, such as ``model.fc``, a row for each class, and ``fit_model`` does the rest. Run it with

    python examples/fit_classifier.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from yolo_sos import fit_model

EPOCHS, OLD, ALL = 8, 8, 10  # 0 to 7 are trained


def digits() -> tuple[Tensor, Tensor]:
    """Return images (1797, 1, 8, 8) and labels (1797,), in random order."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images).float().reshape(-1, 1, 8, 8)[order] / 16, torch.tensor(labels)[order]


def pretrained(images: Tensor, labels: Tensor) -> nn.Sequential:
    """Return a small convolutional network that was trained on the images of the old classes."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in (1, 32, 1), (32, 64, 2), (64, 64, 1):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, OLD))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    seen = labels < OLD
    for _ in range(EPOCHS):
        for x, y in zip(images[seen].split(64), labels[seen].split(64), strict=True):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def grown(layer: nn.Linear, classes: int) -> nn.Linear:
    """Return a layer for more classes: the rows of the old ones, which the ridge pulls towards, and zeros."""
    new = nn.Linear(layer.in_features, classes)
    with torch.no_grad():
        for old, parameter in zip(layer.parameters(), new.parameters(), strict=True):
            parameter.zero_()[: len(old)] = old
    return new


@torch.no_grad()
def accuracies(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the share of images that are classified right, of the old classes and of the new ones."""
    right = (model(images).argmax(1) == labels).float()
    return right[labels < OLD].mean().item(), right[labels >= OLD].mean().item()


def main() -> dict[str, tuple[float, float]]:
    """Train, fit, and return the test accuracies on old and new classes before and after the fit."""
    torch.manual_seed(0)
    images, labels = digits()
    batches = list(zip(images[:1400].split(100), labels[:1400].split(100), strict=True))
    test = images[1400:], labels[1400:]
    model = pretrained(images[:1000], labels[:1000])
    model[-1] = grown(model[-1], ALL)
    before = accuracies(model, *test)
    report = fit_model(model, batches[:10], heldout=batches[10:])  # the held-out batches choose the ridge
    after = accuracies(model, *test)
    print(report)
    for what, old, new in ("before", *before), ("after", *after):
        print(f"test accuracy {what} the fit: {old:.4f} on 0 to 7, {new:.4f} on 8 and 9")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
