"""ATSS of mmdetection 2.13."""

from typing import ClassVar

import torch

from ...models.configuration_atss import ATSSConfig
from .. import reference_heads
from .base import FIVE_LEVELS_RULES, OneStageDetector, Rules, count_matches

# Of the head that ATSS and GFL have in common.
ADAPTIVE_HEAD_RULES: Rules = (
    ("bbox_head.cls_convs.{n}.", "head.class_convs.{n}."),
    ("bbox_head.reg_convs.{n}.", "head.box_convs.{n}."),
    ("bbox_head.scales.{n}.scale", "head.scales.{n}"),
)


class ATSS(OneStageDetector):
    name = "ATSS"
    tags = ("atss",)
    signature = "bbox_head.atss_cls."
    config_class = ATSSConfig
    rules: ClassVar[Rules] = (
        *FIVE_LEVELS_RULES,
        *ADAPTIVE_HEAD_RULES,
        ("bbox_head.atss_cls.", "head.class_predictor."),
        ("bbox_head.atss_reg.", "head.box_predictor."),
        ("bbox_head.atss_centerness.", "head.centerness_predictor."),
    )

    def read_fields(self, shape, official):
        return {
            "num_labels": shape("bbox_head.atss_cls.weight")[0],
            "neck_channels": shape("neck.fpn_convs.0.conv.weight")[0],
            "num_head_convs": count_matches(official, r"bbox_head\.cls_convs\.(\d+)\."),
        }

    def head_reference(self, weights, image, feature_maps):
        levels = reference_heads.atss(weights, reference_heads.pyramid(weights, feature_maps, on_output=True))
        logits, deltas, centerness = (torch.cat(part, dim=1) for part in zip(*levels, strict=True))
        return [logits, deltas, centerness[..., 0]]
