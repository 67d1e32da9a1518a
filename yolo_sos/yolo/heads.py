# yolo-sos, AGPL-3.0
"""The final linear layers of an Ultralytics model, and how its head turns their outputs into predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from ultralytics.nn.modules import Classify, Detect, WorldDetect, YOLOEDetect

from yolo_sos.core import FinalLayer

KIND_OF_BRANCH = {  # the keys of Detect.one2many and one2one
    "box_head": "box",
    "cls_head": "cls",
    "mask_head": "mask",
    "pose_head": "kpt",
    "kpts_head": "kpt",
    "angle_head": "angle",
    # kpts_sigma_head (YOLO26 pose) runs in training mode only: a shift, which runs in eval mode, never sees its input.
}
CLASS_KINDS = ("cls", "linear")  # of the layers that score classes
PREDICTIONS = ("boxes", "scores", "mask_coefficient", "kpts", "angle")  # the keys of what these layers make


def head_of(model: nn.Module) -> nn.Module:
    """Return the last module of an Ultralytics model (``model.model[-1]``), or the model itself if it has none."""
    layers = getattr(model, "model", None)
    return layers[-1] if isinstance(layers, nn.Sequential) else model


def final_layers(model: nn.Module) -> list[FinalLayer]:
    """Find the final linear layers of an Ultralytics model.

    Args:
        model (nn.Module): A detection, segmentation, pose, OBB or classification model of YOLOv3u, v5u, v6, v8 to v12
            or 26. Of heads with a one-to-one branch, the layers of both branches.

    Returns:
        (list[FinalLayer]): One per branch, output and detection level, in the order of the head.

    Raises:
        TypeError: If the head has no such layers; the message says what was looked for.
    """
    names = {module: name for name, module in model.named_modules()}
    head = head_of(model)
    if isinstance(head, Classify):
        return [FinalLayer(names[head.linear], head.linear)]
    if not isinstance(head, Detect) or isinstance(head, (WorldDetect, YOLOEDetect)):
        why = " (its class scores come from text embeddings)" if isinstance(head, (WorldDetect, YOLOEDetect)) else ""
        raise TypeError(
            f"{type(model).__name__} ends in {type(head).__name__}{why}, which has no final linear layers that SOS can "
            "shift. It looks for the last 1×1 convolutions of a Detect, Segment, Pose or OBB head of YOLOv3u, v5u, v6, "
            "v8 to v12 or 26, or for the linear layer of a Classify head."
        )
    layers = []
    for branch in branches_of(head).values():
        classifiers = [last_of(tower) for tower in branch["cls_head"]]
        for key, kind in KIND_OF_BRANCH.items():
            for level, tower in enumerate(branch.get(key, ())):
                last = last_of(tower)
                if isinstance(last, nn.Conv2d):  # not so in YOLO26's pose_head, whose last layers are in kpts_head
                    layers.append(FinalLayer(names[last], last, kind, level, classifier=names[classifiers[level]]))
    return layers


def layers_of_kinds(layers: Sequence[FinalLayer], kinds: Iterable[str]) -> list[FinalLayer]:
    """Return the layers of the given kinds.

    Raises:
        ValueError: If there are none; names the kinds that the model has.
    """
    kinds = list(kinds)
    chosen = [layer for layer in layers if layer.kind in kinds]
    if not chosen:
        has = ", ".join(dict.fromkeys(layer.kind for layer in layers))
        raise ValueError(f"sos_layers={','.join(kinds)} chooses no layer of this model. It has: {has}.")
    return chosen


def branches_of(head: Detect) -> dict[str, dict[str, Sequence[nn.Module]]]:
    """Return the branches of a Detect head that exist, by name: fusing removes one."""
    branches = {"one2many": head.one2many}
    if getattr(head, "one2one_cv2", None) is not None:
        branches["one2one"] = head.one2one
    return {name: branch for name, branch in branches.items() if branch["box_head"] is not None}


def last_of(tower: nn.Module) -> nn.Module:
    return tower[-1] if isinstance(tower, nn.Sequential) else tower


def _shape_only(x: Tensor) -> Tensor:
    """Return a tensor's shape, dtype and device without its memory: what reads its values gets NaN."""
    return x.new_full((), math.nan).expand(x.shape)


class YoloTask:
    """An Ultralytics model and its loss as a ``yolo_sos.core.Task``.

    Batches are Ultralytics': dictionaries with ``img`` ``(B, C, H, W)`` and the task's targets, preprocessed.

    Args:
        model (nn.Module): The model to run; not compiled, not wrapped.
        criterion (Callable, optional): ``criterion(predictions, batch) -> (loss, items)`` as Ultralytics makes them.
            None: a new one of the model's own.

    Attributes:
        layers (list[FinalLayer]): All final layers of the model.
        criterion (Callable): The criterion.
    """

    def __init__(self, model: nn.Module, criterion: Callable[..., tuple[Tensor, Any]] | None = None):
        """Find the layers and their places in the head."""
        self.criterion = criterion or model.init_criterion()  # type: ignore[operator]
        # Ultralytics' losses ask for no more of images and features than their shape; someone else's may.
        theirs = type(self.criterion).__module__.partition(".")[0] == "ultralytics"
        self._needed: Callable[[Tensor], Tensor] = _shape_only if theirs else lambda x: x
        self.head = head_of(model)
        self.layers = final_layers(model)
        self._names = {layer.module: layer.name for layer in self.layers}

    def run(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """Return the raw predictions: the second element of what the head returns in eval mode."""
        output = model(batch["img"])
        return output[1] if isinstance(output, (tuple, list)) else output

    def loss(self, output: Any, batch: dict[str, Any]) -> Tensor:
        """Return the training loss per image: Ultralytics', without its factor of the batch size."""
        loss = self.criterion(output, batch)[0]
        return loss.sum() / (1 if isinstance(self.head, Classify) else self.size(batch))

    def size(self, batch: dict[str, Any]) -> int:
        """Return the number of images."""
        return len(batch["img"])

    def probabilities(self, layer: FinalLayer, logits: Tensor, batch: dict[str, Any]) -> Tensor:
        """Return labels as one-hot rows for a classifier, else the class scores of each anchor point."""
        if layer.kind == "linear":
            return nn.functional.one_hot(batch["cls"].long().view(-1), logits.shape[1]).to(logits.dtype)
        return logits.sigmoid_()  # in place: allocating takes longer than the sigmoid

    def replay_state(self, batch: dict[str, Any], output: Any) -> tuple[dict[str, Any], Any]:
        """Return the batch, and the raw predictions without those that the final layers make.

        Images and features keep no memory where the loss is Ultralytics'.
        """
        return {**batch, "img": self._needed(batch["img"])}, self._rest(output)

    def _rest(self, output: Any) -> Any:
        if isinstance(self.head, Classify):
            return None
        if "one2many" in output:
            return {name: self._rest(branch) for name, branch in output.items()}
        others = {key: value for key, value in output.items() if key not in PREDICTIONS}
        return {k: [self._needed(x) for x in value] if k == "feats" else value for k, value in others.items()}

    def replay(self, state: Any, outputs: dict[str, Tensor]) -> Any:
        """Return the predictions for other outputs of the final layers, by the head's own ``forward_head``."""
        if isinstance(self.head, Classify):
            return outputs[self._names[self.head.linear]]
        branches = branches_of(self.head)
        if "one2many" not in state:
            return self._replay_branch(state, branches["one2many"], outputs)
        return {name: self._replay_branch(state[name], branch, outputs) for name, branch in branches.items()}

    def _replay_branch(self, state: dict[str, Any], branch: dict[str, Any], outputs: dict[str, Tensor]) -> Any:
        def constant(tower: nn.Module):
            output = outputs.get(self._names.get(last_of(tower), ""))
            return lambda _: output  # in place of the tower, whatever its input

        towers = {key: [constant(tower) for tower in towers or ()] for key, towers in branch.items()}  # fused: None
        return {**state, **self.head.forward_head(state["feats"], **towers)}

    def decode(self, output: Any, raw: Any) -> Any:
        """Return what the model would have returned in eval mode, had its raw predictions been ``raw``.

        Args:
            output (tuple | list): What it did return: decoded and raw predictions. Of the former, what does not come
                from the final layers (mask prototypes) is taken over.
            raw (Any): Other raw predictions, of ``replay``.
        """
        head = self.head
        if isinstance(head, Classify):
            return raw.softmax(1), raw
        decoded = head._inference(raw["one2one" if head.end2end else "one2many"] if "one2one" in raw else raw)
        if head.end2end:
            decoded = head.postprocess(decoded.permute(0, 2, 1))
        return (decoded, *output[0][1:]) if isinstance(output[0], tuple) else decoded, raw
