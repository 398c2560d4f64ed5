"""The papers' evaluation transform: shorter edge to 256 (bicubic), centre crop 224, ImageNet normalisation."""

import math
from typing import Any, Self

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

# An image has no more pixels after its resize: at 256 pixels of the shortest edge, an aspect ratio of about 1000.
_MAX_RESIZED_PIXELS = 2**26


def _scale_together(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Where only one of `size` and `crop_size` is given, the other follows in the papers' ratio of 256 to 224."""
    size, crop_size = (
        dict(value) if isinstance(value, SizeDict) else value for value in map(kwargs.get, ("size", "crop_size"))
    )
    if (size is None) == (crop_size is None):
        return kwargs
    crops = True
    if size is None:
        sides = crop_size.values() if isinstance(crop_size, dict) else np.atleast_1d(crop_size)
        size = {"shortest_edge": int(256 / 224 * int(max(sides)))}
    else:
        shortest_edge = size.get("shortest_edge") if isinstance(size, dict) else size
        crops = isinstance(shortest_edge, int)
        # A size that fixes both sides leaves nothing to crop.
        crop_size = math.ceil(224 / 256 * shortest_edge) if crops else size
    if kwargs.get("do_center_crop") is not None:
        crops = kwargs["do_center_crop"]
    return kwargs | {"size": size, "crop_size": crop_size, "do_center_crop": crops}


class _PvtPreprocessing:
    """The settings and what the two backends share."""

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 256}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_convert_rgb = True
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True

    def __init__(self, **kwargs: Any):
        super().__init__(**_scale_together(kwargs))

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Self:
        # What the caller overrides is scaled together, before it is merged with a file that has both.
        return super().from_dict(image_processor_dict, **_scale_together(kwargs))

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        if self._auto_class is not None and "auto_map" in fields:  # saved with this file, which has both backends
            module = type(self).__module__.rsplit(".", 1)[-1]
            backends = {"torchvision": f"{module}.PvtImageProcessor", "pil": f"{module}.PvtImageProcessorPil"}
            fields["auto_map"]["AutoImageProcessor"] = backends
        return fields

    def resize(self, image: Any, size: SizeDict, **kwargs: Any) -> Any:
        """As that of the backend, but not of a thin image, which would become very long before most of it is cut off.

        Args:
            image: `(..., height, width)`, an array or a tensor.
            size: Sides in pixels.
            **kwargs: As of the backend.

        Raises:
            ValueError: If the image would get more than 2^26 pixels.
        """
        if size.shortest_edge and not size.longest_edge:
            height, width = image.shape[-2:]
            resized = [round(side * size.shortest_edge / min(height, width)) for side in (height, width)]
            if math.prod(resized) > _MAX_RESIZED_PIXELS:
                raise ValueError(
                    f"An image of {height} x {width} pixels (height x width) would become {resized[0]} x {resized[1]} "
                    f"by `size` {dict(size)}, more than {_MAX_RESIZED_PIXELS} pixels: cut it before."
                )
        return super().resize(image=image, size=size, **kwargs)

    def preprocess(self, images: ImageInput, *args: Any, **kwargs: Any) -> BatchFeature:
        """
        Args:
            images: One image or a list of images: PIL of any mode, or arrays and tensors with values in [0, 255].
            **kwargs: Any of the processor's settings, for this call only.

        Returns:
            `BatchFeature`: `pixel_values`, float32 of shape `(batch, 3, height, width)`, RGB, with ImageNet's mean and
            standard deviation taken out.

        Raises:
            ValueError: If an image is so thin that it would be resized to more than 2^26 pixels.
        """
        return super().preprocess(images, *args, **_scale_together(kwargs))


class PvtImageProcessor(_PvtPreprocessing, TorchvisionBackend):
    r"""
    Prepares images for PVT v1 and v2 as the papers evaluate them, on the torchvision backend: within two grey levels of
    torchvision's `Resize(256, BICUBIC)` and `CenterCrop(224)` on PIL images.

    Args:
        size (`int` or `dict`, *optional*, defaults to `{"shortest_edge": 256}`):
            In pixels. `{"height": ..., "width": ...}` resizes to exactly that and turns the centre crop off, which is
            what the `preprocessor_config.json` of the PVT checkpoints on the Hub asks for.
        crop_size (`int` or `dict`, *optional*, defaults to `{"height": 224, "width": 224}`):
            In pixels. If only one of `size` and `crop_size` is given, the other is scaled with it (384 and 438, say).
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

    def center_crop(self, image: torch.Tensor, size: SizeDict, **kwargs: Any) -> torch.Tensor:
        from torchvision.transforms.v2 import functional

        return functional.center_crop(image, [size.height, size.width])


class PvtImageProcessorPil(_PvtPreprocessing, PilBackend):
    """[`PvtImageProcessor`] on the PIL backend: exactly torchvision's `Resize(256, BICUBIC)` and `CenterCrop(224)` of
    PIL images. The arguments are the same."""

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs: Any) -> np.ndarray:
        # As torchvision: a missing odd pixel is added behind, and an odd pixel too many is split by rounding to even.
        crop = (size.height, size.width)
        missing = [max(0, side - given) for side, given in zip(crop, image.shape[1:], strict=True)]
        image = np.pad(image, [(0, 0), *((pixels // 2, (pixels + 1) // 2) for pixels in missing)])
        top, left = (round((given - side) / 2) for side, given in zip(crop, image.shape[1:], strict=True))
        return image[:, top : top + size.height, left : left + size.width]


__all__ = ["PvtImageProcessor", "PvtImageProcessorPil"]
