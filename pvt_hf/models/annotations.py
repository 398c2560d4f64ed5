"""The objects of an image: read from COCO annotations, and kept aligned with the image through its geometry."""

from __future__ import annotations

import dataclasses
import numbers
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
        masks: `(objects, height, width)` bool, or `None` where no masks are wanted; nothing is set in that of an object
            whose annotation has none.
        has_masks: `(objects,)` bool, whether each annotation has a mask, or `None` where no masks are wanted.
    """

    boxes: torch.Tensor
    class_labels: torch.Tensor
    area: torch.Tensor
    iscrowd: torch.Tensor
    masks: torch.Tensor | None = None
    has_masks: torch.Tensor | None = None

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
    logged. An annotation without a mask (no `segmentation`, or only parts of one or two points) is an object with a box
    and, where masks are wanted, without one.

    Args:
        target: `{"image_id": ..., "annotations": [...]}`, each annotation with `bbox` (absolute xywh) and
            `category_id`, a class label in 0..`num_labels` - 1; optionally `area` (default: that of the box),
            `iscrowd`, `ignore`, `id`, and `segmentation` (polygons, or RLE, compressed or not).
        size: `(height, width)` of the image in pixels.
        masks: Whether the segmentations are read (default: False).
        num_labels: Number of classes, where it is known.

    Raises:
        AnnotationError: If an annotation lacks a field or has one of another type (a box that is not four finite
            numbers), a class that does not exist, or a segmentation that is malformed or of another size than the
            image; the message names image, annotation and field.
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
    xywh = torch.tensor([_list_box(annotation["bbox"]) for annotation, _ in kept], dtype=torch.float64).reshape(-1, 4)
    areas = [annotation.get("area") or float(box[2:].prod()) for (annotation, _), box in zip(kept, xywh, strict=True)]
    objects = Objects(
        boxes=torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1).float(),
        class_labels=torch.tensor([int(annotation["category_id"]) for annotation, _ in kept], dtype=torch.int64),
        area=torch.tensor(areas, dtype=torch.float32),
        iscrowd=torch.zeros(len(kept), dtype=torch.int64),
    )
    if masks:
        has_masks = [has_mask(annotation.get("segmentation"), name) for annotation, name in kept]
        rasters = [
            rasterize(annotation["segmentation"], size, name) if given else np.zeros(size, dtype=bool)
            for (annotation, name), given in zip(kept, has_masks, strict=True)
        ]
        objects.masks = torch.from_numpy(np.stack(rasters)) if kept else torch.zeros((0, *size), dtype=torch.bool)
        objects.has_masks = torch.tensor(has_masks, dtype=torch.bool)
    return objects


# More than any coordinate or id is, and what float64 still holds exactly.
_LARGEST = 2**53


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, of Python or NumPy, and no bool."""
    # The comparison is false for NaN, and unlike `math.isfinite` it takes integers of any length.
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and bool(abs(value) <= _LARGEST)


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, of Python or NumPy, and no bool."""
    return isinstance(value, numbers.Integral) and is_number(value)


def _list_box(value: Any) -> list[Any] | None:
    """A box as a list, also of a tuple, an array or a tensor."""
    value = value.tolist() if isinstance(value, np.ndarray | torch.Tensor) else value
    return list(value) if isinstance(value, list | tuple) else None


def _is_box(value: Any) -> bool:
    box = _list_box(value)
    return box is not None and len(box) == 4 and all(map(is_number, box))


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool) or (is_number(value) and value in (0, 1))


# What an annotation's fields may hold, and how that is called.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bbox": (_is_box, "four finite numbers x, y, width, height"),
    "category_id": (lambda value: is_number(value) and value == int(value), "an integer"),
    "area": (lambda value: value is None or is_number(value), "a finite number"),
    "iscrowd": (_is_flag, "0 or 1"),
    "ignore": (_is_flag, "0 or 1"),
}


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
        if not isinstance(annotation, Mapping):
            raise AnnotationError(
                f"Annotation number {position} of image {image_id} is no object: {annotation!r:.200}."
            )
        name = f"Annotation {annotation.get('id', f'number {position}')} of image {image_id}"
        missing = [field for field in ("bbox", "category_id") if field not in annotation]
        if missing:
            raise AnnotationError(f"{name} has no {' and no '.join(f'`{field}`' for field in missing)}.")
        for field, (is_valid, wanted) in _FIELDS.items():
            if not is_valid(annotation.get(field)):
                raise AnnotationError(f"{name} has `{field}` {annotation[field]!r:.200}, it must be {wanted}.")
        label = annotation["category_id"]
        if label < 0 or (num_labels is not None and label >= num_labels):
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


def has_mask(segmentation: Any, name: str = "A segmentation") -> bool:
    """Whether there is a mask: RLE, or a polygon of three or more points.

    Args:
        segmentation: See [`rasterize`], or `None`.
        name: Of the annotation, for the error.

    Raises:
        AnnotationError: If it is none of these.
    """
    return isinstance(segmentation, Mapping) or bool(usable_polygons(segmentation, name))


def usable_polygons(segmentation: Any, name: str = "A segmentation") -> list[list[float]]:
    """The polygons of a segmentation; parts of one or two points have no area and are left out.

    Args:
        segmentation: A list of polygons, or `None`.
        name: Of the annotation, for the error.

    Raises:
        AnnotationError: If it is not a list of lists of numbers x, y, x, y, ...
    """
    for part in segmentation if isinstance(segmentation, list) else [segmentation] * (segmentation is not None):
        if not isinstance(part, list) or len(part) % 2 or not all(map(is_number, part)):
            raise AnnotationError(
                f"{name} has `segmentation` with {part!r:.200}, it must be RLE or a list of polygons, each a list of "
                "numbers x, y, x, y, ..."
            )
    return [part for part in segmentation or [] if len(part) >= 6]


def rasterize(segmentation: Any, size: tuple[int, int], name: str = "A segmentation") -> np.ndarray:
    """A segmentation as COCO's own code draws it: bool, `(height, width)`.

    Args:
        segmentation: A list of polygons `[x0, y0, x1, y1, ...]`, of which those of one or two points are left out, or
            RLE `{"size": [height, width], "counts": ...}` with counts as a list, string or bytes.
        size: `(height, width)` of the image in pixels.
        name: Of the annotation, for the error.

    Raises:
        AnnotationError: If it is none of these, or RLE of another size.
    """
    coco_mask = _import_coco_mask()
    height, width = size
    if isinstance(segmentation, Mapping):
        given = segmentation.get("size")
        if not isinstance(given, list | tuple) or list(given) != [height, width]:
            raise AnnotationError(
                f"{name} has a mask of (height, width) {given!r:.200}, the image is {[height, width]}."
            )
        try:
            listed = isinstance(segmentation["counts"], list)
            rle = coco_mask.frPyObjects(segmentation, height, width) if listed else segmentation
            return coco_mask.decode(rle).astype(bool)
        except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise AnnotationError(f"{name} has RLE that cannot be read: {error}") from error
    polygons = usable_polygons(segmentation, name)
    if not polygons:
        raise AnnotationError(
            f"{name} has no mask: `segmentation` must be RLE or have a polygon of three or more points, got "
            f"{segmentation!r:.200}."
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
