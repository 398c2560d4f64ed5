"""Sparse R-CNN (arXiv 2011.12450) on any backbone, as PVT v2's paper uses it (mmdetection 2.13)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.image_transforms import center_to_corners_format
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbone import build_backbone
from .boxes import at_least_float32, decode_boxes, paired_overlaps
from .configuration_sparse_rcnn import SparseRCNNConfig
from .distributed import mean_over_processes
from .fpn import FeaturePyramid
from .pretrained import PretrainedMixin
from .rois import arrange_levels, flatten_rois, pool_rois
from .targets import GroundTruth, normalize_boxes, read_ground_truths, read_images

_ROI_SIZE, _SAMPLING_RATIO = 7, 2  # cells per side that an RoI is pooled to, and samples per side of a cell
_BOX_STDS = (0.5, 0.5, 1.0, 1.0)


@dataclass
class SparseRCNNObjectDetectionOutput(ModelOutput):
    r"""
    Outputs of [`SparseRCNNForObjectDetection`], those of its last head.
    [`~pvt_hf.models.post_processing.detect_objects`] (in the image processor: `post_process_object_detection`) makes
    detections from them; so does the image processor of transformers' Deformable DETR from `logits` and `pred_boxes`.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned where `labels` are given):
            The sum of `loss_dict`.
        loss_dict (`dict[str, torch.Tensor]`, *optional*, returned where `labels` are given):
            `loss_class_0`, `loss_box_0` and `loss_giou_0` of the first head, and so on.
        logits (`torch.Tensor` of shape `(batch, proposals, num_labels)`):
            Class logits of every proposal, for a sigmoid each: there is no background class.
        pred_boxes (`torch.Tensor` of shape `(batch, proposals, 4)`):
            The box of every proposal: cxcywh, relative to the image's size without padding. It may reach out of the
            image. Float32 or float64, and without a gradient.
        level_sizes (`torch.Tensor` of shape `(1,)`):
            The number of proposals, which are of no level.
        nms_threshold (`torch.Tensor` of shape `(1,)`):
            1: detections are not suppressed.
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


class LearnedProposals(nn.Module):
    """Boxes and features that every image starts with (section 3.2)."""

    def __init__(self, config: SparseRCNNConfig):
        super().__init__()
        self.boxes = nn.Parameter(torch.empty(config.num_proposals, 4))  # cxcywh, relative to the image's size
        self.features = nn.Parameter(torch.empty(config.num_proposals, config.neck_channels))

    def reset_parameters(self) -> None:
        """The whole image, and normal features; loaded tensors are left as they are."""
        init.copy_(self.boxes, self.boxes.new_tensor([0.5, 0.5, 1, 1]).expand_as(self.boxes))
        init.normal_(self.features)

    def forward(self, image_sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            image_sizes: Height and width in pixels of each image, `(batch, 2)`.

        Returns:
            Boxes, xyxy in pixels, `(batch, proposals, 4)`, at least in float32, and features
            `(batch, proposals, channels)`.
        """
        boxes = center_to_corners_format(at_least_float32(self.boxes))  # (proposals, 4)
        return boxes * _corner_scales(image_sizes, boxes), self.features.expand(image_sizes.shape[0], -1, -1)


class DynamicConvolution(nn.Module):
    """Two layers for the features of each RoI that its proposal makes (section 3.3)."""

    def __init__(self, config: SparseRCNNConfig):
        super().__init__()
        channels, self.dynamic_channels = config.neck_channels, config.dynamic_channels
        self.dynamic_layer = nn.Linear(channels, 2 * channels * self.dynamic_channels)
        self.norm_in = nn.LayerNorm(self.dynamic_channels)
        self.norm_out = nn.LayerNorm(channels)
        self.output_layer = nn.Linear(channels * _ROI_SIZE**2, channels)
        self.output_norm = nn.LayerNorm(channels)

    def forward(self, proposals: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            proposals: Features of the proposals, `(RoIs, channels)`.
            features: Of their RoIs, `(RoIs, channels, 7, 7)`.

        Returns:
            `(RoIs, channels)`.
        """
        channels = features.shape[1]
        first, second = self.dynamic_layer(proposals).chunk(2, dim=1)
        first = first.unflatten(1, (channels, self.dynamic_channels))
        second = second.unflatten(1, (self.dynamic_channels, channels))
        features = features.flatten(2).transpose(1, 2)  # (RoIs, 49, channels)
        features = F.relu(self.norm_in(features @ first))  # (RoIs, 49, dynamic channels)
        features = F.relu(self.norm_out(features @ second))  # (RoIs, 49, channels)
        return F.relu(self.output_norm(self.output_layer(features.flatten(1))))


class SparseRCNNHead(nn.Module):
    """One refinement of all proposals: they look at each other, then at the features in their boxes."""

    def __init__(self, config: SparseRCNNConfig):
        super().__init__()
        self.prior_probability = config.prior_probability
        channels = config.neck_channels
        self.attention = nn.MultiheadAttention(channels, config.num_attention_heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(channels)
        self.dynamic_conv = DynamicConvolution(config)
        self.dynamic_conv_norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, channels)
        self.ffn_norm = nn.LayerNorm(channels)
        self.class_layers, self.box_layers = (
            nn.Sequential(*(layer for _ in range(depth) for layer in _build_layer(channels)))
            for depth in (config.num_class_layers, config.num_box_layers)
        )
        self.class_predictor = nn.Linear(channels, config.num_labels)
        self.box_predictor = nn.Linear(channels, 4)

    def reset_parameters(self) -> None:
        """Xavier-uniform weights; biases as PyTorch's layers have them, but for zeros in the attention and the boxes,
        and every class at its prior probability. Loaded tensors are left as they are."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                init.ones_(module.weight)
                init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    bound = module.in_features**-0.5
                    init.uniform_(module.bias, -bound, bound)
        init.xavier_uniform_(self.attention.in_proj_weight)
        for bias in (self.attention.in_proj_bias, self.attention.out_proj.bias, self.box_predictor.bias):
            init.zeros_(bias)
        prior = self.prior_probability
        init.constant_(self.class_predictor.bias, -math.log((1 - prior) / prior))

    def forward(
        self, proposals: torch.Tensor, features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            proposals: Features of the proposals, `(batch, proposals, channels)`.
            features: Of their boxes, `(batch * proposals, channels, 7, 7)`.

        Returns:
            The proposals' new features, and of their boxes logits `(batch, proposals, num_labels)` and deltas
            `(batch, proposals, 4)`, at least in float32.
        """
        attended, _ = self.attention(proposals, proposals, proposals, need_weights=False)
        proposals = self.attention_norm(proposals + attended)
        update = self.dynamic_conv(proposals.flatten(0, 1), features).reshape(proposals.shape)
        proposals = self.dynamic_conv_norm(proposals + update)
        proposals = self.ffn_norm(proposals + self.fc2(F.relu(self.fc1(proposals))))
        logits = self.class_predictor(self.class_layers(proposals))
        deltas = self.box_predictor(self.box_layers(proposals))
        return proposals, at_least_float32(logits), at_least_float32(deltas)


class SparseRCNNPreTrainedModel(PretrainedMixin, PreTrainedModel):
    """The base of Sparse R-CNN: its configuration, its weight initialisation, and complete loading."""

    config: SparseRCNNConfig
    config_class = SparseRCNNConfig
    _may_change_shape = ("heads.class_predictor.",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The parts know how; their layers have been visited before them.
        if isinstance(module, FeaturePyramid | LearnedProposals | SparseRCNNHead):
            module.reset_parameters()


class SparseRCNNForObjectDetection(SparseRCNNPreTrainedModel):
    """Backbone, feature pyramid, and learned proposals that one head after the other refines. Every head is trained
    with a matching of its own; there is no suppression."""

    accepts_loss_kwargs = False  # the loss is a mean over objects, not over labels that Trainer could count
    evaluation_threshold = 0.0  # with which mmdetection's detections are made

    def __init__(self, config: SparseRCNNConfig):
        super().__init__(config)
        self.backbone = build_backbone(config)
        self.neck = FeaturePyramid(self.backbone.channels, config.neck_channels)
        self.proposals = LearnedProposals(config)
        self.heads = nn.ModuleList(SparseRCNNHead(config) for _ in range(config.num_heads))
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
    ) -> SparseRCNNObjectDetectionOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`):
                Normalised images, padded to the right and below with zeros to a height and width of multiples of 32.
            pixel_mask (`torch.Tensor` of shape `(batch, height, width)`, *optional*):
                1 in each image and 0 in its padding; all 1 by default. It says where an image ends: boxes and labels
                are relative to that size. More padding than to multiples of 32 is taken off (not in compiled code); the
                rest is computed as if it were image.
            labels (`list[dict[str, torch.Tensor]]`, *optional*):
                For each image `class_labels` int64 `(objects,)` and `boxes` `(objects, 4)`, cxcywh relative to the
                image's size without padding.
            output_attentions (`bool`, *optional*):
                As in the backbone.
            output_hidden_states (`bool`, *optional*):
                As in the backbone.

        Returns:
            [`SparseRCNNObjectDetectionOutput`]

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
        logits, boxes = self.refine_proposals(arrange_levels(self.neck(features.feature_maps)), image_sizes)
        loss_dict = None if truths is None else self.compute_losses(logits, boxes, truths, image_sizes)
        return SparseRCNNObjectDetectionOutput(
            loss=sum(loss_dict.values()) if loss_dict else None,
            loss_dict=loss_dict,
            logits=logits[-1],
            pred_boxes=normalize_boxes(boxes[-1].detach(), image_sizes[:, None]),
            level_sizes=torch.full((1,), self.config.num_proposals, device=boxes.device),
            nms_threshold=torch.ones(1, device=boxes.device),
            image_sizes=image_sizes,
            hidden_states=features.hidden_states,
            attentions=features.attentions,
        )

    def refine_proposals(
        self, levels: Sequence[torch.Tensor], image_sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What every head says.

        Args:
            levels: P2 ... P5, each `(batch, channels, height, width)`.
            image_sizes: Height and width in pixels of each image, `(batch, 2)`.

        Returns:
            Logits `(heads, batch, proposals, num_labels)` and boxes, xyxy in pixels and not clipped,
            `(heads, batch, proposals, 4)`.
        """
        boxes, proposals = self.proposals(image_sizes)
        all_logits, all_boxes = [], []
        for head in self.heads:
            rois = flatten_rois(boxes.detach())  # (batch * proposals, 5)
            features = pool_rois(levels, rois, self.config.strides, _ROI_SIZE, _SAMPLING_RATIO)
            proposals, logits, deltas = head(proposals, features)
            boxes = decode_boxes(boxes, deltas, _BOX_STDS)
            all_logits.append(logits)
            all_boxes.append(boxes)
            boxes = boxes.detach()  # so that a head learns from its own deltas; the first, its boxes too
        return torch.stack(all_logits), torch.stack(all_boxes)

    def compute_losses(
        self,
        logits: torch.Tensor,
        boxes: torch.Tensor,
        truths: Sequence[GroundTruth],
        image_sizes: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Of every head focal loss of all proposals, and L1 and GIoU losses of the matched ones; all of them over the
        number of matched pairs: the mean over processes, at least 1.

        Args:
            logits: `(heads, batch, proposals, num_labels)`.
            boxes: xyxy in pixels, `(heads, batch, proposals, 4)`.
            truths: The objects of each image.
            image_sizes: Height and width in pixels of each image, `(batch, 2)`.

        Returns:
            `loss_class_0`, `loss_box_0`, `loss_giou_0` and so on, scalars.
        """
        from torchvision.ops import sigmoid_focal_loss

        config, scales = self.config, _corner_scales(image_sizes, boxes)  # (batch, 1, 4)
        images, rows, objects = match_proposals(logits.detach(), boxes.detach(), truths, scales, config)
        heads = torch.arange(len(logits), device=logits.device)[:, None]
        # (The empty tensors are all that an empty batch has.)
        wanted = torch.cat([boxes.new_zeros(0, 4), *(truth.boxes for truth in truths)])[objects]  # (heads, pairs, 4)
        labels = torch.cat([objects.new_zeros(0), *(truth.class_labels for truth in truths)])[objects]
        targets = torch.zeros_like(logits)
        targets[heads, images, rows, labels] = 1
        predicted = boxes[heads, images, rows]  # (heads, pairs, 4)
        normalizer = mean_over_processes(logits.new_full((), float(images.numel()))).clamp(min=1)

        focal = sigmoid_focal_loss(logits, targets, config.focal_alpha, config.focal_gamma)
        scales = scales[:, 0][images]  # (pairs, 4)
        losses = {
            "class": config.class_loss_coefficient * focal.sum(dim=(1, 2, 3)),
            "box": config.bbox_loss_coefficient * (predicted / scales - wanted / scales).abs().sum(dim=(1, 2)),
            "giou": config.giou_loss_coefficient * (1 - paired_overlaps(predicted, wanted)[1]).sum(dim=1),
        }
        return {
            f"loss_{name}_{head}": value / normalizer
            for name, values in losses.items()
            for head, value in enumerate(values)
        }


@torch.no_grad()
def match_proposals(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    truths: Sequence[GroundTruth],
    scales: torch.Tensor,
    config: SparseRCNNConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs of proposals and objects of an image with the lowest sum of costs, for every head: focal, L1 of the
    corners, GIoU. The costs of a batch go to the CPU at once, since there is no such algorithm for a GPU.

    Args:
        logits: `(heads, batch, proposals, num_labels)`.
        boxes: xyxy in pixels, `(heads, batch, proposals, 4)`.
        truths: The objects of each image.
        scales: Width, height, width and height of each image in pixels, `(batch, 1, 4)`.
        config: The weights of the costs.

    Returns:
        The image of each pair `(pairs,)`; and the proposal and the object, counted through the batch, for each head
        `(heads, pairs)`. All int64.
    """
    from scipy.optimize import linear_sum_assignment

    alpha, gamma, costs = config.focal_alpha, config.focal_gamma, [boxes.new_zeros(*logits.shape[::2], 0)]
    for index, truth in enumerate(truths):
        scores = logits[:, index].sigmoid()[..., truth.class_labels]  # (heads, proposals, objects)
        positive = -(scores + 1e-12).log() * alpha * (1 - scores) ** gamma
        negative = -(1 - scores + 1e-12).log() * (1 - alpha) * scores**gamma
        own = boxes[:, index, :, None]  # (heads, proposals, 1, 4)
        distances = ((own - truth.boxes) / scales[index]).abs().sum(dim=-1)
        overlaps = paired_overlaps(own, truth.boxes)[1]
        costs.append(
            config.class_cost * (positive - negative) + config.bbox_cost * distances - config.giou_cost * overlaps
        )
    # Predictions that are not finite match anything: their losses say so.
    cost = torch.cat(costs, dim=-1).nan_to_num().cpu()  # (heads, proposals, all objects)
    counts = [len(truth.class_labels) for truth in truths]
    pairs: list[list[tuple[int, int, int]]] = []  # of each head: image, proposal, object
    for head_cost in cost.numpy():
        pairs.append([])
        for index, count in enumerate(counts):
            start = sum(counts[:index])
            found = linear_sum_assignment(head_cost[:, start : start + count])
            pairs[-1] += [(index, row, start + column) for row, column in zip(*found, strict=True)]
    images, rows, objects = torch.tensor(pairs, dtype=torch.int64).reshape(len(pairs), -1, 3).unbind(dim=-1)
    return images[0].to(boxes.device), rows.to(boxes.device), objects.to(boxes.device)


def _build_layer(channels: int) -> list[nn.Module]:
    return [nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU()]


def _corner_scales(image_sizes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Width, height, width and height of each image, `(batch, 1, 4)`, in the dtype of another tensor."""
    return image_sizes.to(like).flip(1).repeat(1, 2)[:, None]


__all__ = ["SparseRCNNForObjectDetection", "SparseRCNNObjectDetectionOutput", "SparseRCNNPreTrainedModel"]
