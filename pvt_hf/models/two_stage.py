"""What the detectors of two stages have in common: proposals, and heads that look at their features."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbone import build_backbone
from .boxes import at_least_float32, clip_boxes, has_area, suppress, take_rows
from .fpn import FeaturePyramid
from .layers import place_numbers, runs_transformed
from .pretrained import PretrainedMixin
from .rois import SampledRoIs, arrange_levels, flatten_rois, pool_rois
from .rpn import RegionProposalNetwork
from .targets import GroundTruth, normalize_boxes, read_ground_truths, read_images
from .winograd import Conv3x3

BOX_SIZE, MASK_SIZE = 7, 14  # cells per side that an RoI is pooled to


class MaskHead(nn.Module):
    """Convolutions, an upsampling by 2 and one map of logits for every class."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        channels = config.neck_channels
        self.convs = nn.ModuleList(Conv3x3(channels, channels) for _ in range(config.num_mask_convs))
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
            features = F.relu(conv(features), inplace=True)
        return at_least_float32(self.predictor(F.relu(self.upsample(features), inplace=True)))

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
            if (masks := truth.masks) is None:
                raise ValueError("Masks are learned from objects that have some.")
            size = place_numbers(masks.shape[1:], rois.objects.dtype, rois.objects.device)
            boxes = clip_boxes(rois.positive_boxes, size)
            boxes = torch.cat((rois.objects[:, None].to(boxes), boxes), dim=1)  # (positive RoIs, 5)
            masks = masks[:, None].to(boxes.dtype)  # (objects, 1, height, width)
            targets.append(roi_align(masks, boxes, logits.shape[-1], 1.0, sampling_ratio=0, aligned=True)[:, 0] >= 0.5)
            labels.append(truth.class_labels[rois.objects])
            has_masks = torch.ones_like(truth.class_labels).bool() if truth.has_masks is None else truth.has_masks
            counted.append(has_masks[rois.objects])
        targets, labels, counted = torch.cat(targets).to(logits.dtype), torch.cat(labels), torch.cat(counted)
        own_class = logits[torch.arange(len(labels), device=labels.device), labels]  # (all positive RoIs, 28, 28)
        if any(truth.has_masks is not None for truth in truths):
            own_class, targets = own_class[counted], targets[counted]
        loss = F.binary_cross_entropy_with_logits(own_class, targets, reduction="sum")
        return {"loss_mask": loss / max(targets.numel(), 1)}


class TwoStageDetector(PretrainedMixin, PreTrainedModel):
    """The base of Mask R-CNN and Cascade Mask R-CNN, which differ in their heads.

    Attributes:
        output_class: Of the model's outputs.
        box_head_class: Of its box head or heads.
    """

    output_class: ClassVar[type[ModelOutput]]
    box_head_class: ClassVar[type[nn.Module]]
    rpn: RegionProposalNetwork
    accepts_loss_kwargs = False  # the losses are means over sampled RoIs, not over labels that Trainer could count

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.backbone = build_backbone(config)
        self.neck = FeaturePyramid(self.backbone.channels, config.neck_channels, extra_pooled_level=True)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The parts know how; their layers have been visited before them.
        if isinstance(module, FeaturePyramid | RegionProposalNetwork | MaskHead | self.box_head_class):
            module.reset_parameters()

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
    ) -> ModelOutput:
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
            The class's `output_class`.

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
        levels = arrange_levels(levels[:-1])
        loss_dict = None
        if truths is not None:
            valid = self.rpn.find_valid(level_shapes, anchors, image_sizes.tolist(), input_size)
            loss_dict = self.rpn.loss(objectness, deltas, anchors, valid, truths)
            loss_dict |= self.compute_roi_losses(levels, proposals, truths, image_sizes)
        detects = truths is None or not self.training
        return self.output_class(
            loss=sum(loss_dict.values()) if loss_dict else None,
            loss_dict=loss_dict,
            image_sizes=image_sizes,
            hidden_states=features.hidden_states,
            attentions=features.attentions,
            **(self.detect(levels, proposals, image_sizes) if detects else {}),
        )

    def compute_roi_losses(
        self,
        levels: Sequence[torch.Tensor],
        proposals: torch.Tensor,
        truths: Sequence[GroundTruth],
        image_sizes: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The losses of the heads on samples of the proposals, scalars.

        Args:
            levels: P2 ... P5, each `(batch, channels, height, width)`.
            proposals: xyxy in pixels, `(batch, proposals, 4)`; those without an area are none.
            truths: The objects of each image.
            image_sizes: Height and width in pixels of each image, `(batch, 2)`.
        """
        raise NotImplementedError

    def predict_boxes(
        self, levels: Sequence[torch.Tensor], proposals: torch.Tensor, image_sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the box heads make of the proposals.

        Args:
            levels: P2 ... P5, each `(batch, channels, height, width)`.
            proposals: xyxy in pixels, `(batch, proposals, 4)`.
            image_sizes: Height and width in pixels of each image, `(batch, 2)`.

        Returns:
            Logits `(batch, proposals, num_labels + 1)` and for every class a box, xyxy in pixels and not clipped,
            `(batch, proposals, num_labels, 4)`.
        """
        raise NotImplementedError

    def list_mask_heads(self) -> list[nn.Module]:
        """Those whose probabilities are averaged; none without masks."""
        raise NotImplementedError

    def detect(
        self, levels: Sequence[torch.Tensor], proposals: torch.Tensor, image_sizes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The fields of the outputs that describe detections.

        mmdetection suppresses boxes after it has scaled them to the original image; their overlaps are the same but for
        rounding.

        Args:
            levels: P2 ... P5, each `(batch, channels, height, width)`.
            proposals: xyxy in pixels, `(batch, proposals, 4)`; those without an area are none.
            image_sizes: Height and width in pixels of each image, `(batch, 2)`.
        """
        config, num_proposals = self.config, proposals.shape[1]
        logits, boxes = self.predict_boxes(levels, proposals, image_sizes)
        num_labels = boxes.shape[2]
        boxes = clip_boxes(boxes, image_sizes[:, None, None]).flatten(1, 2)  # (batch, proposals * num_labels, 4)
        scores = logits.softmax(dim=-1)[..., :-1]
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
        if self.list_mask_heads():
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
        features = pool_rois(levels, rois[rows], self.config.strides[: len(levels)], MASK_SIZE)
        own_classes = torch.arange(len(rows), device=rois.device), all_classes[rows].clamp(min=0)
        # Each head gives (rows, num_labels, 28, 28).
        own_class = average_logits([head(features)[own_classes] for head in self.list_mask_heads()])
        masks = own_class.new_zeros(len(found), *own_class.shape[1:]).index_copy(0, rows, own_class)
        return masks.where(found[:, None, None], 0).reshape(*classes.shape, *own_class.shape[1:])


def average_logits(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """The logits of the mean of probabilities, which are given by their logits."""
    if len(logits) == 1:
        return logits[0]
    stacked = torch.stack(list(logits))
    return F.logsigmoid(stacked).logsumexp(dim=0) - F.logsigmoid(-stacked).logsumexp(dim=0)


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


__all__ = ["MaskHead", "TwoStageDetector"]
