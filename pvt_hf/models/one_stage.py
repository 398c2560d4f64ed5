"""What the detectors of one stage have in common: a backbone, a feature pyramid, and a head that all levels share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbone import build_backbone
from .boxes import IGNORED, Anchors, clip_boxes
from .fpn import FeaturePyramid
from .layers import place_numbers
from .pretrained import PretrainedMixin
from .targets import GroundTruth, normalize_boxes, pad_image_sizes, read_ground_truths, read_images


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


def match_anchors(
    anchors: Anchors,
    valid: Sequence[torch.Tensor],
    truths: Sequence[GroundTruth],
    match: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> MatchedAnchors:
    """What each anchor of a batch learns. Nothing waits for a GPU.

    Args:
        anchors: Of all levels.
        valid: For each image, which anchors take part: bool `(anchors,)`.
        truths: The objects of each image.
        match: From the boxes of an image's objects `(objects, 4)` and which anchors take part to the object of each
            anchor, `NEGATIVE` or `IGNORED`: int64 `(anchors,)`.
    """
    boxes = anchors.boxes.repeat(len(truths), 1, 1)  # (batch, anchors, 4)
    matches = torch.full(boxes.shape[:2], IGNORED, device=boxes.device)
    class_labels = torch.zeros_like(matches)
    for index, (valid_anchors, truth) in enumerate(zip(valid, truths, strict=True)):
        matches[index] = match(truth.boxes, valid_anchors)
        if len(truth.boxes):
            objects, positive = matches[index].clamp(min=0), matches[index] >= 0  # (anchors,)
            class_labels[index] = truth.class_labels[objects] * positive
            boxes[index] = truth.boxes[objects].where(positive[:, None], anchors.boxes)
    return MatchedAnchors(matches != IGNORED, matches >= 0, class_labels, boxes)


class OneStageDetector(PretrainedMixin, PreTrainedModel):
    """The base of RetinaNet, ATSS and GFL, which differ in what their heads predict, decode and learn.

    Attributes:
        head_class: Its instances have an `anchor_grid`, give logits, what boxes are decoded from and perhaps more for
            the levels of the pyramid, `decode` the second of these, and have a `loss` of all of them.
        output_class: Of the model's outputs.
        extra_convs_source: What the coarser levels of the pyramid are made from, see [`FeaturePyramid`].
        evaluation_threshold: With which [`detect_objects`] gives mmdetection's detections.
    """

    head_class: ClassVar[type[nn.Module]]
    output_class: ClassVar[type[ModelOutput]]
    extra_convs_source: ClassVar[Literal["on_input", "on_output"]] = "on_input"
    evaluation_threshold: ClassVar[float] = 0.05
    accepts_loss_kwargs = False  # the loss is a mean over positive anchors, not over labels that Trainer could count
    _may_change_shape = ("head.class_predictor.",)

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.backbone = build_backbone(config)
        self.neck = FeaturePyramid(
            self.backbone.channels,
            config.neck_channels,
            num_extra_convs=2,
            extra_convs_source=self.extra_convs_source,
        )
        self.head = self.head_class(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The parts know how; their layers have been visited before them.
        if isinstance(module, FeaturePyramid | self.head_class):
            module.reset_parameters()

    def describe_detections(self, *predictions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Fields of the outputs that say more about how detections are made of them.

        Args:
            *predictions: Of the head.
        """
        return {}

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
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`):
                Normalised images, padded to the right and below with zeros to a height and width of multiples of 32.
            pixel_mask (`torch.Tensor` of shape `(batch, height, width)`, *optional*):
                1 in each image and 0 in its padding; all 1 by default. It says where an image ends: boxes are clipped
                there, and labels are relative to that size. More padding than to multiples of 32 is taken off (not in
                compiled code); the rest is computed as if it were image.
            labels (`list[dict[str, torch.Tensor]]`, *optional*):
                For each image `class_labels` int64 `(objects,)` and `boxes` `(objects, 4)`, cxcywh relative to the
                image's size without padding.
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
        pixel_values, image_sizes = read_images(pixel_values, pixel_mask, self.backbone.config.num_channels)
        truths = None
        if labels is not None:
            dtype = torch.promote_types(self.dtype, torch.float32)
            truths = read_ground_truths(labels, image_sizes, self.config.num_labels, dtype)
        features = self.backbone.forward_with_filtered_kwargs(
            pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        levels = self.neck(features.feature_maps)  # P3 ... P7
        predictions = self.head(levels)  # logits and what boxes are decoded from, each (batch, anchors, values)
        grid, level_shapes = self.head.anchor_grid, [level.shape[2:] for level in levels]
        anchors = grid.generate_anchors(level_shapes, like=predictions[1])
        boxes = self.head.decode(anchors, predictions[1].detach())
        boxes = clip_boxes(boxes, image_sizes[:, None])  # (batch, anchors, 4)
        loss_dict = None
        if truths is not None:
            sizes = pad_image_sizes(image_sizes.tolist(), pixel_values.shape[2:])
            valid = [grid.find_valid(level_shapes, size, boxes.device) for size in sizes]
            loss_dict = self.head.loss(*predictions, anchors, valid, truths)
        return self.output_class(
            loss=sum(loss_dict.values()) if loss_dict else None,
            loss_dict=loss_dict,
            logits=predictions[0],
            pred_boxes=normalize_boxes(boxes, image_sizes[:, None]),
            level_sizes=place_numbers(anchors.level_sizes, torch.int64, boxes.device),
            image_sizes=image_sizes,
            hidden_states=features.hidden_states,
            attentions=features.attentions,
            **self.describe_detections(*predictions),
        )
