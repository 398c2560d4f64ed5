"""Which pixels an image has: any type, range and layout becomes RGB of 8 bits, or is refused by name.

Whatever reads images reads them here: the image processors, and the data for training and evaluation. Transparency is
dropped, as the papers' training, torchvision, timm and the pipelines' own loading drop it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from transformers.utils import logging

logger = logging.get_logger(__name__)

_CHANNELS = (1, 3, 4)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PixelError(ValueError):
    """Pixels that cannot be right. The message names the image."""


def list_images(images: Any) -> list[Any]:
    """A flat list of one image, of (nested) lists of images and of batches of four dimensions, in any mixture.

    Args:
        images: Arrays and tensors of two or three dimensions are an image each, of four dimensions a batch.
    """
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return [image for entry in images for image in list_images(entry)]
    return list(images) if getattr(images, "ndim", None) == 4 else [images]


def read_orientation(image: Image.Image) -> int:
    """The orientation that an image's EXIF says, 1 to 8, as Pillow's `ImageOps.exif_transpose` reads it; 1, upright,
    without EXIF and with one that cannot be read.

    Args:
        image: Loaded or not. Pillow turns TIFF files itself when it loads them, and they then say 1.
    """
    if not image.info and not hasattr(image, "tag_v2"):
        return 1
    try:
        # Of the base class: PNG's own would decode the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever a corrupt block leads Pillow to: the pixels are there nevertheless
        return 1
    return orientation if orientation in _TURNS else 1


def turn_upright(image: Image.Image) -> Image.Image:
    """Turns and mirrors an image as its EXIF says.

    Args:
        image: Loaded.
    """
    orientation = read_orientation(image)
    if orientation == 1:
        return image
    image = image.transpose(_TURNS[orientation])
    image.info = {}  # or the EXIF would still say it
    return image


def read_file(source: Any, name: str, mode: str | None = "RGB", turn: bool = True) -> Image.Image:
    """Reads the file of an image.

    Args:
        source: A path or a binary file.
        name: Of the image, for the message of an error.
        mode: `"RGB"` (default), or `None`, which leaves the mode of the file: for label maps.
        turn: Whether the image is turned as its EXIF says (default: `True`).

    Raises:
        PixelError: If the image has no pixels, or pixels that cannot become RGB.
        Exception: Whatever a corrupt file leads Pillow's decoders to.
    """
    with Image.open(source) as opened:
        opened.load()
        image = turn_upright(opened) if turn else opened
        return to_rgb(image, name) if mode == "RGB" else image.copy()


def check_mode(image: Image.Image, name: str) -> None:
    """Raises a [`PixelError`] if an image, loaded or not, has no pixels, or pixels whose range is not known."""
    if 0 in image.size:
        raise PixelError(f"{name} has no pixels: its size (width x height) is {image.width} x {image.height}.")
    if image.mode == "F":
        raise PixelError(
            f"{name} has floating-point pixels (PIL's mode 'F'), whose range is not known: scale them to 0 to 255 and "
            "convert them to 8 bits."
        )


def to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """A PIL image with 8 bits a channel: of 16 bits (modes `I;16` and `I`) the upper eight, as OpenCV reads them.

    Args:
        image: Of any mode.
        name: Of the image, for the message of an error.

    Raises:
        PixelError: If the image has no pixels, or pixels whose range is not known.
    """
    check_mode(image, name)
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image).astype(np.int32)
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > 65535:
        raise PixelError(f"{name} has values in [{low}, {high}] (PIL's mode {image.mode!r}): at most 16 bits are read.")
    return Image.fromarray(_cut_16_bits(torch.from_numpy(pixels)).numpy())


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A PIL image of any mode in RGB, without transparency.

    Args:
        image: Of any mode.
        name: Of the image, for the message of an error.

    Raises:
        PixelError: If the image has no pixels, or pixels that cannot become RGB.
    """
    image = to_8_bits(image, name)
    if image.mode == "RGB":
        return image
    if image.mode == "P":  # by way of RGBA, or Pillow warns of transparency
        image = image.convert("RGBA")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise PixelError(f"{name} has PIL's mode {image.mode!r}, which cannot become RGB: {error}.") from error


def read_pixels(
    image: Any,
    name: str,
    do_convert_rgb: bool = True,
    do_rescale: bool = True,
    rescale_factor: float = 1 / 255,
    input_data_format: str | None = None,
) -> torch.Tensor:
    """Reads an image that is in memory.

    Args:
        image: A PIL image of any mode, or an array or a tensor, `(height, width)`, `(channels, height, width)` or
            `(height, width, channels)`, of any dtype and strides. Integers are in [0, 255], uint16 in [0, 65535],
            floating-point values in [0, 255], or in whatever range they are used without `do_rescale`.
        name: Of the image, for messages.
        do_convert_rgb: Whether the result is RGB (default: `True`); else it keeps its channels.
        do_rescale: Whether the pixels will be multiplied by `rescale_factor` (default: `True`).
        rescale_factor: See `do_rescale` (default: 1 / 255).
        input_data_format: `channels_first` or `channels_last` (default: found from the shape).

    Returns:
        `(channels, height, width)`, uint8, or floating-point as it was given.

    Raises:
        PixelError: If the pixels or the shape cannot be right; the message has `name`.
        TypeError: If it is no image.
    """
    if isinstance(image, Image.Image):
        image = to_rgb(image, name) if do_convert_rgb else to_8_bits(image, name)
        array = np.array(image)
        pixels = torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
        return pixels * 255 if pixels.dtype == torch.bool else pixels
    pixels = _to_tensor(image, name)
    if 0 in pixels.shape:
        raise PixelError(f"{name} has no pixels: its shape is {list(image.shape)}.")
    pixels = _check_values(pixels, name, do_rescale and math.isclose(rescale_factor, 1 / 255))
    pixels = _order_channels(pixels, name, input_data_format)
    if do_convert_rgb and len(pixels) not in _CHANNELS:
        raise PixelError(
            f"{name} of shape {list(image.shape)} has {len(pixels)} channels with `input_data_format` "
            f"{input_data_format!r}, but RGB is made of 1, 3 or 4: `do_convert_rgb=False` keeps others."
        )
    return pixels[:3].expand(3, -1, -1) if do_convert_rgb else pixels


def _to_tensor(image: Any, name: str) -> torch.Tensor:
    """An array with strides, byte order and memory as torch takes them, or a tensor as it is."""
    if isinstance(image, torch.Tensor):
        return image.detach()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"{name} must be a PIL image, an array or a tensor, got {type(image).__name__}.")
    if image.dtype.kind not in "buif":
        raise PixelError(f"{name} has dtype {image.dtype}: pixels must be integers, floating-point or bool.")
    return torch.from_numpy(np.require(image, image.dtype.newbyteorder("="), requirements=["C", "W"]))


def _order_channels(pixels: torch.Tensor, name: str, input_data_format: str | None) -> torch.Tensor:
    """`(channels, height, width)` of an image whose channels are first, last or missing."""
    shape = list(pixels.shape)
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim != 3:
        raise PixelError(f"{name} has shape {shape}: it must have two or three dimensions.")
    if input_data_format is not None:
        formats = {"channels_first": pixels, "channels_last": pixels.permute(2, 0, 1)}
        if input_data_format not in formats:
            raise ValueError(f"`input_data_format` must be one of {list(formats)}, got {input_data_format!r}.")
        return formats[input_data_format]
    first, last = pixels.shape[0] in _CHANNELS, pixels.shape[2] in _CHANNELS
    if not first and not last:
        raise PixelError(
            f"{name} has shape {shape}: neither its first nor its last dimension has 1, 3 or 4 channels. "
            "`input_data_format` ('channels_first' or 'channels_last') says where other numbers of channels are."
        )
    if first and last:
        logger.warning_once(
            f"An image of shape {shape} may have its channels first or last. They are taken to be first: "
            "`input_data_format='channels_last'` says otherwise."
        )
    return pixels if first else pixels.permute(2, 0, 1)


def _check_values(pixels: torch.Tensor, name: str, in_grey_levels: bool) -> torch.Tensor:
    """uint8, or floating-point as it is; `in_grey_levels` if the latter must be in [0, 255]."""
    if pixels.dtype == torch.uint8:
        return pixels
    if pixels.dtype == torch.bool:
        return pixels.to(torch.uint8) * 255
    if pixels.dtype == torch.uint16:
        return _cut_16_bits(pixels.int())
    if pixels.is_complex():
        raise PixelError(f"{name} has dtype {pixels.dtype}: pixels must be integers, floating-point or bool.")
    is_float = pixels.is_floating_point()
    low, high = (value.item() for value in (pixels if is_float else pixels.long()).aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise PixelError(f"{name} has pixels that are NaN or infinite.")
    if (in_grey_levels or not is_float) and (low < 0 or high > 255):
        raise PixelError(
            f"{name} has values in [{low:.6g}, {high:.6g}] ({pixels.dtype}), it must have them in [0, 255]. 16 bits "
            "are read from uint16, other ranges from floating-point values with `do_rescale=False`."
        )
    if in_grey_levels and is_float and 0 < high <= 1:
        logger.warning_once(
            "There are images with floating-point values in [0, 1], which `do_rescale` divides by 255 once more: set "
            "`do_rescale=False` for them, or give values in [0, 255]."
        )
    return pixels if is_float else pixels.to(torch.uint8)


def _cut_16_bits(pixels: torch.Tensor) -> torch.Tensor:
    """The upper eight of 16 bits, given as int32."""
    if 0 < pixels.max() < 4096:
        logger.warning_once(
            "There are images of 16 bits without a value over 4095. They are read by the range of 16 bits, in which "
            "they are nearly black: scale them before, if they have 12 bits or fewer."
        )
    return (pixels >> 8).to(torch.uint8)
