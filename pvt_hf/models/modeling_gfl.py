"""GFL (generalized focal loss, arXiv 2006.04388) on any backbone, as PVT v2 uses it (mmdetection 2.13)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

from .adaptive_head import AdaptiveHead
from .boxes import Anchors, at_least_float32, flatten_to_anchors, paired_overlaps
from .configuration_gfl import GFLConfig
from .distributed import mean_over_processes
from .one_stage import OneStageDetector
from .targets import GroundTruth


@dataclass
class GFLObjectDetectionOutput(ModelOutput):
    r"""
    Outputs of [`GFLForObjectDetection`]. [`~pvt_hf.models.post_processing.detect_objects`] (in the image processor:
    `post_process_object_detection`) makes detections from them.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned where `labels` are given):
            The sum of `loss_dict`.
        loss_dict (`dict[str, torch.Tensor]`, *optional*, returned where `labels` are given):
            `loss_class`, `loss_box` and `loss_distribution`.
        logits (`torch.Tensor` of shape `(batch, anchors, num_labels)`):
            Logits of every anchor, level by level, for a sigmoid each, which says at once how likely a class is and how
            well the box fits: there is no background class.
        pred_boxes (`torch.Tensor` of shape `(batch, anchors, 4)`):
            The box of every anchor, clipped to its image: cxcywh, relative to the image's size without padding. Float32
            or float64, and without a gradient.
        level_sizes (`torch.Tensor` of shape `(levels,)`):
            Number of anchors of each level.
        nms_threshold (`torch.Tensor` of shape `(1,)`):
            Detections of a class do not overlap by a larger IoU.
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
    nms_threshold: torch.Tensor | None = None
    image_sizes: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class GFLHead(AdaptiveHead):
    """Class logits of every anchor, and a distribution of the distance from its centre to each side of its box."""

    def __init__(self, config: GFLConfig):
        super().__init__(config, num_box_values=4 * (config.reg_max + 1))

    def forward(self, levels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            levels: Maps `(batch, channels, height, width)`, finest first.

        Returns:
            Logits `(batch, anchors, num_labels)`, and logits of the distances left, top, right and bottom
            `(batch, anchors, 4 * (reg_max + 1))`, at least in float32.
        """
        logits, distances = [], []
        for level, scale in zip(levels, self.scales, strict=True):
            logits.append(flatten_to_anchors(self.class_predictor(self.class_convs(level)), self.config.num_labels))
            scaled = self.box_predictor(self.box_convs(level)) * scale
            distances.append(flatten_to_anchors(scaled, scaled.shape[1]))
        return at_least_float32(torch.cat(logits, dim=1)), at_least_float32(torch.cat(distances, dim=1))

    def decode(self, anchors: Anchors, distances: torch.Tensor) -> torch.Tensor:
        """Boxes at the expected distances, xyxy in pixels, `(batch, anchors, 4)`."""
        bins = torch.arange(self.config.reg_max + 1, dtype=distances.dtype, device=distances.device)
        expected = distances.unflatten(-1, (4, -1)).softmax(dim=-1) @ bins  # (batch, anchors, 4), in strides
        before, behind = (expected * anchors.strides[:, None]).split(2, dim=-1)
        return torch.cat((anchors.centres - before, anchors.centres + behind), dim=-1)

    def loss(
        self,
        logits: torch.Tensor,
        distances: torch.Tensor,
        anchors: Anchors,
        valid: Sequence[torch.Tensor],
        truths: Sequence[GroundTruth],
    ) -> dict[str, torch.Tensor]:
        """Quality focal loss of all anchors; of the positive ones GIoU loss and distribution focal loss, weighted by
        their best scores. They are divided by the number of positive anchors (at least one per image) and by the sum of
        the weights, both as means over the processes.

        Args:
            logits: `(batch, anchors, num_labels)`.
            distances: Logits `(batch, anchors, 4 * (reg_max + 1))`.
            anchors: Of all levels.
            valid: For each image, which anchors take part: bool `(anchors,)`.
            truths: The objects of each image.

        Returns:
            `loss_class`, `loss_box` and `loss_distribution`, scalars.
        """
        config, matched = self.config, self.match(anchors, valid, truths)
        strides = anchors.strides[:, None]  # (anchors, 1)
        scores = logits.sigmoid()
        weights = scores.detach().amax(dim=-1) * matched.positive  # (batch, anchors)
        sums = torch.stack((matched.count.to(weights.dtype), weights.sum()))
        num_positives, total_weight = mean_over_processes(sums).clamp(min=1).unbind()

        wanted = matched.boxes / strides
        iou, giou = paired_overlaps(self.decode(anchors, distances) / strides, wanted)
        quality = matched.class_targets(iou.detach(), logits)
        entropy = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
        focal = entropy * (quality - scores).abs() ** config.focal_gamma
        centres = anchors.centres / strides
        sides = torch.cat((centres - wanted[..., :2], wanted[..., 2:] - centres), dim=-1)  # (batch, anchors, 4)
        distribution = compute_distribution_loss(distances.unflatten(-1, (4, -1)), sides).mean(dim=-1)
        return {
            "loss_class": (focal * matched.takes_part[..., None]).sum() / num_positives,
            "loss_box": config.box_loss_weight * ((1 - giou) * weights).sum() / total_weight,
            "loss_distribution": config.distribution_loss_weight * (distribution * weights).sum() / total_weight,
        }


def compute_distribution_loss(logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the two bins around each value, weighted by how near they are (distribution focal loss).

    Args:
        logits: `(..., bins)`, of the values 0, 1, ...
        values: `(...)`; those outside of the bins count as at their edge.

    Returns:
        `(...)`.
    """
    values = values.clamp(0, logits.shape[-1] - 1 - 0.1)  # the official margin
    lower = values.floor()
    bins = torch.stack((lower, lower + 1), dim=-1).to(torch.int64)  # (..., 2)
    nearness = torch.stack((lower + 1 - values, values - lower), dim=-1)
    return -(logits.log_softmax(dim=-1).gather(-1, bins) * nearness).sum(dim=-1)


class GFLForObjectDetection(OneStageDetector):
    """Backbone, feature pyramid of five levels (strides 8 to 128) and the shared head."""

    config: GFLConfig
    config_class = GFLConfig
    head_class = GFLHead
    output_class = GFLObjectDetectionOutput
    extra_convs_source = "on_output"

    def describe_detections(self, logits, distances):
        return {"nms_threshold": logits.new_full((1,), self.config.nms_threshold)}


__all__ = ["GFLForObjectDetection", "GFLObjectDetectionOutput"]
