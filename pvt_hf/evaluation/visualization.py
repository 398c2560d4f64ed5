"""Pictures of images with the objects in them: truth beside detections."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..data.detection import DetectionData
from ..models.annotations import rasterize, read_objects
from ..models.image_processing_segmentation import IGNORE_INDEX

# In pixels: around pairs of pictures, within a pair, and above them all.
_MARGIN, _GAP, _TITLE = 8, 4, 32


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
    masks: Sequence[np.ndarray] | torch.Tensor | None = None,
    height: int | None = None,
) -> Image.Image:
    """An image with boxes, names and scores, and translucent masks with an outline.

    Args:
        image: uint8 `(3, height, width)`, RGB, or a PIL image.
        boxes: xyxy in pixels of the image `(objects, 4)`.
        class_labels: Of the objects; they choose name and colour.
        label_names: The name of each class.
        scores: Of the objects, where there are any.
        masks: Bool `(height, width)` each, of the image.
        height: Of the picture in pixels, at the same ratio; by default that of the image.

    Returns:
        A PIL image, RGB.
    """
    if isinstance(image, torch.Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    factor = (height or image.height) / image.height
    picture = image.convert("RGB").resize((round(image.width * factor), round(image.height * factor)))
    # The best detection comes first and is drawn last, on top.
    for mask, label in reversed(list(zip(masks, class_labels, strict=True))) if masks is not None else ():
        picture = _tinted(picture, np.asarray(mask), class_color(int(label)))
    draw = ImageDraw.Draw(picture)
    size = max(11, round(min(picture.size) / 24))
    font, width = ImageFont.load_default(size), max(1, round(size / 7))
    corners = (torch.as_tensor(boxes).reshape(-1, 4) * factor).tolist()
    for index in reversed(range(len(corners))):
        label = int(class_labels[index])
        color = class_color(label)
        text = label_names[label] if scores is None else f"{label_names[label]} {float(scores[index]):.2f}"
        draw.rectangle(corners[index], outline=color, width=width)
        _write(draw, corners[index], text, font, color, picture.size)
    return picture


def _tinted(picture: Image.Image, mask: np.ndarray, color: tuple[int, int, int]) -> Image.Image:
    """The picture with a mask of any size over it: translucent, its outline opaque."""
    enlarged = Image.fromarray(mask.astype(np.uint8) * 255).resize(picture.size)
    inside = np.asarray(enlarged) >= 128
    padded = np.pad(inside, 1)
    surrounded = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    strength = np.where(inside & ~surrounded, 1.0, np.where(inside, 0.45, 0.0))[..., None]
    pixels = np.asarray(picture) * (1 - strength) + np.array(color) * strength
    return Image.fromarray(pixels.round().astype(np.uint8))


def _write(
    draw: ImageDraw.ImageDraw,
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
    draw.rectangle((x, y, x + width, y + height), fill=color)
    dark = np.dot(color, (0.299, 0.587, 0.114)) > 140
    draw.text((x + 2 - left, y + 2 - top), text, font=font, fill="black" if dark else "white")


def draw_detections(
    data: DetectionData,
    results: Mapping[int, Sequence[Mapping[str, Any]]],
    images: int = 8,
    threshold: float = 0.3,
    size: tuple[int, int] = (280, 360),
) -> Image.Image:
    """A sheet of images, each with its annotations on the left and its detections on the right.

    Args:
        data: With the images and their annotations.
        results: For each image id its detections, from [`~pvt_hf.evaluation.metrics.coco_results`].
        images: How many of the first images are shown.
        threshold: Detections with a larger score are drawn.
        size: Each image has this height in pixels, or less where it would be wider than the second number.
    """
    pairs = [_pair(data, index, results, threshold, size) for index in range(min(images, len(data)))]
    columns = [pairs[0::2], pairs[1::2]] if len(pairs) > 1 else [pairs]
    widths = [max(pair.width for pair in column) + 2 * _MARGIN for column in columns]
    heights = [
        max(pair.height for pair in row) + _MARGIN for row in (pairs[i : i + 2] for i in range(0, len(pairs), 2))
    ]
    title, font = f"left: annotations; right: detections with a score above {threshold:g}", ImageFont.load_default(16)
    sheet = Image.new("RGB", (max(sum(widths), 480), sum(heights) + _TITLE), "white")
    ImageDraw.Draw(sheet).text((_MARGIN, 6), title, font=font, fill="black")
    for number, pair in enumerate(pairs):
        row, column = divmod(number, 2)
        sheet.paste(pair, (sum(widths[:column]) + _MARGIN, sum(heights[:row]) + _TITLE))
    return sheet


def _pair(
    data: DetectionData, index: int, results: Mapping[int, Any], threshold: float, size: tuple[int, int]
) -> Image.Image:
    """Annotations and detections of one image, side by side."""
    record, image = data.records[index], data.image(index)
    height = round(min(size[0], size[1] * record.size[0] / record.size[1]))
    found = [result for result in results[record.image_id] if result["score"] > threshold]
    has_masks = any("segmentation" in result for image_results in results.values() for result in image_results)
    truth = read_objects(data.target(index), record.size, has_masks)
    labels = truth.class_labels.tolist()
    left = draw_objects(image, truth.boxes, labels, data.label_names, masks=truth.masks, height=height)
    boxes = torch.tensor([result["bbox"] for result in found]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = [data.category_ids.index(result["category_id"]) for result in found]
    scores = [result["score"] for result in found]
    masks = [rasterize(result["segmentation"], record.size) for result in found] if has_masks else None
    right = draw_objects(image, boxes, labels, data.label_names, scores, masks, height)
    pair = Image.new("RGB", (left.width + _GAP + right.width, height), "white")
    pair.paste(left, (0, 0))
    pair.paste(right, (left.width + _GAP, 0))
    return pair


_OPACITY = 0.65


def palette(num_labels: int) -> torch.Tensor:
    """A colour for every class, uint8 `(num_labels, 3)`. The first is grey, which suits a background; the hues of the
    others are far apart from one class to the next."""
    colors = [(0.5, 0.5, 0.5)]
    for label in range(1, num_labels):
        hue = label * 0.618034 % 1
        colors.append(colorsys.hsv_to_rgb(hue, (0.9, 0.6)[label // 7 % 2], (1.0, 0.75)[label // 14 % 2]))
    return (torch.tensor(colors[:num_labels]) * 255).round().to(torch.uint8)


def overlay(image: torch.Tensor, labels: torch.Tensor, colors: torch.Tensor) -> torch.Tensor:
    """An image in the colours of its classes, through which its brightness shows.

    Args:
        image: uint8 `(3, height, width)`, RGB.
        labels: int64 `(height, width)`; where they are 255 the pixels are black.
        colors: uint8 `(num_labels, 3)`, from [`palette`].

    Returns:
        uint8 `(3, height, width)`.
    """
    brightness = image.float().mean(0)
    ignored = labels == IGNORE_INDEX
    painted = colors[labels.masked_fill(ignored, 0)].movedim(-1, 0).float()
    mixed = _OPACITY * painted + (1 - _OPACITY) * brightness
    return mixed.masked_fill(ignored, 0).round().to(torch.uint8)


def draw_overlays(
    samples: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], names: Mapping[int, str], file: str | Path
) -> None:
    """Writes a PNG with a row for each sample: image, truth, prediction, and a legend of the classes in either.

    Args:
        samples: Image, uint8 `(3, height, width)`, RGB; truth and prediction, int64 `(height, width)`, 255 where
            ignored, which is black.
        names: Of all classes.
        file: To be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colors = palette(len(names))
    figure = Figure(figsize=(11, 2.7 * len(samples) + 0.3), layout="constrained")
    grid = figure.subplots(len(samples), 4, squeeze=False, width_ratios=(3, 3, 3, 2))
    for axes, (image, truth, prediction) in zip(grid, samples, strict=True):
        for axis in axes:
            axis.axis("off")
        pictures = (image, overlay(image, truth, colors), overlay(image, prediction, colors))
        for axis, picture in zip(axes, pictures, strict=False):
            axis.imshow(picture.movedim(0, -1).numpy())
        valid = truth != IGNORE_INDEX
        axes[2].set_title(f"{100 * (truth == prediction)[valid].float().mean():.1f} % of the pixels right", fontsize=8)
        present = torch.cat([truth[valid], prediction.flatten()]).unique().tolist()
        handles = [Patch(color=(colors[label] / 255).tolist(), label=names[label]) for label in present]
        if not valid.all():
            handles.append(Patch(color="black", label="ignored"))
        axes[3].legend(handles=handles, loc="center left", frameon=False, fontsize=9, ncols=1 + len(handles) // 13)
    for axis, title in zip(grid[0], ("image", "truth", "prediction"), strict=False):
        axis.set_title("\n".join(filter(None, (title, axis.get_title()))), fontsize=9)
    figure.savefig(file, dpi=100)
