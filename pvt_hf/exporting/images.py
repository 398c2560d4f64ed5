"""Images that an export is calibrated and compared with."""

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import BaseImageProcessor

from ..data.images import ImageError, decode
from .targets import Batch, ExportError


class Samples(Sequence[Batch]):
    """Images as a model takes them, each prepared when it is asked for.

    Args:
        images: Paths, or PIL images in RGB.
        image_processor: Of the model.
        names: Of its inputs.
        size: Height and width in pixels that they must have, if the program has one size.
    """

    def __init__(
        self,
        images: Sequence[str | Image.Image],
        image_processor: BaseImageProcessor | None,
        names: Sequence[str],
        size: tuple[int, int] | None = None,
    ):
        if images and image_processor is None:
            raise ExportError("`calibration_images` need the image processor of the model, and it has none.")
        self.images, self.names, self.size = images, names, size
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        image = self.images[index]
        name = image if isinstance(image, str) else f"Image number {index}"
        assert self.image_processor is not None
        try:
            decoded = decode({"path": image}, name) if isinstance(image, str) else image
            prepared = self.image_processor(decoded, return_tensors="pt")
        except ValueError as error:
            raise ImageError(f"{name} cannot be prepared: {error}") from error
        pixels = prepared["pixel_values"]
        if self.size and tuple(pixels.shape[-2:]) != self.size:
            raise ExportError(
                f"{name} is prepared as {tuple(pixels.shape[-2:])} pixels, the program takes {self.size}."
            )
        masks = torch.ones(len(pixels), *pixels.shape[-2:], dtype=torch.int64)
        return {name: prepared.get(name, masks) for name in self.names}
