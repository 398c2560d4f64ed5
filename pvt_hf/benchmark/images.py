"""Image processing of ours and of the peers: from an image in memory, or a file, to what a model takes."""

import io
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from transformers import BaseImageProcessor, BitImageProcessor, DetrImageProcessor, SegformerImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data.augmentation import build_training_transform
from ..data.classification import TrainingImages, prepare
from ..data.images import decode
from ..models.image_processing_detection import PvtDetectionImageProcessor
from ..models.image_processing_pvt import PvtImageProcessor
from ..models.image_processing_segmentation import PvtSegmentationImageProcessor
from ..recipes import imagenet_recipe
from .timing import Step

_NORMALIZE = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
Prepare = Callable[[Image.Image], torch.Tensor]


def draw_photo(height: int, width: int) -> Image.Image:
    """An image that is coarse and fine as photographs are, so that a file of it is as long.

    Args:
        height: In pixels.
        width: In pixels.
    """
    y, x = np.mgrid[:height, :width]
    texture = np.random.default_rng(0).normal(0, 12, (height, width, 3))
    waves = np.stack((x / width, y / height, (x + y) / (width + height)), axis=-1) * 250
    pixels = waves + 60 * np.sin(x / 9)[..., None] + texture
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_photo(height: int, width: int) -> bytes:
    """The JPEG of such an image.

    Args:
        height: In pixels.
        width: In pixels.
    """
    buffer = io.BytesIO()
    draw_photo(height, width).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _compose(*resize: v2.Transform) -> Prepare:
    """torchvision's, as its references evaluate."""
    finish = v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return v2.Compose([v2.PILToTensor(), *resize, *finish])


def _call(image_processor: BaseImageProcessor) -> Prepare:
    return lambda image: image_processor(image, return_tensors="pt")["pixel_values"]


def _classification(library: str) -> Prepare:
    """The papers' evaluation: the shortest edge becomes 256, bicubic, and the centre of 224 is cut out."""
    size, crop = {"shortest_edge": 256}, {"height": 224, "width": 224}
    if library == "torchvision":
        resize = v2.Resize(256, InterpolationMode.BICUBIC, antialias=True)
        return _compose(resize, v2.CenterCrop(224))
    if library == "transformers":
        return _call(BitImageProcessor(size=size, crop_size=crop, resample=3, **_NORMALIZE))
    return _call(PvtImageProcessor())


def _detection(library: str) -> Prepare:
    """Of COCO: the shortest edge becomes 800, bilinear."""
    if library == "torchvision":
        return _compose(v2.Resize(800, InterpolationMode.BILINEAR, max_size=1333, antialias=False))
    if library == "transformers":
        return _call(DetrImageProcessor(size={"shortest_edge": 800, "longest_edge": 1333}, **_NORMALIZE))
    return _call(PvtDetectionImageProcessor())


def _segmentation(library: str) -> Prepare:
    """Of ADE20K: to 512 x 683, which is its usual size, and from there to multiples of 32."""
    if library == "torchvision":
        return _compose(v2.Resize((512, 704), InterpolationMode.BILINEAR, antialias=False))
    if library == "transformers":
        return _call(SegformerImageProcessor(size={"height": 512, "width": 704}, do_reduce_labels=False, **_NORMALIZE))
    return _call(PvtSegmentationImageProcessor())


PREPARE: dict[str, Callable[[str], Prepare]] = {
    "classification": _classification,
    "detection": _detection,
    "segmentation": _segmentation,
}


def make_image_step(library: str, model: str, size: tuple[int, int]) -> Step:
    """What prepares an image.

    Args:
        library: `pvt_hf`, `torchvision` or `transformers`.
        model: `classification images`, `detection images`, `segmentation images` or `evaluation files`, which are
            JPEGs that are decoded, too.
        size: Height and width in pixels of the image.
    """
    if model == "evaluation files":
        return _make_file_step(library, write_photo(*size))
    prepare_image, photo = PREPARE[model.split()[0]](library), draw_photo(*size)

    def step() -> None:
        prepare_image(photo)

    return step


def _make_file_step(library: str, jpeg: bytes) -> Step:
    image_processor, prepare_image = PvtImageProcessor(), _classification(library)

    def step_own() -> None:
        prepare(decode({"bytes": jpeg, "path": None}, "a.jpg"), image_processor, "a.jpg")

    def step() -> None:
        with Image.open(io.BytesIO(jpeg)) as image:
            prepare_image(image.convert("RGB"))

    return step_own if library == "pvt_hf" else step


def make_training_image_step(variant: str, size: tuple[int, int], count: int) -> Step:
    """What one worker of the recipe's input pipeline does for a batch.

    Args:
        variant: Of the recipe.
        size: Height and width in pixels of what the model takes, a square.
        count: Number of images.
    """
    # The mean size of ImageNet's files, which take about 110 kB.
    row: dict[str, Any] = {"image": {"bytes": write_photo(375, 500), "path": "a.jpg"}, "label": 0}
    transform = build_training_transform(imagenet_recipe(variant), size[0])
    data = TrainingImages([row] * count, "label", 10, transform)

    epochs = itertools.count()

    def step() -> None:
        epoch = next(epochs)  # another augmentation each time
        for index in range(count):
            data[index, 0, epoch, index]

    return step
