# yolo-sos, AGPL-3.0
"""A classifier of torchvision and SOS: the layer that runs last is found by itself.

The data are scikit-learn's 1 797 handwritten digits. A model of timm does as well:
``model = timm.create_model("resnet10t", num_classes=10)``. Run it with

    python examples/classifier.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torchvision.models import shufflenet_v2_x0_5

from yolo_sos import SOS

EPOCHS = 4


def digits() -> tuple[Tensor, Tensor]:
    """Return images (1797, 3, 32, 32) and labels (1797,), in random order."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images).float().reshape(-1, 1, 8, 8)[order] / 16
    return interpolate(x, size=32, mode="bilinear").expand(-1, 3, -1, -1), torch.tensor(labels)[order]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that are classified right."""
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> dict[str, float]:
    """Train, shift, and return the test accuracy before and after and what is left of the squared norm."""
    torch.manual_seed(0)
    images, labels = digits()
    batches = list(zip(images[:1400].split(64), labels[:1400].split(64), strict=True))
    test = images[1400:], labels[1400:]
    model = shufflenet_v2_x0_5(num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    # Once, at the end, and as far as the loss on the held-out batches rises by no more than half a per cent.
    sos = SOS(model, start=1.0, optimizer=optimizer)
    before, report = 0.0, None
    for epoch in range(EPOCHS):
        model.train()
        for x, y in batches[4:]:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        before = accuracy(model, *test)
        report = sos.step(epoch, EPOCHS, batches[4:], heldout=batches[:4])  # None where no shift is due
    after = accuracy(model, *test)
    print(report)
    print(f"test accuracy: {before:.4f} before the shift, {after:.4f} after it")
    return {"before": before, "after": after, "squared_norm_ratio": report.squared_norm_ratio}


if __name__ == "__main__":
    main()
