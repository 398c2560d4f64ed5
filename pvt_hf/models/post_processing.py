"""From the detectors' outputs to detections, instances and masks of complete images, as mmdetection 2.13 makes them.

Sizes are (height, width) in pixels. A model's boxes are cxcywh relative to its image without padding; what comes out
here is xyxy, in pixels of the target or, without one, relative to the image.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from operator import floordiv
from typing import Any

import torch
import torch.nn.functional as F
from transformers.image_transforms import center_to_corners_format

from .boxes import at_least_float32, batched_nms

# What is read here of outputs.
_FIELDS = (
    *("logits", "pred_boxes", "level_sizes", "centerness", "nms_threshold"),
    *("scores", "class_labels", "pred_masks", "image_sizes"),
)
# Anchors of each cell of RetinaNet, where only their number is left.
_ANCHORS_PER_CELL = 9


def read_outputs(outputs: Any, *needed: str) -> dict[str, torch.Tensor]:
    """The fields of a model's outputs that post-processing reads, as tensors.

    Args:
        outputs: What the model returned, a mapping or any object with such attributes, as tensors or arrays; or a tuple
            of the fields in their order, as `Trainer` gathers them for a batch (`eval_do_concat_batches=False`).
        *needed: Names of fields.

    Raises:
        ValueError: If there is no such field.
    """
    if isinstance(outputs, tuple | list):
        outputs = _recognize_fields(outputs)
    elif not isinstance(outputs, Mapping):
        outputs = {name: getattr(outputs, name, None) for name in _FIELDS}
    fields = {name: torch.as_tensor(outputs[name]) for name in _FIELDS if outputs.get(name) is not None}
    if missing := [name for name in needed if name not in fields]:
        raise ValueError(f"`outputs` must have {list(needed)}, got {sorted(fields)} without {missing}.")
    return fields


def _recognize_fields(outputs: Sequence[Any]) -> dict[str, Any]:
    """The fields in a tuple of outputs, by their order and their form."""
    # Losses have fewer dimensions or are in a dictionary, hidden states are in tuples.
    values = [value for value in outputs if getattr(value, "ndim", 0) >= 2]
    fields = dict(zip(("logits", "pred_boxes"), values, strict=False))
    for value in values[2:]:
        if value.ndim == 4:
            fields.setdefault("pred_masks", value)
        elif value.shape == values[0].shape[:2]:
            fields["centerness"] = value
    for vector in (torch.as_tensor(value) for value in outputs if getattr(value, "ndim", 0) == 1):
        if vector.is_floating_point():
            fields["nms_threshold"] = vector
        elif values and vector.sum() == values[0].shape[1]:  # not what several processes have put together
            fields["level_sizes"] = vector
    return fields


def complete_outputs(
    outputs: dict[str, torch.Tensor], num_labels: int | None, input_size: tuple[int, int] | None
) -> dict[str, torch.Tensor]:
    """Finds the `level_sizes` of RetinaNet from the number of its anchors, where logits and boxes are all that is left.
    (ATSS's scores need the centerness too, and GFL has as many anchors as ATSS. Sparse R-CNN's logits and boxes are in
    the form of Deformable DETR's, whose image processor reads them.)

    Without them other outputs are in DETR's form, as Mask R-CNN's are, too: as many logits as classes and one more.

    Args:
        outputs: See [`read_outputs`].
        num_labels: Number of classes, if it is known.
        input_size: Height and width in pixels that the network has had, if they are known.

    Raises:
        ValueError: If the levels cannot be told, or if rows have been added to the boxes of a batch.
    """
    if "level_sizes" in outputs or "scores" in outputs:
        return outputs
    _, num_anchors, num_logits = outputs["logits"].shape
    if num_labels is not None and num_logits == num_labels + 1:
        return outputs
    found = _find_level_sizes(num_anchors, input_size)
    if not found and num_logits != num_labels:
        return outputs
    if len(found) != 1:
        raise ValueError(
            f"`outputs` with {num_anchors} anchors do not say how many each level has ({len(found)} possibilities): "
            "hand over the model's `level_sizes`, too (and of ATSS, GFL and Sparse R-CNN all outputs), or "
            "`target_sizes` with the original sizes of the images."
        )
    if (outputs["pred_boxes"] < 0).any():
        raise ValueError(
            "`outputs` have negative boxes, with which `Trainer` fills batches up that are smaller than others: set "
            "`eval_do_concat_batches=False`."
        )
    return outputs | {"level_sizes": torch.tensor(found.pop())}


def _find_level_sizes(num_anchors: int, input_size: tuple[int, int] | None) -> set[tuple[int, ...]]:
    """All numbers of anchors per level that add up, for the input's size or else for sides of multiples of 32."""

    def size_levels(height: int, width: int, divide: Callable[[int, int], int]) -> tuple[int, ...]:
        shapes = [(divide(height, stride), divide(width, stride)) for stride in (8, 16, 32)]  # of C3 to C5
        for _ in range(2):  # P6 and P7
            shapes.append((_ceil(shapes[-1][0], 2), _ceil(shapes[-1][1], 2)))
        return tuple(rows * columns * _ANCHORS_PER_CELL for rows, columns in shapes)

    # The patch embedding of v1 drops what is left of an odd side, that of v2 does not.
    options = [size_levels(*input_size, divide) for divide in (floordiv, _ceil)] if input_size is not None else []
    if matching := {sizes for sizes in options if sum(sizes) == num_anchors}:
        return matching
    if any(sum(sizes) == num_anchors * _ANCHORS_PER_CELL for sizes in options):
        return set()  # one anchor per cell: ATSS or GFL
    most = num_anchors // (21 * _ANCHORS_PER_CELL)  # cells of stride 32; those of stride 16 and 8 are 20 times as many
    multiples = (
        size_levels(32 * rows, 32 * columns, _ceil)
        for rows in range(1, math.isqrt(most) + 1)
        for columns in range(rows, most // rows + 1)
    )
    return {sizes for sizes in multiples if sum(sizes) == num_anchors}


def _ceil(side: int, stride: int) -> int:
    return -(-side // stride)


def detect_objects(
    outputs: Any,
    threshold: float = 0.05,
    target_sizes: torch.Tensor | Sequence[tuple[int, int]] | None = None,
    nms_threshold: float | None = None,
    candidates_per_level: int = 1000,
    max_detections: int = 100,
    class_threshold: float = 0.05,
) -> list[dict[str, torch.Tensor]]:
    """The detections of RetinaNet, ATSS, GFL, Sparse R-CNN or (Cascade) Mask R-CNN, as mmdetection makes them with a
    `threshold` of 0.05, of ATSS and Sparse R-CNN of 0.

    The outputs of the first three are all anchors: the best `candidates_per_level` of each level by their best class
    are scaled to the target size, and then suppressed. ATSS's scores are the product of class and centerness, and can
    be far below the `class_threshold`. Sparse R-CNN's proposals are treated as anchors of one level; they are not
    suppressed, and mmdetection makes 300 detections of them. Mask R-CNN's outputs are its detections (its configuration
    has the settings), which are just filtered and scaled.

    Args:
        outputs: What the model returned, see [`read_outputs`].
        threshold: Detections have a larger score (default: 0.05).
        target_sizes: Size of each image, `(batch, 2)`. Without them boxes are relative to the image.
        nms_threshold: Of anchors: detections of a class do not overlap by a larger IoU (default: what the outputs say,
            or 0.5).
        candidates_per_level: Of anchors: those of each level that may become detections (default: 1000).
        max_detections: Of anchors: at most so many detections per image (default: 100).
        class_threshold: Of ATSS: detections have a larger probability of their class (default: 0.05).

    Returns:
        For each image `scores` `(detections,)`, `labels` int64 `(detections,)` and `boxes` xyxy `(detections, 4)`, best
        first.

    Raises:
        ValueError: If there are not as many `target_sizes` as images.
    """
    outputs = read_outputs(outputs, "pred_boxes")
    all_boxes = outputs["pred_boxes"]  # (batch, anchors or detections, 4)
    sizes = None if target_sizes is None else check_target_sizes(target_sizes, len(all_boxes))
    if nms_threshold is None:
        nms_threshold = outputs["nms_threshold"][0].item() if "nms_threshold" in outputs else 0.5
    detections = []
    for index, image_boxes in enumerate(all_boxes):
        size = None if sizes is None else sizes[index]
        if "level_sizes" in outputs:
            candidates, scores = _score_anchors(outputs, index, candidates_per_level, class_threshold)
            boxes = _place_boxes(image_boxes[candidates], size)
            rows, labels = select_detections(boxes, scores, threshold, nms_threshold, max_detections)
            scores, boxes = scores[rows, labels], boxes[rows]
        else:
            rows = (outputs["scores"][index] > threshold).nonzero().flatten()
            scores, labels = outputs["scores"][index, rows], outputs["class_labels"][index, rows]
            boxes = _place_boxes(image_boxes[rows], size)
        detections.append({"scores": scores, "labels": labels, "boxes": boxes})
    return detections


def _place_boxes(boxes: torch.Tensor, size: torch.Tensor | None) -> torch.Tensor:
    """xyxy in pixels of an image of this size, or without one relative to the image, of cxcywh: `(boxes, 4)`."""
    boxes = center_to_corners_format(at_least_float32(boxes))
    return boxes if size is None else boxes * size.to(boxes)[[1, 0, 1, 0]]


def _score_anchors(
    outputs: dict[str, torch.Tensor], index: int, count: int, class_threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `count` anchors of each level of an image by their best class, and all anchors of smaller levels; and
    their scores for all classes.

    Returns:
        Int64 `(candidates,)`, and at least float32 `(candidates, classes)`.
    """
    logits, centerness = outputs["logits"][index], None
    # The best class has the largest logit: all others, most of what there is, need no sigmoid.
    best = at_least_float32(logits.amax(dim=1)).sigmoid()  # (anchors,)
    if "centerness" in outputs:
        centerness = at_least_float32(outputs["centerness"][index]).sigmoid()  # (anchors,)
        best = best * centerness
    candidates = _select_best_of_levels(best, outputs["level_sizes"].tolist(), count)
    scores = at_least_float32(logits[candidates]).sigmoid()
    if centerness is not None:
        unlikely = scores <= class_threshold
        scores = (scores * centerness[candidates, None]).masked_fill(unlikely, 0)
    return candidates, scores


def detr_detections(
    outputs: Any,
    threshold: float = 0.0,
    target_sizes: torch.Tensor | Sequence[tuple[int, int]] | None = None,
    max_detections: int = 100,
) -> list[dict[str, torch.Tensor]]:
    """The detections of [`~transformers.DetrForObjectDetection`], as mmdetection makes them with a `threshold` of 0:
    the best class of every query, sorted by score; no suppression.

    Args:
        outputs: With `logits` `(batch, queries, classes + 1)`, no object last, and `pred_boxes` `(batch, queries, 4)`.
        threshold: Detections have a larger score (default: 0).
        target_sizes: Size of each image, `(batch, 2)`. Without them boxes are relative to the image.
        max_detections: At most so many per image (default: 100).

    Returns:
        For each image `scores` `(detections,)`, `labels` int64 `(detections,)` and `boxes` xyxy `(detections, 4)`,
        clipped to the image, best first.

    Raises:
        ValueError: If there are not as many `target_sizes` as images.
    """
    outputs = read_outputs(outputs, "logits", "pred_boxes")
    all_logits, all_boxes = outputs["logits"], outputs["pred_boxes"]
    batch_size = len(all_logits)
    sizes = torch.ones(batch_size, 2) if target_sizes is None else check_target_sizes(target_sizes, batch_size)
    limits = sizes.to(all_boxes)[:, [1, 0, 1, 0]]  # (batch, 4): width, height, width, height
    detections = []
    for index in range(batch_size):
        scores, labels = all_logits[index].softmax(-1)[:, :-1].max(-1)  # (queries,)
        scores, queries = scores.topk(min(max_detections, len(scores)))
        boxes = center_to_corners_format(all_boxes[index, queries]) * limits[index]
        boxes = torch.minimum(boxes.clamp(min=0), limits[index])
        kept = scores > threshold
        detections.append({"scores": scores[kept], "labels": labels[queries][kept], "boxes": boxes[kept]})
    return detections


def segment_instances(
    outputs: Any,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    target_sizes: torch.Tensor | Sequence[tuple[int, int]] | None = None,
    return_binary_maps: bool = False,
) -> list[dict[str, Any]]:
    """The instances of [`MaskRCNNForInstanceSegmentation`], in the form of transformers' other models.

    Args:
        outputs: What the model returned, see [`read_outputs`].
        threshold: Instances have a larger score (default: 0.5).
        mask_threshold: Pixels of an instance have at least this probability (default: 0.5).
        target_sizes: Size of each image, `(batch, 2)`; by default that of the model's input without padding.
        return_binary_maps: Whether each instance has a map of its own. Else (the default) a pixel belongs to the best
            instance.

    Returns:
        For each image `segmentation`, int64 `(height, width)` with the `id` of the instance of each pixel or -1, or
        bool `(instances, height, width)`; and `segments_info`, for each instance, best first, `id`, `label_id`,
        `was_fused` (False) and `score`.

    Raises:
        ValueError: If the model has no mask head, or there are not as many `target_sizes` as images.
    """
    outputs = read_outputs(outputs, "pred_boxes")
    if "pred_masks" not in outputs:
        raise ValueError("`outputs` have no `pred_masks`: the model was configured with `use_masks=False`.")
    if "scores" not in outputs:
        scores, labels = outputs["logits"].softmax(-1)[..., :-1].max(-1)  # (batch, detections)
        outputs |= {"scores": scores, "class_labels": labels}
    if target_sizes is None and "image_sizes" not in outputs:
        raise ValueError("`outputs` have no `image_sizes`: `target_sizes` are needed.")
    sizes = outputs["image_sizes"] if target_sizes is None else check_target_sizes(target_sizes, len(outputs["scores"]))
    boxes = center_to_corners_format(at_least_float32(outputs["pred_boxes"]))  # (batch, detections, 4)
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


def paste_masks(
    mask_logits: torch.Tensor, boxes: torch.Tensor, size: Sequence[int], threshold: float = 0.5
) -> torch.Tensor:
    """Masks of complete images from those of boxes, by bilinear interpolation.

    Args:
        mask_logits: `(masks, mask height, mask width)`.
        boxes: xyxy in pixels of the image, `(masks, 4)`.
        size: Of the image.
        threshold: Pixels of a mask have at least this probability (default: 0.5).

    Returns:
        Bool `(masks, height, width)`.
    """
    masks = torch.zeros(len(mask_logits), *size, dtype=torch.bool, device=mask_logits.device)
    for mask, logits, box in zip(masks, mask_logits, boxes, strict=True):
        rows, columns, inside = _paste(logits, box, size, threshold)
        mask[rows, columns] = inside
    return masks


def select_detections(
    boxes: torch.Tensor, scores: torch.Tensor, score_threshold: float, nms_threshold: float, max_detections: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every class of every box above the score threshold, suppressed by class (`multiclass_nms`).

    Args:
        boxes: xyxy `(boxes, 4)` for all classes, or `(boxes, classes, 4)`.
        scores: `(boxes, classes)`.
        score_threshold: Detections have a larger score.
        nms_threshold: Detections of a class do not overlap by a larger IoU.
        max_detections: At most so many.

    Returns:
        The row and the class of each detection, both int64 `(detections,)`, best first.
    """
    rows, classes = (scores > score_threshold).nonzero().unbind(dim=1)  # (candidates,)
    candidates = boxes[rows] if boxes.ndim == 2 else boxes[rows, classes]  # (candidates, 4)
    scores = scores[rows, classes]
    if nms_threshold < 1:
        kept = batched_nms(candidates, scores, classes, nms_threshold, max_detections)
    else:  # no overlap is larger
        kept = scores.argsort(descending=True, stable=True)
    return rows[kept[:max_detections]], classes[kept[:max_detections]]


def check_target_sizes(target_sizes: torch.Tensor | Sequence[tuple[int, int]], batch_size: int) -> torch.Tensor:
    """`target_sizes` as a tensor `(batch, 2)`. Raises a `ValueError` if they are not that."""
    sizes = torch.stack([torch.as_tensor(size) for size in target_sizes]) if len(target_sizes) else torch.zeros(0, 2)
    if sizes.shape != (batch_size, 2):
        raise ValueError(
            f"`target_sizes` must be the height and width of each of {batch_size} images, got shape "
            f"{tuple(sizes.shape)}."
        )
    return sizes


def _select_best_of_levels(scores: torch.Tensor, level_sizes: Sequence[int], count: int) -> torch.Tensor:
    """The indices of the best `count` anchors of each level, and of all of smaller levels.

    `scores` are `(anchors,)`, level by level, and the result is int64 `(at most levels * count,)`.
    """
    chosen, start = [], 0
    for level_scores in scores.split(list(level_sizes)):  # (anchors of the level,)
        if len(level_scores) > count:
            chosen.append(start + level_scores.topk(count).indices)
        else:
            chosen.append(torch.arange(start, start + len(level_scores), device=scores.device))
        start += len(level_scores)
    return torch.cat(chosen)


def _paste(
    logits: torch.Tensor, box: torch.Tensor, size: Sequence[int], threshold: float
) -> tuple[slice, slice, torch.Tensor]:
    """The rows and columns of the image that a mask can reach, and which of these pixels it sets: bool
    `(rows, columns)`. The interpolation fades to zero within half a cell of the small map around the box."""
    low, high = box.reshape(2, 2).flip(1).tolist()  # (y, x) of the upper left and of the lower right corner
    spans, coordinates = [], []
    for axis, (start, end, cells, limit) in enumerate(zip(low, high, logits.shape, size, strict=True)):
        margin = (end - start) / cells / 2 + 1
        first = min(max(math.floor(start - margin), 0), limit)
        span = slice(first, max(min(math.ceil(end + margin), limit), first))
        centres = torch.arange(span.start, span.stop, dtype=box.dtype, device=box.device) + 0.5  # of the pixels
        relative = (centres - box[1 - axis]) / (box[3 - axis] - box[1 - axis]) * 2 - 1  # [-1, 1] in the box
        spans.append(span)
        coordinates.append(torch.where(relative.isfinite(), relative, 0))
    y, x = torch.meshgrid(*coordinates, indexing="ij")
    grid = torch.stack((x, y), dim=-1)[None]  # (1, rows, columns, 2)
    if grid.numel() == 0:
        return *spans, torch.zeros(grid.shape[1:3], dtype=torch.bool, device=box.device)
    probabilities = at_least_float32(logits).sigmoid().to(box.dtype)  # (mask height, mask width)
    return *spans, F.grid_sample(probabilities[None, None], grid, align_corners=False)[0, 0] >= threshold


__all__ = ["detect_objects", "detr_detections", "paste_masks", "segment_instances"]
