"""The papers' evaluation transform: shorter edge to 256 (bicubic), centre crop 224, ImageNet normalisation."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.utils import TensorType

from .image_processing_common import SIDES, SIZE_FORMS, ImagePreprocessing, read_size


def _enlarge(crop_size: Mapping[str, int], crop_pct: float) -> dict[str, int]:
    """The size of which a crop is this share, rounded down as timm does."""
    return {"shortest_edge": int(max(crop_size.values()) / crop_pct)}


def _find_crop(size: Mapping[str, int] | None, crop_pct: Any) -> dict[str, int]:
    """The crop of a file with `crop_pct`, in which `size` is what the model sees."""
    if not isinstance(crop_pct, int | float) or not 0 < crop_pct <= 1:
        raise ValueError(f"`crop_pct` must be in (0, 1], got {crop_pct!r}.")
    if size is None or set(size) not in ({*SIDES}, {"shortest_edge"}):
        raise ValueError(f"With `crop_pct`, `size` or `crop_size` must say the size of the crop, got {size}.")
    return dict.fromkeys(SIDES, size["shortest_edge"]) if "shortest_edge" in size else dict(size)


class _PvtPreprocessing(ImagePreprocessing):
    """The settings and what the two backends share."""

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 256}
    default_to_square = True
    crop_size = {"height": 224, "width": 224}
    do_convert_rgb = True
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True

    @classmethod
    def complete_settings(cls, settings: dict[str, Any], size: Mapping[str, int] | SizeDict) -> dict[str, Any]:
        """Where only one of `size` and `crop_size` is given, the other follows in the papers' ratio of 256 to 224, or
        in `crop_pct`; every other size is of all that the model sees, as for transformers' PVT."""
        settings = dict(settings)
        crop_pct = settings.pop("crop_pct", None)
        given = read_size(settings.get("size"), "size", SIZE_FORMS, settings.get("default_to_square") is not False)
        crop_size = read_size(settings.get("crop_size"), "crop_size")
        if crop_pct is not None:
            crop_size = _find_crop(crop_size or given, crop_pct)
            return settings | {"size": _enlarge(crop_size, crop_pct), "crop_size": crop_size, "do_center_crop": True}
        crops = True
        if given is None:
            if crop_size is None:
                return settings
            given = _enlarge(crop_size, 224 / 256)
        elif crop_size is not None:
            return settings | {"size": given, "crop_size": crop_size}
        elif set(given) == {"shortest_edge"}:
            crop_size = dict.fromkeys(SIDES, math.ceil(224 / 256 * given["shortest_edge"]))
        else:
            crop_size, crops = given if "height" in given else None, False
        if settings.get("do_center_crop") is not None:
            crops = settings["do_center_crop"]
        return settings | {"size": given, "crop_size": crop_size, "do_center_crop": crops}

    def preprocess(self, images: ImageInput, *args: Any, **kwargs: Any) -> BatchFeature:
        """
        Args:
            images: One image or a list of images: PIL of any mode, or arrays and tensors, see
                [`~pvt_hf.models.pixels.read_pixels`]. They are taken as they are stored: apply the orientation of EXIF
                before (`PIL.ImageOps.exif_transpose`). Paths and URLs are read, and turned.
            **kwargs: Any of the processor's settings, for this call only.

        Returns:
            `BatchFeature`: `pixel_values`, float32 of shape `(batch, 3, height, width)`, RGB, with ImageNet's mean and
            standard deviation taken out.

        Raises:
            ValueError: If an image has pixels that cannot be right (not finite, out of range, none), or is so thin that
                it would be resized to more than 2^26 pixels.
        """
        return super().preprocess(images, *args, **kwargs)


class PvtImageProcessor(_PvtPreprocessing, TorchvisionBackend):
    r"""
    Prepares images for PVT v1 and v2 as the papers evaluate them, on the torchvision backend: within two grey levels of
    torchvision's `Resize(256, BICUBIC)` and `CenterCrop(224)` on PIL images.

    Args:
        size (`int` or `dict`, *optional*, defaults to `{"shortest_edge": 256}`):
            In pixels. An integer, `(height, width)` or `{"height": ..., "width": ...}` resizes to exactly that and
            turns the centre crop off, as the `preprocessor_config.json` of the PVT checkpoints on the Hub asks for.
            `{"shortest_edge": ...}` alone is cropped; with `longest_edge`, and with `{"max_height": ..., "max_width":
            ...}`, the whole image keeps its aspect ratio.
        crop_size (`int` or `dict`, *optional*, defaults to `{"height": 224, "width": 224}`):
            In pixels. If only `crop_size` or the shortest edge is given, the other is scaled with it (384 and 438).
        crop_pct (`float`, *optional*):
            Share of the shortest edge that the crop keeps, in (0, 1], with `size` or `crop_size` as that of the crop,
            in pixels: `size=224, crop_pct=0.875` is the default. Settings are saved without it.
        resample (`int`, *optional*, defaults to 3):
            PIL's number of the interpolation: bicubic.
        image_mean (`list[float]`, *optional*, defaults to `[0.485, 0.456, 0.406]`):
            Mean of each channel (R, G, B) in units of 1 / `rescale_factor`, subtracted.
        image_std (`list[float]`, *optional*, defaults to `[0.229, 0.224, 0.225]`):
            Standard deviation of each channel in the same unit, by which is divided.
        rescale_factor (`float`, *optional*, defaults to 1 / 255):
            Factor of the pixels.
        do_convert_rgb (`bool`, *optional*, defaults to `True`):
            Whether images become RGB.
        do_resize (`bool`, *optional*, defaults to `True`):
            Whether images are resized.
        do_center_crop (`bool`, *optional*, defaults to `True`):
            Whether the centre of `crop_size` is cut out.
        do_rescale (`bool`, *optional*, defaults to `True`):
            Whether pixels are multiplied by `rescale_factor`.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether the mean is subtracted, and the result divided by the standard deviation.
    """

    def lay_out(self, pixels: torch.Tensor) -> torch.Tensor:
        # torchvision resizes 8 bits in whole numbers, the same of every layout, and soonest the one that is read.
        as_read = pixels.dtype == torch.uint8 and pixels.permute(1, 2, 0).is_contiguous()
        return pixels if as_read else pixels.contiguous()

    def center_crop(self, image: torch.Tensor, size: SizeDict, **kwargs: Any) -> torch.Tensor:
        from torchvision.transforms.v2 import functional

        return functional.center_crop(image, [size.height, size.width])

    def rescale_and_normalize(self, images: torch.Tensor, *settings: Any) -> torch.Tensor:
        # Planes first, while they have 8 bits: interleaved channels are normalised at a third of the speed.
        return super().rescale_and_normalize(images.contiguous(), *settings)

    def _preprocess(
        self, images: list[torch.Tensor], *args: Any, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        features = super()._preprocess(images, *args, return_tensors=None, **kwargs)
        if return_tensors == TensorType.PYTORCH and len(images) == 1:  # is a batch without being copied to one
            features["pixel_values"] = features["pixel_values"][0][None]
        return features.convert_to_tensors(return_tensors)


class PvtImageProcessorPil(_PvtPreprocessing, PilBackend):
    """[`PvtImageProcessor`] on the PIL backend: exactly torchvision's `Resize(256, BICUBIC)` and `CenterCrop(224)` of
    PIL images. The arguments are the same."""

    def lay_out(self, pixels: torch.Tensor) -> np.ndarray:
        pixels = pixels.cpu()
        # PIL resizes three channels of 8 bits only; fractions of 1 are left to the backend.
        whole = pixels.is_floating_point() and 1 < pixels.max() <= 255 and pixels.min() >= 0
        return (pixels.round().to(torch.uint8) if whole else pixels).numpy()

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs: Any) -> np.ndarray:
        # As torchvision: a missing odd pixel is added behind, and an odd pixel too many is split by rounding to even.
        crop = (size.height, size.width)
        missing = [max(0, side - given) for side, given in zip(crop, image.shape[1:], strict=True)]
        image = np.pad(image, [(0, 0), *((pixels // 2, (pixels + 1) // 2) for pixels in missing)])
        top, left = (round((given - side) / 2) for side, given in zip(crop, image.shape[1:], strict=True))
        return image[:, top : top + size.height, left : left + size.width]


__all__ = ["PvtImageProcessor", "PvtImageProcessorPil"]
