"""What the image processors of the detectors and of the segmenters share."""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict

from .resize import keep_ratio_size


class DensePreprocessing:
    """Mixin of image processors that keep the aspect ratio and resize as OpenCV does, before a backend of transformers.

    The backends only decode: what they decode becomes a tensor, and all the rest is the same for both.
    """

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    default_to_square = False
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True

    def process_image(self, image: Any, **kwargs: Any) -> torch.Tensor:
        """One image as transformers' backend decodes it, but with 16 bits cut to 8: `(3, height, width)`."""
        return torch.as_tensor(super().process_image(to_uint8(image), **kwargs))

    def _validate_preprocess_kwargs(self, resample: Any = None, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(resample=resample, **kwargs)
        if resample != PILImageResampling.BILINEAR:
            raise ValueError(f"`resample` must be bilinear ({int(PILImageResampling.BILINEAR)}), got {resample}.")

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        if self._auto_class is not None and "auto_map" in fields:  # saved with its file, which has both backends
            module = type(self).__module__.rsplit(".", 1)[-1]
            name = type(self).__name__.removesuffix("Pil")
            backends = {"torchvision": f"{module}.{name}", "pil": f"{module}.{name}Pil"}
            fields["auto_map"]["AutoImageProcessor"] = backends
        return fields


def compute_resized_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """Height and width in pixels of an image after the resize.

    Args:
        height: In pixels.
        width: In pixels.
        size: `{"shortest_edge", "longest_edge"}` (the second may be left out), which keep the aspect ratio, or
            `{"height", "width"}`, which do not, in pixels.

    Raises:
        ValueError: If `size` is anything else.
    """
    if size.height and size.width:
        return size.height, size.width
    if size.shortest_edge:
        return keep_ratio_size(height, width, size.shortest_edge, size.longest_edge or math.inf)
    raise ValueError(f"`size` must have `shortest_edge` and `longest_edge`, or `height` and `width`, got {dict(size)}.")


def check_finite(image: torch.Tensor, name: str) -> None:
    """Raises a `ValueError` with the image's name if it has pixels that are NaN or infinite."""
    if image.is_floating_point() and not image.isfinite().all():
        raise ValueError(f"{name} has pixels that are NaN or infinite.")


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
        raise ValueError(f"`pad_size` is {dict(pad_size)}, but the largest sides of the images are {list(largest)}.")
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


def to_uint8(image: Any) -> Any:
    """Images of 16 bits (PIL's modes `I;16` and `I`, uint16 arrays and tensors) keep the upper eight, as OpenCV reads
    them; other images are returned as they are.

    Raises:
        ValueError: If the pixels have another range than 8 or 16 bits.
    """
    if isinstance(image, Image.Image):
        if image.mode == "F":
            raise ValueError("An image of PIL's mode 'F' has no range of values: convert it to 8 bits.")
        return image if not image.mode.startswith("I") else Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if isinstance(image, np.ndarray) and image.dtype == np.uint16:
        return (image >> 8).astype(np.uint8)
    if not isinstance(image, np.ndarray | torch.Tensor):
        return image
    pixels = torch.as_tensor(np.ascontiguousarray(image) if isinstance(image, np.ndarray) else image)
    if pixels.dtype == torch.uint16:
        return (pixels.int() >> 8).to(torch.uint8)
    if not pixels.is_floating_point() and pixels.dtype not in (torch.uint8, torch.bool):
        if pixels.min() < 0 or pixels.max() > 255:
            raise ValueError(
                f"The image has values in [{pixels.min()}, {pixels.max()}], it must have them in [0, 255]."
            )
        return image.astype(np.uint8) if isinstance(image, np.ndarray) else image.to(torch.uint8)
    return image


def normalize(
    image: torch.Tensor,
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: tuple[float, ...] | None,
    image_std: tuple[float, ...] | None,
) -> torch.Tensor:
    """An image as float32, with its mean subtracted and divided by its standard deviation.

    Args:
        image: `(3, height, width)`.
        do_rescale: Whether pixels are multiplied by `rescale_factor`.
        rescale_factor: Factor of the pixels.
        do_normalize: Whether mean and standard deviation count.
        image_mean: Of each channel, in units of 1 / `rescale_factor`.
        image_std: Of each channel, in the same unit.
    """
    image = image.float()
    factor = rescale_factor if do_rescale else 1.0
    if not do_normalize:
        return image * factor
    mean, std = (
        (torch.tensor(value, dtype=torch.float64) / factor).float().reshape(-1, 1, 1).to(image.device)
        for value in (image_mean, image_std)
    )
    return (image - mean) / std
