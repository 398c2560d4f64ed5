"""Detectors and segmenters of ours and of torchvision: from image to result, and detectors of ours to their losses."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

import torch
from PIL import Image
from torch import nn
from torchvision.models import detection, segmentation
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import normalize, pil_to_tensor, resize
from transformers import (
    AutoConfig,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..models.image_processing_detection import PvtDetectionImageProcessor
from ..models.image_processing_segmentation import PvtSegmentationImageProcessor
from .images import draw_photo
from .timing import Clock, Step

_CLASSES = {"retinanet": 80, "mask_rcnn": 80, "semantic_fpn": 150}
_AUTO = {"mask_rcnn": AutoModelForInstanceSegmentation, "semantic_fpn": AutoModelForSemanticSegmentation}
_SHRINKS = 3 / 4  # of the images beside what the network gets: COCO's and ADE20K's are enlarged
_PARTS = ("image processor", "backbone", "neck", "head", "post-processing")


def build_own(architecture: str, build_backbone: Callable[..., PreTrainedConfig]) -> PreTrainedModel:
    """A detector or segmenter of ours with random weights, which finds as much as there can be.

    Args:
        architecture: `retinanet`, `mask_rcnn`, `semantic_fpn`, ...
        build_backbone: From fields to the configuration of its PVT.
    """
    config_class = type(AutoConfig.for_model(f"pvt_hf_{architecture}"))
    backbone = build_backbone(out_features=list(config_class.backbone_out_features))
    config = config_class(backbone_config=backbone, num_labels=_CLASSES.get(architecture, 80))
    return _find_most(_AUTO.get(architecture, AutoModelForObjectDetection).from_config(config))


def _build_of_torchvision(architecture: str, size: tuple[int, int]) -> nn.Module:
    """torchvision's on a ResNet-50."""
    sides = {"min_size": min(size), "max_size": max(size)}
    if architecture == "retinanet":
        return _find_most(detection.retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, **sides))
    if architecture == "mask_rcnn":
        return _find_most(detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, **sides))
    return segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=150)


def _find_most(model: nn.Module) -> nn.Module:
    """Makes heads say one class everywhere: there are as many candidates as there can be for the suppression, and as
    many masks. (Of the ends of layers' names: logits of anchors, of classes of ours, of torchvision's second stage.)"""
    anchors_per_cell = 9 if "retinanet" in type(model).__name__.lower() else 1
    with torch.no_grad():
        for name, layer in model.named_modules():
            if name.endswith(("class_predictor", "head.classification_head.cls_logits")):
                layer.bias.view(anchors_per_cell, -1)[:, 0] = 4
            elif name.endswith("box_predictor.cls_score"):
                layer.bias[1] = 4  # after the background
    return model


def make_result_step(
    library: str,
    architecture: str,
    build_backbone: Callable[..., PreTrainedConfig],
    size: tuple[int, int],
    clock: Clock,
) -> tuple[Step, Callable[[], object]]:
    """From an image to what a user gets, which says what its parts take; and what of that is counted.

    Args:
        library: `pvt_hf` or `torchvision`.
        architecture: `retinanet`, `mask_rcnn`, `semantic_fpn`, or of torchvision `fcn`.
        build_backbone: Of ours, see [`build_own`].
        size: Height and width in pixels that the network gets.
        clock: With the device of the model.
    """
    device = clock.device
    run: Step
    photo = draw_photo(*(round(side * _SHRINKS) for side in size))
    if library == "torchvision":
        model = _build_of_torchvision(architecture, size).eval().requires_grad_(False).to(device)
        run_peer: Callable[..., None] = _run_fcn if architecture == "fcn" else _run_detector_of_torchvision
        run = partial(run_peer, model, photo, size, clock)
    else:
        own = build_own(architecture, build_backbone).eval().requires_grad_(False).to(device)
        run = partial(_run_own, own, architecture, photo, size, clock, _mark_ends(own, clock))
    return torch.no_grad()(run), run


def _mark_ends(model: PreTrainedModel, clock: Clock) -> list[float]:
    """A list to which the model adds the times at which its backbone and its neck end. (A GPU would have to be waited
    for, which makes the step longer.)"""
    ends: list[float] = []
    for part in (model.backbone, model.neck) if clock.device.type == "cpu" else ():
        part.register_forward_hook(lambda *_: ends.append(clock.read()))
    return ends


def _run_own(
    model: PreTrainedModel,
    architecture: str,
    photo: Image.Image,
    size: tuple[int, int],
    clock: Clock,
    ends: list[float],
) -> Mapping[str, float]:
    """Returns the seconds of the image processor, of the parts of the network and of what follows."""
    sides = {"shortest_edge": min(size), "longest_edge": max(size)}
    segments = architecture == "semantic_fpn"
    processor = (PvtSegmentationImageProcessor if segments else PvtDetectionImageProcessor)(size=sides)
    times = [clock.read()]
    pixels = processor(photo, return_tensors="pt", device=clock.device)["pixel_values"]
    times.append(clock.read())
    ends.clear()
    outputs = model(pixels)
    times += [*ends, clock.read()]
    target_sizes = [photo.size[::-1]]
    if segments:
        found = processor.post_process_semantic_segmentation(outputs, target_sizes)
    elif architecture == "mask_rcnn":
        found = processor.post_process_instance_segmentation(outputs, 0.05, target_sizes=target_sizes)
    else:
        found = processor.post_process_object_detection(outputs, 0.05, target_sizes)
    assert len(found) == 1
    times.append(clock.read())
    names = _PARTS if ends else (_PARTS[0], "network", _PARTS[-1])
    return {name: after - before for name, (before, after) in zip(names, pairwise(times), strict=True)}


def _run_detector_of_torchvision(model: nn.Module, photo: Image.Image, size: tuple[int, int], clock: Clock) -> None:
    model([pil_to_tensor(photo).to(clock.device).float() / 255])


def _run_fcn(model: nn.Module, photo: Image.Image, size: tuple[int, int], clock: Clock) -> None:
    """As torchvision's references evaluate."""
    pixels = resize(pil_to_tensor(photo).to(clock.device), list(size)).float() / 255
    pixels = normalize(pixels, list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))
    logits = nn.functional.interpolate(model(pixels[None])["out"], photo.size[::-1], mode="bilinear")
    logits.argmax(dim=1)


class DetectorNetwork(nn.Module):
    """A detector of ours from pixels to what it finds, or in training to its loss of ten objects.

    Args:
        detector: With random weights.
    """

    def __init__(self, detector: PreTrainedModel):
        super().__init__()
        self.detector = detector
        corners = torch.rand(10, 2, generator=torch.Generator().manual_seed(0)) * 0.7
        self.boxes = box_convert(torch.cat([corners, corners + 0.15], dim=1), "xyxy", "cxcywh")

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        height, width = pixels.shape[2:]
        if not self.training:
            processor, sizes = PvtDetectionImageProcessor(), [(height, width)] * len(pixels)
            found = processor.post_process_object_detection(self.detector(pixels), 0.05, sizes)
            return [image["boxes"] for image in found]
        labels = {
            "boxes": self.boxes.to(pixels),
            "class_labels": torch.arange(10, device=pixels.device),
            "masks": pixels.new_ones((), dtype=torch.bool).expand(10, height, width),
        }
        return [self.detector(pixels, labels=[labels] * len(pixels)).loss]


class HeadAlone(nn.Module):
    """The head of a detector of one stage, on maps of the sizes that images have in the pyramid.

    Args:
        detector: Of ours.
    """

    def __init__(self, detector: PreTrainedModel):
        super().__init__()
        self.head, self.config = detector.head, detector.config

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        sizes = [[-(-side // stride) for side in pixels.shape[2:]] for stride in self.config.strides]
        levels = [pixels.new_ones(len(pixels), self.config.neck_channels, *size) for size in sizes]
        return list(self.head([level.normal_().requires_grad_(torch.is_grad_enabled()) for level in levels]))
