"""The bundled data, which need no download: handwritten digits to classify, and synthetic scenes of them with boxes,
masks and label maps."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..models.annotations import encode_mask
from ..writing.files import hidden_folder

if TYPE_CHECKING:
    import datasets

CLASSES = tuple("0123456789")
_SCENE_SIDES = (112, 192)  # in pixels, least and largest
_DIGIT_SIDES = (20, 64)
_MIN_CONTRAST = 90  # in grey levels, of a digit and what is behind it


def load_digits_dataset(split: str | None = None) -> datasets.Dataset:
    """scikit-learn's 1797 handwritten digits, 8 x 8 pixels in grey, as columns `image` and `label` of 10 classes.

    Args:
        split: `"train"` has four fifths of each class, every other name the rest (default: all of them).
    """
    import datasets
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)  # float64 (1797, 64), 0 to 16
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    pixels = (images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    data = datasets.Dataset.from_dict({"image": list(pixels), "label": labels.tolist()}, features=features)
    if split is None:
        return data
    return data.train_test_split(0.2, stratify_by_column="label", seed=0)["train" if split == "train" else "test"]


def load_digit_images(split: str) -> tuple[np.ndarray, list[int]]:
    """The digits of a split; none of them is in the other one.

    Args:
        split: As of [`load_digits_dataset`].

    Returns:
        Pixels, uint8 `(digits, 8, 8)`, and labels.
    """
    pixels, labels = _read_digits(split)
    return pixels.copy(), list(labels)


@functools.cache  # scenes are made of those that were encoded and decoded for the others
def _read_digits(split: str) -> tuple[np.ndarray, tuple[int, ...]]:
    data = load_digits_dataset(split)
    return np.stack([np.asarray(row["image"].convert("L")) for row in data]), tuple(data["label"])


@dataclass
class Scene:
    """A synthetic image and the digits on it.

    Args:
        pixels: uint8 `(height, width, 3)`, RGB.
        masks: bool `(digits, height, width)`, what is visible of each digit; no two of them overlap.
        labels: The digits, 0 to 9.
    """

    pixels: np.ndarray
    masks: np.ndarray
    labels: list[int]

    def label_map(self) -> np.ndarray:
        """uint8 `(height, width)`: 0 is the background, 1 to 10 the digits 0 to 9."""
        values = np.array([0, *(label + 1 for label in self.labels)], dtype=np.uint8)
        # (digits, height, width) -> (height, width): the number of the digit from 1, 0 where there is none
        numbers = (self.masks * np.arange(1, len(values))[:, None, None]).sum(axis=0, dtype=int)
        return values[numbers]


def write_scenes(folder: str | Path, images: int = 1000, validation: int = 200, seed: int = 0) -> Path:
    """Writes synthetic digit scenes, `train` and `validation`, once: a folder that has them already is left as it is.

    Each split has `annotations.json` in COCO's format (boxes, and masks as RLE), the images in `images` and the label
    maps for semantic segmentation in `maps` (background and ten digits). The digits of the two splits, and of
    those on which the classifiers are trained and evaluated, are the same two sets of scikit-learn's.

    Args:
        folder: To be written; it appears when it is complete.
        images: Number of scenes in `train` (default: 1000).
        validation: Number of scenes in `validation` (default: 200).
        seed: The same seed gives the same files (default: 0).

    Returns:
        `folder`.

    Raises:
        FileExistsError: If `folder` holds anything else.
    """
    folder = Path(folder)
    contents = {"images": images, "validation": validation, "seed": seed}
    about = folder / "scenes.json"
    if about.is_file() and json.loads(about.read_text()) == contents:
        return folder
    if folder.exists():
        raise FileExistsError(f"`folder` ({folder}) exists and does not hold the scenes {contents}.")
    with hidden_folder(folder.parent) as hidden:
        complete = hidden / folder.name
        for split, count in (("train", images), ("validation", validation)):
            _write_split(complete / split, split, count, seed)
        (complete / about.name).write_text(json.dumps(contents))
        try:
            os.rename(complete, folder)
        except OSError:  # another program was faster; what it wrote is the same
            if not about.is_file() or json.loads(about.read_text()) != contents:
                raise
    return folder


def _write_split(folder: Path, split: str, images: int, seed: int) -> None:
    for name in ("images", "maps"):
        (folder / name).mkdir(parents=True)
    glyphs, labels = load_digit_images(split)
    records: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    for image_id in range(1, images + 1):
        scene = draw_scene(glyphs, labels, np.random.default_rng([seed, split == "train", image_id]))
        name = f"{image_id:06}.png"
        Image.fromarray(scene.pixels).save(folder / "images" / name)
        Image.fromarray(scene.label_map()).save(folder / "maps" / name)
        height, width = scene.pixels.shape[:2]
        records["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            ids = {"id": len(records["annotations"]) + 1, "image_id": image_id, "category_id": label + 1}
            shape = {"bbox": _surround(mask), "area": int(mask.sum()), "iscrowd": 0, "segmentation": encode_mask(mask)}
            records["annotations"].append(ids | shape)
    records["categories"] = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    (folder / "annotations.json").write_text(json.dumps(records))


def _surround(mask: np.ndarray) -> list[int]:
    """The xywh in pixels of the box around a mask, bool `(height, width)`."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return [int(value) for value in (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)]


def draw_scene(glyphs: np.ndarray, labels: Sequence[int], generator: np.random.Generator) -> Scene:
    """Draws a scene with up to five of these digits, 20 to 64 pixels high; one scene in 25 is empty.

    Args:
        glyphs: uint8 `(digits, 8, 8)`, 0 where there is no ink.
        labels: The digits, 0 to 9.
        generator: Decides everything.
    """
    height, width = generator.integers(_SCENE_SIDES[0], _SCENE_SIDES[1] + 1, 2).tolist()
    pixels = _draw_texture(height, width, generator)  # float64 (height, width, 3), 0 to 255 and a little beyond
    masks: list[np.ndarray] = []  # each bool (height, width)
    drawn: list[int] = []
    wanted = 0 if generator.random() < 0.04 else int(generator.integers(1, 6))
    for _ in range(4 * wanted):  # a digit that finds no room is not drawn
        index = int(generator.integers(len(glyphs)))
        side = int(generator.integers(_DIGIT_SIDES[0], _DIGIT_SIDES[1] + 1))
        glyph = Image.fromarray(glyphs[index]).resize((side, side), Image.Resampling.BICUBIC)
        ink = np.asarray(glyph) / 255  # (side, side), 0 to 1
        top, left = int(generator.integers(height - side + 1)), int(generator.integers(width - side + 1))
        window = np.s_[top : top + side, left : left + side]
        mask = np.zeros((height, width), dtype=bool)
        mask[window] = ink > 0.4
        if len(drawn) == wanted or any((mask & other).any() for other in masks):
            continue
        color = _draw_contrasting_color(pixels[mask].mean(axis=0), generator)
        opacity = np.clip(2.5 * ink - 0.5, 0, 1)[..., None]  # (side, side, 1)
        pixels[window] += (color - pixels[window]) * opacity
        masks.append(mask)
        drawn.append(labels[index])
    stacked = np.stack(masks) if masks else np.zeros((0, height, width), dtype=bool)
    return Scene(pixels.clip(0, 255).round().astype(np.uint8), stacked, drawn)


def _draw_texture(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """A background: a colour with blotches, stripes and grain, float64 `(height, width, 3)`."""
    blotches = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    blotches = np.asarray(blotches.resize((width, height), Image.Resampling.BICUBIC)) / 255 - 0.5
    y, x = np.mgrid[:height, :width]
    angle, period = generator.uniform(0, np.pi), generator.uniform(6, 40)
    stripes = np.sin(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / period)
    grain = generator.normal(0, 5, (height, width, 3))
    return generator.uniform(40, 215, 3) + 60 * blotches + 12 * stripes[..., None] + grain


def _draw_contrasting_color(background: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """An RGB colour, float64 `(3,)`, whose brightness is far from that of the background."""
    while True:
        color = generator.uniform(0, 255, 3)
        if abs((color - background) @ (0.299, 0.587, 0.114)) > _MIN_CONTRAST:
            return color
