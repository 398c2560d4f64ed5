"""The objects of an image: read from COCO annotations, and kept aligned with the image through its geometry."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .resize import resize_nearest

logger = logging.get_logger(__name__)

# How many annotations this process has skipped so far, by reason.
SKIPPED: Counter[str] = Counter()


class AnnotationError(ValueError):
    """An annotation that cannot be used. The message names the image and the annotation."""


@dataclass
class Objects:
    """The objects of one image.

    Args:
        boxes: `(objects, 4)` float32, absolute xyxy in pixels of the image.
        class_labels: `(objects,)` int64.
        area: `(objects,)` float32, in pixels; of the mask where the annotation says so, which is COCO's meaning.
        iscrowd: `(objects,)` int64.
        masks: `(objects, height, width)` bool, or `None` where no masks are wanted.
    """

    boxes: torch.Tensor
    class_labels: torch.Tensor
    area: torch.Tensor
    iscrowd: torch.Tensor
    masks: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, keep: torch.Tensor) -> Objects:
        """The objects of a bool mask or of indices."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Objects(**{name: value if value is None else value[keep] for name, value in fields.items()})

    def resize(self, source: tuple[int, int], target: tuple[int, int]) -> Objects:
        """The objects after a resize of the image: boxes are clipped to it, masks have the nearest pixel (mmdetection's
        `Resize`).

        Args:
            source: `(height, width)` in pixels before.
            target: `(height, width)` in pixels after.
        """
        y_factor, x_factor = (np.float32(new / old) for new, old in zip(target, source, strict=True))
        boxes = self.boxes * torch.tensor([x_factor, y_factor, x_factor, y_factor])
        masks = self.masks if self.masks is None else resize_nearest(self.masks, target)
        area = self.area * float(x_factor * y_factor)
        return dataclasses.replace(self, boxes=clip(boxes, target), masks=masks, area=area)

    def flip(self, width: int) -> Objects:
        """The objects in the image of that width, mirrored left to right."""
        x0, y0, x1, y1 = self.boxes.unbind(1)
        boxes = torch.stack([width - x1, y0, width - x0, y1], dim=1)
        return dataclasses.replace(self, boxes=boxes, masks=self.masks if self.masks is None else self.masks.flip(-1))

    def crop(self, top: int, left: int, height: int, width: int) -> Objects:
        """What is left of the objects in a window of the image; those whose box has nothing in it vanish.

        Args:
            top: First row of the window.
            left: First column of the window.
            height: In pixels.
            width: In pixels.
        """
        boxes = clip(self.boxes - torch.tensor([left, top, left, top]), (height, width))
        masks = self.masks if self.masks is None else self.masks[:, top : top + height, left : left + width]
        visible = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        return dataclasses.replace(self, boxes=boxes, masks=masks)[visible]


def clip(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Boxes clipped to an image.

    Args:
        boxes: xyxy in pixels, `(..., 4)`.
        size: `(height, width)` of the image in pixels.
    """
    height, width = size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))


def read_objects(
    target: dict[str, Any], size: tuple[int, int], masks: bool = False, num_labels: int | None = None
) -> Objects:
    """The objects of COCO annotations as mmdetection trains on them.

    Skipped are annotations marked `ignore`, crowds (`iscrowd`), those whose box lies outside the image, is less than a
    pixel wide or high, or whose area is not positive. They are counted in `SKIPPED`, and the first of each kind is
    logged.

    Args:
        target: `{"image_id": ..., "annotations": [...]}`, each annotation with `bbox` (absolute xywh) and
            `category_id`, a class label in 0..`num_labels` - 1; optionally `area` (default: that of the box),
            `iscrowd`, `ignore`, `id`, and `segmentation` (polygons, or RLE, compressed or not).
        size: `(height, width)` of the image in pixels.
        masks: Whether the segmentations are read (default: False).
        num_labels: Number of classes, where it is known.

    Raises:
        AnnotationError: If an annotation lacks a field, has a box that is not four finite numbers, a class that does
            not exist, or a segmentation that is malformed or of another size than the image.
    """
    image_id, annotations = target.get("image_id"), target.get("annotations")
    if not isinstance(image_id, int | np.integer) or not isinstance(annotations, list | tuple):
        raise AnnotationError(
            "`annotations` must have for each image an integer `image_id` and a list `annotations`, got "
            f"{ {name: type(value).__name__ for name, value in target.items()} }."
        )
    kept = []
    for name, annotation, reason in iter_annotations(annotations, image_id, size, num_labels):
        if reason:
            SKIPPED[reason] += 1
            if SKIPPED[reason] == 1:
                logger.warning(f"{name} is skipped: {reason}. Others like it are counted in `SKIPPED`.")
        else:
            kept.append((annotation, name))
    xywh = torch.tensor([annotation["bbox"] for annotation, _ in kept], dtype=torch.float64).reshape(-1, 4)
    areas = [annotation.get("area") or float(box[2:].prod()) for (annotation, _), box in zip(kept, xywh, strict=True)]
    objects = Objects(
        boxes=torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1).float(),
        class_labels=torch.tensor([annotation["category_id"] for annotation, _ in kept], dtype=torch.int64),
        area=torch.tensor(areas, dtype=torch.float32),
        iscrowd=torch.zeros(len(kept), dtype=torch.int64),
    )
    if masks:
        rasters = [rasterize(annotation.get("segmentation"), size, name) for annotation, name in kept]
        objects.masks = torch.from_numpy(np.stack(rasters)) if kept else torch.zeros((0, *size), dtype=torch.bool)
    return objects


def iter_annotations(
    annotations: Sequence[dict[str, Any]], image_id: int, size: tuple[int, int], num_labels: int | None = None
) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """For each annotation a name for messages, itself, and why mmdetection leaves it out, or `None`.

    Args:
        annotations: See [`read_objects`].
        image_id: Of the image.
        size: `(height, width)` of the image in pixels.
        num_labels: Number of classes, where it is known.

    Raises:
        AnnotationError: As [`read_objects`], but segmentations are not looked at.
    """
    for position, annotation in enumerate(annotations):
        name = f"Annotation {annotation.get('id', f'number {position}')} of image {image_id}"
        missing = [field for field in ("bbox", "category_id") if field not in annotation]
        if missing:
            raise AnnotationError(f"{name} has no {' and no '.join(f'`{field}`' for field in missing)}.")
        box, label = annotation["bbox"], annotation["category_id"]
        if len(box) != 4 or not all(math.isfinite(value) for value in box):
            raise AnnotationError(f"{name} has `bbox` {box}, it must have four finite numbers x, y, width, height.")
        if label != int(label) or label < 0 or (num_labels is not None and label >= num_labels):
            wanted = f"0 to {num_labels - 1}" if num_labels is not None else "0, 1, 2, ..."
            raise AnnotationError(f"{name} has `category_id` {label}, the class labels are {wanted}.")
        yield name, annotation, _find_reason_to_skip(annotation, size)


def _find_reason_to_skip(annotation: dict[str, Any], size: tuple[int, int]) -> str | None:
    x, y, width, height = annotation["bbox"]
    inside = min(x + width, size[1]) > max(x, 0) and min(y + height, size[0]) > max(y, 0)
    reasons = {
        "it is marked `ignore`": annotation.get("ignore"),
        "its box is less than a pixel wide or high": width < 1 or height < 1,
        "its box lies outside the image": not inside,
        "its area is not positive": (1 if annotation.get("area") is None else annotation["area"]) <= 0,
        "it is a crowd": annotation.get("iscrowd"),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def rasterize(segmentation: Any, size: tuple[int, int], name: str = "A segmentation") -> np.ndarray:
    """A segmentation as COCO's own code draws it: bool, `(height, width)`.

    Args:
        segmentation: A list of polygons `[x0, y0, x1, y1, ...]`, or RLE `{"size": [height, width], "counts": ...}` with
            counts as a list, string or bytes.
        size: `(height, width)` of the image in pixels.
        name: Of the annotation, for the error.

    Raises:
        AnnotationError: If it is none of these, or RLE of another size.
    """
    coco_mask = _import_coco_mask()
    height, width = size
    if isinstance(segmentation, dict):
        given = list(segmentation.get("size") or ())
        if given != [height, width]:
            raise AnnotationError(f"{name} has a mask of (height, width) {given}, the image is {[height, width]}.")
        try:
            listed = isinstance(segmentation["counts"], list)
            rle = coco_mask.frPyObjects(segmentation, height, width) if listed else segmentation
            return coco_mask.decode(rle).astype(bool)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise AnnotationError(f"{name} has RLE that cannot be read: {error}") from error
    polygons = segmentation if isinstance(segmentation, list) else []
    if not polygons or any(not isinstance(p, list) or len(p) < 6 or len(p) % 2 for p in polygons):
        raise AnnotationError(
            f"{name} has no mask: `segmentation` must be RLE or a list of polygons of three or more points, got "
            f"{str(segmentation)[:80]}."
        )
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask `(height, width)` as COCO's compressed RLE, with counts that json can hold."""
    rle = _import_coco_mask().encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def _import_coco_mask() -> ModuleType:
    try:  # also keeps it from being asked of those who load the image processor's code from the Hub
        from faster_coco_eval import mask
    except ImportError as error:
        raise ImportError("Masks in COCO's format need `pip install faster-coco-eval`.") from error
    return mask
