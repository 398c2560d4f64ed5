"""Regions of interest: features of boxes, pooled from the levels of a pyramid."""

from collections.abc import Sequence

import torch

from .boxes import at_least_float32
from .layers import runs_transformed


def to_rois(boxes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Boxes of each image, `(boxes, 4)`, as RoIs `(all boxes, 5)`: the index of the image, then the box."""
    images = torch.cat([torch.full_like(image_boxes[:, :1], index) for index, image_boxes in enumerate(boxes)])
    return torch.cat((images, torch.cat(list(boxes))), dim=1)


def flatten_rois(boxes: torch.Tensor) -> torch.Tensor:
    """[`to_rois`] of as many boxes of each image: `(batch, boxes, 4)` to `(batch * boxes, 5)`."""
    images = torch.arange(boxes.shape[0], device=boxes.device).to(boxes)[:, None, None]
    return torch.cat((images.expand(-1, boxes.shape[1], -1), boxes), dim=-1).flatten(0, 1)


def pool_rois(levels: Sequence[torch.Tensor], rois: torch.Tensor, strides: Sequence[int], size: int) -> torch.Tensor:
    """Features of each RoI from the level of its scale (`SingleRoIExtractor`; arXiv 1612.03144, equation 1).

    Args:
        levels: Maps `(batch, channels, height, width)`, finest first.
        rois: The index of the image, then xyxy in pixels, `(RoIs, 5)`.
        strides: Pixels per cell of each level.
        size: Cells per side of the result.

    Returns:
        `(RoIs, channels, size, size)` in the dtype of the maps; zeros for boxes without an area.
    """
    images, boxes = rois.split((1, 4), dim=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)  # (RoIs,)
    scales = torch.floor(torch.log2(areas.sqrt() / 56 + 1e-6)).clamp(0, len(levels) - 1)
    members = [scales == index for index in range(len(levels))]
    if rois.device.type == "cpu" and not runs_transformed():
        rows = [is_member.nonzero().flatten() for is_member in members]
        parts = [
            _pool_level(level, stride, rois[own], size)
            for level, stride, own in zip(levels, strides, rows, strict=True)
        ]
        return torch.cat(parts)[torch.cat(rows).argsort()]
    # No size depends on a value, and nothing waits for a GPU: the RoIs of other levels become empty ones, of which no
    # samples are taken, and which add zeros.
    pooled = levels[0].new_zeros(())
    for level, stride, is_member in zip(levels, strides, members, strict=True):
        own = torch.cat((images, boxes.where(is_member[:, None], 0)), dim=1)
        pooled = pooled + _pool_level(level, stride, own, size)
    return pooled


def _pool_level(level: torch.Tensor, stride: int, rois: torch.Tensor, size: int) -> torch.Tensor:
    """[`pool_rois`] of one level."""
    from torchvision.ops import roi_align

    # Half precision could not tell neighbouring pixels of a large image apart.
    pooled = roi_align(at_least_float32(level), rois, size, 1 / stride, sampling_ratio=0, aligned=True)
    return pooled.to(level.dtype)
