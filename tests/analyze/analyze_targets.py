# yolo-sos, AGPL-3.0
"""Batches with what a task's criterion asks for."""

from __future__ import annotations

import torch


def targets(task: str, images: int = 2) -> dict:
    """Return a batch of two objects per image, with what a task's criterion asks for."""
    torch.manual_seed(1)
    n = 2 * images
    batch = {
        "img": torch.rand(images, 3, 64, 64),
        "batch_idx": torch.arange(images).repeat_interleave(2).float(),
        "cls": torch.randint(10, (n, 1)).float(),
        "bboxes": torch.rand(n, 4) * 0.3 + 0.3,
    }
    if task == "classify":
        return {"img": batch["img"], "cls": torch.randint(10, (images,))}
    if task == "segment":
        batch["masks"] = torch.zeros(images, 16, 16)
        batch["masks"][:, 4:10, 4:10], batch["masks"][:, 8:14, 8:14] = 1, 2
        batch["sem_masks"] = torch.zeros(images, 16, 16)
    if task == "pose":
        batch["keypoints"] = torch.cat([torch.rand(n, 2, 2), torch.full((n, 2, 1), 2.0)], 2)
    if task == "obb":
        batch["bboxes"] = torch.cat([batch["bboxes"], torch.rand(n, 1)], 1)
    return batch
