"""Random geometry of the official detectors' training, on an image and its objects together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .objects import Objects
from .resize import keep_ratio_size, resize_bilinear

Sample = tuple[torch.Tensor, Objects]


@dataclass(frozen=True)
class DetectionAugmentation:
    """Resize to a random size, for half of the images after a random crop where the recipe has it, and flip.

    The defaults are the 1x schedules' (mmdetection's `Resize(1333, 800)`, `RandomFlip(0.5)`).

    Args:
        short_sides: One of them, in pixels, is the limit of the shorter side.
        longest_side: The limit of the longer side in pixels. The ratio is kept.
        flip: Probability of mirroring left and right.
        crop_short_sides: Where it is not empty, half of the images are first resized to one of these and cropped (the
            second policy of the 3x schedules and of DETR).
        crop_sides: Limits in pixels of the sides of that crop, which are drawn apart; a shorter image is not cropped.
    """

    short_sides: Sequence[int] = (800,)
    longest_side: int = 1333
    flip: float = 0.5
    crop_short_sides: Sequence[int] = ()
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
        if len(self.crop_short_sides) and generator.random() < 0.5:
            sample = resize_keep_ratio(*sample, int(generator.choice(self.crop_short_sides)), self.longest_side)
            sample = random_crop(*sample, self.crop_sides, generator)
        sample = resize_keep_ratio(*sample, int(generator.choice(self.short_sides)), self.longest_side)
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
