"""ATSS (arXiv 1912.02424) on any backbone, as PVT v2 uses it (mmdetection 2.13)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

from .adaptive_head import AdaptiveHead
from .boxes import Anchors, at_least_float32, decode_boxes, flatten_to_anchors, paired_overlaps
from .configuration_atss import ATSSConfig
from .distributed import mean_over_processes
from .one_stage import OneStageDetector
from .targets import GroundTruth
from .winograd import Conv3x3

# The units of the deltas.
_BOX_STDS = (0.1, 0.1, 0.2, 0.2)


@dataclass
class ATSSObjectDetectionOutput(ModelOutput):
    r"""
    Outputs of [`ATSSForObjectDetection`]. [`~pvt_hf.models.post_processing.detect_objects`] (in the image processor:
    `post_process_object_detection`) makes detections from them.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned where `labels` are given):
            The sum of `loss_dict`.
        loss_dict (`dict[str, torch.Tensor]`, *optional*, returned where `labels` are given):
            `loss_class`, `loss_box` and `loss_centerness`.
        logits (`torch.Tensor` of shape `(batch, anchors, num_labels)`):
            Class logits of every anchor, level by level, for a sigmoid each: there is no background class.
        pred_boxes (`torch.Tensor` of shape `(batch, anchors, 4)`):
            The box of every anchor, clipped to its image: cxcywh, relative to the image's size without padding. Float32
            or float64, and without a gradient.
        centerness (`torch.Tensor` of shape `(batch, anchors)`):
            Logits of how central every anchor is in its object. A detection's score is the product of its class's
            probability and this one.
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
    centerness: torch.Tensor | None = None
    level_sizes: torch.Tensor | None = None
    nms_threshold: torch.Tensor | None = None
    image_sizes: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class ATSSHead(AdaptiveHead):
    """Class logits, box deltas and centerness of every anchor."""

    def __init__(self, config: ATSSConfig):
        super().__init__(config, num_box_values=4)
        self.centerness_predictor = Conv3x3(config.neck_channels, 1)

    def forward(self, levels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            levels: Maps `(batch, channels, height, width)`, finest first.

        Returns:
            Logits `(batch, anchors, num_labels)`, deltas `(batch, anchors, 4)` and logits of the centerness
            `(batch, anchors)`, at least in float32.
        """
        logits, deltas, centerness = [], [], []
        for level, scale in zip(levels, self.scales, strict=True):
            box_states = self.box_convs(level)
            logits.append(flatten_to_anchors(self.class_predictor(self.class_convs(level)), self.config.num_labels))
            deltas.append(flatten_to_anchors(self.box_predictor(box_states) * scale, 4))
            centerness.append(flatten_to_anchors(self.centerness_predictor(box_states), 1)[..., 0])
        return tuple(at_least_float32(torch.cat(parts, dim=1)) for parts in (logits, deltas, centerness))

    def decode(self, anchors: Anchors, deltas: torch.Tensor) -> torch.Tensor:
        """Boxes of the anchors' deltas, xyxy in pixels, `(batch, anchors, 4)`."""
        return decode_boxes(anchors.boxes, deltas, _BOX_STDS)

    def loss(
        self,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        centerness: torch.Tensor,
        anchors: Anchors,
        valid: Sequence[torch.Tensor],
        truths: Sequence[GroundTruth],
    ) -> dict[str, torch.Tensor]:
        """Focal loss of all anchors; of the positive ones cross-entropy of the centerness, and GIoU loss weighted by
        it. They are divided by the number of positive anchors (at least one per image) and by the sum of the weights,
        both as means over the processes.

        Args:
            logits: `(batch, anchors, num_labels)`.
            deltas: `(batch, anchors, 4)`.
            centerness: Logits `(batch, anchors)`.
            anchors: Of all levels.
            valid: For each image, which anchors take part: bool `(anchors,)`.
            truths: The objects of each image.

        Returns:
            `loss_class`, `loss_box` and `loss_centerness`, scalars.
        """
        from torchvision.ops import sigmoid_focal_loss

        config, matched = self.config, self.match(anchors, valid, truths)
        weights = compute_centerness(anchors.centres, matched.boxes) * matched.positive  # (batch, anchors)
        sums = torch.stack((matched.count.to(weights.dtype), weights.sum()))
        num_positives, total_weight = mean_over_processes(sums).clamp(min=1).unbind()

        targets = matched.class_targets(torch.ones_like(weights), logits)
        focal = sigmoid_focal_loss(logits, targets, config.focal_alpha, config.focal_gamma)
        entropy = F.binary_cross_entropy_with_logits(centerness, weights, reduction="none")
        _, giou = paired_overlaps(self.decode(anchors, deltas), matched.boxes)
        return {
            "loss_class": (focal * matched.takes_part[..., None]).sum() / num_positives,
            "loss_box": config.box_loss_weight * ((1 - giou) * weights).sum() / total_weight,
            "loss_centerness": (entropy * matched.positive).sum() / num_positives,
        }


def compute_centerness(points: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """How central points are in boxes, 1 in the middle and 0 on a side (FCOS, arXiv 1904.01355, equation 3).

    Args:
        points: xy `(..., 2)`, inside of their boxes.
        boxes: xyxy `(..., 4)` in the same unit; the leading dimensions broadcast.

    Returns:
        `(...)`.
    """
    before, behind = points - boxes[..., :2], boxes[..., 2:] - points  # left and top, right and bottom
    return (torch.minimum(before, behind) / torch.maximum(before, behind)).prod(dim=-1).sqrt()


class ATSSForObjectDetection(OneStageDetector):
    """Backbone, feature pyramid of five levels (strides 8 to 128) and the shared head."""

    config: ATSSConfig
    config_class = ATSSConfig
    head_class = ATSSHead
    output_class = ATSSObjectDetectionOutput
    extra_convs_source = "on_output"
    evaluation_threshold = 0.0  # of the product of class and centerness; that of the class has one of its own

    def describe_detections(self, logits, deltas, centerness):
        return {"centerness": centerness, "nms_threshold": logits.new_full((1,), self.config.nms_threshold)}


__all__ = ["ATSSForObjectDetection", "ATSSObjectDetectionOutput"]
