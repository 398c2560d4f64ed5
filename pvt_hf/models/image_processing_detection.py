"""Images, annotations and detections of the detectors, as mmdetection 2.13 treats them."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import torch
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import ImageInput, SizeDict
from transformers.processing_utils import ImagesKwargs

from .annotations import Objects, read_objects
from .image_processing_common import SIZE_FORMS, read_size
from .image_processing_dense import (
    DensePreprocessing,
    clear_padding,
    compute_padded_size,
    compute_resized_size,
    normalize,
    normalize_batch,
    pad,
)
from .post_processing import complete_outputs, detect_objects, detr_detections, read_outputs, segment_instances
from .resize import resize_bilinear

# The settings that the second half of the preprocessing takes.
_BATCH_SETTINGS = (
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad",
    "pad_size",
    "pad_size_divisor",
)

# Settings of DETR's processor that have one value here.
_ONLY = {"format": "coco_detection", "do_convert_annotations": True, "masks_path": None}

TargetSizes: TypeAlias = torch.Tensor | Sequence[tuple[int, int]] | None


class DetectionImagesKwargs(ImagesKwargs, total=False):
    """What an image processor for detection takes beyond the arguments of every image processor: see
    [`PvtDetectionImageProcessor`]."""

    pad_size_divisor: int
    num_labels: int | None


class _DetectionPreprocessing(DensePreprocessing):
    """The settings and everything that both backends share: they differ only in how they decode."""

    valid_kwargs = DetectionImagesKwargs
    size = {"shortest_edge": 800, "longest_edge": 1333}
    do_pad = True
    pad_size_divisor = 32
    num_labels = None
    model_input_names = ["pixel_values", "pixel_mask"]

    @classmethod
    def complete_settings(cls, settings: dict[str, Any], size: Mapping[str, int] | SizeDict) -> dict[str, Any]:
        """Sizes as DETR's processor takes them, and images that are made to fit a `pad_size` that is given alone."""
        settings = dict(settings)
        for name, only in _ONLY.items():
            if (value := settings.pop(name, only)) not in (only, None):
                raise ValueError(f"`{name}` must be {only!r}, got {value!r}.")
        if "pad_and_return_pixel_mask" in settings:
            settings.setdefault("do_pad", settings.pop("pad_and_return_pixel_mask"))
        max_size = settings.pop("max_size", None)
        given = read_size(settings.get("size"), "size", SIZE_FORMS, settings.get("default_to_square") is True)
        pad_size = read_size(settings.get("pad_size"), "pad_size")
        if given and "shortest_edge" in given and isinstance(settings["size"], Integral):
            given["longest_edge"] = max_size or 1333
        elif pad_size and not given and settings.get("do_pad") is not False:
            given = _fit_size(dict(size), pad_size)
        return settings | ({"size": given} if given else {}) | ({"pad_size": pad_size} if pad_size else {})

    def name_images(self, count: int, *args: Any) -> list[str]:
        annotations = _list_annotations(args[0])
        if annotations is None:
            return super().name_images(count)
        if len(annotations) != count:
            raise ValueError(f"Got `annotations` of {len(annotations)} images for {count} images.")
        ids = (annotation.get("image_id") if isinstance(annotation, Mapping) else None for annotation in annotations)
        return [f"Image {f'number {index}' if given is None else given}" for index, given in enumerate(ids)]

    def preprocess(
        self,
        images: ImageInput,
        annotations: dict[str, Any] | list[dict[str, Any]] | None = None,
        return_segmentation_masks: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images: One image or a list of images of any sizes: PIL of any mode, or arrays and tensors, see
                [`~pvt_hf.models.pixels.read_pixels`]. They are taken as they are stored: apply the orientation of EXIF
                before (`PIL.ImageOps.exif_transpose`), as mmdetection does when it reads a file. Paths and URLs are
                read, and turned.
            annotations: For each image `{"image_id": int, "annotations": [...]}` in COCO's format, see
                [`~pvt_hf.models.annotations.read_objects`], which also says which annotations are skipped.
            return_segmentation_masks: Whether the labels have `masks` (default: False).
            **kwargs: Any of the processor's settings, for this call only.

        Returns:
            `BatchFeature`: `pixel_values`, float32 `(batch, 3, height, width)`, RGB, normalised, then padded with zeros
            on the right and at the bottom to the largest of the batch; `pixel_mask`, int64 `(batch, height, width)`,
            1 where the image is. With annotations also `labels`, for each image a `BatchFeature` with `class_labels`
            int64 `(objects,)`, `boxes` float32 `(objects, 4)`, cxcywh divided by the size of the resized image
            *without* its padding, `area` in pixels of the resized image, `iscrowd`, `image_id` `(1,)`, `orig_size` and
            `size` `(2,)`, (height, width) before and after the resize, and `masks` bool `(objects, height, width)` of
            the padded size, with `has_masks` bool `(objects,)` where an annotation has none.

        Raises:
            AnnotationError: If an annotation cannot be used; it names the image and the annotation.
            ValueError: If an image has pixels that cannot be right (not finite, out of range, none), or there are not
                as many annotations as images.
        """
        return super().preprocess(images, annotations, return_segmentation_masks, **kwargs)

    def _preprocess(
        self,
        images: list[torch.Tensor],
        annotations: dict[str, Any] | list[dict[str, Any]] | None,
        return_segmentation_masks: bool,
        do_resize: bool,
        size: SizeDict,
        num_labels: int | None,
        **kwargs: Any,
    ) -> BatchFeature:
        annotations = _list_annotations(annotations)
        original = [tuple(image.shape[-2:]) for image in images]
        sizes = [
            compute_resized_size(height, width, size) if do_resize else (height, width) for height, width in original
        ]
        targets = None
        if annotations is not None:
            targets = []
            for annotation, given, wanted in zip(annotations, original, sizes, strict=True):
                objects = read_objects(annotation, given, return_segmentation_masks, num_labels).resize(given, wanted)
                targets.append({"objects": objects, "image_id": annotation["image_id"], "orig_size": given})
        images = [resize_bilinear(image, wanted) for image, wanted in zip(images, sizes, strict=True)]
        return self._batch(images, targets, **kwargs)

    def batch(
        self, images: list[torch.Tensor], targets: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """The second half of the preprocessing, for images that were resized and augmented elsewhere: normalises, pads
        and puts together what [`preprocess`] returns.

        Args:
            images: uint8 `(3, height, width)` each, RGB.
            targets: For each image its `objects` (an [`Objects`] in pixels of that image), `image_id` and
                `orig_size`.
            **kwargs: Any of the processor's settings, for this call only.
        """
        settings: dict[str, Any] = {name: getattr(self, name, None) for name in _BATCH_SETTINGS}
        settings |= {"return_tensors": "pt"} | kwargs
        if isinstance(settings["pad_size"], Mapping):
            settings["pad_size"] = SizeDict(**settings["pad_size"])
        return self._batch(images, targets, **settings)

    def _batch(
        self,
        images: list[torch.Tensor],
        targets: list[dict[str, Any]] | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...] | None,
        image_std: tuple[float, ...] | None,
        do_pad: bool,
        pad_size: SizeDict | None,
        pad_size_divisor: int,
        return_tensors: str | None,
        **kwargs: Any,
    ) -> BatchFeature:
        sizes = [tuple(image.shape[-2:]) for image in images]
        padded = compute_padded_size(sizes, pad_size, pad_size_divisor) if do_pad else None
        settings: dict[str, Any] = {
            "do_rescale": do_rescale,
            "rescale_factor": rescale_factor,
            "do_normalize": do_normalize,
            "image_mean": image_mean,
            "image_std": image_std,
        }
        if padded is None:
            data = {"pixel_values": [normalize(image, **settings) for image in images]}
        else:
            mask = torch.ones(len(images), *padded, dtype=torch.int64, device=images[0].device)
            for image_mask, size in zip(mask, sizes, strict=True):
                clear_padding(image_mask, size)
            data = {"pixel_values": normalize_batch(images, padded, **settings), "pixel_mask": mask}
            if return_tensors is None:
                data = {name: list(values) for name, values in data.items()}
        batch = BatchFeature(data, tensor_type=return_tensors)
        if targets is not None:
            device = images[0].device
            batch["labels"] = [
                BatchFeature(
                    _build_labels(**target, size=size, padded=padded, device=device), tensor_type=return_tensors
                )
                for target, size in zip(targets, sizes, strict=True)
            ]
        return batch

    def post_process_object_detection(
        self, outputs: Any, threshold: float = 0.5, target_sizes: TargetSizes = None, max_detections: int = 100
    ) -> list[dict[str, torch.Tensor]]:
        """The detections of a detector of pvt_hf or DETR, as mmdetection makes them: with a `threshold` of 0.05, for
        ATSS, Sparse R-CNN and DETR of 0.

        Args:
            outputs: What the model returned, or an object with its `logits` and `pred_boxes` alone, as tensors or
                arrays; or the tuple of a batch that `Trainer` gathers (`eval_do_concat_batches=False`).
            threshold: Detections have a larger score (default: 0.5).
            target_sizes: Height and width in pixels of each image, `(batch, 2)`, usually the original one. Without them
                boxes are relative to the image's size.
            max_detections: At most so many per image (default: 100). The configuration of (Cascade) Mask R-CNN has it.

        Returns:
            For each image `scores` `(detections,)`, `labels` int64 `(detections,)` and `boxes` xyxy `(detections, 4)`
            within the image (those of Sparse R-CNN may reach out of it), best first.

        Raises:
            ValueError: If there are not as many `target_sizes` as images, or if RetinaNet's logits and boxes alone do
                not say which level they are of. Those of ATSS (whose centerness is part of its scores), GFL (which has
                as many anchors as ATSS) and Sparse R-CNN never are enough;
                [`~transformers.DeformableDetrImageProcessor`] makes Sparse R-CNN's detections from them.
        """
        outputs = read_outputs(outputs, "pred_boxes")
        if "scores" not in outputs:
            outputs = read_outputs(outputs, "logits", "pred_boxes")
            outputs = complete_outputs(outputs, self.num_labels, self._find_input_size(target_sizes))
        is_detr = not {"level_sizes", "scores"} & outputs.keys()

        detect = detr_detections if is_detr else detect_objects
        return detect(outputs, threshold, target_sizes, max_detections=max_detections)

    def _find_input_size(self, target_sizes: TargetSizes) -> tuple[int, int] | None:
        """Height and width in pixels of what the network computes of a batch of images of these sizes."""
        if target_sizes is None or not len(target_sizes):
            return None
        sizes = [(int(height), int(width)) for height, width in target_sizes]
        if self.do_resize:
            sizes = [compute_resized_size(*size, self.size) for size in sizes]
        needed = compute_padded_size(sizes, None, 32)  # the models take more padding off
        if self.pad_size:
            padded = dict(self.pad_size)["height"], dict(self.pad_size)["width"]
        else:
            padded = compute_padded_size(sizes, None, self.pad_size_divisor if self.do_pad else 1)
        return min(needed[0], padded[0]), min(needed[1], padded[1])

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float | None = None,
        target_sizes: TargetSizes = None,
        return_binary_maps: bool = False,
    ) -> list[dict[str, Any]]:
        """The instances of Mask R-CNN: see [`~pvt_hf.models.post_processing.segment_instances`].

        Args:
            outputs: What the model returned.
            threshold: Instances have a larger score (default: 0.5).
            mask_threshold: Pixels of an instance have at least this probability (default: 0.5).
            overlap_mask_area_threshold: Without effect: the instances are mmdetection's, which may overlap. The
                pipeline gives it to every model.
            target_sizes: Height and width in pixels of each image, `(batch, 2)`; by default those of the model's input
                without padding.
            return_binary_maps: Whether each instance has a map of its own. Else (the default) a pixel belongs to the
                best instance.

        Returns:
            For each image `segmentation` and `segments_info`.
        """
        return segment_instances(outputs, threshold, mask_threshold, target_sizes, return_binary_maps)


def _list_annotations(annotations: dict[str, Any] | list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    return [annotations] if isinstance(annotations, dict) else annotations


def _fit_size(size: dict[str, int], pad_size: dict[str, int]) -> dict[str, int]:
    """The size itself, if all that it gives fits into the padding, or else the size that does."""
    if size.get("longest_edge", math.inf) <= min(pad_size.values()) or "shortest_edge" not in size:
        return size
    return {"max_height": pad_size["height"], "max_width": pad_size["width"]}


def _build_labels(
    objects: Objects,
    image_id: int,
    orig_size: tuple[int, int],
    size: tuple[int, int],
    padded: tuple[int, int] | None,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """The labels of one image, as [`preprocess`] returns them; sizes are (height, width) in pixels."""
    corners, sides = objects.boxes[:, :2], objects.boxes[:, 2:] - objects.boxes[:, :2]
    height, width = size
    labels = {
        "size": torch.tensor(size),
        "image_id": torch.tensor([image_id]),
        "class_labels": objects.class_labels,
        "boxes": torch.cat([corners + sides / 2, sides], dim=1) / torch.tensor([width, height, width, height]),
        "area": objects.area,
        "iscrowd": objects.iscrowd,
        "orig_size": torch.tensor(orig_size),
    }
    if objects.masks is not None:
        labels["masks"] = pad(objects.masks, padded)
    if objects.has_masks is not None and not objects.has_masks.all():
        labels["has_masks"] = objects.has_masks
    return {name: value.to(device) for name, value in labels.items()}


class PvtDetectionImageProcessor(_DetectionPreprocessing, TorchvisionBackend):
    r"""
    Prepares images for the detectors and DETR on PVT as mmdetection 2.13 does, on the torchvision backend: the
    aspect ratio is kept, sides are rounded to the nearest pixel, the resize is OpenCV's bilinear (no antialiasing) to
    the last bit, and the padding is zero after the normalisation. Both backends give the same values.

    Args:
        size (`int` or `dict`, *optional*, defaults to `{"shortest_edge": 800, "longest_edge": 1333}`):
            Limits in pixels, the aspect ratio is kept, also with `{"max_height": ..., "max_width": ...}`.
            `{"height": ..., "width": ...}` resizes to exactly that. An integer is the shortest edge, as for DETR's
            processor, and the longest is 1333 (or `max_size`).
        pad_size_divisor (`int`, *optional*, defaults to 32):
            Height and width of the batch are padded to multiples of it, in pixels.
        pad_size (`int` or `dict`, *optional*):
            `{"height": ..., "width": ...}` in pixels, to pad to instead. Given without `size`, images are resized to
            fit into it, unless all of them do anyway. Labels are those of any other padding; sides that are no
            multiples of 32 cut the last cells of the coarse maps.
        num_labels (`int`, *optional*):
            Where it is given, annotations of classes beyond it are an error.
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
        do_pad (`bool`, *optional*, defaults to `True`):
            Whether the images of a batch are padded to one size, with a `pixel_mask`.
        do_rescale (`bool`, *optional*, defaults to `True`):
            Whether pixels are multiplied by `rescale_factor`.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether the mean is subtracted, and the result divided by the standard deviation.
    """


class PvtDetectionImageProcessorPil(_DetectionPreprocessing, PilBackend):
    """[`PvtDetectionImageProcessor`] on the PIL backend. The arguments and the values are the same."""


__all__ = ["PvtDetectionImageProcessor", "PvtDetectionImageProcessorPil"]
