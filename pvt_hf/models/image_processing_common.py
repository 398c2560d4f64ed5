"""What all image processors share, whatever the task and the backend."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ImageInput, SizeDict, load_image
from transformers.utils import logging

from .pixels import list_images, read_file, read_orientation, read_pixels

logger = logging.get_logger(__name__)

# An image has no more pixels after its resize: at 256 pixels of the shortest edge, an aspect ratio of about 1000.
_MAX_RESIZED_PIXELS = 2**26

SIDES = ("height", "width")
SIZE_FORMS = (("shortest_edge",), ("shortest_edge", "longest_edge"), SIDES, ("max_height", "max_width"))


def read_size(
    value: Any, name: str, forms: Sequence[tuple[str, ...]] = (SIDES,), square: bool = True
) -> dict[str, int] | None:
    """A size in any form that preprocessor files have had, as a dictionary.

    Args:
        value: An integer, `(height, width)`, or a mapping; None stays None.
        name: Of the argument, for the error.
        forms: The keys that a mapping may have (default: height and width).
        square: Whether an integer is height and width (default: `True`), or else the shortest edge.

    Raises:
        ValueError: If it is anything else, or has a side that is not an integer of at least 1.
    """
    if value is None:
        return None
    if isinstance(value, int | np.integer):
        size = dict.fromkeys(SIDES if square else ("shortest_edge",), value)
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        size = dict(zip(SIDES, value, strict=True))
    elif isinstance(value, Mapping | SizeDict):
        size = {key: side for key, side in dict(value).items() if side is not None}
    else:
        size = {}
    sides = size.values()
    valid = all(isinstance(side, int | np.integer) and not isinstance(side, bool) and side > 0 for side in sides)
    if not valid or set(size) not in [set(form) for form in forms]:
        given = size if isinstance(value, SizeDict) else value
        wanted = ", or ".join(" and ".join(f"`{key}`" for key in form) for form in forms)
        raise ValueError(f"`{name}` must have {wanted}, integers from 1 on, got {given!r}.")
    return {key: int(side) for key, side in size.items()}


def check_resize(height: int, width: int, size: SizeDict, name: str) -> None:
    """Raises a `ValueError` if a thin image would become gigabytes, since only its shortest edge is limited.

    Args:
        height: In pixels.
        width: In pixels.
        size: What the processor resizes to.
        name: Of the image.
    """
    if not size.shortest_edge or size.longest_edge:
        return
    resized = [round(side * size.shortest_edge / min(height, width)) for side in (height, width)]
    if math.prod(resized) > _MAX_RESIZED_PIXELS:
        raise ValueError(
            f"{name} of {height} x {width} pixels (height x width) would become {resized[0]} x {resized[1]} by `size` "
            f"{dict(size)}, more than {_MAX_RESIZED_PIXELS} pixels: cut it before."
        )


class ImagePreprocessing(BaseImageProcessor):
    """Mixin of the image processors, before a backend of transformers: what the settings mean, which images there are
    and which pixels they have is the same for all of them."""

    size: dict[str, int] | SizeDict

    def __init__(self, **kwargs: Any):
        super().__init__(**self.complete_settings(kwargs, type(self).size))

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Self:
        # What the caller overrides is completed by itself, before it is merged with a file that has everything.
        file = cls.complete_settings(image_processor_dict, cls.size)
        return super().from_dict(file, **cls.complete_settings(kwargs, file.get("size") or cls.size))

    @classmethod
    def complete_settings(cls, settings: dict[str, Any], size: Mapping[str, int] | SizeDict) -> dict[str, Any]:
        """The settings with sizes in the one form that is used, and with what follows from those that are given.

        Args:
            settings: Of a constructor, a file or a call, which may lack any of them.
            size: The one that holds where `settings` have none.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        if self._auto_class is None:
            fields.pop("auto_map", None)  # of a file that came with code, which is not saved with this one
        elif "auto_map" in fields:  # saved with its file, which has both backends
            module = type(self).__module__.rsplit(".", 1)[-1]
            name = type(self).__name__.removesuffix("Pil")
            backends = {"torchvision": f"{module}.{name}", "pil": f"{module}.{name}Pil"}
            fields["auto_map"]["AutoImageProcessor"] = backends
        return fields

    def preprocess(self, images: ImageInput, *args: Any, **kwargs: Any) -> BatchFeature:
        return super().preprocess(images, *args, **self.complete_settings(kwargs, self.size))

    def name_images(self, count: int, *args: Any) -> list[str]:
        """What messages call the images.

        Args:
            count: Of the images.
            *args: What else [`preprocess`] was given.
        """
        return [f"Image number {index}" for index in range(count)]

    def _preprocess_image_like_inputs(self, images: ImageInput, *args: Any, **kwargs: Any) -> BatchFeature:
        listed = list_images(images)
        if not listed:
            raise ValueError("`images` must have at least one image, got none.")
        names = self.name_images(len(listed), *args)
        read = [self.process_image(image, name=name, **kwargs) for image, name in zip(listed, names, strict=True)]
        if kwargs["do_resize"]:
            for image, name in zip(read, names, strict=True):
                check_resize(image.shape[-2], image.shape[-1], kwargs["size"], name)
        return self._preprocess(read, *args, **kwargs)

    def process_image(
        self,
        image: Any,
        name: str = "The image",
        do_convert_rgb: bool = True,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        input_data_format: str | None = None,
        device: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Reads one image: see [`~pvt_hf.models.pixels.read_pixels`].

        Args:
            image: As `read_pixels` takes it, or a path or a URL.
            name: Of the image, for messages.
            do_convert_rgb: Whether the result is RGB.
            do_rescale: Whether its pixels will be multiplied by `rescale_factor`.
            rescale_factor: See `do_rescale`.
            input_data_format: `channels_first` or `channels_last` (default: found from the shape).
            device: Where the result shall be (default: where the image is).
            **kwargs: The other settings.

        Returns:
            `(channels, height, width)`, a tensor or an array.
        """
        if isinstance(image, str | os.PathLike):
            name = f"{name} ({image})" if os.path.exists(image) else name
            image = read_file(image, name) if os.path.exists(image) else load_image(image)
        pixels = read_pixels(image, name, do_convert_rgb, do_rescale, rescale_factor, input_data_format)
        if isinstance(image, Image.Image) and read_orientation(image) != 1:
            logger.warning_once(
                "There are images whose EXIF says that they are to be turned. They are taken as they are stored, like "
                "annotations and target sizes: `PIL.ImageOps.exif_transpose` turns them, as whatever reads files does."
            )
        return self.lay_out(pixels.to(device))

    def lay_out(self, pixels: torch.Tensor) -> Any:
        """The pixels as the backend takes them.

        Args:
            pixels: `(channels, height, width)`.
        """
        return pixels
