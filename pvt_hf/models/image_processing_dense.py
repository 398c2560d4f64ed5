"""What the image processors of the detectors and of the segmenters share."""

import math
from typing import Any

import numpy as np
import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict

from .image_processing_common import ImagePreprocessing
from .layers import place_numbers
from .resize import keep_ratio_size, scale_sides


class DensePreprocessing(ImagePreprocessing):
    """Mixin of image processors that keep the aspect ratio and resize as OpenCV does, before a backend of transformers.

    Nothing of the backends is used that changes a pixel: both give the same values.
    """

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    default_to_square = False
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True

    def _validate_preprocess_kwargs(self, resample: Any = None, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(resample=resample, **kwargs)
        if resample != PILImageResampling.BILINEAR:
            raise ValueError(f"`resample` must be bilinear ({int(PILImageResampling.BILINEAR)}), got {resample}.")


def compute_resized_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """Height and width in pixels of an image after the resize.

    Args:
        height: In pixels.
        width: In pixels.
        size: `{"shortest_edge", "longest_edge"}` (the second may be left out) or `{"max_height", "max_width"}`, which
            keep the aspect ratio, or `{"height", "width"}`, which do not, in pixels.
    """
    if size.height:
        return size.height, size.width
    if size.max_height:
        return scale_sides(height, width, min(size.max_height / height, size.max_width / width))
    return keep_ratio_size(height, width, size.shortest_edge, size.longest_edge or math.inf)


def compute_padded_size(sizes: list[tuple[int, int]], pad_size: SizeDict | None, divisor: int) -> tuple[int, int]:
    """Height and width in pixels of a batch.

    Args:
        sizes: Height and width in pixels of each image.
        pad_size: What the batch shall have, or None for the smallest multiples of `divisor` that hold all images.
        divisor: In pixels.

    Raises:
        ValueError: If an image is larger than `pad_size`.
    """
    largest = tuple(map(max, zip(*sizes, strict=True)))
    if pad_size is None:
        return tuple(math.ceil(side / divisor) * divisor for side in largest)
    if largest[0] > pad_size.height or largest[1] > pad_size.width:
        raise ValueError(
            f"`pad_size` is {dict(pad_size)}, but the largest sides of the images are {list(largest)}. With "
            f"`size={{'max_height': {pad_size.height}, 'max_width': {pad_size.width}}}` they fit."
        )
    return pad_size.height, pad_size.width


def pad(image: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """Zeros on the right and at the bottom.

    Args:
        image: `(..., height, width)`.
        size: Height and width in pixels of the result; None leaves the image as it is.
    """
    if size is None or size == tuple(image.shape[-2:]):
        return image
    padded = image.new_zeros((*image.shape[:-2], *size))
    padded[..., : image.shape[-2], : image.shape[-1]] = image
    return padded


def normalize(
    image: torch.Tensor,
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: tuple[float, ...] | None,
    image_std: tuple[float, ...] | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """An image as float32, with its mean subtracted and divided by its standard deviation.

    Args:
        image: `(3, height, width)`.
        do_rescale: Whether pixels are multiplied by `rescale_factor`.
        rescale_factor: Factor of the pixels.
        do_normalize: Whether mean and standard deviation count.
        image_mean: Of each channel, in units of 1 / `rescale_factor`.
        image_std: Of each channel, in the same unit.
        out: What the result is written to, float32 `(3, height, width)` (default: a new tensor).
    """
    factor = rescale_factor if do_rescale else 1.0
    if not do_normalize:
        return torch.mul(image.float(), factor, out=out)
    levels = ((np.atleast_1d(value) / factor).tolist() for value in (image_mean, image_std))
    mean, std = (place_numbers(level, torch.float32, image.device).reshape(-1, 1, 1) for level in levels)
    if out is None:  # one channel becomes as many as there are means
        out = torch.empty(torch.broadcast_shapes(image.shape, mean.shape), device=image.device)
    # A few rows at a time, which stay in the cache of a CPU.
    rows = 64 if image.device.type == "cpu" else image.shape[-2]
    for pixels, target in zip(image.split(rows, dim=-2), out.split(rows, dim=-2), strict=True):
        target.copy_(pixels).sub_(mean).div_(std)
    return out


def normalize_batch(images: list[torch.Tensor], size: tuple[int, int], **settings: Any) -> torch.Tensor:
    """The batch of images that [`normalize`] gives, each padded with zeros on the right and at the bottom: float32
    `(batch, 3, height, width)`.

    Args:
        images: `(3, height, width)` each.
        size: Height and width in pixels of the batch.
        **settings: Of [`normalize`].
    """
    if {len(image) for image in images} != {3}:  # whatever they become, it is the same for all, or an error
        return torch.stack([pad(normalize(image, **settings), size) for image in images])
    batch = torch.empty(len(images), 3, *size, device=images[0].device)
    for image, target in zip(images, batch, strict=True):
        height, width = image.shape[-2:]
        normalize(image, **settings, out=target[:, :height, :width])
        clear_padding(target, (height, width))
    return batch


def clear_padding(image: torch.Tensor, size: tuple[int, int]) -> None:
    """Writes zeros where there is no image.

    Args:
        image: `(..., height, width)`.
        size: Height and width in pixels of what is kept.
    """
    image[..., size[0] :, :] = 0
    image[..., : size[0], size[1] :] = 0
