"""Images, label maps and predictions of Semantic FPN, as mmsegmentation 0.13 treats them."""

import math
from collections.abc import Mapping
from functools import reduce
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import ImageInput, SizeDict
from transformers.processing_utils import ImagesKwargs

from .class_maps import find_classes
from .image_processing_common import SIZE_FORMS, read_size
from .image_processing_dense import (
    DensePreprocessing,
    compute_padded_size,
    compute_resized_size,
    normalize,
    normalize_batch,
    pad,
)
from .post_processing import read_outputs
from .resize import resize_bilinear, resize_nearest

IGNORE_INDEX = 255


class SegmentationImagesKwargs(ImagesKwargs, total=False):
    """What an image processor for segmentation takes beyond the arguments of every image processor: see
    [`PvtSegmentationImageProcessor`]."""

    size_divisor: int
    do_reduce_labels: bool
    num_labels: int | None
    logits_stride: int


class _SegmentationPreprocessing(DensePreprocessing):
    """The settings and everything that both backends share: they differ only in how they decode."""

    valid_kwargs = SegmentationImagesKwargs
    size = {"shortest_edge": 512, "longest_edge": 2048}
    size_divisor = 32
    do_reduce_labels = False
    num_labels = None
    logits_stride = 4

    @classmethod
    def complete_settings(cls, settings: dict[str, Any], size: Mapping[str, int] | SizeDict) -> dict[str, Any]:
        """`size` in any form, and `reduce_labels`, as SegFormer's files once called it."""
        settings = dict(settings)
        if "reduce_labels" in settings:
            settings.setdefault("do_reduce_labels", settings.pop("reduce_labels"))
        given = read_size(settings.get("size"), "size", SIZE_FORMS, settings.get("default_to_square") is True)
        return settings if given is None else settings | {"size": given}

    def preprocess(self, images: ImageInput, segmentation_maps: Any = None, **kwargs: Any) -> BatchFeature:
        """
        Args:
            images: One image or a list of images: PIL of any mode, or arrays and tensors, see
                [`~pvt_hf.models.pixels.read_pixels`]. They are taken as they are stored, like their maps: apply the
                orientation of EXIF to both before (`PIL.ImageOps.exif_transpose`). Paths and URLs are read, and turned.
            segmentation_maps: The label map of each image, `(height, width)` of the image, as integer arrays or tensors
                or PIL images of one channel. Palette images give their indices, whatever the colours.
            **kwargs: Any of the processor's settings, for this call only.

        Returns:
            `BatchFeature`: `pixel_values`, float32 `(batch, 3, height, width)`, RGB, normalised; with maps also
            `labels`, int64 `(batch, height, width)` of the same size (nearest pixel), 255 where a pixel is ignored. To
            evaluate as mmsegmentation does, compare what [`post_process_semantic_segmentation`] gives at the
            original size with the map as it is, not with these labels.

        Raises:
            ValueError: If a map is of colours or of fractions, has another size than its image, or has labels that are
                not classes (with `num_labels`; the labels found are listed); if an image has pixels that cannot be
                right (not finite, out of range, none); or if images of a batch have different sizes after the resize,
                since padding them would change the predictions: process them one by one, or fix both sides with
                `size={"height": ..., "width": ...}`.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _preprocess(
        self,
        images: list[torch.Tensor],
        segmentation_maps: Any,
        do_resize: bool,
        size: SizeDict,
        size_divisor: int,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...] | None,
        image_std: tuple[float, ...] | None,
        do_reduce_labels: bool,
        num_labels: int | None,
        return_tensors: str | None,
        **kwargs: Any,
    ) -> BatchFeature:
        steps = [_plan_resizes(image, size, size_divisor) if do_resize else [] for image in images]
        finals = {(step or [tuple(image.shape[-2:])])[-1] for image, step in zip(images, steps, strict=True)}
        if return_tensors is not None and len(finals) > 1:
            raise ValueError(
                f"The images of a batch have different sizes (height, width) after the resize: {sorted(finals)}. "
                'Process them one by one, or give them the same size with `size={"height": ..., "width": ...}`.'
            )
        maps = None if segmentation_maps is None else _read_label_maps(segmentation_maps, images)
        settings: dict[str, Any] = {
            "do_rescale": do_rescale,
            "rescale_factor": rescale_factor,
            "do_normalize": do_normalize,
            "image_mean": image_mean,
            "image_std": image_std,
        }
        images = [reduce(resize_bilinear, step, image) for image, step in zip(images, steps, strict=True)]
        if return_tensors is None:
            data = {"pixel_values": [normalize(image, **settings) for image in images]}
        else:
            data = {"pixel_values": normalize_batch(images, finals.pop(), **settings)}
        if maps is not None:
            maps = [reduce_labels(labels) if do_reduce_labels else labels for labels in maps]
            for index, labels in enumerate(maps):
                check_label_map(labels, num_labels, f"Segmentation map number {index}")
            data["labels"] = [reduce(resize_nearest, step, labels) for labels, step in zip(maps, steps, strict=True)]
        return BatchFeature(data, tensor_type=return_tensors)

    def batch(
        self, images: list[torch.Tensor], labels: list[torch.Tensor], size: tuple[int, int] | None = None
    ) -> BatchFeature:
        """The end of the preprocessing, for crops that were resized and augmented elsewhere: normalises them, and pads
        smaller ones on the right and at the bottom, images with zeros and labels with 255.

        Args:
            images: uint8 `(3, height, width)` each, RGB.
            labels: int64 `(height, width)` each.
            size: (height, width) of the batch; by default that of the largest crop.
        """
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        settings = {name: getattr(self, name) for name in names}
        size = size or compute_padded_size([tuple(image.shape[-2:]) for image in images], None, 1)
        # The padding of a label is 0 before the shift by 255, and 255 after it.
        data = {
            "pixel_values": normalize_batch(images, size, **settings),
            "labels": [pad(label - IGNORE_INDEX, size) + IGNORE_INDEX for label in labels],
        }
        return BatchFeature(data, tensor_type="pt")

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: list[tuple[int, int]] | torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """The class of every pixel as mmsegmentation finds it: the logits are resized to the network's input and
        from there to the target (both bilinear), which is not the same as one resize.

        Args:
            outputs: Of a model for semantic segmentation, with `logits` `(batch, classes, height, width)`, as a tensor
                or an array. The input was `logits_stride` times as large.
            target_sizes: (height, width) of each image, usually the original one. Without them the maps have the size
                of the logits.

        Returns:
            int64 `(height, width)` for each image.

        Raises:
            ValueError: If there are not as many target sizes as images.
        """
        logits = read_outputs(outputs, "logits")["logits"]
        if target_sizes is None:
            return list(logits.max(dim=1).indices)  # an argmax, several times as fast
        if len(target_sizes) != len(logits):
            raise ValueError(f"Got `target_sizes` of {len(target_sizes)} images for logits of {len(logits)} images.")
        sizes = [(int(height), int(width)) for height, width in target_sizes]
        return [find_classes(image, self.logits_stride, size) for image, size in zip(logits, sizes, strict=True)]


def _plan_resizes(image: torch.Tensor, size: SizeDict, divisor: int) -> list[tuple[int, int]]:
    """The sizes (height, width) that an image is resized to in turn."""
    height, width = image.shape[-2:]
    height, width = compute_resized_size(height, width, size)
    return [(height, width), (math.ceil(height / divisor) * divisor, math.ceil(width / divisor) * divisor)]


def _read_label_maps(segmentation_maps: Any, images: list[torch.Tensor]) -> list[torch.Tensor]:
    """The maps as int64 `(height, width)` on the devices of their images."""
    single = isinstance(segmentation_maps, Image.Image) or getattr(segmentation_maps, "ndim", 3) == 2
    maps = [segmentation_maps] if single else list(segmentation_maps)
    if len(maps) != len(images):
        raise ValueError(f"Got `segmentation_maps` of {len(maps)} images for {len(images)} images.")
    labels = [read_label_map(given, f"Segmentation map number {index}") for index, given in enumerate(maps)]
    for index, (given, image) in enumerate(zip(labels, images, strict=True)):
        if given.shape != image.shape[-2:]:
            raise ValueError(
                f"Segmentation map number {index} has (height, width) {list(given.shape)}, its image "
                f"{list(image.shape[-2:])}."
            )
    return [given.to(image.device) for given, image in zip(labels, images, strict=True)]


def read_label_map(given: Any, name: str = "The segmentation map") -> torch.Tensor:
    """A map of class labels as int64 `(height, width)`.

    Args:
        given: A PIL image, an array or a tensor, `(height, width)` or with one channel more.
        name: Of the map, for the error.

    Raises:
        ValueError: If it has more than one channel or values that are not integers from 0 on.
    """
    mode = f" of PIL's mode {given.mode!r}" if isinstance(given, Image.Image) else ""
    labels = torch.as_tensor(np.array(given)) if not isinstance(given, torch.Tensor) else given
    if labels.ndim == 3 and 1 in (labels.shape[0], labels.shape[-1]):
        labels = labels.squeeze(0 if labels.shape[0] == 1 else -1)
    if labels.ndim != 2 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{name} has shape {list(labels.shape)} and dtype {labels.dtype}{mode}: it must have one class label "
            "(an integer) for each pixel. Colours have to be turned into labels first."
        )
    labels = labels.long()
    if labels.numel() and labels.min() < 0:
        raise ValueError(
            f"{name} has negative labels ({labels.min()}); pixels to ignore have the label {IGNORE_INDEX}."
        )
    return labels


def reduce_labels(labels: torch.Tensor) -> torch.Tensor:
    """Label 0 is ignored (255) and the others count from 0, as ADE20K is used."""
    return torch.where((labels == 0) | (labels == IGNORE_INDEX), IGNORE_INDEX, labels - 1)


def check_label_map(
    labels: torch.Tensor,
    num_labels: int | None,
    name: str,
    advice: str = "If 0 stands for no class, set `do_reduce_labels`.",
) -> None:
    """Raises a `ValueError` that lists the labels which are neither classes nor 255, and gives advice."""
    if num_labels is None:
        return
    wrong = labels[(labels >= num_labels) & (labels != IGNORE_INDEX)]
    if wrong.numel():
        raise ValueError(
            f"{name} has the labels {wrong.unique().tolist()}, the classes are 0 to {num_labels - 1} "
            f"({IGNORE_INDEX} is ignored). {advice}".rstrip()
        )


class PvtSegmentationImageProcessor(_SegmentationPreprocessing, TorchvisionBackend):
    r"""
    Prepares images for Semantic FPN on PVT as mmsegmentation 0.13 evaluates them, on the torchvision backend: the
    aspect ratio is kept, sides are rounded to the nearest pixel, then a second resize makes both sides multiples of 32;
    both have the bits of OpenCV's bilinear (no antialiasing). Both backends give the same values.

    Args:
        size (`int` or `dict`, *optional*, defaults to `{"shortest_edge": 512, "longest_edge": 2048}`):
            Limits in pixels, the aspect ratio is kept, also with `{"max_height": ..., "max_width": ...}`.
            `{"height": ..., "width": ...}` resizes to exactly that. An integer is the shortest edge.
        size_divisor (`int`, *optional*, defaults to 32):
            Sides are then enlarged to multiples of it, in pixels, without padding.
        do_reduce_labels (`bool`, *optional*, defaults to `False`):
            Whether label 0 is no class: it becomes 255 and the others count from 0. For ADE20K.
        num_labels (`int`, *optional*):
            Where it is given, maps with labels beyond it are an error.
        logits_stride (`int`, *optional*, defaults to 4):
            How many times larger the model's input is than its logits: 1 for UperNet, which resizes them itself.
        resample (`int`, *optional*, defaults to 2):
            PIL's number of the interpolation: bilinear, nothing else.
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
        do_rescale (`bool`, *optional*, defaults to `True`):
            Whether pixels are multiplied by `rescale_factor`.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether the mean is subtracted, and the result divided by the standard deviation.
    """


class PvtSegmentationImageProcessorPil(_SegmentationPreprocessing, PilBackend):
    """[`PvtSegmentationImageProcessor`] on the PIL backend. The arguments and the values are the same."""


__all__ = ["PvtSegmentationImageProcessor", "PvtSegmentationImageProcessorPil"]
