"""Mask R-CNN (arXiv 1703.06870) on any backbone, as the PVT papers use it (mmdetection 2.13)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbone import build_backbone
from .boxes import (
    at_least_float32,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    has_area,
    suppress,
    take_rows,
)
from .configuration_mask_rcnn import MaskRCNNConfig
from .fpn import FeaturePyramid
from .layers import runs_transformed
from .pretrained import PretrainedMixin
from .rois import SampledRoIs, flatten_rois, pool_rois, sample_rois, to_rois
from .rpn import RegionProposalNetwork
from .targets import GroundTruth, normalize_boxes, pad_image_sizes, read_ground_truths, read_images

_BOX_SIZE, _MASK_SIZE = 7, 14  # cells per side that an RoI is pooled to
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
        self.fc1 = nn.Linear(config.neck_channels * _BOX_SIZE**2, config.box_head_size)
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
        # (They begin with nothing, which is all that an empty batch has.)
        labels, wanted, start = [logits.new_zeros(0, dtype=torch.int64)], [deltas.new_zeros(0, 4)], 0
        rows = labels[:]
        for rois, truth in zip(samples, truths, strict=True):
            label = torch.full((len(rois.boxes),), self.config.num_labels, device=logits.device)  # the background
            label[: len(rois.objects)] = truth.class_labels[rois.objects]
            labels.append(label)
            rows.append(torch.arange(start, start + len(rois.objects), device=logits.device))
            wanted.append(encode_boxes(rois.positive_boxes, truth.boxes[rois.objects], _BOX_STDS))
            start += len(rois.boxes)
        labels, rows = torch.cat(labels), torch.cat(rows)  # (all RoIs,) and (all positive RoIs,)
        normalizer = max(len(labels), 1)
        class_loss = F.cross_entropy(logits, labels, reduction="sum")
        box_loss = F.l1_loss(deltas[rows, labels[rows]], torch.cat(wanted), reduction="sum")
        return {"loss_class": class_loss / normalizer, "loss_box": box_loss / normalizer}


class MaskHead(nn.Module):
    """Convolutions, an upsampling by 2 and one map of logits for every class."""

    def __init__(self, config: MaskRCNNConfig):
        super().__init__()
        channels = config.neck_channels
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(config.num_mask_convs))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, config.num_labels, 1)

    def reset_parameters(self) -> None:
        """Kaiming-normal weights by fan-out and zero biases; loaded tensors are left as they are."""
        for conv in (*self.convs, self.upsample, self.predictor):
            init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            init.zeros_(conv.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features: `(RoIs, channels, 14, 14)`.

        Returns:
            Logits `(RoIs, num_labels, 28, 28)`, at least in float32.
        """
        for conv in self.convs:
            features = F.relu(conv(features))
        return at_least_float32(self.predictor(F.relu(self.upsample(features))))

    def loss(
        self, logits: torch.Tensor, samples: Sequence[SampledRoIs], truths: Sequence[GroundTruth]
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy of the maps of the objects' classes, averaged over their cells; 0 without a positive RoI. That
        of an object without a mask does not count.

        Args:
            logits: `(all positive RoIs, num_labels, 28, 28)`, image by image.
            samples: The RoIs of each image.
            truths: The objects of each image, with masks.

        Returns:
            `loss_mask`, a scalar.
        """
        from torchvision.ops import roi_align

        labels = [torch.zeros(0, dtype=torch.int64, device=logits.device)]
        targets = [torch.zeros(0, *logits.shape[2:], dtype=torch.bool, device=logits.device)]
        counted = [labels[0].bool()]  # (nothing, as all that an empty batch has)
        for rois, truth in zip(samples, truths, strict=True):
            boxes = clip_boxes(rois.positive_boxes, rois.objects.new_tensor(truth.masks.shape[1:]))
            boxes = torch.cat((rois.objects[:, None].to(boxes), boxes), dim=1)  # (positive RoIs, 5)
            masks = truth.masks[:, None].to(boxes.dtype)  # (objects, 1, height, width)
            targets.append(roi_align(masks, boxes, logits.shape[-1], 1.0, sampling_ratio=0, aligned=True)[:, 0] >= 0.5)
            labels.append(truth.class_labels[rois.objects])
            has_masks = torch.ones_like(truth.class_labels).bool() if truth.has_masks is None else truth.has_masks
            counted.append(has_masks[rois.objects])
        targets, labels, counted = torch.cat(targets).to(logits.dtype), torch.cat(labels), torch.cat(counted)
        own_class = logits[torch.arange(len(labels), device=labels.device), labels]  # (all positive RoIs, 28, 28)
        own_class, targets = own_class[counted], targets[counted]
        loss = F.binary_cross_entropy_with_logits(own_class, targets, reduction="sum")
        return {"loss_mask": loss / max(targets.numel(), 1)}


class MaskRCNNPreTrainedModel(PretrainedMixin, PreTrainedModel):
    """The base of Mask R-CNN: its configuration, its weight initialisation, and complete loading."""

    config: MaskRCNNConfig
    config_class = MaskRCNNConfig
    _may_change_shape = ("box_head.class_predictor.", "box_head.box_predictor.", "mask_head.predictor.")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The parts know how; their layers have been visited before them.
        if isinstance(module, FeaturePyramid | RegionProposalNetwork | BoxHead | MaskHead):
            module.reset_parameters()


class MaskRCNNForInstanceSegmentation(MaskRCNNPreTrainedModel):
    """Backbone, feature pyramid, region proposal network, and for each proposal a box head and a mask head. With
    `config.use_masks=False` there is no mask head: Faster R-CNN."""

    accepts_loss_kwargs = False  # the losses are means over sampled RoIs, not over labels that Trainer could count

    def __init__(self, config: MaskRCNNConfig):
        super().__init__(config)
        self.backbone = build_backbone(config)
        self.neck = FeaturePyramid(self.backbone.channels, config.neck_channels, extra_pooled_level=True)
        self.rpn = RegionProposalNetwork(config)
        self.box_head = BoxHead(config)
        self.mask_head = MaskHead(config) if config.use_masks else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: Sequence[Mapping[str, torch.Tensor]] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MaskRCNNInstanceSegmentationOutput:
        r"""
        Anchors and proposals to learn from are drawn in training only, from torch's CPU generator; in evaluation mode
        the loss takes evenly spaced ones, so that the same input gives the same output.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`):
                Normalised images, padded to the right and below with zeros to a height and width of multiples of 32.
            pixel_mask (`torch.Tensor` of shape `(batch, height, width)`, *optional*):
                1 in each image and 0 in its padding; all 1 by default. It says where an image ends: boxes are clipped
                there, and labels are relative to that size. More padding than to multiples of 32 is taken off (not in
                compiled code); the rest is computed as if it were image.
            labels (`list[dict[str, torch.Tensor]]`, *optional*):
                For each image `class_labels` int64 `(objects,)`, `boxes` `(objects, 4)`, cxcywh relative to the image's
                size without padding, and with a mask head `masks` `(objects, height, width)`, bool or integers, of the
                size of `pixel_values`, and perhaps `has_masks`, bool `(objects,)`: an object without one trains its box
                only.
            output_attentions (`bool`, *optional*):
                As in the backbone.
            output_hidden_states (`bool`, *optional*):
                As in the backbone.

        Returns:
            [`MaskRCNNInstanceSegmentationOutput`]

        Raises:
            TypeError: For `pixel_values`, a `pixel_mask` or `labels` of another type.
            ValueError: For `pixel_values`, a `pixel_mask` or `labels` of another form; the message names the image and
                the annotation.
        """
        batch = pixel_values
        pixel_values, image_sizes = read_images(batch, pixel_mask, self.backbone.config.num_channels)
        input_size, truths = pixel_values.shape[2:], None
        if labels is not None:
            dtype = torch.promote_types(self.dtype, torch.float32)
            mask_size = tuple(batch.shape[2:]) if self.config.use_masks else None
            truths = read_ground_truths(labels, image_sizes, self.config.num_labels, dtype, mask_size, input_size)
        features = self.backbone.forward_with_filtered_kwargs(
            pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        levels = self.neck(features.feature_maps)  # P2 ... P6
        objectness, deltas = self.rpn(levels)
        grid, level_shapes = self.rpn.anchor_grid, [level.shape[2:] for level in levels]
        anchors = grid.generate_boxes(level_shapes, like=deltas)
        level_sizes = [height * width * grid.num_per_cell for height, width in level_shapes]
        proposals = self.rpn.select_proposals(objectness, deltas, anchors, level_sizes, image_sizes)
        loss_dict = None
        if truths is not None:
            sizes = pad_image_sizes(image_sizes.tolist(), input_size)
            valid = [grid.find_valid(level_shapes, size, deltas.device) for size in sizes]
            loss_dict = self.rpn.loss(objectness, deltas, anchors, valid, truths)
            loss_dict |= self.compute_roi_losses(levels[:-1], proposals, truths)
        detects = truths is None or not self.training
        return MaskRCNNInstanceSegmentationOutput(
            loss=sum(loss_dict.values()) if loss_dict else None,
            loss_dict=loss_dict,
            image_sizes=image_sizes,
            hidden_states=features.hidden_states,
            attentions=features.attentions,
            **(self.detect(levels[:-1], proposals, image_sizes) if detects else {}),
        )

    def compute_roi_losses(
        self, levels: Sequence[torch.Tensor], proposals: torch.Tensor, truths: Sequence[GroundTruth]
    ) -> dict[str, torch.Tensor]:
        """The losses of the two heads on samples of the proposals.

        Args:
            levels: P2 ... P5, each `(batch, channels, height, width)`.
            proposals: xyxy in pixels, `(batch, proposals, 4)`; those without an area are none.
            truths: The objects of each image.

        Returns:
            `loss_class`, `loss_box` and with a mask head `loss_mask`, scalars.
        """
        strides, threshold = self.config.strides[: len(levels)], self.config.roi_iou_threshold
        samples = [
            sample_rois(
                image_proposals[has_area(image_proposals)], truth, self.config, threshold, threshold, self.training
            )
            for image_proposals, truth in zip(proposals, truths, strict=True)
        ]
        nothing = proposals.new_zeros(0, 4)  # all that an empty batch has
        rois = to_rois([*(rois.boxes for rois in samples), nothing])
        features = pool_rois(levels, rois, strides, _BOX_SIZE)  # (all RoIs, channels, 7, 7)
        logits, deltas = self.box_head(features)
        losses = self.box_head.loss(logits, deltas, samples, truths)
        if self.mask_head is not None:
            rois = to_rois([*(rois.positive_boxes for rois in samples), nothing])
            features = pool_rois(levels, rois, strides, _MASK_SIZE)
            losses |= self.mask_head.loss(self.mask_head(features), samples, truths)
        return losses

    def detect(
        self, levels: Sequence[torch.Tensor], proposals: torch.Tensor, image_sizes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The fields of [`MaskRCNNInstanceSegmentationOutput`] that describe detections.

        mmdetection suppresses boxes after it has scaled them to the original image; their overlaps are the same but for
        rounding.

        Args:
            levels: P2 ... P5, each `(batch, channels, height, width)`.
            proposals: xyxy in pixels, `(batch, proposals, 4)`; those without an area are none.
            image_sizes: Height and width in pixels of each image, `(batch, 2)`.
        """
        config, strides = self.config, self.config.strides[: len(levels)]
        batch_size, num_proposals, _ = proposals.shape
        logits, deltas = self.box_head(pool_rois(levels, flatten_rois(proposals), strides, _BOX_SIZE))
        logits = logits.reshape(batch_size, num_proposals, logits.shape[-1])  # (batch, proposals, num_labels + 1)
        deltas = deltas.reshape(batch_size, num_proposals, *deltas.shape[1:])  # (batch, proposals, num_labels, 4)
        boxes = decode_boxes(proposals[:, :, None], deltas, _BOX_STDS)
        boxes = clip_boxes(boxes, image_sizes[:, None, None]).flatten(1, 2)  # (batch, proposals * num_labels, 4)
        scores, num_labels = logits.softmax(dim=-1)[..., :-1], deltas.shape[2]
        candidates = (scores > config.score_threshold) & has_area(proposals)[..., None]
        scores, classes = scores.flatten(1), torch.arange(num_labels, device=boxes.device).repeat(num_proposals)
        kept = suppress(
            boxes, scores, classes, candidates.flatten(1), config.nms_threshold, config.max_detections
        )  # (batch, detections)
        found, kept = kept >= 0, kept.clamp(min=0)
        classes = classes[kept].where(found, -1)
        boxes = take_rows(boxes, kept).where(found[..., None], 0)  # (batch, detections, 4)
        fields = {
            "logits": separate_class(take_rows(logits, kept // num_labels), classes),
            "pred_boxes": normalize_boxes(boxes, image_sizes[:, None]),
            "scores": take_rows(scores, kept).where(found, 0),
            "class_labels": classes,
        }
        if self.mask_head is not None:
            fields["pred_masks"] = self._predict_masks(levels, boxes, classes)
        return fields

    def _predict_masks(
        self, levels: Sequence[torch.Tensor], boxes: torch.Tensor, classes: torch.Tensor
    ) -> torch.Tensor:
        """The logits of the masks in boxes `(batch, detections, 4)` of these classes `(batch, detections)`, zeros for
        the class -1: `(batch, detections, 28, 28)`."""
        rois, all_classes = flatten_rois(boxes), classes.flatten()  # (batch * detections, 5) and (batch * detections,)
        found = all_classes >= 0
        # In compiled code, where sizes are fixed, rows without a detection are computed too.
        rows = torch.arange(len(found), device=rois.device) if runs_transformed() else found.nonzero().flatten()
        features = pool_rois(levels, rois[rows], self.config.strides[: len(levels)], _MASK_SIZE)
        mask_logits = self.mask_head(features)  # (rows, num_labels, 28, 28)
        own_class = mask_logits[torch.arange(len(rows), device=rois.device), all_classes[rows].clamp(min=0)]
        masks = own_class.new_zeros(len(found), *own_class.shape[1:]).index_copy(0, rows, own_class)
        return masks.where(found[:, None, None], 0).reshape(*classes.shape, *own_class.shape[1:])


def separate_class(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The logits of one class each, and in place of the background's those of all other classes together, so that a
    softmax still gives the class its probability.

    Args:
        logits: `(..., num_labels + 1)`, the background last.
        classes: Int64 `(...)`; -1 for none.

    Returns:
        `(..., num_labels + 1)`: -inf for all other classes. Without a class the last is 0.
    """
    is_own = classes[..., None] == torch.arange(logits.shape[-1], device=logits.device)
    others = logits.masked_fill(is_own, -torch.inf).logsumexp(dim=-1, keepdim=True)
    own = logits.masked_fill(~is_own, -torch.inf)
    return torch.cat((own[..., :-1], others.where(classes[..., None] >= 0, 0)), dim=-1)


__all__ = ["MaskRCNNForInstanceSegmentation", "MaskRCNNInstanceSegmentationOutput", "MaskRCNNPreTrainedModel"]
