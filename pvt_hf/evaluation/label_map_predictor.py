"""The class of every pixel as a segmenter sees it: of the whole image or in windows, once or at several scales."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import SemanticSegmenterOutput

from ..data.segmentation import prepare_scales
from ..models.sliding_window import sliding_window_logits

if TYPE_CHECKING:
    from ..models.image_processing_segmentation import PvtSegmentationImageProcessor


@dataclass(frozen=True)
class LabelMapPredictor:
    """Predicts label maps at the original size of images.

    With several scales or with `flip`, the class of a pixel is the one whose mean probability is the largest, each view
    being resized to the original size first (mmsegmentation's test-time augmentation).

    Args:
        image_processor: Of the model.
        window: Predict in windows of this many pixels of the network's input, as
            [`~pvt_hf.models.sliding_window.sliding_window_logits`]; by default the whole image at once.
        stride: Pixels from one window to the next; it goes with `window`.
        scales: Factors of the image processor's size at which the image is looked at beside 1 (default: none).
            mmsegmentation's are 0.5, 0.75, 1.25, 1.5 and 1.75.
        flip: Whether the image is looked at mirrored left and right too (default: `False`).

    Raises:
        ValueError: If only one of `window` and `stride` is given, or a scale is not positive.
    """

    image_processor: PvtSegmentationImageProcessor
    window: int | None = None
    stride: int | None = None
    scales: Sequence[float] = ()
    flip: bool = False

    def __post_init__(self) -> None:
        if (self.window is None) != (self.stride is None):
            raise ValueError(f"`window` and `stride` go together, got {self.window} and {self.stride}.")
        if not all(scale > 0 for scale in self.scales):
            raise ValueError(f"`scales` must be positive, got {list(self.scales)}.")

    def prepare(self, image: torch.Tensor, name: str = "the image") -> list[torch.Tensor]:
        """The image as the network gets it, at the scale 1 and then at the others.

        Args:
            image: uint8 `(3, height, width)`, RGB.
            name: For the message of an error (default: "the image").

        Returns:
            float32 `(1, 3, height, width)` each.
        """
        return [view[None] for view in prepare_scales(image, self.image_processor, (1, *self.scales), name)]

    def __call__(
        self, model: nn.Module, views: Sequence[torch.Tensor], size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            model: With `logits` `(batch, num_labels, any height and width)`.
            views: Of `prepare`, on the model's device.
            size: (height, width) of the image.

        Returns:
            The class of each pixel, int64 `(height, width)`, and the logits of the first view, without flip.
        """
        (labels,), first = self.predict_batch(model, views, [size])
        return labels, first

    def predict_batch(
        self, model: nn.Module, views: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The same for several images that have one size as the network gets them.

        Args:
            model: See above.
            views: Those of all images, put together: `(batch, 3, height, width)` each.
            sizes: (height, width) of each image.

        Returns:
            The class of each pixel of each image, int64 `(height, width)`, and the logits of the first views, without
            flip.
        """
        first = self._logits(model, views[0])
        if len(views) == 1 and not self.flip:
            return self._segment(first, views[0].shape[-2], sizes), first
        totals: list[torch.Tensor | float] = [0.0] * len(sizes)
        for index, view in enumerate(views):
            logits = first if index == 0 else self._logits(model, view)
            _add_probabilities(totals, logits, view, sizes)
            if self.flip:
                _add_probabilities(totals, self._logits(model, view.flip(-1)).flip(-1), view, sizes)
        return [torch.as_tensor(total)[0].argmax(dim=0) for total in totals], first

    def _logits(self, model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.window is None or self.stride is None:
            return model(pixel_values=pixel_values).logits
        return sliding_window_logits(model, pixel_values, self.window, self.stride)

    def _segment(self, logits: torch.Tensor, height: int, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """As the image processor does, for logits of an input of that height."""
        # It is saved with the stride that the model has; windows that were put together have none.
        image_processor = self.image_processor if self.window is None else copy.copy(self.image_processor)
        image_processor.logits_stride = height // logits.shape[-2]
        outputs = SemanticSegmenterOutput(logits=logits)
        return image_processor.post_process_semantic_segmentation(outputs, list(sizes))


def _add_probabilities(
    totals: list[torch.Tensor | float], logits: torch.Tensor, view: torch.Tensor, sizes: Sequence[tuple[int, int]]
) -> None:
    """Adds to each image's total the probabilities `(1, classes, height, width)` of a batch of logits, which are
    resized to the size of the view, and from there to that of the image."""
    for index, size in enumerate(sizes):
        scores = logits[index, None].float()  # (1, classes, height, width)
        for target in (tuple(view.shape[-2:]), size):
            scores = F.interpolate(scores, target, mode="bilinear", align_corners=False)
        totals[index] = totals[index] + scores.softmax(dim=1)
