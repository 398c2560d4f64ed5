"""Cascade R-CNN and Cascade Mask R-CNN of mmdetection 2.13, with the box heads that PVT v2's configurations have."""

from typing import ClassVar

from transformers import AutoModelForInstanceSegmentation

from ...models.configuration_cascade_mask_rcnn import CascadeMaskRCNNConfig
from .. import reference_heads
from ..rename import ConversionError
from .base import FPN_RULES, Detector, Rules, count_matches
from .mask_rcnn import RPN_RULES, random_regions, region_proposals

_STAGES = 3
_BOX_HEAD, _MASK_HEAD = "roi_head.bbox_head.{s}", "roi_head.mask_head.{s}"


class CascadeRCNN(Detector):
    name = "Cascade R-CNN"
    tags = ("cascade-r-cnn",)
    signature = "roi_head.bbox_head.0.shared_convs."
    config_class = CascadeMaskRCNNConfig
    fixed_fields = {"use_masks": False}
    rules: ClassVar[Rules] = (
        *FPN_RULES,
        *RPN_RULES,
        (f"{_BOX_HEAD}.shared_convs.{{n}}.", "box_heads.{s}.convs.{n}."),
        (f"{_BOX_HEAD}.shared_fcs.0.", "box_heads.{s}.fc."),
        (f"{_BOX_HEAD}.fc_cls.", "box_heads.{s}.class_predictor."),
        (f"{_BOX_HEAD}.fc_reg.", "box_heads.{s}.box_predictor."),
    )

    def read_fields(self, shape, official):
        if (stages := count_matches(official, r"roi_head\.bbox_head\.(\d+)\.")) != _STAGES:
            raise ConversionError(f"A {self.name} has {_STAGES} stages here, and the checkpoint {stages}.")
        return {
            "num_labels": shape("roi_head.bbox_head.0.fc_cls.weight")[0] - 1,  # the last is background
            "neck_channels": shape("neck.fpn_convs.0.conv.weight")[0],
            "box_head_size": shape("roi_head.bbox_head.0.shared_fcs.0.weight")[0],
            "num_box_convs": count_matches(official, r"roi_head\.bbox_head\.0\.shared_convs\.(\d+)\."),
        }

    def outputs(self, model, image):
        regions = random_regions(model.config.neck_channels, 7)
        outputs = list(model.rpn(model.neck(model.backbone(image).feature_maps)))
        for head in model.box_heads:
            logits, deltas = head(regions)
            outputs += [logits, deltas.flatten(1)]
        return outputs

    def head_reference(self, weights, image, feature_maps):
        levels = reference_heads.pyramid(weights, feature_maps)
        regions = random_regions(levels[0].shape[1], 7)
        outputs = region_proposals(weights, levels)
        for stage in range(_STAGES):
            outputs += reference_heads.cascade_box_head(weights, regions, stage)
        return outputs


class CascadeMaskRCNN(CascadeRCNN):
    name = "Cascade Mask R-CNN"
    auto_class = AutoModelForInstanceSegmentation
    pipeline_tag = "image-segmentation"
    tags = ("cascade-mask-r-cnn",)
    signature = "roi_head.mask_head.0."
    fixed_fields = {"use_masks": True}
    rules = (
        *CascadeRCNN.rules,
        (f"{_MASK_HEAD}.convs.{{n}}.conv.", "mask_heads.{s}.convs.{n}."),
        (f"{_MASK_HEAD}.upsample.", "mask_heads.{s}.upsample."),
        (f"{_MASK_HEAD}.conv_logits.", "mask_heads.{s}.predictor."),
    )

    def read_fields(self, shape, official):
        num_mask_convs = count_matches(official, r"roi_head\.mask_head\.0\.convs\.(\d+)\.")
        return super().read_fields(shape, official) | {"num_mask_convs": num_mask_convs}

    def outputs(self, model, image):
        regions = random_regions(model.config.neck_channels, 14)
        return [*super().outputs(model, image), *(head(regions) for head in model.mask_heads)]

    def head_reference(self, weights, image, feature_maps):
        channels = weights["roi_head.mask_head.0.convs.0.conv.weight"].shape[1]
        names = (f"roi_head.mask_head.{stage}" for stage in range(_STAGES))
        masks = [reference_heads.mask_head(weights, random_regions(channels, 14), name) for name in names]
        return [*super().head_reference(weights, image, feature_maps), *masks]
