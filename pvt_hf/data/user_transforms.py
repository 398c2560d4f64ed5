"""A user's own augmentation, of `torchvision.transforms.v2`: boxes, masks and label maps follow their image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors

from ..models.annotations import Objects, clip
from .images import seed_random_state

# A transform of v2, or any function that takes and gives what one does: an image, and what belongs to it.
Transform = Callable[[Any, Any], tuple[Any, Any]]


def transform_map(
    transform: Transform, image: torch.Tensor, labels: torch.Tensor, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transforms an image with its label map. What a rotation brings in from outside has the label 0, unless the
    transform has `fill={tv_tensors.Image: 0, tv_tensors.Mask: 255}`.

    Args:
        transform: Gets `(tv_tensors.Image, tv_tensors.Mask)`.
        image: uint8 `(3, height, width)`, RGB.
        labels: int64 `(height, width)`.
        generator: Decides everything, also where the transform draws from torch, NumPy or Python.

    Raises:
        ValueError: If the transform gives something else than an image of that kind with a map of its size.
    """
    with seed_random_state(int(generator.integers(2**32))):
        image, labels = transform(tv_tensors.Image(image), tv_tensors.Mask(labels))
    image = _check_image(image)
    if labels.shape != image.shape[1:] or labels.dtype != torch.int64:
        raise ValueError(
            f"`transform` must give a label map of the image's size, int64 {list(image.shape[1:])}, got {labels.dtype} "
            f"{list(labels.shape)}."
        )
    return image, labels.as_subclass(torch.Tensor)


def transform_objects(
    transform: Transform, image: torch.Tensor, objects: Objects, generator: np.random.Generator
) -> tuple[torch.Tensor, Objects]:
    """Transforms an image with its objects. Boxes are cut to the image, and objects whose box has nothing in it vanish;
    areas change as those of the boxes.

    Args:
        transform: Gets a `tv_tensors.Image` and a dictionary with `boxes` (`tv_tensors.BoundingBoxes`, xyxy), `labels`
            (the numbers of the objects, by which it is known which are left) and `masks` (`tv_tensors.Mask`) where the
            objects have them.
        image: uint8 `(3, height, width)`, RGB.
        objects: Of that image.
        generator: Decides everything, also where the transform draws from torch, NumPy or Python.

    Raises:
        ValueError: If the transform gives something else than an image of that kind with boxes, labels and masks of as
            many objects.
    """
    boxes = tv_tensors.BoundingBoxes(objects.boxes, format="XYXY", canvas_size=image.shape[-2:])
    target = {"boxes": boxes, "labels": torch.arange(len(objects))}
    if objects.masks is not None:
        target["masks"] = tv_tensors.Mask(objects.masks)
    with seed_random_state(int(generator.integers(2**32))):
        image, target = transform(tv_tensors.Image(image), target)
    image, left = _check_image(image), objects[target["labels"]]
    size, plain = tuple(image.shape[-2:]), {name: value.as_subclass(torch.Tensor) for name, value in target.items()}
    masks = plain.get("masks")
    lengths = {name: len(value) for name, value in plain.items()}
    if len(set(lengths.values())) > 1 or (masks is not None and tuple(masks.shape[1:]) != size):
        shapes = {name: list(value.shape) for name, value in plain.items()}
        raise ValueError(f"`transform` must give boxes, labels and masks of the same objects on {size}, got {shapes}.")
    new = clip(plain["boxes"], size)
    area = left.area * _measure(new) / _measure(left.boxes)
    moved = dataclasses.replace(left, boxes=new, area=area, **({} if masks is None else {"masks": masks}))
    return image, moved[(new[:, 2:] > new[:, :2]).all(dim=1)]


def _measure(boxes: torch.Tensor) -> torch.Tensor:
    """Areas `(objects,)` of boxes, xyxy."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)


def _check_image(image: Any) -> torch.Tensor:
    if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
        raise ValueError(
            f"`transform` must give an RGB image as it gets one, uint8 [3, height, width], got {found}: the image "
            "processor rescales and normalises."
        )
    return image.as_subclass(torch.Tensor)
