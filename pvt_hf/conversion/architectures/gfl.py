"""GFL of mmdetection 2.13."""

from typing import ClassVar

import torch

from ...models.configuration_gfl import GFLConfig
from .. import reference_heads
from ..rename import ConversionError
from .atss import ADAPTIVE_HEAD_RULES
from .base import FIVE_LEVELS_RULES, OneStageDetector, Rules, count_matches

# The distances whose probabilities are predicted, 0, 1, ...: a constant that checkpoints hold, and the model does not.
_DISTANCES = "bbox_head.integral.project"


class GFL(OneStageDetector):
    name = "GFL"
    tags = ("gfl",)
    signature = "bbox_head.gfl_cls."
    config_class = GFLConfig
    rules: ClassVar[Rules] = (
        *FIVE_LEVELS_RULES,
        *ADAPTIVE_HEAD_RULES,
        ("bbox_head.gfl_cls.", "head.class_predictor."),
        ("bbox_head.gfl_reg.", "head.box_predictor."),
    )

    def read_fields(self, shape, official):
        num_bins = shape("bbox_head.gfl_reg.weight")[0] // 4
        distances = official.get(_DISTANCES)
        if distances is not None and distances.tolist() != list(range(num_bins)):
            raise ConversionError(
                f"{_DISTANCES!r} must be 0, 1, ... {num_bins - 1}, as 'bbox_head.gfl_reg.weight' has it, got "
                f"{distances.tolist()!s:.80}."
            )
        return {
            "num_labels": shape("bbox_head.gfl_cls.weight")[0],
            "neck_channels": shape("neck.fpn_convs.0.conv.weight")[0],
            "num_head_convs": count_matches(official, r"bbox_head\.cls_convs\.(\d+)\."),
            "reg_max": num_bins - 1,
        }

    def from_official(self, official):
        return super().from_official({key: tensor for key, tensor in official.items() if key != _DISTANCES})

    def to_official(self, tensors):
        official = super().to_official(tensors)
        bias = official["bbox_head.gfl_reg.bias"]
        return official | {_DISTANCES: torch.arange(len(bias) // 4, dtype=bias.dtype, device=bias.device)}

    def head_reference(self, weights, image, feature_maps):
        levels = reference_heads.gfl(weights, reference_heads.pyramid(weights, feature_maps, on_output=True))
        return [torch.cat(part, dim=1) for part in zip(*levels, strict=True)]
