"""Losses that a segmenter may be trained with instead of its own: weighted cross-entropy, Dice, and their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from ..models.modeling_semantic_fpn import resize

SEGMENTATION_LOSSES = ("cross_entropy", "dice", "cross_entropy+dice")
IGNORED = -100  # what torch, and Trainer where it counts labels, take for "no label"


def balance_classes(pixels: Sequence[int]) -> list[float]:
    """Weights with which each class has the same part in a loss: all pixels / (classes x pixels of the class), as
    scikit-learn's `"balanced"`. A class without pixels is not counted, and has the weight 0.

    Args:
        pixels: Of each class.
    """
    classes = sum(count > 0 for count in pixels)
    return [sum(pixels) / (classes * count) if count else 0.0 for count in pixels]


def dice_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The soft Dice loss (arXiv 1606.04797) of each class over a batch, then the mean over all classes, where a class
    that no pixel of the batch has counts as 0. (segmentation_models_pytorch's `DiceLoss("multiclass")`.)

    Args:
        logits: Float `(batch, num_labels, height, width)`.
        labels: int64 `(batch, height, width)`, -100 where ignored.

    Returns:
        A scalar in [0, 1].
    """
    valid = (labels != IGNORED).unsqueeze(1)  # (batch, 1, height, width)
    probabilities = logits.softmax(dim=1) * valid
    truth = F.one_hot(labels.clamp(min=0), logits.shape[1]).movedim(-1, 1) * valid  # (batch, num_labels, height, width)
    dims = (0, 2, 3)
    overlap, total = (probabilities * truth).sum(dims), (probabilities + truth).sum(dims)  # (num_labels,)
    return ((1 - 2 * overlap / total.clamp(min=1e-7)) * (truth.sum(dims) > 0)).mean()


@lru_cache(maxsize=8)
def _place(weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Once for all steps, because a GPU has to be waited for."""
    return torch.tensor(weights, dtype=dtype, device=device)


@dataclass(frozen=True)
class SegmentationLoss:
    """A loss of logits for `Trainer(compute_loss_func=...)`, over the pixels that are not ignored.

    Parts of an accumulated or distributed batch weigh as much as their share of valid pixels: the cross-entropy of the
    parts is that of the batch, the Dice loss the mean of those of the parts.

    Args:
        name: `"cross_entropy"`, `"dice"` or `"cross_entropy+dice"`, their sum.
        class_weights: Of the pixels of each class in the cross-entropy, whose sum is divided by the number of pixels,
            whatever their weights (default: 1 each).

    Raises:
        ValueError: If there is no such loss, or it has no cross-entropy to be weighted.
    """

    name: str
    class_weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.name not in SEGMENTATION_LOSSES:
            raise ValueError(f"`name` must be one of {', '.join(SEGMENTATION_LOSSES)}, got {self.name!r}.")
        if self.class_weights is not None and "cross_entropy" not in self.name:
            raise ValueError(f"`class_weights` are of the cross-entropy, which the loss {self.name!r} does not have.")

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """
        Args:
            outputs: Of a segmenter, with `logits` `(batch, num_labels, any height and width)`.
            labels: int64 `(batch, height, width)`, -100 where ignored.
            num_items_in_batch: Valid pixels of the complete batch; by default this is all of it.
        """
        logits = outputs["logits"]
        logits = resize(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.shape[1:])
        valid = (labels != IGNORED).sum()
        total = logits.new_zeros(())
        if "cross_entropy" in self.name:
            weights = None
            if self.class_weights is not None:
                weights = _place(tuple(self.class_weights), logits.dtype, logits.device)
            summed = F.cross_entropy(logits, labels, weights, ignore_index=IGNORED, reduction="sum")
            total = total + summed / valid.clamp(min=1)
        if "dice" in self.name:
            total = total + dice_loss(logits, labels)
        if num_items_in_batch is None:
            return total
        return total * (valid / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1))
