"""RetinaNet of mmdetection 2.13."""

import torch

from ...models.configuration_retinanet import RetinaNetConfig
from .. import reference_heads
from .base import FIVE_LEVELS_RULES, OneStageDetector, count_matches


class RetinaNet(OneStageDetector):
    name = "RetinaNet"
    tags = ("retinanet",)
    signature = "bbox_head.retina_cls."
    config_class = RetinaNetConfig
    rules = (
        *FIVE_LEVELS_RULES,
        ("bbox_head.cls_convs.{n}.conv.", "head.class_convs.{n}."),
        ("bbox_head.reg_convs.{n}.conv.", "head.box_convs.{n}."),
        ("bbox_head.retina_cls.", "head.class_predictor."),
        ("bbox_head.retina_reg.", "head.box_predictor."),
    )

    def read_fields(self, shape, official):
        num_anchors = shape("bbox_head.retina_reg.weight")[0] // 4
        return {
            "num_labels": shape("bbox_head.retina_cls.weight")[0] // max(num_anchors, 1),
            "neck_channels": shape("neck.fpn_convs.0.conv.weight")[0],
            "num_head_convs": count_matches(official, r"bbox_head\.cls_convs\.(\d+)\."),
        }

    def head_reference(self, weights, image, feature_maps):
        levels = reference_heads.retinanet(weights, reference_heads.pyramid(weights, feature_maps))
        return [torch.cat(part, dim=1) for part in zip(*levels, strict=True)]
