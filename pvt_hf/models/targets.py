"""What the detectors are given beside images: the sizes of these without padding, and labels, which are checked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.image_transforms import center_to_corners_format, corners_to_center_format

from .layers import runs_transformed
from .modeling_common import check_pixel_values

# Relative coordinates may leave [0, 1] by this much: rounding in half precision, or by an annotator.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class GroundTruth:
    """The objects of one image.

    Args:
        boxes: xyxy in pixels, `(objects, 4)`.
        class_labels: Int64 `(objects,)`.
        masks: Bool `(objects, height, width)` of the network's input, or None.
        has_masks: Bool `(objects,)`, or None where all objects have a mask, or none is needed.
    """

    boxes: torch.Tensor
    class_labels: torch.Tensor
    masks: torch.Tensor | None
    has_masks: torch.Tensor | None = None


def read_images(
    pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None, num_channels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks a batch, and takes off padding that the batch would not have if it were padded to multiples of 32: the
    network sees its padding, and shall give the same for every size that a batch is padded to.

    Compiled code neither checks a batch nor makes it smaller, as its sizes must not depend on values.

    Args:
        pixel_values: `(batch, channels, height, width)`.
        pixel_mask: `(batch, height, width)`, not 0 in the image; by default there is no padding.
        num_channels: What the backbone takes.

    Returns:
        `pixel_values`, and height and width in pixels of each image without its padding, int64 `(batch, 2)`.

    Raises:
        TypeError: If `pixel_values` or `pixel_mask` is no tensor, or one without an order (complex numbers).
        ValueError: If `pixel_values` or `pixel_mask` has another shape, or if `pixel_mask` does not mark a rectangle
            from the upper left corner of each image.
    """
    check_pixel_values(pixel_values, num_channels, 1)
    batch_size, _, height, width = pixel_values.shape
    if pixel_mask is None:
        sides = [torch.full((batch_size,), side, device=pixel_values.device) for side in (height, width)]
        return pixel_values, torch.stack(sides, dim=1)
    if not runs_transformed():
        _check_pixel_mask(pixel_mask, (batch_size, height, width))
    real = pixel_mask != 0
    image_sizes = torch.stack((real[:, :, 0].sum(dim=1), real[:, 0].sum(dim=1)), dim=1)
    if runs_transformed():
        return pixel_values, image_sizes
    rows = torch.arange(height, device=real.device) < image_sizes[:, :1]  # (batch, height)
    columns = torch.arange(width, device=real.device) < image_sizes[:, 1:]  # (batch, width)
    is_rectangle = (real == (rows[:, :, None] & columns[:, None])).flatten(1).all(dim=1)
    sides = torch.cat((image_sizes, is_rectangle[:, None]), dim=1).tolist()  # the only wait for the device
    for index, side in enumerate(sides):
        if not all(side):
            raise ValueError(
                f"`pixel_mask[{index}]` must be 1 in a rectangle from the upper left corner (the image) and 0 to the "
                "right of it and below (the padding)."
            )
    padded = pad_image_sizes([side[:2] for side in sides], (height, width))
    rows, columns = map(max, zip(*padded, strict=True)) if padded else (height, width)
    return pixel_values[:, :, :rows, :columns], image_sizes


def pad_image_sizes(
    image_sizes: Sequence[Sequence[int]], input_size: Sequence[int], divisor: int = 32
) -> list[tuple[int, int]]:
    """Height and width of each image as mmdetection pads it alone, at most those of the batch.

    Args:
        image_sizes: Height and width in pixels of each image.
        input_size: Height and width of the batch in pixels.
        divisor: Sides are padded to multiples of it (default: 32).
    """
    return [
        tuple(min(math.ceil(side / divisor) * divisor, limit) for side, limit in zip(size, input_size, strict=True))
        for size in image_sizes
    ]


def read_ground_truths(
    labels: Sequence[Mapping[str, torch.Tensor]],
    image_sizes: torch.Tensor,
    num_labels: int,
    dtype: torch.dtype,
    mask_size: tuple[int, int] | None = None,
    input_size: Sequence[int] | None = None,
) -> list[GroundTruth]:
    """Checks `labels` and makes their boxes absolute.

    Args:
        labels: See [`check_labels`].
        image_sizes: Height and width in pixels of each image, int64 `(batch, 2)`.
        num_labels: Number of classes.
        dtype: Of the boxes.
        mask_size: Height and width of the batch in pixels, where masks are needed.
        input_size: Height and width of what [`read_images`] left of it, to which the masks are cut.

    Raises:
        TypeError: See [`check_labels`].
        ValueError: See [`check_labels`].
    """
    check_labels(labels, len(image_sizes), num_labels, mask_size)
    truths = []
    scales = image_sizes.to(dtype).flip(1).repeat(1, 2)  # (batch, 4): width, height, width and height
    for label, scale in zip(labels, scales, strict=True):
        boxes = center_to_corners_format(label["boxes"].to(scale).reshape(-1, 4)) * scale
        masks = has_masks = None
        if mask_size is not None:
            rows, columns = input_size or mask_size
            masks = label["masks"].to(scale.device).reshape(-1, *mask_size)[:, :rows, :columns] != 0
            has_masks = label["has_masks"].to(scale.device) if "has_masks" in label else None
        truths.append(GroundTruth(boxes, label["class_labels"].to(scale.device, torch.int64), masks, has_masks))
    return truths


def check_labels(
    labels: Sequence[Mapping[str, torch.Tensor]],
    batch_size: int,
    num_labels: int,
    mask_size: tuple[int, int] | None = None,
) -> None:
    """Raises an error that says what is wrong with the labels of a detector.

    Args:
        labels: For each image `class_labels`, integers `(objects,)` in `[0, num_labels)`, `boxes`, floats
            `(objects, 4)`, cxcywh relative to the image's own size without padding, and with a `mask_size` also `masks`
            `(objects, *mask_size)`, bool or integers, and perhaps `has_masks`, bool `(objects,)`, without which all of
            them count. Tensors without elements may have any shape.
        batch_size: Number of images.
        num_labels: Number of classes.
        mask_size: Height and width of the batch in pixels, where masks are needed.

    Raises:
        TypeError: If `labels` or one of them has another type.
        ValueError: For anything else, with the indices of the image and of the annotation. That includes boxes without
            an area or with a centre outside the image; a box may reach out of it.
    """
    if isinstance(labels, Mapping | torch.Tensor) or not isinstance(labels, Sequence):
        raise TypeError(f"`labels` must be a list of one dictionary per image, got {type(labels).__name__}.")
    if len(labels) != batch_size:
        raise ValueError(f"`labels` must have one dictionary for each of {batch_size} images, got {len(labels)}.")
    for index, label in enumerate(labels):
        _check_tensors(f"labels[{index}]", label, mask_size)
    _check_values(labels, num_labels)


def normalize_boxes(boxes: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Boxes as the models return them.

    Args:
        boxes: xyxy in pixels, `(..., 4)`.
        sizes: Height and width in pixels, `(..., 2)`; the leading dimensions broadcast.

    Returns:
        cxcywh relative to `sizes`, `(..., 4)`.
    """
    scale = sizes.to(boxes).flip(-1)  # (..., 2): width and height
    return corners_to_center_format(boxes / torch.cat((scale, scale), dim=-1))


def _check_pixel_mask(pixel_mask: Any, shape: tuple[int, int, int]) -> None:
    if not isinstance(pixel_mask, torch.Tensor) or pixel_mask.is_complex():
        got = pixel_mask.dtype if isinstance(pixel_mask, torch.Tensor) else type(pixel_mask).__name__
        raise TypeError(f"`pixel_mask` must be a tensor of integers, booleans or floats, got {got}.")
    if pixel_mask.shape != shape:
        raise ValueError(f"`pixel_mask` must have shape {shape}, as `pixel_values`, got {tuple(pixel_mask.shape)}.")


def _check_tensors(name: str, label: Any, mask_size: tuple[int, int] | None) -> None:
    """Types and shapes of the labels of one image."""
    if not isinstance(label, Mapping):
        raise TypeError(f"`{name}` must be a dictionary, got {type(label).__name__}.")
    tails = {"boxes": (4,)} if mask_size is None else {"boxes": (4,), "masks": mask_size}
    needed = ["class_labels", *tails]
    if missing := [key for key in needed if not isinstance(label.get(key), torch.Tensor)]:
        raise ValueError(f"`{name}` must have tensors {needed}, got {sorted(label)} without {missing}.")
    classes, boxes = label["class_labels"], label["boxes"]
    if classes.ndim != 1 or classes.is_floating_point() or classes.dtype == torch.bool:
        raise ValueError(
            f"`{name}['class_labels']` must be class indices of shape (objects,), got {classes.dtype} of shape "
            f"{tuple(classes.shape)}."
        )
    for key, tail in tails.items():
        wanted = (len(classes), *tail)
        # An image without objects may have an empty tensor of any shape.
        if (len(classes) or label[key].numel()) and label[key].shape != wanted:
            raise ValueError(f"`{name}[{key!r}]` must have shape {wanted}, got {tuple(label[key].shape)}.")
    has_masks = label.get("has_masks") if mask_size is not None else None
    if has_masks is not None and (has_masks.dtype != torch.bool or has_masks.shape != (len(classes),)):
        raise ValueError(
            f"`{name}['has_masks']` must be bool of shape {(len(classes),)}, got {has_masks.dtype} of shape "
            f"{tuple(has_masks.shape)}."
        )
    if not boxes.is_floating_point() and boxes.numel():
        raise ValueError(f"`{name}['boxes']` must be floating point, relative to the image's size, got {boxes.dtype}.")


def _check_values(labels: Sequence[Mapping[str, torch.Tensor]], num_labels: int) -> None:
    """Classes `(objects,)` and boxes `(objects, 4)` of each image. A GPU is waited for once, and for what is wrong."""
    wanted = (
        f"classes in [0, {num_labels}) (`config.num_labels`)",
        "finite boxes",
        "boxes (centre x, centre y, width, height) relative to the image's size, in [0, 1]",
        "boxes (centre x, centre y, width, height) of some width and height",
    )
    flags = [_find_wrong(label["class_labels"], label["boxes"], num_labels) for label in labels]
    wrong = torch.cat([flag.to(flags[0].device) for flag in flags], dim=1).cpu() if flags else torch.zeros(4, 0)
    if not wrong.any():
        return
    images = wrong.split([len(label["class_labels"]) for label in labels], dim=1)
    index = next(index for index, image in enumerate(images) if image.any())
    problem = images[index].any(dim=1).tolist().index(True)
    annotation = images[index][problem].tolist().index(True)
    value = labels[index]["boxes" if problem else "class_labels"][annotation].tolist()
    raise ValueError(f"`labels[{index}]` must have {wanted[problem]}: annotation {annotation} has {value}.")


def _find_wrong(classes: torch.Tensor, boxes: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Which of the four problems each object has: bool `(problems, objects)`."""
    boxes = boxes.reshape(-1, 4)
    problems = (
        ((classes < 0) | (classes >= num_labels)).to(boxes.device),
        ~boxes.isfinite().all(dim=1),
        ((boxes < -_TOLERANCE) | (boxes > 1 + _TOLERANCE)).any(dim=1),
        (boxes[:, 2:] <= 0).any(dim=1),
    )
    return torch.stack(problems)
