"""What the image processors of the detectors and of the segmenters share."""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict

from .resize import keep_ratio_size


class DensePreprocessing:
    """Mixin of image processors that keep the ratio and resize as OpenCV does, before a backend of transformers.

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
        return torch.as_tensor(super().process_image(eight_bits(image), **kwargs))

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


def resized_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """The size of an image after the resize: `{"shortest_edge", "longest_edge"}` (the second may be left out) keep its
    ratio, `{"height", "width"}` do not.

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


def padded_size(sizes: list[tuple[int, int]], pad_size: SizeDict | None, divisor: int) -> tuple[int, int]:
    """`pad_size`, or the smallest multiples of `divisor` that hold images of all `sizes`.

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
    """`(..., height, width)` with zeros on the right and at the bottom up to `size`; `None` leaves it."""
    if size is None or size == tuple(image.shape[-2:]):
        return image
    padded = image.new_zeros((*image.shape[:-2], *size))
    padded[..., : image.shape[-2], : image.shape[-1]] = image
    return padded


def eight_bits(image: Any) -> Any:
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


def normalized(
    image: torch.Tensor,
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: tuple[float, ...] | None,
    image_std: tuple[float, ...] | None,
) -> torch.Tensor:
    """An image `(3, height, width)` as float32 with its mean taken out, divided by its standard deviation, both in
    units of `rescale_factor`."""
    image = image.float()
    factor = rescale_factor if do_rescale else 1.0
    if not do_normalize:
        return image * factor
    mean, std = (
        (torch.tensor(value, dtype=torch.float64) / factor).float().reshape(-1, 1, 1).to(image.device)
        for value in (image_mean, image_std)
    )
    return (image - mean) / std
