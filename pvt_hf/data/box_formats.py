"""Formats of boxes: what the four numbers are, and which format fits the numbers that are there."""

from __future__ import annotations

import numpy as np

from ..models.annotations import AnnotationError

# The names are those of albumentations. `coco` is xywh and `voc` xyxy in pixels; relative to the image's size are
# `yolo`, cxcywh, and `albumentations`, xyxy.
_MEANINGS = {
    "coco": "x, y, width, height in pixels",
    "voc": "two corners in pixels",
    "yolo": "centre, width and height relative to the image",
    "albumentations": "two corners relative to the image",
}
BBOX_FORMATS = tuple(_MEANINGS)
# A format fits where nearly all of the boxes make sense in it. Sloppy boxes reach out of the image by up to a tenth.
_FITTING, _DOUBTFUL, _SLACK = 0.99, 0.8, 0.1


def to_xywh(boxes: np.ndarray, sizes: np.ndarray, bbox_format: str) -> np.ndarray:
    """Boxes as COCO has them: left and upper edge, width and height in pixels.

    Args:
        boxes: float64 `(boxes, 4)`, in the format.
        sizes: `(boxes, 2)`, height and width of each box's image in pixels.
        bbox_format: One of `BBOX_FORMATS`.

    Returns:
        float64 `(boxes, 4)`.
    """
    scale = sizes[:, [1, 0, 1, 0]]
    if bbox_format == "coco":
        return boxes
    if bbox_format == "yolo":
        return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], axis=1) * scale
    corners = boxes * scale if bbox_format == "albumentations" else boxes
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def check_bbox_format(boxes: np.ndarray, sizes: np.ndarray, bbox_format: str, source: str) -> None:
    """Raises an [`~pvt_hf.models.annotations.AnnotationError`] if the boxes fit another format and not this one, or are
    relative where they should be in pixels.

    Args:
        boxes: float64 `(boxes, 4)`.
        sizes: `(boxes, 2)`, height and width of each box's image in pixels.
        bbox_format: One of `BBOX_FORMATS`, which the boxes are said to have.
        source: Where they are from, for the message.
    """
    if not len(boxes):
        return
    shares = {name: _fitting_share(to_xywh(boxes, sizes, name), sizes) for name in BBOX_FORMATS}
    guesses = [f"`{name}` ({_MEANINGS[name]})" for name, share in shares.items() if share >= _FITTING]
    if bbox_format in ("coco", "voc") and _fitting_share(boxes * sizes[:, [1, 0, 1, 0]], sizes) >= _FITTING:
        guesses.append("x, y, width, height relative to the image (which no format is: multiply them by its sides)")
    if shares[bbox_format] < _DOUBTFUL and guesses:
        raise AnnotationError(
            f"{source}: only {shares[bbox_format]:.0%} of the {len(boxes)} boxes lie in their image as `{bbox_format}` "
            f"({_MEANINGS[bbox_format]}); the first is {boxes[0].tolist()} in an image of (height, width) "
            f"{sizes[0].tolist()}. They look like {' or '.join(guesses)}. Of COCO json and data sets of the Hub, "
            "`bbox_format` (`--bbox_format`) says what boxes are."
        )


def _fitting_share(boxes: np.ndarray, sizes: np.ndarray) -> float:
    """The part of the boxes (xywh) that have at least a pixel and lie in their image."""
    limits = sizes[:, ::-1]  # (boxes, 2): width, height
    inside = (boxes[:, :2] >= -_SLACK * limits) & (boxes[:, :2] + boxes[:, 2:] <= (1 + _SLACK) * limits)
    return float((inside & (boxes[:, 2:] >= 1)).all(axis=1).mean())
