"""Pictures of predictions: bars of classes, boxes and masks of objects, and classes of pixels with a legend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

from ..evaluation.visualization import draw_objects, overlay, pick_color, shorten_name
from .predictions import Classification, Detections, Prediction, Segmentation

# Of a panel: name, value, the length of its bar in [0, 1] (`None` for a square of its colour), and colour.
Row: TypeAlias = tuple[str, str, float | None, tuple[int, int, int]]

# In pixels: the longest side of a picture without its panel.
_SMALLEST, _LARGEST = 512, 2048
_BACKGROUND = (128, 128, 128)  # of the first class of a segmenter, often the background
_BAR, _TEXT, _PANEL = (70, 120, 190), (25, 25, 25), (250, 250, 250)


def draw(image: Image.Image, prediction: Prediction, steady: bool = False) -> Image.Image:
    """Draws a prediction on its image.

    Args:
        image: The one that it was predicted of, of any mode.
        prediction: Of [`~pvt_hf.prediction.predictor.Predictor`].
        steady: Whether pictures of images of one size have one size, as frames of a video must: with room for the names
            of all classes (default: `False`, with room for those that are shown).

    Returns:
        A PIL image, RGB. Its longest side is that of the image, but 512 to 2048 pixels; the classes of a classifier,
        and the legend of a segmenter, are on a panel to the right of it.
    """
    return _DRAW[type(prediction)](image.convert("RGB"), prediction, steady)


def _choose_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the picture of an image."""
    longest = max(image.size)
    factor = min(max(longest, _SMALLEST), _LARGEST) / longest
    return max(1, round(image.width * factor)), max(1, round(image.height * factor))


def _draw_classification(image: Image.Image, prediction: Classification, steady: bool) -> Image.Image:
    best = prediction.list_best()
    rows = [(name, f"{100 * score:.1f} %", score, _BAR) for _, name, score in best]
    return _add_panel(image.resize(_choose_size(image)), rows, prediction.label_names if steady else ())


def _draw_detections(image: Image.Image, prediction: Detections, steady: bool) -> Image.Image:
    height = _choose_size(image)[1]
    picture = draw_objects(
        image,
        prediction.boxes,
        prediction.labels.tolist(),
        prediction.label_names,
        prediction.scores.tolist(),
        prediction.masks,
        height,
    )
    if not len(prediction):
        _write_note(picture, prediction.describe())
    return picture


def _draw_segmentation(image: Image.Image, prediction: Segmentation, steady: bool) -> Image.Image:
    shares = prediction.list_shares()
    rows = [(name, f"{100 * share:.1f} %", None, pick_map_color(label)) for label, name, share in shares]
    return _add_panel(paint(image, prediction), rows, prediction.label_names if steady else ())


def pick_map_color(label: int) -> tuple[int, int, int]:
    """The colour of a class on a label map, RGB of 0 to 255: the first class, often the background, is grey.

    Args:
        label: Of the class, from 0.
    """
    return pick_color(label) if label else _BACKGROUND


def paint(image: Image.Image, prediction: Segmentation) -> Image.Image:
    """Paints an image in the colours of its classes, without a legend.

    Args:
        image: The one that it was predicted of, RGB.
        prediction: The class of each pixel.

    Returns:
        A PIL image, RGB, of the size of [`draw`].
    """
    size = _choose_size(image)
    labels = Image.fromarray(prediction.labels.numpy().astype(np.int32)).resize(size, Image.Resampling.NEAREST)
    pixels = torch.from_numpy(np.array(image.resize(size))).permute(2, 0, 1)  # (3, height, width)
    colors = [pick_map_color(label) for label in range(len(prediction.label_names))]
    return to_pil_image(overlay(pixels, torch.from_numpy(np.array(labels)).long(), colors))


def _font_size(picture: Image.Image) -> int:
    return max(14, round(max(picture.size) / 45))


def _write_note(picture: Image.Image, text: str) -> None:
    """Writes a line at the bottom of a picture."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_font_size(picture))
    left, top, right, bottom = font.getbbox(text)
    y = picture.height - (bottom - top) - 12
    draw.rectangle((0, y, right - left + 16, picture.height), fill="black")
    draw.text((8 - left, y + 6 - top), text, font=font, fill="white")


@functools.lru_cache(maxsize=16)
def _measure_names(names: tuple[str, ...], size: int) -> float:
    """In pixels the longest line of a panel that may show any of these classes, at a size of the font."""
    font, lines = ImageFont.load_default(size), [shorten_name(name) for name in names]
    return max(font.getlength(f"{line}    100.0 %") for line in [*lines, f"... and {len(names)} others"])


def _add_panel(picture: Image.Image, rows: Sequence[Row], all_names: Sequence[str]) -> Image.Image:
    """Puts a panel to the right of a picture, with a line for each row. What does not fit is counted.

    With `all_names`, those of all classes, its size does not depend on the rows.
    """
    size = _font_size(picture)
    font, step = ImageFont.load_default(size), size * 2
    room = max(picture.height, 6 * step + size)
    if len(rows) * step + size > room:
        fitting = (room - size) // step - 1
        rows = [*rows[:fitting], (f"... and {len(rows) - fitting} others", "", None, _PANEL)]
    names = [shorten_name(name) for name, *_ in rows]
    lines = (font.getlength(f"{name}    {value}") for name, (_, value, *_) in zip(names, rows, strict=True))
    width = round(_measure_names(tuple(all_names), size) if all_names else max(lines)) + 4 * size
    height = room if all_names else max(picture.height, len(rows) * step + size)
    sheet = Image.new("RGB", (picture.width + width, height), _PANEL)
    sheet.paste(picture, (0, 0))
    draw, left, right = ImageDraw.Draw(sheet), picture.width + size, picture.width + width - size
    for number, (name, (_, value, length, color)) in enumerate(zip(names, rows, strict=True)):
        y = size // 2 + number * step
        if length is None:
            draw.rectangle((left, y, left + size, y + size), fill=color)
        else:
            draw.rectangle((left, y + size * 1.35, right, y + size * 1.6), fill=(225, 225, 225))
            draw.rectangle((left, y + size * 1.35, left + (right - left) * length, y + size * 1.6), fill=color)
        indent = 0 if length is not None else round(1.6 * size)
        draw.text((left + indent, y), name, font=font, fill=_TEXT)
        draw.text((right, y), value, font=font, fill=_TEXT, anchor="ra")
    return sheet


_DRAW: dict[type, Callable[[Image.Image, Any, bool], Image.Image]] = {
    Classification: _draw_classification,
    Detections: _draw_detections,
    Segmentation: _draw_segmentation,
}
