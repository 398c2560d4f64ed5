"""Semantic segmentation of images that are too large for one pass: windows that overlap, and averaged logits."""

import torch
import torch.nn.functional as F
from torch import nn


@torch.no_grad()
def sliding_window_logits(
    model: nn.Module,
    pixel_values: torch.Tensor,
    window: int | tuple[int, int],
    stride: int | tuple[int, int],
) -> torch.Tensor:
    """Logits of a large image from windows of it, as mmsegmentation's `mode="slide"`.

    Windows start every `stride` pixels; those that would pass the bottom or the right border are moved back inside, and
    an image smaller than the window is one window. Each window's logits are resized (bilinear) to its pixels, and
    every pixel gets the mean over the windows that cover it. A window that covers the image is one pass over it.

    Args:
        model: In evaluation mode. Any model with `logits` of shape (batch, num_labels, any height and width).
        pixel_values: (batch, num_channels, height, width). Each window goes to the model's device; the result stays on
            that of `pixel_values`, so that a GPU needs memory for one window only.
        window: Height and width of the windows in pixels, or one number for both.
        stride: Rows and columns from one window to the next in pixels, at most the window's; or one number for both.

    Returns:
        (batch, num_labels, height, width), in the dtype of the model's logits.

    Raises:
        ValueError: If `model` is in training mode, or the windows would leave pixels out.
    """
    windows, strides = ((value, value) if isinstance(value, int) else tuple(value) for value in (window, stride))
    if model.training:
        raise ValueError("`model` must be in evaluation mode: call `model.eval()`.")
    if len(windows) != 2 or len(strides) != 2 or not all(0 < s <= w for s, w in zip(strides, windows, strict=True)):
        raise ValueError(f"`stride` must be positive and at most `window`, got {stride} and {window}.")
    height, width = pixel_values.shape[2:]
    total = None
    counts = pixel_values.new_zeros(height, width)
    for top, bottom in _find_spans(height, windows[0], strides[0]):
        for left, right in _find_spans(width, windows[1], strides[1]):
            logits = model(pixel_values[:, :, top:bottom, left:right].to(model.device)).logits
            logits = F.interpolate(logits, size=(bottom - top, right - left), mode="bilinear", align_corners=False)
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width, device=pixel_values.device)
            total[:, :, top:bottom, left:right] += logits.to(total.device)
            counts[top:bottom, left:right] += 1
    return total / counts.to(total.dtype)


def _find_spans(size: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Start and end of every window along one side."""
    steps = range(-(-max(size - window, 0) // stride) + 1)
    ends = [min(step * stride + window, size) for step in steps]
    return [(max(end - window, 0), end) for end in ends]


__all__ = ["sliding_window_logits"]
