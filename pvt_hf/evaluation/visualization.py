"""Pictures of what a model finds beside what is there: boxes and masks of objects, and classes of pixels."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ..models.annotations import rasterize, read_objects
from ..models.image_processing_segmentation import IGNORE_INDEX
from ..writing.text import escape_control

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from ..data.detection import DetectionData

    Color: TypeAlias = tuple[int, int, int]

# In pixels: around pairs of pictures, within a pair, and above them all.
_MARGIN, _GAP, _TITLE = 8, 4, 32
_BACKGROUND = (128, 128, 128)
# Of wrong pixels: where the prediction has the second of two classes, where the truth has it, and any of more classes.
_FALSE, _MISSED, _WRONG = (255, 48, 48), (255, 208, 0), (255, 48, 48)
# Of classified images: the side of one in pixels, how many are beside each other, the height of its line, the colours.
_TILE, _COLUMNS, _LINE = 144, 8, 18
_RIGHT_NAME, _WRONG_NAME = (0, 120, 40), (200, 20, 20)


def pick_color(label: int) -> Color:
    """The colour of a class, RGB of 0 to 255. Neighbouring classes have far hues.

    Args:
        label: Of the class, from 0.
    """
    hue = label * 0.618034 % 1  # the golden ratio spreads any number of them
    saturation, value = (0.85, 0.6)[label // 7 % 2], (1.0, 0.75)[label // 14 % 2]
    red, green, blue = (round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def draw_objects(
    image: torch.Tensor | Image.Image,
    boxes: torch.Tensor,
    class_labels: Sequence[int],
    label_names: Sequence[str],
    scores: Sequence[float] | None = None,
    masks: Sequence[np.ndarray] | torch.Tensor | None = None,
    height: int | None = None,
) -> Image.Image:
    """Draws an image with boxes, names and scores, and translucent masks with an outline.

    Args:
        image: uint8 `(3, height, width)`, RGB, or a PIL image.
        boxes: float `(objects, 4)`, absolute xyxy in pixels of the image; the best object is the first, and on top.
        class_labels: Of the objects; they choose name and colour.
        label_names: The name of each class.
        scores: Of the objects, in [0, 1] (default: none are written).
        masks: bool `(height, width)` of the image for each object (default: none are drawn).
        height: Of the picture in pixels, at the same aspect ratio (default: that of the image).

    Returns:
        A PIL image, RGB.
    """
    picture = to_pil_image(image.cpu()) if isinstance(image, torch.Tensor) else image.convert("RGB")
    factor = (height or picture.height) / picture.height
    picture = picture.resize((round(picture.width * factor), round(picture.height * factor)))
    colors = [pick_color(int(label)) for label in class_labels]
    pixels = pil_to_tensor(picture)
    if masks is not None:
        pixels = _draw_masks(pixels, masks, colors)
    corners = (torch.as_tensor(boxes).reshape(-1, 4) * factor).round()
    size = max(11, round(min(picture.size) / 24))
    if colors:  # the best is drawn last
        pixels = draw_bounding_boxes(pixels, corners.flip(0), colors=colors[::-1], width=max(1, round(size / 7)))
    picture = to_pil_image(pixels)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    for index in reversed(range(len(colors))):
        name = shorten_name(label_names[int(class_labels[index])])
        text = name if scores is None else f"{name} {float(scores[index]):.2f}"
        _write_name(draw, corners[index].tolist(), text, font, colors[index], picture.size)
    return picture


def _draw_masks(
    pixels: torch.Tensor, masks: Sequence[np.ndarray] | torch.Tensor, colors: Sequence[Color]
) -> torch.Tensor:
    """Pixels, uint8 `(3, height, width)`, with masks of any size over them: translucent, their outlines opaque."""
    # One call for each, the best last: within a call, torchvision blackens what two masks share.
    for mask, color in reversed(list(zip(masks, colors, strict=True))):
        given = torch.as_tensor(mask).float().cpu()[None, None]  # (1, 1, height, width)
        inside = F.interpolate(given, pixels.shape[-2:], mode="bilinear") >= 0.5
        outline = inside & (F.avg_pool2d(inside.float(), 3, stride=1, padding=1) < 0.95)  # some of 3 x 3 are outside
        pixels = draw_segmentation_masks(pixels, inside[0], 0.45, color)
        pixels = draw_segmentation_masks(pixels, outline[0], 1.0, color)
    return pixels


# By hand, since torchvision writes names into the boxes, over what they show, and past the picture's edge.
def _write_name(
    draw: ImageDraw.ImageDraw,
    box: Sequence[float],
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    color: Color,
    size: tuple[int, int],
) -> None:
    """A name on a plate of its colour: above the box (xyxy in pixels), inside it where there is no room above, always
    in the picture of `size` (width, height)."""
    left, top, right, bottom = font.getbbox(text)
    width, height = right - left + 4, bottom - top + 4
    x = max(0, min(box[0], size[0] - width))
    y = box[1] - height if box[1] >= height else min(max(box[1], 0), size[1] - height)
    draw.rectangle((x, y, x + width, y + height), fill=color)
    dark = np.dot(color, (0.299, 0.587, 0.114)) > 140
    draw.text((x + 2 - left, y + 2 - top), text, font=font, fill="black" if dark else "white")


def draw_classes(samples: Sequence[tuple[Image.Image, str, str, float]]) -> Image.Image:
    """Draws images beside each other, with the class that was found below each: green where it is right, else red.

    Args:
        samples: Image, true class, class that was found, and its score in [0, 1].

    Returns:
        A PIL image, RGB.
    """
    width, height = _TILE + _GAP, _TILE + _LINE + _GAP
    columns, rows = min(_COLUMNS, len(samples)), math.ceil(len(samples) / _COLUMNS)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_LINE - 6)
    for number, (image, truth, found, score) in enumerate(samples):
        row, column = divmod(number, _COLUMNS)
        x, y = column * width + _GAP, row * height + _GAP
        sheet.paste(ImageOps.pad(image.convert("RGB"), (_TILE, _TILE), color="white"), (x, y))
        color = _RIGHT_NAME if found == truth else _WRONG_NAME
        draw.text((x, y + _TILE), f"{shorten_name(found, 16)} {score:.2f}", font=font, fill=color)
    return sheet


def draw_detections(
    data: DetectionData,
    results: Mapping[int, Sequence[Mapping[str, Any]]],
    images: int = 8,
    threshold: float = 0.3,
    size: tuple[int, int] = (280, 360),
) -> Image.Image:
    """Draws a sheet of images, each with its annotations on the left and its detections on the right.

    Args:
        data: With the images and their annotations.
        results: For each image id its detections, from [`~pvt_hf.evaluation.metrics.coco_results`].
        images: How many of the first images are shown (default: 8).
        threshold: Detections with a larger score are drawn (default: 0.3).
        size: (height, width) in pixels within which each image is fitted (default: 280 x 360).

    Returns:
        A PIL image, RGB.
    """
    pairs = [_draw_pair(data, index, results, threshold, size) for index in range(min(images, len(data)))]
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


def _draw_pair(
    data: DetectionData, index: int, results: Mapping[int, Any], threshold: float, size: tuple[int, int]
) -> Image.Image:
    """Annotations and detections of one image, side by side."""
    record, image = data.records[index], data.image(index)
    height = round(min(size[0], size[1] * record.size[0] / record.size[1]))
    has_masks = any("segmentation" in result for image_results in results.values() for result in image_results)
    truth = read_objects(data.target(index), record.size, has_masks)
    labels = truth.class_labels.tolist()
    left = draw_objects(image, truth.boxes, labels, data.label_names, masks=truth.masks, height=height)
    found = [result for result in results[record.image_id] if result["score"] > threshold]
    boxes = torch.tensor([result["bbox"] for result in found]).reshape(-1, 4)  # xywh
    boxes[:, 2:] += boxes[:, :2]  # xyxy
    labels = [data.category_ids.index(result["category_id"]) for result in found]
    scores = [result["score"] for result in found]
    masks = [rasterize(result["segmentation"], record.size) for result in found] if has_masks else None
    right = draw_objects(image, boxes, labels, data.label_names, scores, masks, height)
    pair = Image.new("RGB", (left.width + _GAP + right.width, height), "white")
    pair.paste(left, (0, 0))
    pair.paste(right, (left.width + _GAP, 0))
    return pair


def overlay(image: torch.Tensor, labels: torch.Tensor, colors: Sequence[Color]) -> torch.Tensor:
    """Paints an image in the colours of its classes, through which its brightness shows.

    Args:
        image: uint8 `(3, height, width)`, RGB.
        labels: int64 `(height, width)`; where they are 255 the pixels are black.
        colors: Of each class, such as [`pick_color`] gives.

    Returns:
        uint8 `(3, height, width)`.
    """
    ignored = labels == IGNORE_INDEX
    present = labels[~ignored].unique().tolist()
    painted = _paint_masks(image, [labels == label for label in present], [colors[label] for label in present])
    return painted.masked_fill(ignored, 0)


def _paint_masks(image: torch.Tensor, masks: Sequence[torch.Tensor], colors: Sequence[Color]) -> torch.Tensor:
    """An image, uint8 `(3, height, width)`, in grey, with masks, bool `(height, width)`, in their colours."""
    brightness = image.float().mean(0).round().to(torch.uint8).expand(3, -1, -1)
    return draw_segmentation_masks(brightness, torch.stack(list(masks)), 0.65, list(colors)) if masks else brightness


def find_errors(truth: torch.Tensor, prediction: torch.Tensor, names: Mapping[int, str]) -> dict[str, torch.Tensor]:
    """Where a prediction is wrong, by what a legend calls it: of two classes apart for either side of the second.

    Args:
        truth: int64 `(height, width)`, 255 where ignored, which is never wrong.
        prediction: int64 `(height, width)`.
        names: Of all classes.

    Returns:
        bool `(height, width)` each.
    """
    wrong = (truth != prediction) & (truth != IGNORE_INDEX)
    if len(names) != 2:
        return {"wrong": wrong}
    return {f"false {names[1]}": wrong & (prediction == 1), f"missed {names[1]}": wrong & (truth == 1)}


def draw_legend(axes: Axes, handles: Sequence[Artist], names: Sequence[str], **options: Any) -> None:
    """Draws a legend that shows the names as they are: neither `$` nor a leading underscore means anything in it.

    Args:
        axes: Of matplotlib.
        handles: What is named.
        names: Of anybody, one for each.
        **options: Of [`~matplotlib.axes.Axes.legend`].
    """
    places = [str(number) for number in range(len(names))]
    legend = axes.legend(handles, places, ncols=1 + len(handles) // 13, **options)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(shorten_name(name))


def shorten_name(name: str, longest: int = 40) -> str:
    """The name for a picture, in a line, its middle left out if it is longer than so many characters."""
    name = escape_control(name)
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}\u2026{name[-half:]}"


def draw_overlays(
    samples: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], names: Mapping[int, str], file: str | Path
) -> None:
    """Writes a PNG with a row for each sample: image, truth, prediction, errors, and a legend of what they show. The
    first class, often the background, is grey.

    Args:
        samples: Image, uint8 `(3, height, width)`, RGB; truth and prediction, int64 `(height, width)`, 255 where
            ignored, which is black.
        names: Of all classes.
        file: To be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colors = [_BACKGROUND, *(pick_color(label) for label in range(1, len(names)))]
    figure = Figure(figsize=(14, 2.7 * len(samples) + 0.3), layout="constrained")
    grid = figure.subplots(len(samples), 5, squeeze=False, width_ratios=(3, 3, 3, 3, 2))
    for axes, (image, truth, prediction) in zip(grid, samples, strict=True):
        for axis in axes:
            axis.axis("off")
        errors = find_errors(truth, prediction, names)
        error_colors = (_FALSE, _MISSED) if len(errors) == 2 else (_WRONG,)
        pictures = (
            image,
            overlay(image, truth, colors),
            overlay(image, prediction, colors),
            _paint_masks(image, list(errors.values()), error_colors),
        )
        for axis, picture in zip(axes, pictures, strict=False):
            axis.imshow(picture.movedim(0, -1).numpy())
        valid = truth != IGNORE_INDEX
        axes[2].set_title(f"{100 * (truth == prediction)[valid].float().mean():.1f} % of the pixels right", fontsize=8)
        present = torch.cat([truth[valid], prediction.flatten()]).unique().tolist()
        entries = [(Patch(color=np.divide(colors[label], 255)), names[label]) for label in present]
        if not valid.all():
            entries.append((Patch(color="black"), "ignored"))
        entries += [
            (Patch(color=np.divide(color, 255)), name)
            for color, (name, mask) in zip(error_colors, errors.items(), strict=True)
            if mask.any()
        ]
        draw_legend(axes[4], *zip(*entries, strict=True), loc="center left", frameon=False, fontsize=9)
    for axis, title in zip(grid[0], ("image", "truth", "prediction", "errors"), strict=False):
        axis.set_title("\n".join(filter(None, (title, axis.get_title()))), fontsize=9)
    figure.savefig(file, dpi=100)
