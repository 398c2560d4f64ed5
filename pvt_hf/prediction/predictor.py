"""A model of any task with its image processor: images in, predictions out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_OBJECT_DETECTION_MAPPING,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..data.class_names import list_class_names
from ..data.images import ImageError, decode
from ..evaluation.classifier_views import ClassifierViews
from ..evaluation.label_map_predictor import LabelMapPredictor
from ..models.pixels import PixelError, to_rgb
from .predictions import Classification, Detections, Prediction, ScoredLabel, Segmentation

# (height, width) of images as they are; and what the processor made of images of one size, as a batch.
Sizes: TypeAlias = Sequence[tuple[int, int]]
Inputs: TypeAlias = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Predictor:
    """Predicts what is in images. [`load_predictor`] makes one of a checkpoint, `dataclasses.replace` another one with
    other settings.

    An image's prediction does not depend on the others of a batch: those of other sizes are computed apart.

    Args:
        model: Of any task, in evaluation mode.
        image_processor: Of the model.
        threshold: Of detectors and instance segmenters: objects have a larger score (default: 0.3).
        top_k: Of classifiers: how many classes are shown (default: 5).
        window: Of segmenters: predict in windows of this many pixels of the network's input (default: the whole image).
        stride: Of segmenters: pixels from one window to the next; it goes with `window`.
        tta_scales: Of segmenters and classifiers: factors of the size at which images are looked at beside 1 (default:
            none).
        tta_flip: Of segmenters and classifiers: whether images are looked at mirrored too (default: `False`).
        subtask: Of MaskFormer and Mask2Former: `"instance"` (default) or `"semantic"`.
    """

    model: PreTrainedModel
    image_processor: BaseImageProcessor
    threshold: float = 0.3
    top_k: int = 5
    window: int | None = None
    stride: int | None = None
    tta_scales: Sequence[float] = ()
    tta_flip: bool = False
    subtask: str = "instance"

    def __post_init__(self) -> None:
        _label_maps_of(self)  # refuses wrong windows and scales
        if not 0 <= self.threshold < 1:
            raise ValueError(f"`threshold` must be in [0, 1), got {self.threshold}.")
        if self.top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {self.top_k}.")
        if self.subtask not in ("instance", "semantic"):
            raise ValueError(f"`subtask` must be instance or semantic, got {self.subtask!r}.")

    @property
    def label_names(self) -> list[str]:
        """The name of each class of the model."""
        return list_class_names(self.model.config)

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[Image.Image | str | Path], names: Sequence[str] | None = None
    ) -> list[Prediction]:
        """
        Args:
            images: A batch: PIL images, taken as they are stored, or paths of files, which are turned as their EXIF
                says.
            names: Of the images, for messages (default: their paths or their numbers).

        Returns:
            The prediction of each image.

        Raises:
            ImageError: If an image cannot be read or prepared; the message names it.
        """
        names = names or [f"image {n}" if isinstance(i, Image.Image) else str(i) for n, i in enumerate(images)]
        read = [_read_image(image, name) for image, name in zip(images, names, strict=True)]
        task = find_task(self.model.config)
        groups: dict[tuple[torch.Size, ...], list[tuple[int, Inputs]]] = {}
        for place, (image, name) in enumerate(zip(read, names, strict=True)):
            inputs = task.prepare(self, image, name)
            groups.setdefault(tuple(value.shape for value in inputs.values()), []).append((place, inputs))
        found: dict[int, Prediction] = {}
        for group in groups.values():
            places, prepared = zip(*group, strict=True)
            batch = {key: self._place(torch.cat([inputs[key] for inputs in prepared])) for key in prepared[0]}
            sizes = [read[place].size[::-1] for place in places]
            found |= dict(zip(places, task.predict(self, batch, sizes), strict=True))
        return [found[place] for place in range(len(images))]

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the model's device; floating-point numbers in its dtype."""
        return tensor.to(self.model.device, self.model.dtype if tensor.is_floating_point() else None)


def _read_image(image: Image.Image | str | Path, name: str) -> Image.Image:
    if not isinstance(image, Image.Image):
        return decode({"path": str(image)}, name)
    try:
        return to_rgb(image, name)
    except PixelError as error:
        raise ImageError(str(error)) from error


def _prepare_image(predictor: Predictor, image: Image.Image, name: str) -> Inputs:
    """What the image processor makes of an image, as a batch of one."""
    try:
        return dict(predictor.image_processor(images=image, return_tensors="pt"))
    except ValueError as error:
        raise ImageError(f"{name} cannot be prepared: {error}") from error


def _label_maps_of(predictor: Predictor) -> LabelMapPredictor:
    return LabelMapPredictor(
        predictor.image_processor, predictor.window, predictor.stride, predictor.tta_scales, predictor.tta_flip
    )


def _prepare_views(predictor: Predictor, image: Image.Image, name: str) -> Inputs:
    """An image at each scale at which a segmenter looks at it."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, height, width)
    return {str(index): view for index, view in enumerate(_label_maps_of(predictor).prepare(pixels, name))}


def _classify(predictor: Predictor, inputs: Inputs, sizes: Sizes) -> list[Prediction]:
    views = ClassifierViews(predictor.model, predictor.tta_scales, predictor.tta_flip)
    scores = views(inputs["pixel_values"]).logits.softmax(dim=1).cpu()  # (batch, num_labels)
    return [Classification(predictor.label_names, row, predictor.top_k) for row in scores]


def _label_pixels(predictor: Predictor, views: Inputs, sizes: Sizes) -> list[Prediction]:
    segment = _label_maps_of(predictor)
    first = int(bool(getattr(predictor.image_processor, "do_reduce_labels", False)))
    maps, _ = segment.predict_batch(predictor.model, list(views.values()), sizes)
    return [Segmentation(predictor.label_names, labels.cpu(), first) for labels in maps]


def _detect(predictor: Predictor, inputs: Inputs, sizes: Sizes) -> list[Prediction]:
    processor, threshold = predictor.image_processor, predictor.threshold
    outputs = _to_float32(predictor.model(**inputs))
    found = processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)
    masks: list[torch.Tensor | None] = [None] * len(sizes)
    if getattr(predictor.model.config, "use_masks", False):
        instances = processor.post_process_instance_segmentation(
            outputs, threshold=threshold, target_sizes=sizes, return_binary_maps=True
        )
        masks = [image["segmentation"].cpu() for image in instances]
    names, best = predictor.label_names, _find_best(outputs, predictor.label_names)
    return [
        Detections(
            names,
            image["scores"].cpu(),
            image["labels"].cpu(),
            image["boxes"].cpu(),
            threshold,
            image_masks,
            None if len(image["scores"]) else image_best,
        )
        for image, image_masks, image_best in zip(found, masks, best, strict=True)
    ]


def _find_best(outputs: Any, names: Sequence[str]) -> list[ScoredLabel | None]:
    """The class with the best score of each image, whatever the threshold."""
    logits = outputs["logits"]  # (batch, queries or anchors, num_labels, or one more for no object)
    if not logits.shape[1]:
        return [None] * len(logits)
    if logits.shape[2] == len(names):
        scores = logits.sigmoid()
        if (centerness := outputs.get("centerness")) is not None:
            scores = scores * centerness.sigmoid()[..., None]
    else:
        scores = logits.softmax(dim=2)[..., :-1]
    values, labels = (result.tolist() for result in scores.amax(dim=1).max(dim=1))
    return [
        ScoredLabel(label, names[label], score) if score > 0 else None
        for label, score in zip(labels, values, strict=True)
    ]


def _to_float32(outputs: Any) -> Any:
    """A model's outputs, of which scores and boxes are computed in float32."""
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            outputs[name] = value.float()
    return outputs


def _segment_universally(predictor: Predictor, inputs: Inputs, sizes: Sizes) -> list[Prediction]:
    processor, names = predictor.image_processor, predictor.label_names
    outputs = _to_float32(predictor.model(**inputs))
    if predictor.subtask == "semantic":
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        first = int(bool(getattr(processor, "do_reduce_labels", False)))
        return [Segmentation(names, labels.long().cpu(), first) for labels in maps]
    pairs = zip(*_find_instances(processor, outputs, sizes, predictor.threshold), sizes, strict=True)
    return [_read_instances(found, lowest, names, size, predictor.threshold) for found, lowest, size in pairs]


def _find_instances(
    processor: Any, outputs: Any, sizes: Sizes, threshold: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The instances above a threshold, and where some image has none also those above 0, of which the best is told."""

    def find(least: float) -> list[dict[str, Any]]:
        return processor.post_process_instance_segmentation(
            outputs, threshold=least, target_sizes=sizes, return_binary_maps=True
        )

    found = find(threshold)
    return found, found if all(image["segments_info"] for image in found) else find(0.0)


def _read_instances(
    found: dict[str, Any], lowest: dict[str, Any], names: Sequence[str], size: tuple[int, int], threshold: float
) -> Detections:
    """The instances of transformers' models, best first, with the boxes around their masks."""
    segments = sorted(found["segments_info"], key=lambda segment: segment["score"], reverse=True)
    masks = torch.zeros(0, *size, dtype=torch.bool)
    if segments:
        masks = found["segmentation"][[segment["id"] for segment in segments]].bool().cpu()
    best = max(lowest["segments_info"], key=lambda segment: segment["score"], default=None)
    return Detections(
        names,
        torch.tensor([segment["score"] for segment in segments]),
        torch.tensor([segment["label_id"] for segment in segments], dtype=torch.int64),
        masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1]),  # it gives the last pixel, not its end
        threshold,
        masks,
        None if segments or not best else ScoredLabel(best["label_id"], names[best["label_id"]], best["score"]),
    )


class Task(NamedTuple):
    """What a model does with images.

    Attributes:
        models: What its models are called.
        mapping: Of transformers, from configurations to its models.
        prepare: From a predictor, an image and its name to the image as a batch of one.
        predict: From a predictor, a batch and the sizes of its images to their predictions.
    """

    models: str
    mapping: Any
    prepare: Callable[[Predictor, Image.Image, str], Inputs]
    predict: Callable[[Predictor, Inputs, Sizes], list[Prediction]]


# The first that knows a model's class counts.
TASKS = (
    Task("classifier", MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, _prepare_image, _classify),
    Task("detector", MODEL_FOR_OBJECT_DETECTION_MAPPING, _prepare_image, _detect),
    Task("segmenter", MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING, _prepare_views, _label_pixels),
    Task("universal segmenter", MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING, _prepare_image, _segment_universally),
)


def find_task(config: PreTrainedConfig) -> Task:
    """What a model is, from its configuration: the class that it was saved as, or the first that it can be.

    Args:
        config: Of any model.

    Raises:
        ValueError: If it is of a model that predicts nothing: an encoder or a backbone.
    """
    saved_as = (getattr(config, "architectures", None) or [None])[0]
    for task in TASKS:
        model_class = task.mapping.get(type(config), None)
        if model_class is not None and saved_as in (None, model_class.__name__):
            return task
    raise ValueError(
        f"the model is a {saved_as or config.model_type}: it must be a classifier, a detector or a segmenter, with the "
        "head that predicts"
    )
