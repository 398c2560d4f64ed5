"""Faster R-CNN and Mask R-CNN of mmdetection 2.13."""

from typing import ClassVar

import torch
from transformers import AutoModelForInstanceSegmentation

from ...models.configuration_mask_rcnn import MaskRCNNConfig
from .. import reference_heads
from .base import FPN_RULES, Detector, Outputs, Rules, Weights, count_matches

# Of the region proposal network.
RPN_RULES: Rules = (
    ("rpn_head.rpn_conv.", "rpn.conv."),
    ("rpn_head.rpn_cls.", "rpn.objectness_predictor."),
    ("rpn_head.rpn_reg.", "rpn.box_predictor."),
)


class FasterRCNN(Detector):
    name = "Faster R-CNN"
    tags = ("faster-r-cnn",)
    signature = "roi_head.bbox_head."
    config_class = MaskRCNNConfig
    fixed_fields = {"use_masks": False}
    rules: ClassVar[Rules] = (
        *FPN_RULES,
        *RPN_RULES,
        ("roi_head.bbox_head.shared_fcs.0.", "box_head.fc1."),
        ("roi_head.bbox_head.shared_fcs.1.", "box_head.fc2."),
        ("roi_head.bbox_head.fc_cls.", "box_head.class_predictor."),
        ("roi_head.bbox_head.fc_reg.", "box_head.box_predictor."),
    )

    def read_fields(self, shape, official):
        return {
            "num_labels": shape("roi_head.bbox_head.fc_cls.weight")[0] - 1,  # the last is background
            "neck_channels": shape("neck.fpn_convs.0.conv.weight")[0],
            "box_head_size": shape("roi_head.bbox_head.shared_fcs.0.weight")[0],
        }

    def outputs(self, model, image):
        objectness, deltas = model.rpn(model.neck(model.backbone(image).feature_maps))
        logits, class_deltas = model.box_head(random_regions(model.config.neck_channels, 7))
        return [objectness, deltas, logits, class_deltas.flatten(1)]

    def head_reference(self, weights, image, feature_maps):
        levels = reference_heads.pyramid(weights, feature_maps)
        regions = random_regions(levels[0].shape[1], 7)
        return [*region_proposals(weights, levels), *reference_heads.box_head(weights, regions)]


class MaskRCNN(FasterRCNN):
    name = "Mask R-CNN"
    auto_class = AutoModelForInstanceSegmentation
    pipeline_tag = "image-segmentation"
    tags = ("mask-r-cnn",)
    signature = "roi_head.mask_head."
    fixed_fields = {"use_masks": True}
    rules = (
        *FasterRCNN.rules,
        ("roi_head.mask_head.convs.{n}.conv.", "mask_head.convs.{n}."),
        ("roi_head.mask_head.upsample.", "mask_head.upsample."),
        ("roi_head.mask_head.conv_logits.", "mask_head.predictor."),
    )

    def read_fields(self, shape, official):
        shape("roi_head.mask_head.convs.0.conv.weight")  # there is at least one
        num_mask_convs = count_matches(official, r"roi_head\.mask_head\.convs\.(\d+)\.")
        return super().read_fields(shape, official) | {"num_mask_convs": num_mask_convs}

    def outputs(self, model, image):
        masks = model.mask_head(random_regions(model.config.neck_channels, 14))
        return [*super().outputs(model, image), masks]

    def head_reference(self, weights, image, feature_maps):
        channels = weights["roi_head.mask_head.convs.0.conv.weight"].shape[1]
        masks = reference_heads.mask_head(weights, random_regions(channels, 14))
        return [*super().head_reference(weights, image, feature_maps), masks]


def region_proposals(weights: Weights, levels: Outputs) -> Outputs:
    """The reference's objectness logits (batch, anchors) and deltas (batch, anchors, 4) of all levels."""
    proposals = zip(*reference_heads.region_proposals(weights, levels), strict=True)
    objectness, deltas = (torch.cat(part, dim=1) for part in proposals)
    return [objectness[..., 0], deltas]


def random_regions(channels: int, size: int) -> torch.Tensor:
    """Noise in the place of the features that a head gets of three regions: (3, channels, size, size), float64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, channels, size, size, generator=generator, dtype=torch.double)
