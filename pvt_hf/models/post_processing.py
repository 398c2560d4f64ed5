"""From the detectors' outputs to detections, instances and masks of whole images, as mmdetection 2.13 makes them."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from transformers.image_transforms import center_to_corners_format

from .boxes import at_least_float32, batched_nms


def paste_masks(
    mask_logits: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], threshold: float = 0.5
) -> torch.Tensor:
    """Masks of whole images from those of boxes: bilinear, and set where the probability is at least `threshold`.

    Args:
        mask_logits: `(masks, mask height, mask width)`.
        boxes: xyxy in pixels of the image `(masks, 4)`.
        size: Height and width of the image.

    Returns:
        Bool `(masks, height, width)`.
    """
    masks = torch.zeros(len(mask_logits), *size, dtype=torch.bool, device=mask_logits.device)
    for mask, logits, box in zip(masks, mask_logits, boxes, strict=True):
        rows, columns, inside = _paste(logits, box, size, threshold)
        mask[rows, columns] = inside
    return masks


def segment_instances(
    outputs: Mapping[str, torch.Tensor],
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    target_sizes: torch.Tensor | Sequence[tuple[int, int]] | None = None,
    return_binary_maps: bool = False,
) -> list[dict]:
    """The instances of [`MaskRCNNForInstanceSegmentation`], in the form of transformers' other models.

    Args:
        outputs: What the model returned.
        threshold: Instances have a larger score.
        mask_threshold: Pixels of an instance have at least this probability.
        target_sizes: Height and width in pixels of each image, `(batch, 2)`; by default those of the model's input,
            without padding.
        return_binary_maps: Whether each instance has a map of its own. Else a pixel belongs to the best instance.

    Returns:
        For each image `segmentation`, int64 `(height, width)` with the `id` of the instance of each pixel or -1, or
        bool `(instances, height, width)`; and `segments_info`, for each instance, best first, `id`, `label_id`,
        `was_fused` (False) and `score`.

    Raises:
        ValueError: If the model has no mask head, or there are not as many `target_sizes` as images.
    """
    if "pred_masks" not in outputs:
        raise ValueError("`outputs` have no `pred_masks`: the model was configured with `use_masks=False`.")
    sizes = outputs["image_sizes"] if target_sizes is None else check_target_sizes(target_sizes, len(outputs["scores"]))
    boxes = center_to_corners_format(at_least_float32(outputs["pred_boxes"]))
    boxes = boxes * sizes.to(boxes)[:, None, [1, 0, 1, 0]]
    results = []
    for index, size in enumerate(sizes.tolist()):
        chosen = (outputs["scores"][index] > threshold).nonzero().flatten()
        instance_logits, instance_boxes = outputs["pred_masks"][index, chosen], boxes[index, chosen]
        if return_binary_maps:
            segmentation = paste_masks(instance_logits, instance_boxes, size, mask_threshold)
        else:
            segmentation = torch.full(size, -1, device=boxes.device)
            for number in reversed(range(len(chosen))):  # the best one comes last, on top
                rows, columns, inside = _paste(instance_logits[number], instance_boxes[number], size, mask_threshold)
                segmentation[rows, columns][inside] = number
        labels, scores = (outputs[name][index, chosen].tolist() for name in ("class_labels", "scores"))
        segments = [
            {"id": number, "label_id": label, "was_fused": False, "score": round(score, 6)}
            for number, (label, score) in enumerate(zip(labels, scores, strict=True))
        ]
        results.append({"segmentation": segmentation, "segments_info": segments})
    return results


def _paste(
    logits: torch.Tensor, box: torch.Tensor, size: Sequence[int], threshold: float
) -> tuple[slice, slice, torch.Tensor]:
    """The rows and columns of the image that a mask can reach, and which of these pixels it sets. The interpolation
    fades to zero within half a cell of the small map around the box."""
    low, high = box.reshape(2, 2).flip(1).tolist()  # (y, x)
    spans, coordinates = [], []
    for axis, (start, end, cells, limit) in enumerate(zip(low, high, logits.shape, size, strict=True)):
        margin = (end - start) / cells / 2 + 1
        first = min(max(math.floor(start - margin), 0), limit)
        span = slice(first, max(min(math.ceil(end + margin), limit), first))
        centres = torch.arange(span.start, span.stop, dtype=box.dtype, device=box.device) + 0.5
        relative = (centres - box[1 - axis]) / (box[3 - axis] - box[1 - axis]) * 2 - 1
        spans.append(span)
        coordinates.append(torch.where(relative.isfinite(), relative, 0))
    y, x = torch.meshgrid(*coordinates, indexing="ij")
    grid = torch.stack((x, y), dim=-1)[None]
    if grid.numel() == 0:
        return *spans, torch.zeros(grid.shape[1:3], dtype=torch.bool, device=box.device)
    probabilities = at_least_float32(logits).sigmoid().to(box.dtype)
    return *spans, F.grid_sample(probabilities[None, None], grid, align_corners=False)[0, 0] >= threshold


def select_detections(
    boxes: torch.Tensor, scores: torch.Tensor, score_threshold: float, nms_threshold: float, max_detections: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every class of every box above the score threshold, suppressed by class (`multiclass_nms`).

    Args:
        boxes: xyxy `(boxes, 4)` for all classes, or `(boxes, classes, 4)`.
        scores: `(boxes, classes)`.

    Returns:
        The row and the class of each detection, int64, best first.
    """
    rows, classes = (scores > score_threshold).nonzero().unbind(dim=1)
    candidates = boxes[rows] if boxes.ndim == 2 else boxes[rows, classes]
    kept = batched_nms(candidates, scores[rows, classes], classes, nms_threshold)[:max_detections]
    return rows[kept], classes[kept]


def detect_objects(
    outputs: Mapping[str, torch.Tensor],
    threshold: float = 0.05,
    target_sizes: torch.Tensor | Sequence[tuple[int, int]] | None = None,
    nms_threshold: float = 0.5,
    candidates_per_level: int = 1000,
    max_detections: int = 100,
) -> list[dict[str, torch.Tensor]]:
    """The detections of [`RetinaNetForObjectDetection`] or [`MaskRCNNForInstanceSegmentation`], as the official code
    makes them with a `threshold` of 0.05.

    RetinaNet's outputs are all its anchors: the best `candidates_per_level` of each level by their best class are
    scaled to the target size, and then suppressed. Mask R-CNN's outputs are its detections (its configuration has the
    settings), which are just filtered and scaled.

    Args:
        outputs: What the model returned.
        threshold: Detections have a larger score.
        target_sizes: Height and width in pixels of each image, `(batch, 2)`. Without them boxes are relative to the
            image's size.
        nms_threshold, candidates_per_level, max_detections: Settings of RetinaNet's detections.

    Returns:
        For each image `scores` `(detections,)`, `labels` int64 `(detections,)` and `boxes` xyxy `(detections, 4)`, best
        first.

    Raises:
        ValueError: If there are not as many `target_sizes` as images.
    """
    boxes = center_to_corners_format(at_least_float32(outputs["pred_boxes"]))
    if target_sizes is not None:
        boxes = boxes * check_target_sizes(target_sizes, len(boxes)).to(boxes)[:, None, [1, 0, 1, 0]]
    detections = []
    for index, image_boxes in enumerate(boxes):
        if "level_sizes" in outputs:
            scores = at_least_float32(outputs["logits"][index]).sigmoid()
            candidates = _best_of_levels(scores, outputs["level_sizes"].tolist(), candidates_per_level)
            image_boxes, scores = image_boxes[candidates], scores[candidates]
            rows, labels = select_detections(image_boxes, scores, threshold, nms_threshold, max_detections)
            scores = scores[rows, labels]
        else:
            rows = (outputs["scores"][index] > threshold).nonzero().flatten()
            scores, labels = outputs["scores"][index, rows], outputs["class_labels"][index, rows]
        detections.append({"scores": scores, "labels": labels, "boxes": image_boxes[rows]})
    return detections


def check_target_sizes(target_sizes: torch.Tensor | Sequence[tuple[int, int]], batch_size: int) -> torch.Tensor:
    """`target_sizes` as a tensor `(batch, 2)`. Raises a `ValueError` if they are not that."""
    sizes = torch.stack([torch.as_tensor(size) for size in target_sizes]) if len(target_sizes) else torch.zeros(0, 2)
    if sizes.shape != (batch_size, 2):
        raise ValueError(
            f"`target_sizes` must be the height and width of each of {batch_size} images, got shape "
            f"{tuple(sizes.shape)}."
        )
    return sizes


def _best_of_levels(scores: torch.Tensor, level_sizes: Sequence[int], count: int) -> torch.Tensor:
    """The indices of the best `count` rows of each level by their best class, and of all rows of smaller levels."""
    best = scores.amax(dim=1)
    chosen, start = [], 0
    for level_scores in best.split(list(level_sizes)):
        if len(level_scores) > count:
            chosen.append(start + level_scores.topk(count).indices)
        else:
            chosen.append(torch.arange(start, start + len(level_scores), device=scores.device))
        start += len(level_scores)
    return torch.cat(chosen)


__all__ = ["paste_masks", "segment_instances"]
