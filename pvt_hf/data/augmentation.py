"""Random changes of the papers' training, on an image alone or together with its objects or its label map."""

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
        shortest_edges: One of them, in pixels, is the limit of the shorter side.
        longest_edge: The limit of the longer side in pixels. The ratio is kept.
        flip: Probability of mirroring left and right.
        crop_shortest_edges: Where it is not empty, half of the images are first resized to one of these and cropped
            (the second policy of the 3x schedules and of DETR).
        crop_sides: Limits in pixels of the sides of that crop, which are drawn apart; a shorter image is not cropped.
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
    """The largest image of the same ratio within both limits, as the image processor resizes it."""
    source = tuple(image.shape[-2:])
    target = keep_ratio_size(*source, shortest_edge, longest_edge)
    return resize_bilinear(image, target), objects.resize(source, target)


def flip(image: torch.Tensor, objects: Objects) -> Sample:
    """Mirrored left to right."""
    return image.flip(-1), objects.flip(image.shape[-1])


def random_crop(
    image: torch.Tensor, objects: Objects, sides: tuple[int, int], generator: np.random.Generator
) -> Sample:
    """A window at a random place whose height and width are each uniform in `sides`, both cut to the image's own
    (mmdetection's `RandomCrop("absolute_range")`, also where no object is left)."""
    given = image.shape[-2:]
    height, width = (int(generator.integers(min(side, sides[0]), min(side, sides[1]) + 1)) for side in given)
    top, left = (int(generator.integers(side - cut + 1)) for side, cut in zip(given, (height, width), strict=True))
    return image[:, top : top + height, left : left + width], objects.crop(top, left, height, width)


@dataclass(frozen=True)
class SegmentationAugmentation:
    """Random scale, a crop in which no class has nearly everything, flip and photometric distortion, as mmsegmentation
    trains on ADE20K.

    Args:
        shortest_edge, longest_edge: Limits of the sides in pixels at the scale 1; the ratio is kept.
        scales: Lowest and highest factor of these limits.
        crop: (height, width) of the crop in pixels; a smaller image stays smaller.
        max_share: Crops are drawn again, up to ten times, until no class has more than this share of the pixels that
            are not ignored, and there are two classes.
        flip: Probability of mirroring left and right.
        distortion: Whether brightness, contrast, saturation and hue change.
        ignored: The label of ignored pixels.
    """

    shortest_edge: int = 512
    longest_edge: int = 2048
    scales: tuple[float, float] = (0.5, 2.0)
    crop: tuple[int, int] = (512, 512)
    max_share: float = 0.75
    flip: float = 0.5
    distortion: bool = True
    ignored: int = 255

    def __call__(
        self, image: torch.Tensor, labels: torch.Tensor, generator: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            image: uint8 `(3, height, width)`, RGB.
            labels: int64 `(height, width)`.
            generator: Decides everything.
        """
        scale = generator.uniform(*self.scales)
        limits = int(self.shortest_edge * scale), int(self.longest_edge * scale)
        size = keep_ratio_size(*image.shape[-2:], *limits)
        image, labels = resize_bilinear(image, size), resize_nearest(labels, size)
        window = self._window(labels, generator)
        image, labels = image[(slice(None), *window)], labels[window]
        if generator.random() < self.flip:
            image, labels = image.flip(-1), labels.flip(-1)
        if self.distortion:
            image = photometric_distortion(image, generator)
        return image, labels

    def _window(self, labels: torch.Tensor, generator: np.random.Generator) -> tuple[slice, slice]:
        def draw() -> tuple[slice, slice]:
            starts = [
                int(generator.integers(max(side - cut, 0) + 1))
                for side, cut in zip(labels.shape, self.crop, strict=True)
            ]
            return tuple(slice(start, start + cut) for start, cut in zip(starts, self.crop, strict=True))

        window = draw()
        for _ in range(10):
            values, counts = labels[window].unique(return_counts=True)
            counts = counts[values != self.ignored]
            if len(counts) > 1 and counts.max() / counts.sum() < self.max_share:
                break
            window = draw()
        return window


def training_transform(recipe: ImageNetRecipe, size: int) -> Callable[[Image.Image], torch.Tensor]:
    """The recipe's augmentation by timm, from a PIL image in RGB to `(3, size, size)`, normalised with ImageNet's
    mean and standard deviation."""
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


def to_hsv(image: torch.Tensor) -> torch.Tensor:
    """uint8 `(3, height, width)` RGB to hue in [0, 180), saturation and value in [0, 255], as OpenCV's `COLOR_RGB2HSV`
    in its fixed-point arithmetic."""
    red, green, blue = image.int().unbind()
    value, low = image.amax(0).int(), image.amin(0).int()
    difference = value - low

    def reciprocals(numerator: float) -> torch.Tensor:
        table = np.rint(numerator * 4096 / np.maximum(np.arange(256), 1)).astype(np.int32)
        table[0] = 0
        return torch.from_numpy(table).to(image.device)

    saturation = (difference * reciprocals(255)[value.long()] + 2048) >> 12
    hue = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * difference, red - green + 4 * difference),
    )
    hue = (hue * reciprocals(180 / 6)[difference.long()] + 2048) >> 12
    return torch.stack([torch.where(hue < 0, hue + 180, hue), saturation, value]).to(torch.uint8)


def to_rgb(image: torch.Tensor) -> torch.Tensor:
    """The inverse of [`to_hsv`], within a grey level of OpenCV's `COLOR_HSV2RGB`, which cuts fractions off."""
    hue, saturation, value = image.float().unbind()
    hue, saturation = hue / 30, saturation / 255
    # Each channel falls from the value by the saturation where the hue is far from that of the channel.
    channels = [
        value * (1 - saturation * (1 - ((hue - centre + 3) % 6 - 3).abs().sub(2).neg().clamp(0, 1)))
        for centre in (0, 2, 4)
    ]
    return torch.stack(channels).clamp(0, 255).to(torch.uint8)


def _linear(image: torch.Tensor, factor: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    return (image.float() * factor + offset).clamp(0, 255).to(torch.uint8)


def photometric_distortion(image: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """mmsegmentation's `PhotoMetricDistortion`: brightness up to 32 grey levels, contrast and saturation by 0.5 to 1.5,
    hue up to 18 of 180, each for half of the images; contrast before or after the colours.

    Args:
        image: uint8 `(3, height, width)`, RGB.
        generator: Decides everything.
    """

    def contrast(image: torch.Tensor) -> torch.Tensor:
        return _linear(image, generator.uniform(0.5, 1.5)) if generator.integers(2) else image

    if generator.integers(2):
        image = _linear(image, offset=generator.uniform(-32, 32))
    contrast_first = generator.integers(2)
    if contrast_first:
        image = contrast(image)
    if generator.integers(2):
        hsv = to_hsv(image)
        hsv[1] = _linear(hsv[1], generator.uniform(0.5, 1.5))
        image = to_rgb(hsv)
    if generator.integers(2):
        hsv = to_hsv(image)
        hsv[0] = ((hsv[0].int() + int(generator.integers(-18, 18))) % 180).to(torch.uint8)
        image = to_rgb(hsv)
    return image if contrast_first else contrast(image)
