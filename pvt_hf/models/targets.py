"""What the detectors take and give beside tensors of a fixed shape: sizes of images, ground truths, detections."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers.image_transforms import center_to_corners_format, corners_to_center_format

# Normalised coordinates may leave [0, 1] by this much: rounding in half precision, or by an annotator.
_TOLERANCE = 1e-2


def image_sizes_from_mask(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> torch.Tensor:
    """Height and width in pixels of each image without its padding, int64 `(batch, 2)`.

    Raises:
        ValueError: If `pixel_values` is not `(batch, channels, height, width)`, or if `pixel_mask` is not
            `(batch, height, width)` or does not mark a rectangle from the upper left corner of each image.
    """
    if pixel_values.ndim != 4:
        raise ValueError(
            f"`pixel_values` must have shape (batch, channels, height, width), got {tuple(pixel_values.shape)}."
        )
    batch_size, _, height, width = pixel_values.shape
    if pixel_mask is None:
        return torch.tensor([[height, width]] * batch_size, device=pixel_values.device)
    if pixel_mask.shape != (batch_size, height, width):
        raise ValueError(
            f"`pixel_mask` must have shape {(batch_size, height, width)}, as `pixel_values`, got "
            f"{tuple(pixel_mask.shape)}."
        )
    real = pixel_mask != 0
    sizes = torch.stack((real[:, :, 0].sum(dim=1), real[:, 0].sum(dim=1)), dim=1)
    rows = torch.arange(height, device=real.device) < sizes[:, :1]
    columns = torch.arange(width, device=real.device) < sizes[:, 1:]
    rectangles = (sizes > 0).all(dim=1) & (real == (rows[:, :, None] & columns[:, None])).flatten(1).all(dim=1)
    if not rectangles.all():
        index = rectangles.tolist().index(False)
        raise ValueError(
            f"`pixel_mask[{index}]` must be 1 in a rectangle from the upper left corner (the image) and 0 to the right "
            "of it and below (the padding)."
        )
    return sizes


def padded_sizes(image_sizes: torch.Tensor, input_size: tuple[int, int], divisor: int = 32) -> list[tuple[int, int]]:
    """Height and width of each image as the official pipeline pads it alone, at most those of the batch."""
    return [
        tuple(min(math.ceil(side / divisor) * divisor, limit) for side, limit in zip(size, input_size, strict=True))
        for size in image_sizes.tolist()
    ]


@dataclass(frozen=True)
class GroundTruth:
    """The objects of one image: `boxes` xyxy in pixels `(objects, 4)`, `class_labels` int64 `(objects,)`, and `masks`
    bool `(objects, height, width)` of the network's input, or None."""

    boxes: torch.Tensor
    class_labels: torch.Tensor
    masks: torch.Tensor | None


def ground_truths(
    labels: Sequence[Mapping[str, torch.Tensor]],
    image_sizes: torch.Tensor,
    num_labels: int,
    dtype: torch.dtype,
    mask_size: tuple[int, int] | None = None,
) -> list[GroundTruth]:
    """Checks `labels` and makes their boxes absolute.

    Args:
        labels: For each image `class_labels` int64 `(objects,)`, `boxes` `(objects, 4)`, cxcywh relative to the image's
            own size without padding, and with a `mask_size` also `masks` `(objects, *mask_size)`, bool or integers.
        image_sizes: Int64 `(batch, 2)`: height and width in pixels.
        num_labels: Number of classes.
        dtype: Of the boxes.
        mask_size: Height and width of the batch, where masks are needed.

    Raises:
        TypeError, ValueError: For anything else, with the indices of the image and of the annotation. That includes
            boxes without an area or with a centre outside the image; a box may reach out of it.
    """
    if isinstance(labels, Mapping | torch.Tensor) or not isinstance(labels, Sequence):
        raise TypeError(f"`labels` must be a list of one dictionary per image, got {type(labels).__name__}.")
    if len(labels) != len(image_sizes):
        raise ValueError(f"`labels` must have one dictionary for each of {len(image_sizes)} images, got {len(labels)}.")
    truths = []
    for index, (label, (height, width)) in enumerate(zip(labels, image_sizes.tolist(), strict=True)):
        _check_label(f"labels[{index}]", label, num_labels, mask_size)
        scale = torch.tensor([width, height, width, height], dtype=dtype, device=image_sizes.device)
        boxes = center_to_corners_format(label["boxes"].to(scale).reshape(-1, 4)) * scale
        masks = None if mask_size is None else label["masks"].to(scale.device).reshape(-1, *mask_size) != 0
        truths.append(GroundTruth(boxes, label["class_labels"].to(scale.device, torch.int64), masks))
    return truths


def _check_label(name: str, label: Mapping, num_labels: int, mask_size: tuple[int, int] | None) -> None:
    if not isinstance(label, Mapping):
        raise TypeError(f"`{name}` must be a dictionary, got {type(label).__name__}.")
    needed = ("class_labels", "boxes") if mask_size is None else ("class_labels", "boxes", "masks")
    if missing := [key for key in needed if not isinstance(label.get(key), torch.Tensor)]:
        raise ValueError(f"`{name}` must have tensors {list(needed)}, got {sorted(label)} without {missing}.")
    classes, boxes = label["class_labels"], label["boxes"]
    if classes.ndim != 1 or classes.is_floating_point() or classes.dtype == torch.bool:
        raise ValueError(
            f"`{name}['class_labels']` must be class indices of shape (objects,), got {classes.dtype} of shape "
            f"{tuple(classes.shape)}."
        )
    for key, tail in (("boxes", (4,)), ("masks", mask_size)):
        # An image without objects may have an empty tensor of any shape.
        if key in needed and (len(classes) or label[key].numel()) and label[key].shape != (len(classes), *tail):
            wanted = (len(classes), *tail)
            raise ValueError(f"`{name}[{key!r}]` must have shape {wanted}, got {tuple(label[key].shape)}.")
    if not boxes.is_floating_point() and boxes.numel():
        raise ValueError(f"`{name}['boxes']` must be floating point, relative to the image's size, got {boxes.dtype}.")
    if len(classes) == 0:
        return
    problems = (
        ((classes < 0) | (classes >= num_labels), f"classes in [0, {num_labels}) (`config.num_labels`)", classes),
        (~boxes.isfinite().all(dim=1), "finite boxes", boxes),
        (
            ((boxes < -_TOLERANCE) | (boxes > 1 + _TOLERANCE)).any(dim=1),
            "boxes (centre x, centre y, width, height) relative to the image's size, in [0, 1]",
            boxes,
        ),
        ((boxes[:, 2:] <= 0).any(dim=1), "boxes (centre x, centre y, width, height) of some width and height", boxes),
    )
    wrong = torch.stack([mask.to(boxes.device) for mask, *_ in problems]).cpu()
    for row, (_, wanted, values) in zip(wrong, problems, strict=True):
        if row.any():
            index = row.tolist().index(True)
            raise ValueError(f"`{name}` must have {wanted}: annotation {index} has {values[index].tolist()}.")


def normalized_boxes(boxes: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """xyxy in pixels `(..., 4)` to cxcywh relative to `sizes`, height and width `(..., 2)`."""
    return corners_to_center_format(boxes / sizes.to(boxes)[..., [1, 0, 1, 0]])
