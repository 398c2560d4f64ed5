"""Regions of interest: which boxes of which images the heads of a second stage see, and their features."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from .boxes import at_least_float32, match_boxes, move_together, pairwise_iou, sample_batch
from .layers import infers_on_cpu, map_to_tokens, runs_transformed, to_channels_last
from .targets import GroundTruth

# Where boxes lie that no sample shall be taken of, in cells: outside of every map.
_OUTSIDE = -1e4


def to_rois(boxes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Boxes of each image, `(boxes, 4)`, as RoIs `(all boxes, 5)`: the index of the image, then the box."""
    images = torch.cat([torch.full_like(image_boxes[:, :1], index) for index, image_boxes in enumerate(boxes)])
    return torch.cat((images, torch.cat(list(boxes))), dim=1)


def flatten_rois(boxes: torch.Tensor) -> torch.Tensor:
    """[`to_rois`] of as many boxes of each image: `(batch, boxes, 4)` to `(batch * boxes, 5)`."""
    images = torch.arange(boxes.shape[0], device=boxes.device).to(boxes)[:, None, None]
    return torch.cat((images.expand(-1, boxes.shape[1], -1), boxes), dim=-1).flatten(0, 1)


def arrange_levels(levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Maps `(batch, channels, height, width)` in the layout in which RoIs are pooled, or each head would copy them."""
    return [to_channels_last(level) if _sums_rows(level) else _make_contiguous(level) for level in levels]


def _sums_rows(level: torch.Tensor) -> bool:
    """Whether RoIs are weighted sums of the rows of a channels-last map, which is a CPU's inference."""
    return infers_on_cpu(level) and not torch.compiler.is_compiling()


def _make_contiguous(level: torch.Tensor) -> torch.Tensor:
    if level.is_contiguous() or level.device.type != "cpu" or runs_transformed():
        return level.contiguous()
    # A CPU transposes matrices several times as fast as it copies maps.
    images = [image.t().contiguous() for image in map_to_tokens(level)]  # (channels, height * width)
    batch = images[0][None] if len(images) == 1 else torch.stack(images)
    return batch.reshape(level.shape)


def pool_rois(
    levels: Sequence[torch.Tensor], rois: torch.Tensor, strides: Sequence[int], size: int, sampling_ratio: int = 0
) -> torch.Tensor:
    """Features of each RoI from the level of its scale (`SingleRoIExtractor`; arXiv 1612.03144, equation 1).

    Args:
        levels: Maps `(batch, channels, height, width)`, finest first.
        rois: The index of the image, then xyxy in pixels, `(RoIs, 5)`.
        strides: Pixels per cell of each level.
        size: Cells per side of the result.
        sampling_ratio: Samples per side of such a cell; 0 (the default) for one in each cell of the map.

    Returns:
        `(RoIs, channels, size, size)` in the dtype of the maps; with a `sampling_ratio` of 0 zeros for boxes without an
        area.
    """
    images, boxes = rois.split((1, 4), dim=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)  # (RoIs,)
    scales = torch.floor(torch.log2(areas.sqrt() / 56 + 1e-6)).clamp(0, len(levels) - 1)
    members = [scales == index for index in range(len(levels))]
    if rois.device.type == "cpu" and not runs_transformed():
        rows = [is_member.nonzero().flatten() for is_member in members]
        parts = [
            _pool_level(level, stride, rois[own], size, sampling_ratio)
            for level, stride, own in zip(levels, strides, rows, strict=True)
        ]
        # (A box with one side below zero is of no level.)
        layout = torch.channels_last if _sums_rows(levels[0]) else torch.contiguous_format
        shape = len(rois), levels[0].shape[1], size, size
        pooled = torch.empty(shape, dtype=levels[0].dtype, memory_format=layout).zero_()
        return pooled.index_copy_(0, torch.cat(rows), torch.cat(parts))
    # No size depends on a value, and nothing waits for a GPU: the RoIs of other levels become empty ones outside of the
    # map, which add zeros.
    pooled = levels[0].new_zeros(())
    for level, stride, is_member in zip(levels, strides, members, strict=True):
        own = torch.cat((images, boxes.where(is_member[:, None], _OUTSIDE * stride)), dim=1)
        pooled = pooled + _pool_level(level, stride, own, size, sampling_ratio)
    return pooled


def _pool_level(level: torch.Tensor, stride: int, rois: torch.Tensor, size: int, sampling_ratio: int) -> torch.Tensor:
    """[`pool_rois`] of one level."""
    from torchvision.ops import roi_align

    # Half precision could not tell neighbouring pixels of a large image apart.
    pool = _sum_rows if _sums_rows(level) else partial(roi_align, aligned=True)
    return pool(at_least_float32(level), rois, size, 1 / stride, sampling_ratio).to(level.dtype)


def _sum_rows(level: torch.Tensor, rois: torch.Tensor, size: int, scale: float, sampling_ratio: int) -> torch.Tensor:
    """torchvision's `roi_align`, aligned, of a channels-last map: it goes through the channels one by one, in one
    thread. All channels of a cell have the same weights, and those of an RoI's cells are products of weights of rows
    and of columns.

    Args:
        level: `(batch, channels, height, width)`.
        rois: The index of the image, then xyxy in pixels, `(RoIs, 5)`.
        size: Cells per side of the result.
        scale: Cells per pixel.
        sampling_ratio: Samples per side of such a cell; 0 for one in each cell of the map.

    Returns:
        `(RoIs, channels, size, size)`, channels-last.
    """
    height, width = level.shape[2:]
    table = map_to_tokens(level).flatten(0, 1)  # (batch * height * width, channels)
    images, boxes = rois[:, 0].int(), rois[:, 1:] * scale - 0.5
    starts, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]  # (RoIs, 2): x, y
    counts = torch.full_like(sides, sampling_ratio) if sampling_ratio else (sides / size).ceil().clamp(min=0)
    reach = (sides.abs() / size * (1 - 1 / counts.clamp(min=1))).ceil() + 2  # cells that the samples of one read
    pooled = level.new_empty(len(rois), size, size, level.shape[1])
    groups, members = torch.cat((counts, reach), dim=1).int().unique(dim=0, return_inverse=True)
    for index, (columns, rows, *reaches) in enumerate(groups.tolist()):
        own = (members == index).nonzero().flatten()
        if not rows or not columns:
            pooled[own] = 0
            continue
        x, x_weights = _weigh(starts[own, 0], sides[own, 0], size, columns, reaches[0], width)
        y, y_weights = _weigh(starts[own, 1], sides[own, 1], size, rows, reaches[1], height)
        y = y + images[own, None, None] * height
        cells = (y * width)[:, :, None, :, None] + x[:, None, :, None, :]  # (own RoIs, size, size, rows, columns)
        weights = y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :]
        cells, weights = (tensor.flatten(3).flatten(0, 2) for tensor in (cells, weights))
        pooled[own] = F.embedding_bag(cells, table, mode="sum", per_sample_weights=weights).view(-1, *pooled.shape[1:])
    return pooled.permute(0, 3, 1, 2)


def _weigh(
    starts: torch.Tensor, sides: torch.Tensor, size: int, count: int, reach: int, limit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows (or columns) of a map the samples of RoIs read, and with which weight.

    Args:
        starts: Where RoIs start, in cells of the map, `(RoIs,)`.
        sides: Their lengths, `(RoIs,)`.
        size: In how many parts they are cut.
        count: Samples in each part.
        reach: Rows that these read at most.
        limit: Rows of the map.

    Returns:
        int32 and weights, both `(RoIs, size, reach)`.
    """
    steps = torch.arange(size * count, device=starts.device) + 0.5
    samples = starts[:, None] + steps * (sides / (size * count))[:, None]
    samples = samples.view(-1, size, count)
    inside = (samples >= -1) & (samples <= limit)
    samples = samples.clamp(0, limit - 1)
    rows = samples.amin(dim=2, keepdim=True).floor() + torch.arange(reach, device=starts.device)
    weights = (1 - (samples[..., None] - rows[..., None, :]).abs()).clamp(min=0)  # (RoIs, size, count, reach)
    return rows.clamp(max=limit - 1).int(), (weights * inside[..., None]).mean(dim=2)


@dataclass(frozen=True)
class SampledRoIs:
    """The RoIs of one image that the heads learn from.

    Args:
        boxes: xyxy in pixels, `(RoIs, 4)`, the positive ones first.
        objects: The index of the object of each positive RoI, int64 `(positive RoIs,)`.
        num_truths: How many of the first RoIs are no proposals, but the boxes of objects themselves.
    """

    boxes: torch.Tensor
    objects: torch.Tensor
    num_truths: int

    @property
    def positive_boxes(self) -> torch.Tensor:
        """xyxy in pixels, `(positive RoIs, 4)`."""
        return self.boxes[: len(self.objects)]


def sample_rois(
    proposals: Sequence[torch.Tensor],
    truths: Sequence[GroundTruth],
    config: PreTrainedConfig,
    iou_threshold: float,
    low_quality_threshold: float,
    shuffle: bool = True,
    valid: Sequence[torch.Tensor] | None = None,
) -> list[SampledRoIs]:
    """Samples, in each image, from the boxes of the objects themselves and the proposals. A GPU is waited for once.

    Args:
        proposals: Of each image, xyxy in pixels, `(proposals, 4)`.
        truths: The objects of each image.
        config: How many are sampled, and how many of them are positive at most.
        iou_threshold: From this IoU with an object on a proposal is positive and learns that object; below, it is
            negative.
        low_quality_threshold: From this IoU on an object takes its best proposals also where they would not be
            positive.
        shuffle: See [`~pvt_hf.models.boxes.sample_boxes`].
        valid: Which proposals take part, bool `(proposals,)` for each image (default: all).
    """
    if not truths:
        return []
    all_boxes, all_matches = [], []  # (objects + proposals, 4) and (objects + proposals,)
    for index, (image_proposals, truth) in enumerate(zip(proposals, truths, strict=True)):
        iou = pairwise_iou(truth.boxes, image_proposals)
        thresholds = iou_threshold, iou_threshold, low_quality_threshold
        matches = match_boxes(iou, *thresholds, None if valid is None else valid[index])
        all_matches.append(torch.cat((torch.arange(len(truth.boxes), device=matches.device), matches)))
        all_boxes.append(torch.cat((truth.boxes, image_proposals)))
    max_positives = int(config.roi_num_samples * config.roi_positive_fraction)
    chosen = sample_batch(all_matches, config.roi_num_samples, max_positives, shuffle)
    rows = move_together([torch.cat(pair) for pair in chosen], all_boxes[0].device)
    return [
        SampledRoIs(boxes[own], matches[own[: len(positives)]], num_truths=int((positives < len(truth.boxes)).sum()))
        for boxes, matches, own, (positives, _), truth in zip(all_boxes, all_matches, rows, chosen, truths, strict=True)
    ]


def list_targets(
    samples: Sequence[SampledRoIs], truths: Sequence[GroundTruth], num_labels: int, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the RoIs of a batch shall learn.

    Args:
        samples: The RoIs of each image.
        truths: The objects of each image.
        num_labels: Number of classes, and so the label of the background.
        like: A tensor whose dtype and device boxes have.

    Returns:
        The class of each RoI, int64 `(all RoIs,)`; which of them are positive, int64 `(all positive RoIs,)`; the boxes
        of these and of their objects, both xyxy in pixels, `(all positive RoIs, 4)`.
    """
    # (They begin with nothing, which is all that an empty batch has.)
    labels, boxes, start = [torch.zeros(0, dtype=torch.int64, device=like.device)], [like.new_zeros(0, 4)], 0
    rows, objects = labels[:], boxes[:]
    for rois, truth in zip(samples, truths, strict=True):
        label = torch.full((len(rois.boxes),), num_labels, device=like.device)  # the background
        label[: len(rois.objects)] = truth.class_labels[rois.objects]
        labels.append(label)
        rows.append(torch.arange(start, start + len(rois.objects), device=like.device))
        boxes.append(rois.positive_boxes)
        objects.append(truth.boxes[rois.objects])
        start += len(rois.boxes)
    return torch.cat(labels), torch.cat(rows), torch.cat(boxes), torch.cat(objects)


__all__ = ["SampledRoIs", "arrange_levels", "flatten_rois", "list_targets", "pool_rois", "sample_rois", "to_rois"]
