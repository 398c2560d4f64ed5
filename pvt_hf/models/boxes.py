"""Anchors, box coder, matcher, sampler and suppression, as mmdetection 2.13 defines them.

Every function is exact to it, quirks included, because the released checkpoints were trained with it. Boxes are
`(x0, y0, x1, y1)`, in pixels unless a function says otherwise, in floating point and without a `+ 1` anywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .layers import place_numbers, runs_transformed

# What `match_boxes` says of a box that has no ground truth.
NEGATIVE = -1
IGNORED = -2

# A box may grow or shrink by this factor from its anchor (`wh_ratio_clip`).
_MAX_LOG_RATIO = abs(math.log(16 / 1000))
# From this many candidates mmdetection's suppression goes through one class after the other.
_SPLIT_THRESHOLD = 10_000
# So many times as many candidates as are wanted are suppressed first, of which in most images enough are left.
_BEST = 5


@dataclass(frozen=True)
class Anchors:
    """All anchors of a batch's levels, in the order of the levels.

    Args:
        boxes: xyxy in pixels, `(anchors, 4)`.
        level_sizes: Number of anchors of each level.
        level_strides: Pixels per cell of each level.
    """

    boxes: torch.Tensor
    level_sizes: Sequence[int]
    level_strides: Sequence[int]

    @property
    def centres(self) -> torch.Tensor:
        """xy in pixels, `(anchors, 2)`."""
        return _centres_and_sizes(self.boxes)[0]

    @property
    def strides(self) -> torch.Tensor:
        """Pixels per cell at each anchor, `(anchors,)`."""
        levels = zip(self.level_sizes, self.level_strides, strict=True)
        return torch.cat([self.boxes.new_full((size,), stride) for size, stride in levels])


@dataclass(frozen=True)
class AnchorGrid:
    """Anchors around the upper left corner of every cell of every level (`AnchorGenerator`, `center_offset=0`).

    An anchor of a level has the area `(stride * scale)^2` and the aspect ratio `height / width`.

    Args:
        strides: Pixels per cell of each level, finest first.
        scales: Sides of the square anchors, in strides.
        ratios: Aspect ratios, heights over widths. The anchors of a cell are in the order of the ratios, then of the
            scales.
    """

    strides: Sequence[int]
    scales: Sequence[float]
    ratios: Sequence[float]

    @property
    def num_per_cell(self) -> int:
        """Anchors of each cell."""
        return len(self.scales) * len(self.ratios)

    def generate_anchors(self, level_shapes: Sequence[tuple[int, int]], like: torch.Tensor) -> Anchors:
        """[`generate_boxes`], with what the levels are.

        Args:
            level_shapes: Height and width of each level in cells.
            like: A tensor whose dtype and device the anchors get.
        """
        level_sizes = [height * width * self.num_per_cell for height, width in level_shapes]
        return Anchors(self.generate_boxes(level_shapes, like), level_sizes, self.strides)

    def generate_boxes(self, level_shapes: Sequence[tuple[int, int]], like: torch.Tensor) -> torch.Tensor:
        """All anchors, in the order of the levels, then rows, then columns, then the anchors of a cell: see
        [`flatten_to_anchors`].

        Args:
            level_shapes: Height and width of each level in cells.
            like: A tensor whose dtype and device the anchors get.

        Returns:
            xyxy in pixels, `(anchors, 4)`.
        """
        options = {"dtype": like.dtype, "device": like.device}
        scales = place_numbers(self.scales, **options)
        height_factors = place_numbers(self.ratios, **options).sqrt()
        levels = []
        for stride, (height, width) in zip(self.strides, level_shapes, strict=True):
            half_heights = (stride * height_factors[:, None] * scales).flatten() * 0.5  # (anchors of a cell,)
            half_widths = (stride * (1 / height_factors)[:, None] * scales).flatten() * 0.5
            around_origin = torch.stack((-half_widths, -half_heights, half_widths, half_heights), dim=1)
            y, x = torch.meshgrid(
                torch.arange(height, **options) * stride, torch.arange(width, **options) * stride, indexing="ij"
            )
            shifts = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)  # (cells, 1, 4)
            levels.append((shifts + around_origin).reshape(-1, 4))
        return torch.cat(levels)

    def find_valid(
        self, level_shapes: Sequence[tuple[int, int]], padded_size: tuple[int, int], device: torch.device | None = None
    ) -> torch.Tensor:
        """Whether the cell of each anchor lies in an image. The rest of a batch that is larger belongs to other images;
        training ignores its anchors.

        Args:
            level_shapes: Height and width of each level in cells.
            padded_size: Height and width of the image in pixels, as it would be padded alone.
            device: Of the result; by default torch's.

        Returns:
            Bool `(anchors,)`.
        """
        levels = []
        for stride, (height, width) in zip(self.strides, level_shapes, strict=True):
            rows = torch.arange(height, device=device) < math.ceil(padded_size[0] / stride)
            columns = torch.arange(width, device=device) < math.ceil(padded_size[1] / stride)
            levels.append((rows[:, None] & columns).flatten().repeat_interleave(self.num_per_cell))
        return torch.cat(levels)


def flatten_to_anchors(feature_map: torch.Tensor, num_values: int) -> torch.Tensor:
    """What a head predicts, in the order of the anchors.

    Args:
        feature_map: `(batch, anchors of a cell * num_values, height, width)`.
        num_values: Values of each anchor.

    Returns:
        `(batch, height * width * anchors of a cell, num_values)`.
    """
    batch_size, channels, height, width = feature_map.shape
    num_anchors = height * width * (channels // num_values)
    return feature_map.permute(0, 2, 3, 1).reshape(batch_size, num_anchors, num_values)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with a precision that coordinates and losses need: half precisions become float32, float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def encode_boxes(anchors: torch.Tensor, boxes: torch.Tensor, stds: Sequence[float] = (1, 1, 1, 1)) -> torch.Tensor:
    """What takes `anchors` to `boxes` (`DeltaXYWHBBoxCoder`): centre offsets in anchor sizes and log size ratios.

    Args:
        anchors: xyxy `(..., 4)`, with no side of zero.
        boxes: xyxy `(..., 4)` in the same unit, with no side of zero.
        stds: The units of the four deltas (default: 1).

    Returns:
        Deltas `(..., 4)`.
    """
    anchor_centres, anchor_sizes = _centres_and_sizes(anchors)
    centres, sizes = _centres_and_sizes(boxes)
    deltas = torch.cat(((centres - anchor_centres) / anchor_sizes, torch.log(sizes / anchor_sizes)), dim=-1)
    return deltas / place_numbers(stds, deltas.dtype, deltas.device)


def decode_boxes(anchors: torch.Tensor, deltas: torch.Tensor, stds: Sequence[float] = (1, 1, 1, 1)) -> torch.Tensor:
    """The inverse of [`encode_boxes`], with the log size ratios clamped to those of 16 / 1000 and 1000 / 16.

    Args:
        anchors: xyxy `(..., 4)`.
        deltas: `(..., 4)`; the leading dimensions broadcast.
        stds: The units of the four deltas (default: 1).

    Returns:
        xyxy `(..., 4)` in the unit of the anchors, not clipped.
    """
    centres, sizes = _centres_and_sizes(anchors)
    offsets, log_ratios = (deltas * place_numbers(stds, deltas.dtype, deltas.device)).split(2, dim=-1)
    centres = centres + sizes * offsets
    sizes = sizes * log_ratios.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    return torch.cat((centres - sizes * 0.5, centres + sizes * 0.5), dim=-1)


def clip_boxes(boxes: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Boxes cut to their images.

    Args:
        boxes: xyxy in pixels, `(..., 4)`.
        sizes: Height and width in pixels, `(..., 2)`; the leading dimensions broadcast.
    """
    limits = sizes.to(boxes.dtype).flip(-1)  # (..., 2): width and height
    limits = torch.cat((limits, limits), dim=-1)
    return torch.minimum(boxes.clamp(min=0), limits)


def has_area(boxes: torch.Tensor) -> torch.Tensor:
    """Whether each of the boxes `(..., 4)`, xyxy, has one: bool `(...)`."""
    return (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)


def take_rows(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """For each image some of its rows.

    Args:
        values: `(batch, rows, ...)`.
        rows: Indices, int64 `(batch, chosen)`.

    Returns:
        `(batch, chosen, ...)`.
    """
    return values[torch.arange(rows.shape[0], device=rows.device)[:, None], rows]


def pairwise_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union of every pair. Boxes without an area overlap with nothing: 0, not NaN.

    Args:
        boxes: xyxy `(boxes, 4)`.
        others: xyxy `(others, 4)` in the same unit.

    Returns:
        `(boxes, others)`.
    """
    upper_left = torch.maximum(boxes[:, None, :2], others[:, :2])  # (boxes, others, 2)
    lower_right = torch.minimum(boxes[:, None, 2:], others[:, 2:])
    intersection = (lower_right - upper_left).clamp(min=0).prod(dim=-1)
    areas, other_areas = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes, others))
    return intersection / (areas[:, None] + other_areas - intersection).clamp(min=1e-6)


def paired_overlaps(boxes: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Intersection over union, plain and generalised (arXiv 1902.09630), of each box with that at its place.

    Args:
        boxes: xyxy `(..., 4)`.
        others: xyxy `(..., 4)` in the same unit.

    Returns:
        IoU and GIoU, each `(...)`.
    """
    sides = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    intersection = sides.clamp(min=0).prod(dim=-1)
    areas, other_areas = ((b[..., 2:] - b[..., :2]).prod(dim=-1) for b in (boxes, others))
    union = (areas + other_areas - intersection).clamp(min=1e-6)
    sides = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(boxes[..., :2], others[..., :2])
    enclosing = sides.clamp(min=0).prod(dim=-1).clamp(min=1e-6)
    iou = intersection / union
    return iou, iou - (enclosing - union) / enclosing


def match_boxes(
    iou: torch.Tensor,
    positive_threshold: float,
    negative_threshold: float,
    low_quality_threshold: float,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Assigns boxes to ground truths by their overlap (`MaxIoUAssigner`).

    A box is negative below `negative_threshold`, and from `positive_threshold` on it is positive and gets the ground
    truth that it overlaps most with; between the two it is ignored. Then every ground truth whose best overlap is at
    least `low_quality_threshold` takes all the boxes that reach this best, also from others: the last one wins.

    Args:
        iou: `(ground truths, boxes)`.
        positive_threshold: IoU.
        negative_threshold: IoU.
        low_quality_threshold: IoU.
        valid: Which boxes take part, bool `(boxes,)`; by default all. The others are ignored.

    Returns:
        Int64 `(boxes,)`: the index of a ground truth, `NEGATIVE`, or `IGNORED`.
    """
    num_objects, num_boxes = iou.shape
    matches = torch.full((num_boxes,), IGNORED, device=iou.device)
    if 0 in iou.shape:
        matches[:] = NEGATIVE
    else:
        if valid is not None:
            iou = iou.masked_fill(~valid, -1)  # below every overlap, so that no ground truth prefers it
        best, best_object = iou.max(dim=0)  # (boxes,)
        matches = matches.masked_fill(best < negative_threshold, NEGATIVE)
        matches = torch.where(best >= positive_threshold, best_object, matches)
        best_of_object = iou.amax(dim=1, keepdim=True)  # (ground truths, 1)
        takes = (iou == best_of_object) & (best_of_object >= low_quality_threshold)  # (ground truths, boxes)
        numbers = torch.arange(1, num_objects + 1, device=iou.device)
        last_taker = (takes * numbers[:, None]).amax(dim=0)  # (boxes,), from 1 on, or 0 where no ground truth takes it
        matches = torch.where(last_taker > 0, last_taker - 1, matches)
    return matches if valid is None else matches.masked_fill(~valid, IGNORED)


def match_atss(
    objects: torch.Tensor,
    anchors: Anchors,
    num_candidates: int,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Assigns anchors to ground truths by a threshold that each of these has for itself (`ATSSAssigner`, arXiv
    1912.02424, algorithm 1).

    The candidates of a ground truth are, of every level, the anchors whose centres are nearest to its own; of equally
    distant ones the first. Its threshold is the mean of their overlaps plus the standard deviation. A candidate is
    positive from the threshold on if its centre is inside of the ground truth; one of several gets the ground truth
    that it overlaps most with. All others are negative, and a ground truth may remain without an anchor.

    Args:
        objects: Boxes of the ground truths, xyxy in pixels, `(ground truths, 4)`.
        anchors: Of all levels.
        num_candidates: Of each level, at most.
        valid: Which anchors take part, bool `(anchors,)`; by default all. The others are ignored.

    Returns:
        Int64 `(anchors,)`: the index of a ground truth, `NEGATIVE`, or `IGNORED`.
    """
    takes_part = torch.ones_like(anchors.boxes[:, 0], dtype=torch.bool) if valid is None else valid
    matches = torch.full_like(takes_part, NEGATIVE, dtype=torch.int64)
    if len(objects):
        centres = anchors.centres
        offsets = centres - _centres_and_sizes(objects)[0][:, None]  # (ground truths, anchors, 2)
        distances = offsets.square().sum(dim=-1).sqrt().masked_fill(~takes_part, torch.inf)
        nearest = [_find_smallest(part, num_candidates) for part in distances.split(list(anchors.level_sizes), dim=1)]
        candidates = torch.cat(nearest, dim=1) & takes_part  # (ground truths, anchors)

        iou = pairwise_iou(objects, anchors.boxes)  # (ground truths, anchors)
        count = candidates.sum(dim=1, keepdim=True)
        mean = (iou * candidates).sum(dim=1, keepdim=True) / count.clamp(min=1)
        variance = ((iou - mean).square() * candidates).sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
        inside = torch.cat((centres - objects[:, None, :2], objects[:, None, 2:] - centres), dim=-1).amin(dim=-1) > 0.01
        positive = candidates & (iou >= mean + variance.sqrt()) & inside
        best, best_object = iou.masked_fill(~positive, -1).max(dim=0)  # (anchors,)
        matches = torch.where(best >= 0, best_object, matches)
    return matches.masked_fill(~takes_part, IGNORED)


def _find_smallest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Which are the `count` smallest of each row, the first ones of equal values: bool `(rows, values)`."""
    count = min(count, values.shape[1])
    largest = values.topk(count, dim=1, largest=False).values.amax(dim=1, keepdim=True)  # (rows, 1)
    smaller, equal = values < largest, values == largest
    return smaller | (equal & (equal.cumsum(dim=1) <= count - smaller.sum(dim=1, keepdim=True)))


def sample_boxes(
    matches: torch.Tensor, num_samples: int, max_positives: int, shuffle: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses among matched boxes (`RandomSampler`): positive ones, and negative ones in place of missing ones.

    Random numbers come from torch's CPU generator, first for the positives, then for the negatives, and only where
    there is a choice.

    Args:
        matches: What [`match_boxes`] gives, int64 `(boxes,)`.
        num_samples: How many boxes are chosen, at most.
        max_positives: How many of them are positive, at most.
        shuffle: Whether the choice is random (the default), or evenly spaced and without random numbers.

    Returns:
        The indices of the positive and of the negative boxes, each int64 and ascending.
    """

    def choose(candidates: torch.Tensor, count: int) -> torch.Tensor:
        if len(candidates) <= count:
            return candidates
        if not shuffle:
            return candidates[torch.arange(count, device=candidates.device) * len(candidates) // count]
        return candidates[torch.randperm(len(candidates))[:count].to(candidates.device)].sort().values

    positives = choose((matches >= 0).nonzero().flatten(), max_positives)
    negatives = choose((matches == NEGATIVE).nonzero().flatten(), num_samples - len(positives))
    return positives, negatives


def sample_batch(
    matches: Sequence[torch.Tensor], num_samples: int, max_positives: int, shuffle: bool = True
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[`sample_boxes`] of each image, one after the other. A GPU is waited for once.

    Args:
        matches: What [`match_boxes`] gives for each image, int64 `(boxes,)`.
        num_samples: How many boxes of an image are chosen, at most.
        max_positives: How many of them are positive, at most.
        shuffle: See [`sample_boxes`].

    Returns:
        For each image the indices of the positive and of the negative boxes, each int64, ascending and on the CPU.
    """
    if not matches:
        return []
    # Which object a box has does not matter here: a byte is enough for whether it has one.
    kinds = torch.cat([image_matches.clamp(max=0).to(torch.int8) for image_matches in matches]).cpu()
    sizes = [len(image_matches) for image_matches in matches]
    return [sample_boxes(own, num_samples, max_positives, shuffle) for own in kinds.split(sizes)]


def move_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors `(values,)` of one dtype and of any lengths on a device, in one transfer."""
    return list(torch.cat(list(tensors)).to(device).split([len(tensor) for tensor in tensors])) if tensors else []


def batched_nms(
    boxes: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor, iou_threshold: float, count: int | None = None
) -> torch.Tensor:
    """Suppresses, among the boxes of the same id, those that overlap with a better one by more than `iou_threshold`.

    The ids are told apart by shifting their boxes, in the boxes' own precision. That rounds coordinates, and is why
    `torchvision.ops.batched_nms`, which does not shift many boxes, gives other results now and then.

    Args:
        boxes: xyxy in pixels, `(boxes, 4)`.
        scores: `(boxes,)`.
        ids: Int64 `(boxes,)`: classes or levels.
        iou_threshold: Boxes of an id that are left do not overlap by more.
        count: How many are wanted (default: all).

    Returns:
        Int64: the indices of the boxes that are left, best first: at least `count` of them, or all.
    """
    from torchvision.ops import nms

    largest = F.pad(boxes.flatten(), (0, 1), value=-math.inf).max()  # of no boxes, too
    shifted = boxes + (ids.to(boxes) * (largest + 1))[:, None]
    if runs_transformed() or len(boxes) < _SPLIT_THRESHOLD:
        if count is not None and boxes.device.type == "cpu" and not runs_transformed():
            # What is left of the best ones does not depend on the others, with which the time grows squared.
            best = scores.argsort(descending=True, stable=True)[: _BEST * count]
            kept = best[nms(shifted[best], scores[best], iou_threshold)]
            if len(kept) >= count or len(best) == len(boxes):
                return kept
        return nms(shifted, scores, iou_threshold)
    kept = []
    for id_ in ids.unique():
        members = (ids == id_).nonzero().flatten()
        kept.append(members[nms(shifted[members], scores[members], iou_threshold)])
    kept = torch.cat(kept).sort().values
    return kept[scores[kept].argsort(descending=True)]


def suppress(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    ids: torch.Tensor,
    candidates: torch.Tensor,
    iou_threshold: float,
    count: int,
) -> torch.Tensor:
    """[`batched_nms`] of the candidates of each image, with a result whose size does not depend on their values.

    Args:
        boxes: xyxy in pixels, `(batch, boxes, 4)`.
        scores: `(batch, boxes)`.
        ids: Int64 `(boxes,)`: classes or levels.
        candidates: Which boxes take part, bool `(batch, boxes)`.
        iou_threshold: Boxes of an id that are left do not overlap by more.
        count: How many boxes are left in each image, at most.

    Returns:
        Int64 `(batch, count)`: the indices of the boxes that are left, best first, then -1.
    """
    # `torch.compile` needs results of known size inside too, so that it has to be one operator there. An exported
    # program has those of torchvision, which other runtimes know.
    is_compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    run = _suppress_as_operator if is_compiled else _suppress
    return run(boxes.detach(), scores.detach(), ids, candidates, iou_threshold, count)


def _suppress(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    ids: torch.Tensor,
    candidates: torch.Tensor,
    iou_threshold: float,
    count: int,
) -> torch.Tensor:
    images = [ids.new_zeros(0, count)]
    for image_boxes, image_scores, image_candidates in zip(boxes, scores, candidates, strict=True):
        rows = image_candidates.nonzero().flatten()  # (candidates,)
        kept = rows[batched_nms(image_boxes[rows], image_scores[rows], ids[rows], iou_threshold)]
        images.append(F.pad(kept, (0, count), value=-1)[None, :count])
    return torch.cat(images)


_suppress_as_operator = torch.library.custom_op("pvt_hf::suppress", _suppress, mutates_args=())


@_suppress_as_operator.register_fake
def _suppress_nothing(boxes, scores, ids, candidates, iou_threshold, count):
    return ids.new_empty(boxes.shape[0], count)


def _centres_and_sizes(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    upper_left, lower_right = boxes.split(2, dim=-1)
    return (upper_left + lower_right) * 0.5, lower_right - upper_left
