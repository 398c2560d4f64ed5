"""What the heads of ATSS and GFL have in common: normed towers, a scale per level, and matching by ATSS."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .boxes import IGNORED, AnchorGrid, Anchors, match_atss
from .targets import GroundTruth


@dataclass(frozen=True)
class MatchedAnchors:
    """What each anchor of a batch learns.

    Args:
        takes_part: Which anchors are positive or negative: bool `(batch, anchors)`.
        positive: Which anchors have an object: bool `(batch, anchors)`.
        class_labels: Of the objects, int64 `(batch, anchors)`; 0 for other anchors.
        boxes: Of the objects, xyxy in pixels, `(batch, anchors, 4)`; other anchors have their own.
    """

    takes_part: torch.Tensor
    positive: torch.Tensor
    class_labels: torch.Tensor
    boxes: torch.Tensor

    @property
    def count(self) -> torch.Tensor:
        """The number of positive anchors, at least one per image, as a scalar."""
        return self.positive.sum(dim=1).clamp(min=1).sum()

    def class_targets(self, values: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """`values` `(batch, anchors)` at the classes of the positive anchors and 0 elsewhere, as `logits`."""
        values = (values * self.positive)[..., None].to(logits.dtype)
        return torch.zeros_like(logits).scatter_(2, self.class_labels[..., None], values)


class NormedConv(nn.Module):
    """A 3 x 3 convolution without a bias, group norm, ReLU."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        # Not called a norm: the recipes decay it, and leave out what has `norm` in its name.
        self.gn = nn.GroupNorm(num_groups, channels)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.gn(self.conv(states)))


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
        self.class_predictor = nn.Conv2d(channels, config.num_labels, 3, padding=1)
        self.box_predictor = nn.Conv2d(channels, num_box_values, 3, padding=1)
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
        """What each anchor learns. Nothing waits for the device.

        Args:
            anchors: Of all levels.
            valid: For each image, which anchors take part: bool `(anchors,)`.
            truths: The objects of each image.
        """
        boxes = anchors.boxes.repeat(len(truths), 1, 1)  # (batch, anchors, 4)
        matches = torch.full(boxes.shape[:2], IGNORED, device=boxes.device)
        class_labels = torch.zeros_like(matches)
        for index, (valid_anchors, truth) in enumerate(zip(valid, truths, strict=True)):
            matches[index] = match_atss(truth.boxes, anchors, self.config.num_candidates, valid_anchors)
            if len(truth.boxes):
                objects, positive = matches[index].clamp(min=0), matches[index] >= 0  # (anchors,)
                class_labels[index] = truth.class_labels[objects] * positive
                boxes[index] = truth.boxes[objects].where(positive[:, None], anchors.boxes)
        return MatchedAnchors(matches != IGNORED, matches >= 0, class_labels, boxes)
