"""Pictures of images with the objects in them: truth beside detections."""

import colorsys
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .coco import DetectionData
from .objects import rasterize, read_objects

_MARGIN = 8  # pixels between and around pictures


def class_color(label: int) -> tuple[int, int, int]:
    """A bright colour; neighbouring classes have far hues."""
    hue = label * 0.618034 % 1  # the golden ratio spreads any number of them
    return tuple(round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.85, 1.0))


def draw_objects(
    image: torch.Tensor | Image.Image,
    boxes: torch.Tensor,
    class_labels: Sequence[int],
    label_names: Sequence[str],
    scores: Sequence[float] | None = None,
    masks: np.ndarray | torch.Tensor | None = None,
    height: int | None = None,
) -> Image.Image:
    """An image with boxes, names and scores, and translucent masks with an outline.

    Args:
        image: uint8 `(3, height, width)`, RGB, or a PIL image.
        boxes: xyxy in pixels of the image `(objects, 4)`.
        class_labels: Of the objects; they choose name and colour.
        label_names: The name of each class.
        scores: Of the objects, where there are any.
        masks: Bool `(objects, height, width)`.
        height: Of the picture in pixels, at the same ratio; by default that of the image.

    Returns:
        A PIL image, RGB.
    """
    if isinstance(image, torch.Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    factor = (height or image.height) / image.height
    picture = image.convert("RGB").resize((round(image.width * factor), round(image.height * factor)))
    for mask, label in zip([] if masks is None else np.asarray(masks), class_labels, strict=masks is not None):
        picture = _tinted(picture, mask, class_color(int(label)))
    canvas = ImageDraw.Draw(picture)
    size = max(11, round(min(picture.size) / 24))
    font, width = ImageFont.load_default(size), max(1, round(size / 7))
    corners = (torch.as_tensor(boxes).reshape(-1, 4) * factor).tolist()
    # The best detection comes first and is drawn last, on top.
    for index in reversed(range(len(corners))):
        label = int(class_labels[index])
        color = class_color(label)
        text = label_names[label] if scores is None else f"{label_names[label]} {float(scores[index]):.2f}"
        canvas.rectangle(corners[index], outline=color, width=width)
        _write(canvas, corners[index], text, font, color, picture.size)
    return picture


def _tinted(picture: Image.Image, mask: np.ndarray, color: tuple[int, int, int]) -> Image.Image:
    enlarged = Image.fromarray(np.asarray(mask, dtype=np.uint8) * 255).resize(picture.size)
    inside = np.asarray(enlarged) >= 128
    padded = np.pad(inside, 1)
    surrounded = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    strength = np.where(inside & ~surrounded, 1.0, np.where(inside, 0.45, 0.0))[..., None]
    pixels = np.asarray(picture) * (1 - strength) + np.array(color) * strength
    return Image.fromarray(pixels.round().astype(np.uint8))


def _write(
    canvas: ImageDraw.ImageDraw,
    box: Sequence[float],
    text: str,
    font: ImageFont.FreeTypeFont,
    color: tuple[int, int, int],
    size: tuple[int, int],
) -> None:
    """A name on a plate of its colour: above the box, inside it where there is no room above, always in the picture."""
    left, top, right, bottom = font.getbbox(text)
    width, height = right - left + 4, bottom - top + 4
    x = max(0, min(box[0], size[0] - width))
    y = box[1] - height if box[1] >= height else min(max(box[1], 0), size[1] - height)
    canvas.rectangle((x, y, x + width, y + height), fill=color)
    dark = np.dot(color, (0.299, 0.587, 0.114)) > 140
    canvas.text((x + 2 - left, y + 2 - top), text, font=font, fill="black" if dark else "white")


def draw_detections(
    data: DetectionData,
    results: Mapping[int, Sequence[Mapping[str, Any]]],
    images: int = 8,
    threshold: float = 0.3,
    height: int = 320,
) -> Image.Image:
    """A sheet of images, each with its annotations on the left and its detections on the right.

    Args:
        data: With the images and their annotations.
        results: For each image id its detections, from [`~pvt_hf.metrics.coco_results`].
        images: How many of the first images are shown.
        threshold: Detections with a larger score are drawn.
        height: Of each image, in pixels.
    """
    pairs = [_pair(data, index, results, threshold, height) for index in range(min(images, len(data)))]
    columns = 2 if len(pairs) > 1 else 1
    widest = max(pair.width for pair in pairs)
    title = ImageFont.load_default(16)
    size = (columns * (widest + 2 * _MARGIN), math.ceil(len(pairs) / columns) * (height + _MARGIN) + 32)
    sheet = Image.new("RGB", size, "white")
    text = f"left: annotations; right: detections with a score above {threshold:g}"
    ImageDraw.Draw(sheet).text((_MARGIN, 6), text, font=title, fill="black")
    for number, pair in enumerate(pairs):
        row, column = divmod(number, columns)
        sheet.paste(pair, (column * (widest + 2 * _MARGIN) + _MARGIN, row * (height + _MARGIN) + 32))
    return sheet


def _pair(data: DetectionData, index: int, results: Mapping[int, Any], threshold: float, height: int) -> Image.Image:
    record, image = data.records[index], data.image(index)
    found = [result for result in results[record.image_id] if result["score"] > threshold]
    has_masks = any("segmentation" in result for result in results[record.image_id])
    truth = read_objects(data.target(index), record.size, has_masks)
    left = draw_objects(
        image, truth.boxes, truth.class_labels.tolist(), data.label_names, masks=truth.masks, height=height
    )
    boxes = torch.tensor([result["bbox"] for result in found]).reshape(-1, 4)
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    labels = [data.category_ids.index(result["category_id"]) for result in found]
    masks = np.array([rasterize(result["segmentation"], record.size) for result in found]) if has_masks else None
    if masks is not None:
        masks = masks.reshape(-1, *record.size)
    scores = [result["score"] for result in found]
    right = draw_objects(image, boxes, labels, data.label_names, scores, masks, height)
    pair = Image.new("RGB", (left.width + 4 + right.width, height), "white")
    pair.paste(left, (0, 0))
    pair.paste(right, (left.width + 4, 0))
    return pair
