"""What the heads of ATSS and GFL have in common: normed towers, a scale per level, and matching by ATSS."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .boxes import AnchorGrid, Anchors, match_atss
from .one_stage import MatchedAnchors, match_anchors
from .targets import GroundTruth
from .winograd import Conv3x3


class NormedConv(nn.Module):
    """A 3 x 3 convolution without a bias, group norm, ReLU."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels, bias=False)
        # Not called a norm: the recipes decay it, and leave out what has `norm` in its name.
        self.gn = nn.GroupNorm(num_groups, channels)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.relu_(self.gn(self.conv(states)))


class AdaptiveHead(nn.Module):
    """Two towers of convolutions that all levels share, two predictors, and a learnt scale of each level.

    Args:
        config: Of the detector.
        num_box_values: What `box_predictor` gives for each anchor.
    """

    def __init__(self, config: PreTrainedConfig, num_box_values: int):
        super().__init__()
        self.config = config
        self.anchor_grid = AnchorGrid(config.strides, (config.anchor_scale,), (1.0,))
        channels = config.neck_channels
        self.class_convs, self.box_convs = (
            nn.Sequential(*(NormedConv(channels, config.norm_groups) for _ in range(config.num_head_convs)))
            for _ in range(2)
        )
        self.class_predictor = Conv3x3(channels, config.num_labels)
        self.box_predictor = Conv3x3(channels, num_box_values)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in config.strides)

    def reset_parameters(self) -> None:
        """Normal weights of 0.01, zero biases, unit norms and scales, and every class at its prior probability."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                init.ones_(module.weight)
                init.zeros_(module.bias)
        for scale in self.scales:
            init.ones_(scale)
        prior = self.config.prior_probability
        init.constant_(self.class_predictor.bias, -math.log((1 - prior) / prior))

    def match(self, anchors: Anchors, valid: Sequence[torch.Tensor], truths: Sequence[GroundTruth]) -> MatchedAnchors:
        """What each anchor learns.

        Args:
            anchors: Of all levels.
            valid: For each image, which anchors take part: bool `(anchors,)`.
            truths: The objects of each image.
        """
        return match_anchors(
            anchors,
            valid,
            truths,
            lambda boxes, takes_part: match_atss(boxes, anchors, self.config.num_candidates, takes_part),
        )
