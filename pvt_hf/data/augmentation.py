"""Random changes of images in training: of an image alone, with its objects, or with its label map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..models.annotations import Objects
from ..models.resize import keep_ratio_size, resize_bilinear, resize_nearest

if TYPE_CHECKING:
    from ..recipes import ImageNetRecipe

Sample = tuple[torch.Tensor, Objects]


@dataclass(frozen=True)
class DetectionAugmentation:
    """Resize to a random size, for half of the images after a random crop where the recipe has it, and flip.

    The defaults are the 1x schedules' (mmdetection's `Resize(1333, 800)`, `RandomFlip(0.5)`).

    Args:
        shortest_edges: One of them is the limit of the shorter side in pixels (default: 800 alone).
        longest_edge: The limit of the longer side in pixels; the aspect ratio is kept (default: 1333).
        flip: Probability of mirroring left and right (default: 0.5).
        crop_shortest_edges: Where it is not empty, half of the images are first resized to one of these, in pixels, and
            cropped: the second policy of the 3x schedules and of DETR (default: empty).
        crop_sides: Least and largest side of that crop in pixels, drawn apart for height and width; a shorter image is
            not cropped (default: 384 to 600).
    """

    shortest_edges: Sequence[int] = (800,)
    longest_edge: int = 1333
    flip: float = 0.5
    crop_shortest_edges: Sequence[int] = ()
    crop_sides: tuple[int, int] = (384, 600)

    def __call__(self, image: torch.Tensor, objects: Objects, generator: np.random.Generator) -> Sample:
        """
        Args:
            image: uint8 `(channels, height, width)`.
            objects: Of that image.
            generator: Decides everything.

        Returns:
            The new image and its objects. There may be none left after a crop.
        """
        sample = image, objects
        if len(self.crop_shortest_edges) and generator.random() < 0.5:
            sample = resize_keep_ratio(*sample, int(generator.choice(self.crop_shortest_edges)), self.longest_edge)
            sample = random_crop(*sample, self.crop_sides, generator)
        sample = resize_keep_ratio(*sample, int(generator.choice(self.shortest_edges)), self.longest_edge)
        if generator.random() < self.flip:
            sample = flip(*sample)
        return sample


def resize_keep_ratio(image: torch.Tensor, objects: Objects, shortest_edge: int, longest_edge: int) -> Sample:
    """Resizes to the largest image of the same aspect ratio within both limits, as the image processor does.

    Args:
        image: uint8 `(channels, height, width)`.
        objects: Of that image.
        shortest_edge: Limit of the shorter side in pixels.
        longest_edge: Limit of the longer side in pixels.
    """
    height, width = image.shape[-2:]
    target = keep_ratio_size(height, width, shortest_edge, longest_edge)
    return resize_bilinear(image, target), objects.resize((height, width), target)


def flip(image: torch.Tensor, objects: Objects) -> Sample:
    """Mirrors left and right.

    Args:
        image: uint8 `(channels, height, width)`.
        objects: Of that image.
    """
    return image.flip(-1), objects.flip(image.shape[-1])


def random_crop(
    image: torch.Tensor, objects: Objects, sides: tuple[int, int], generator: np.random.Generator
) -> Sample:
    """Crops to a window at a random place, whose height and width are each uniform in `sides`, both cut to the image's
    own (mmdetection's `RandomCrop("absolute_range")`, also where no object is left).

    Args:
        image: uint8 `(channels, height, width)`.
        objects: Of that image.
        sides: Least and largest side in pixels.
        generator: Decides everything.
    """
    given = image.shape[-2:]
    height, width = (int(generator.integers(min(side, sides[0]), min(side, sides[1]) + 1)) for side in given)
    top, left = (int(generator.integers(side - cut + 1)) for side, cut in zip(given, (height, width), strict=True))
    return image[:, top : top + height, left : left + width], objects.crop(top, left, height, width)


@dataclass(frozen=True)
class SegmentationAugmentation:
    """Random scale, a crop in which no class has nearly everything, flip and photometric distortion, as mmsegmentation
    trains on ADE20K.

    Args:
        shortest_edge: Limit of the shorter side in pixels at the scale 1; the aspect ratio is kept (default: 512).
        longest_edge: Limit of the longer side in pixels at the scale 1 (default: 2048).
        scales: Lowest and highest factor of these limits (default: 0.5 to 2).
        crop: (height, width) of the crop in pixels; a smaller image stays smaller (default: 512 x 512).
        max_share: Crops are drawn again, up to ten times, until no class has more than this share of the pixels that
            are not ignored, and there are two classes (default: 0.75).
        flip: Probability of mirroring left and right (default: 0.5).
        distortion: Whether brightness, contrast, saturation and hue change (default: `True`).
        ignore_index: The label of ignored pixels (default: 255).
    """

    shortest_edge: int = 512
    longest_edge: int = 2048
    scales: tuple[float, float] = (0.5, 2.0)
    crop: tuple[int, int] = (512, 512)
    max_share: float = 0.75
    flip: float = 0.5
    distortion: bool = True
    ignore_index: int = 255

    def __call__(
        self, image: torch.Tensor, labels: torch.Tensor, generator: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            image: uint8 `(3, height, width)`, RGB.
            labels: int64 `(height, width)`.
            generator: Decides everything.

        Returns:
            The new image and its labels, at most as large as `crop`.
        """
        scale = generator.uniform(*self.scales)
        height, width = image.shape[-2:]
        size = keep_ratio_size(height, width, int(self.shortest_edge * scale), int(self.longest_edge * scale))
        image, labels = resize_bilinear(image, size), resize_nearest(labels, size)
        window = self._draw_window(labels, generator)
        image, labels = image[(slice(None), *window)], labels[window]
        if generator.random() < self.flip:
            image, labels = image.flip(-1), labels.flip(-1)
        if self.distortion:
            image = apply_photometric_distortion(image, generator)
        return image, labels

    def _draw_window(self, labels: torch.Tensor, generator: np.random.Generator) -> tuple[slice, slice]:
        """Rows and columns of a crop."""

        def draw() -> tuple[slice, slice]:
            top, left = (
                int(generator.integers(max(side - cut, 0) + 1))
                for side, cut in zip(labels.shape, self.crop, strict=True)
            )
            return slice(top, top + self.crop[0]), slice(left, left + self.crop[1])

        window = draw()
        smaller = all(
            side <= cut for side, cut in zip(labels.shape, self.crop, strict=True)
        )  # all windows are the same
        for _ in range(0 if smaller else 10):
            values, counts = labels[window].unique(return_counts=True)
            counts = counts[values != self.ignore_index]
            if len(counts) > 1 and counts.max() / counts.sum() < self.max_share:
                break
            window = draw()
        return window


def build_training_transform(recipe: ImageNetRecipe, size: int) -> Callable[[Image.Image], torch.Tensor]:
    """Builds the recipe's augmentation by timm.

    Args:
        recipe: With its colour jitter, RandAugment and random erasing.
        size: Height and width of the crop in pixels.

    Returns:
        From a PIL image in RGB to float32 `(3, size, size)`, normalised with ImageNet's mean and standard deviation.
    """
    import timm.data.auto_augment
    from timm.data import create_transform

    transform = create_transform(
        input_size=size,
        is_training=True,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.auto_augment,
        interpolation="bicubic",
        re_prob=recipe.random_erasing,
        re_mode="pixel",
        re_count=1,
    )
    for operation in (operation for part in transform.transforms for operation in getattr(part, "ops", ())):
        if operation.aug_fn is timm.data.auto_augment.posterize:
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """As timm's with older versions of Pillow: no bits leave a black image, where newer ones raise."""
    return image if bits >= 8 else ImageOps.posterize(image, bits) if bits > 0 else image.point(lambda _: 0)


# By hand, since torchvision's colour functions are not OpenCV's, whose bits mmsegmentation trains on.
def to_hsv(image: torch.Tensor) -> torch.Tensor:
    """OpenCV's `COLOR_RGB2HSV` in its fixed-point arithmetic.

    Args:
        image: uint8 `(3, height, width)`, RGB.

    Returns:
        uint8 `(3, height, width)`: hue in [0, 180), saturation and value in [0, 255].
    """
    red, green, blue = image.int().unbind()  # each (height, width)
    value, low = image.amax(0).int(), image.amin(0).int()
    difference = value - low

    def reciprocals(numerator: float) -> torch.Tensor:  # int32 (256,), with 12 bits of fraction
        table = np.rint(numerator * 4096 / np.maximum(np.arange(256), 1)).astype(np.int32)
        table[0] = 0
        return torch.from_numpy(table).to(image.device)

    saturation = (difference * reciprocals(255)[value.long()] + 2048) >> 12
    # In sixths of the circle times the difference, from red: each channel where it is the largest.
    hue = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * difference, red - green + 4 * difference),
    )
    hue = (hue * reciprocals(180 / 6)[difference.long()] + 2048) >> 12
    return torch.stack([torch.where(hue < 0, hue + 180, hue), saturation, value]).to(torch.uint8)


def to_rgb(image: torch.Tensor) -> torch.Tensor:
    """The inverse of [`to_hsv`], within a grey level of OpenCV's `COLOR_HSV2RGB`, which cuts fractions off.

    Args:
        image: uint8 `(3, height, width)`: hue in [0, 180), saturation and value in [0, 255].

    Returns:
        uint8 `(3, height, width)`, RGB.
    """
    hue, saturation, value = image.float().unbind()  # each (height, width)
    hue, saturation = hue / 30, saturation / 255  # [0, 6), [0, 1]
    # Each channel falls from the value by the saturation where the hue is far from that of the channel.
    channels = [
        value * (1 - saturation * (1 - ((hue - center + 3) % 6 - 3).abs().sub(2).neg().clamp(0, 1)))
        for center in (0, 2, 4)
    ]
    return torch.stack(channels).clamp(0, 255).to(torch.uint8)


def apply_photometric_distortion(image: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """mmsegmentation's `PhotoMetricDistortion`: brightness up to 32 grey levels, contrast and saturation by 0.5 to 1.5,
    hue up to 18 of 180, each for half of the images; contrast before or after the colours.

    Args:
        image: uint8 `(3, height, width)`, RGB.
        generator: Decides everything.

    Returns:
        uint8 `(3, height, width)`, RGB.
    """

    def change_contrast(image: torch.Tensor) -> torch.Tensor:
        return _scale(image, generator.uniform(0.5, 1.5)) if generator.integers(2) else image

    if generator.integers(2):
        image = _scale(image, offset=generator.uniform(-32, 32))
    contrast_first = generator.integers(2)
    if contrast_first:
        image = change_contrast(image)
    if generator.integers(2):
        hsv = to_hsv(image)  # (3, height, width)
        hsv[1] = _scale(hsv[1], generator.uniform(0.5, 1.5))
        image = to_rgb(hsv)
    if generator.integers(2):
        hsv = to_hsv(image)
        hsv[0] = ((hsv[0].int() + int(generator.integers(-18, 18))) % 180).to(torch.uint8)
        image = to_rgb(hsv)
    return image if contrast_first else change_contrast(image)


def _scale(image: torch.Tensor, factor: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    """uint8 of any shape times the factor plus the offset, cut to uint8."""
    return (image.float() * factor + offset).clamp(0, 255).to(torch.uint8)
