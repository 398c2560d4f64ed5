"""Mask R-CNN (arXiv 1703.06870) on any backbone, as the PVT papers use it (mmdetection 2.13)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .boxes import at_least_float32, decode_boxes, encode_boxes, has_area
from .configuration_mask_rcnn import MaskRCNNConfig
from .rois import SampledRoIs, flatten_rois, list_targets, pool_rois, sample_rois, to_rois
from .rpn import RegionProposalNetwork
from .targets import GroundTruth
from .two_stage import BOX_SIZE, MASK_SIZE, MaskHead, TwoStageDetector

_BOX_STDS = (0.1, 0.1, 0.2, 0.2)


@dataclass
class MaskRCNNInstanceSegmentationOutput(ModelOutput):
    r"""
    Outputs of [`MaskRCNNForInstanceSegmentation`]. The detections of an image come first, best first; the rest of the
    `config.max_detections` rows have the score 0 and the class -1. [`~pvt_hf.models.post_processing.detect_objects`]
    and [`~pvt_hf.models.post_processing.segment_instances`] (in the image processor: `post_process_object_detection`
    and `post_process_instance_segmentation`) scale them to an image.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned where `labels` are given):
            The sum of `loss_dict`.
        loss_dict (`dict[str, torch.Tensor]`, *optional*, returned where `labels` are given):
            `loss_objectness`, `loss_rpn_box`, `loss_class`, `loss_box` and with a mask head `loss_mask`.
        logits (`torch.Tensor` of shape `(batch, detections, num_labels + 1)`):
            In DETR's form, for a softmax: the logit of the detection's class, last that of everything else together,
            and -inf for the other classes. Like all that follows not in a training step, which makes no detections.
        pred_boxes (`torch.Tensor` of shape `(batch, detections, 4)`):
            cxcywh, relative to the image's size without padding. Float32 or float64.
        scores (`torch.Tensor` of shape `(batch, detections)`):
            Probability of the class.
        class_labels (`torch.Tensor` of shape `(batch, detections)`):
            The class, int64.
        pred_masks (`torch.Tensor` of shape `(batch, detections, 28, 28)`, *optional*, with a mask head):
            Logits of the mask of this class in the box.
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
    scores: torch.Tensor | None = None
    class_labels: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    image_sizes: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class BoxHead(nn.Module):
    """Two linear layers, then class logits with the background last and box deltas of every class."""

    def __init__(self, config: MaskRCNNConfig):
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(config.neck_channels * BOX_SIZE**2, config.box_head_size)
        self.fc2 = nn.Linear(config.box_head_size, config.box_head_size)
        self.class_predictor = nn.Linear(config.box_head_size, config.num_labels + 1)
        self.box_predictor = nn.Linear(config.box_head_size, config.num_labels * 4)

    def reset_parameters(self) -> None:
        """Xavier-normal weights and zero biases; loaded tensors are left as they are."""
        for linear in self.children():
            init.xavier_normal_(linear.weight)
            init.zeros_(linear.bias)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            features: `(RoIs, channels, 7, 7)`.

        Returns:
            Logits `(RoIs, num_labels + 1)` and deltas `(RoIs, num_labels, 4)`, at least in float32.
        """
        hidden_states = F.relu(self.fc2(F.relu(self.fc1(features.flatten(1)))))
        deltas = self.box_predictor(hidden_states).unflatten(1, (-1, 4))
        return at_least_float32(self.class_predictor(hidden_states)), at_least_float32(deltas)

    def loss(
        self,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        samples: Sequence[SampledRoIs],
        truths: Sequence[GroundTruth],
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy of all RoIs, and L1 loss of the positive ones' deltas of their class, both over the number of
        RoIs.

        Args:
            logits: `(all RoIs, num_labels + 1)`, image by image.
            deltas: `(all RoIs, num_labels, 4)`.
            samples: The RoIs of each image.
            truths: The objects of each image.

        Returns:
            `loss_class` and `loss_box`, scalars.
        """
        labels, rows, boxes, objects = list_targets(samples, truths, self.config.num_labels, like=deltas)
        normalizer = max(len(labels), 1)
        class_loss = F.cross_entropy(logits, labels, reduction="sum")
        wanted = encode_boxes(boxes, objects, _BOX_STDS)
        box_loss = F.l1_loss(deltas[rows, labels[rows]], wanted, reduction="sum")
        return {"loss_class": class_loss / normalizer, "loss_box": box_loss / normalizer}


class MaskRCNNPreTrainedModel(TwoStageDetector):
    """The base of Mask R-CNN: its configuration, and what depends on the number of classes."""

    config: MaskRCNNConfig
    config_class = MaskRCNNConfig
    output_class = MaskRCNNInstanceSegmentationOutput
    box_head_class = BoxHead
    _may_change_shape = ("box_head.class_predictor.", "box_head.box_predictor.", "mask_head.predictor.")


class MaskRCNNForInstanceSegmentation(MaskRCNNPreTrainedModel):
    """Backbone, feature pyramid, region proposal network, and for each proposal a box head and a mask head. With
    `config.use_masks=False` there is no mask head: Faster R-CNN."""

    def __init__(self, config: MaskRCNNConfig):
        super().__init__(config)
        self.rpn = RegionProposalNetwork(config)
        self.box_head = BoxHead(config)
        self.mask_head = MaskHead(config) if config.use_masks else None
        self.post_init()

    def compute_roi_losses(
        self,
        levels: Sequence[torch.Tensor],
        proposals: torch.Tensor,
        truths: Sequence[GroundTruth],
        image_sizes: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        strides, threshold = self.config.strides[: len(levels)], self.config.roi_iou_threshold
        samples = sample_rois(
            proposals, truths, self.config, threshold, threshold, self.training, valid=has_area(proposals)
        )
        nothing = proposals.new_zeros(0, 4)  # all that an empty batch has
        rois = to_rois([*(rois.boxes for rois in samples), nothing])
        features = pool_rois(levels, rois, strides, BOX_SIZE)  # (all RoIs, channels, 7, 7)
        logits, deltas = self.box_head(features)
        losses = self.box_head.loss(logits, deltas, samples, truths)
        if self.mask_head is not None:
            rois = to_rois([*(rois.positive_boxes for rois in samples), nothing])
            features = pool_rois(levels, rois, strides, MASK_SIZE)
            losses |= self.mask_head.loss(self.mask_head(features), samples, truths)
        return losses

    def predict_boxes(
        self, levels: Sequence[torch.Tensor], proposals: torch.Tensor, image_sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        strides = self.config.strides[: len(levels)]
        logits, deltas = self.box_head(pool_rois(levels, flatten_rois(proposals), strides, BOX_SIZE))
        shape = proposals.shape[:2]
        logits, deltas = logits.reshape(*shape, *logits.shape[1:]), deltas.reshape(*shape, *deltas.shape[1:])
        return logits, decode_boxes(proposals[:, :, None], deltas, _BOX_STDS)

    def list_mask_heads(self) -> list[nn.Module]:
        return [] if self.mask_head is None else [self.mask_head]


__all__ = ["MaskRCNNForInstanceSegmentation", "MaskRCNNInstanceSegmentationOutput", "MaskRCNNPreTrainedModel"]
