"""From the mask head's small maps to masks of an image, as mmdetection 2.13 pastes them."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from transformers.image_transforms import center_to_corners_format

from .boxes import at_least_float32
from .detection import check_target_sizes


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


__all__ = ["paste_masks", "segment_instances"]
