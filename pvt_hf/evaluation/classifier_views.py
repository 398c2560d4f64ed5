"""Test-time augmentation of classifiers: several views of an image, and the mean of what they say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class ClassifierViews(nn.Module):
    """A classifier that looks at each image several times, and averages the probabilities.

    Args:
        model: With `logits` `(batch, num_labels)`, for images of any size.
        scales: Factors of the images' height and width (bicubic) at which they are looked at beside 1 (default: none).
        flip: Whether they are looked at mirrored left and right too (default: `False`).
    """

    def __init__(self, model: PreTrainedModel, scales: Sequence[float] = (), flip: bool = False):
        super().__init__()
        if not all(scale > 0 for scale in scales):
            raise ValueError(f"`scales` must be positive, got {list(scales)}.")
        self.model, self.config, self.scales, self.flip = model, model.config, (1, *scales), flip

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """
        Args:
            pixel_values: `(batch, num_channels, height, width)`.
            labels: int64 `(batch,)`.

        Returns:
            `logits` `(batch, num_labels)`, logarithms of the mean probabilities, and with labels their cross-entropy as
            `loss`.
        """
        views = [_resize(pixel_values, scale) for scale in self.scales]
        views += [view.flip(-1) for view in views] if self.flip else []
        logits = torch.stack([self.model(pixel_values=view).logits.float() for view in views])  # (views, batch, labels)
        mean = logits.log_softmax(dim=-1).logsumexp(dim=0) - torch.tensor(float(len(views))).log()
        loss = None if labels is None else F.cross_entropy(mean, labels)
        return ImageClassifierOutput(loss=loss, logits=mean)


def _resize(images: torch.Tensor, scale: float) -> torch.Tensor:
    size = [round(side * scale) for side in images.shape[-2:]]
    return images if scale == 1 else F.interpolate(images, size, mode="bicubic", antialias=True)
