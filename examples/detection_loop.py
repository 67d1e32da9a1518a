# yolo-sos, AGPL-3.0
"""A detector of one's own, a training loop of one's own, and SOS at its end.

The detector is anchor-free and tiny: each cell of an 8 × 8 grid predicts a class and a box. It is trained on drawn
scenes, shifted once after the last epoch, and judged on other scenes before and after. Run it with

    python examples/detection_loop.py
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss

from yolo_sos import SOS
from yolo_sos.core import FinalLayer, ModelTask
from yolo_sos.evaluate import Detections, GroundTruth, mean_ap, voc_ap

SIZE, STRIDE, CLASSES, EPOCHS = 64, 8, ("square", "disc", "bar"), 15
CELLS = SIZE // STRIDE


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw scenes of one object each.

    Returns:
        images (Tensor): (count, 3, 64, 64), noise with a bright object.
        objects (Tensor): (count, 5): class, then x1, y1, x2, y2 in pixels.
    """
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, SIZE, SIZE, generator=g) * 0.5
    label = torch.randint(len(CLASSES), (count,), generator=g)
    height = torch.randint(10, 26, (count,), generator=g)
    width = torch.where(label == 2, height // 3, height)
    x, y = ((torch.rand(count, generator=g) * (SIZE - side)).long() for side in (width, height))
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    for i in range(count):
        u, v = (columns - x[i] + 0.5) / width[i] * 2 - 1, (rows - y[i] + 0.5) / height[i] * 2 - 1
        inside = (u**2 + v**2 < 1) if label[i] == 1 else (u.abs() < 1) & (v.abs() < 1)
        images[i] += 0.5 * inside * torch.rand(3, 1, 1, generator=g).add(0.5)
    return images, torch.stack([label, x, y, x + width, y + height], 1).float()


class Detector(nn.Module):
    """Return class logits (B, C, 8, 8) and boxes (B, 4, 8, 8): how far the sides are from a cell's centre, in cells."""

    def __init__(self, channels: int = 32):
        super().__init__()
        self.backbone = nn.Sequential(*(self.conv(a, b, 2) for a, b in pairwise((3, 16, channels, channels))))
        self.cls_tower, self.box_tower = self.conv(channels, channels), self.conv(channels, channels)
        self.cls, self.box = nn.Conv2d(channels, len(CLASSES), 1), nn.Conv2d(channels, 4, 1)

    @staticmethod
    def conv(a: int, b: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.SiLU())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(images)
        return self.cls(self.cls_tower(features)), self.box(self.box_tower(features))


CENTRES = (torch.arange(CELLS) + 0.5) * STRIDE


def criterion(output: tuple[Tensor, Tensor], objects: Tensor) -> Tensor:
    """Return the loss, the mean over the images: the cells whose centre lies in the object are to find it."""
    logits, boxes = output
    x1, y1, x2, y2 = objects[:, 1:, None, None].unbind(1)
    cx, cy = CENTRES[None, None, :], CENTRES[None, :, None]
    sides = [d.expand(-1, CELLS, CELLS) / STRIDE for d in (cx - x1, cy - y1, x2 - cx, y2 - cy)]
    distances = torch.stack(sides, 1)  # (B, 4, 8, 8)
    inside = distances.amin(1) > 0
    targets = nn.functional.one_hot(objects[:, 0].long(), len(CLASSES))[:, :, None, None] * inside[:, None]
    found = binary_cross_entropy_with_logits(logits, targets.float(), reduction="sum")
    where = l1_loss(boxes.movedim(1, -1)[inside], distances.movedim(1, -1)[inside], reduction="sum")
    return (found + where) / len(objects)


class DetectionTask(ModelTask):
    """What SOS must know beyond the loss: here a class score is a sigmoid, and most cells are background."""

    def probabilities(self, layer: FinalLayer, logits: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return logits.sigmoid()


@torch.no_grad()
def map50(model: nn.Module, images: Tensor, objects: Tensor) -> float:
    """Return the VOC devkit's mAP at an IoU of 0.5; each image's best cell is its detection."""
    logits, boxes = model.eval()(images)
    score, best = logits.sigmoid().flatten(1).max(1)
    label, cell = best // CELLS**2, best % CELLS**2
    left, top, right, bottom = boxes.flatten(2).gather(2, cell[:, None, None].expand(-1, 4, 1))[..., 0].T * STRIDE
    cx, cy = CENTRES[cell % CELLS], CENTRES[cell // CELLS]
    corners = torch.stack([cx - left, cy - top, cx + right.clamp(min=-left), cy + bottom.clamp(min=-top)], 1)
    index, names = list(range(len(images))), [str(i) for i in range(len(images))]
    truth = GroundTruth.build(CLASSES, names, index, objects[:, 0].long(), objects[:, 1:])
    return mean_ap(voc_ap(truth, Detections.build(truth, index, label, score, corners)).ap)


def main() -> dict[str, float]:
    """Train, shift, and return mAP50 before and after and what is left of the squared norm."""
    torch.manual_seed(0)
    images, objects = scenes(512, seed=0)
    batches = list(zip(images.split(16), objects.split(16), strict=True))
    model = Detector()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    sos = SOS(
        model,
        # A box layer has no classes of its own: how its cells are weighted, the class layer says.
        [FinalLayer("cls", model.cls, "cls"), FinalLayer("box", model.box, "box", classifier="cls")],
        start=1.0,  # once, after the last epoch
        optimizer=optimizer,
        task=DetectionTask(criterion),
    )
    new = scenes(200, seed=1)
    report, before = None, 0.0
    for epoch in range(EPOCHS):
        model.train()
        for batch in batches[8:]:
            optimizer.zero_grad()
            criterion(model(batch[0]), batch[1]).backward()
            optimizer.step()
        before = map50(model, *new)
        report = sos.step(epoch, EPOCHS, batches[8:16], heldout=batches[:8])
    after = map50(model, *new)
    print(report)
    print(f"mAP50 on new scenes: {before:.4f} before the shift, {after:.4f} after it")
    return {"before": before, "after": after, "squared_norm_ratio": report.squared_norm_ratio}


if __name__ == "__main__":
    main()
