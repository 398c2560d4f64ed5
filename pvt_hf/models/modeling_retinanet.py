"""RetinaNet (arXiv 1708.02002) on any backbone, as the PVT papers use it (mmdetection 2.13)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .boxes import (
    AnchorGrid,
    Anchors,
    at_least_float32,
    decode_boxes,
    encode_boxes,
    flatten_to_anchors,
    match_boxes,
    pairwise_iou,
)
from .configuration_retinanet import RetinaNetConfig
from .one_stage import OneStageDetector, match_anchors
from .targets import GroundTruth
from .winograd import Conv3x3


@dataclass
class RetinaNetObjectDetectionOutput(ModelOutput):
    r"""
    Outputs of [`RetinaNetForObjectDetection`]. [`~pvt_hf.models.post_processing.detect_objects`] (in the image
    processor: `post_process_object_detection`) makes detections from them.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned where `labels` are given):
            The sum of `loss_dict`.
        loss_dict (`dict[str, torch.Tensor]`, *optional*, returned where `labels` are given):
            `loss_class` and `loss_box`.
        logits (`torch.Tensor` of shape `(batch, anchors, num_labels)`):
            Class logits of every anchor, level by level, for a sigmoid each: there is no background class.
        pred_boxes (`torch.Tensor` of shape `(batch, anchors, 4)`):
            The box of every anchor, clipped to its image: cxcywh, relative to the image's size without padding. Float32
            or float64, and without a gradient.
        level_sizes (`torch.Tensor` of shape `(levels,)`):
            Number of anchors of each level.
        image_sizes (`torch.Tensor` of shape `(batch, 2)`):
            Height and width of each image in pixels, without padding.
        hidden_states (`tuple[torch.Tensor, ...]`, *optional*):
            Those of the backbone, where the call or its configuration asks for them.
        attentions (`tuple[torch.Tensor, ...]`, *optional*):
            Those of the backbone, where the call or its configuration asks for them.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    level_sizes: torch.Tensor | None = None
    image_sizes: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class RetinaNetHead(nn.Module):
    """Two towers of convolutions that all levels share: class logits and box deltas of every anchor."""

    def __init__(self, config: RetinaNetConfig):
        super().__init__()
        self.config = config
        self.anchor_grid = AnchorGrid(config.strides, config.anchor_scales, config.anchor_ratios)
        channels, num_anchors = config.neck_channels, self.anchor_grid.num_per_cell
        self.class_convs, self.box_convs = (
            nn.ModuleList(Conv3x3(channels, channels) for _ in range(config.num_head_convs)) for _ in range(2)
        )
        self.class_predictor = Conv3x3(channels, num_anchors * config.num_labels)
        self.box_predictor = Conv3x3(channels, num_anchors * 4)

    def reset_parameters(self) -> None:
        """Section 4.1: normal weights of 0.01, zero biases, and every class at its prior probability."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init.normal_(module.weight, std=0.01)
                init.zeros_(module.bias)
        prior = self.config.prior_probability
        init.constant_(self.class_predictor.bias, -math.log((1 - prior) / prior))

    def forward(self, levels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            levels: Maps `(batch, channels, height, width)`, finest first.

        Returns:
            Logits `(batch, anchors, num_labels)` and deltas `(batch, anchors, 4)`, at least in float32.
        """
        logits, deltas = [], []
        for level in levels:
            class_states = box_states = level
            for conv in self.class_convs:
                class_states = F.relu(conv(class_states), inplace=True)
            for conv in self.box_convs:
                box_states = F.relu(conv(box_states), inplace=True)
            logits.append(flatten_to_anchors(self.class_predictor(class_states), self.config.num_labels))
            deltas.append(flatten_to_anchors(self.box_predictor(box_states), 4))
        return at_least_float32(torch.cat(logits, dim=1)), at_least_float32(torch.cat(deltas, dim=1))

    def decode(self, anchors: Anchors, deltas: torch.Tensor) -> torch.Tensor:
        """Boxes of the anchors' deltas, xyxy in pixels, `(batch, anchors, 4)`."""
        return decode_boxes(anchors.boxes, deltas)

    def loss(
        self,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        anchors: Anchors,
        valid: Sequence[torch.Tensor],
        truths: Sequence[GroundTruth],
    ) -> dict[str, torch.Tensor]:
        """Focal loss of all anchors and L1 loss of the positive ones' deltas, over the number of positive anchors (at
        least one per image).

        Args:
            logits: `(batch, anchors, num_labels)`.
            deltas: `(batch, anchors, 4)`.
            anchors: Of all levels.
            valid: For each image, which anchors take part: bool `(anchors,)`.
            truths: The objects of each image.

        Returns:
            `loss_class` and `loss_box`, scalars.
        """
        from torchvision.ops import sigmoid_focal_loss

        config = self.config
        matched = match_anchors(
            anchors,
            valid,
            truths,
            lambda boxes, takes_part: match_boxes(
                pairwise_iou(boxes, anchors.boxes),
                config.positive_iou_threshold,
                config.negative_iou_threshold,
                0,
                takes_part,
            ),
        )
        normalizer = matched.count.clamp(min=1)
        targets = matched.class_targets(torch.ones_like(logits[..., 0]), logits)
        focal = sigmoid_focal_loss(logits, targets, config.focal_alpha, config.focal_gamma)
        wanted = encode_boxes(anchors.boxes, matched.boxes)  # (batch, anchors, 4)
        distances = F.l1_loss(deltas, wanted, reduction="none") * matched.positive[..., None]
        return {
            "loss_class": (focal * matched.takes_part[..., None]).sum() / normalizer,
            "loss_box": distances.sum() / normalizer,
        }


class RetinaNetForObjectDetection(OneStageDetector):
    """Backbone, feature pyramid of five levels (strides 8 to 128) and the shared head."""

    config: RetinaNetConfig
    config_class = RetinaNetConfig
    head_class = RetinaNetHead
    output_class = RetinaNetObjectDetectionOutput


__all__ = ["RetinaNetForObjectDetection", "RetinaNetObjectDetectionOutput"]
