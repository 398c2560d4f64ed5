"""Cascade Mask R-CNN (arXiv 1906.09756) on any backbone, as PVT v2's paper uses it (mmdetection 2.13)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .boxes import at_least_float32, clip_boxes, decode_boxes, has_area, paired_overlaps
from .configuration_cascade_mask_rcnn import CascadeMaskRCNNConfig
from .modeling_mask_rcnn import MaskRCNNInstanceSegmentationOutput
from .rois import SampledRoIs, flatten_rois, list_targets, pool_rois, sample_rois, to_rois
from .rpn import RegionProposalNetwork
from .targets import GroundTruth
from .two_stage import BOX_SIZE, MASK_SIZE, MaskHead, TwoStageDetector
from .winograd import Conv3x3


@dataclass
class CascadeMaskRCNNInstanceSegmentationOutput(MaskRCNNInstanceSegmentationOutput):
    r"""
    Outputs of [`CascadeMaskRCNNForInstanceSegmentation`]: those of [`MaskRCNNInstanceSegmentationOutput`], with
    `loss_class_0`, `loss_box_0` and `loss_mask_0` of the first stage in `loss_dict`, and so on. Scores are those of
    the stages' mean logits, masks of their mean probabilities.
    """


class CascadeBoxBlock(nn.Module):
    """3 x 3 convolution, batch normalisation over all RoIs, ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)  # not `norm`: it is decayed, as that of the released code is

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(features)), inplace=True)


class CascadeBoxHead(nn.Module):
    """The box head of a stage: convolutions and a linear layer, then class logits with the background last and box
    deltas of every class."""

    def __init__(self, config: CascadeMaskRCNNConfig, box_stds: Sequence[float]):
        super().__init__()
        self.config, self.box_stds = config, tuple(box_stds)
        self.convs = nn.ModuleList(CascadeBoxBlock(config.neck_channels) for _ in range(config.num_box_convs))
        self.fc = nn.Linear(config.neck_channels * BOX_SIZE**2, config.box_head_size)
        self.class_predictor = nn.Linear(config.box_head_size, config.num_labels + 1)
        self.box_predictor = nn.Linear(config.box_head_size, config.num_labels * 4)

    def reset_parameters(self) -> None:
        """Kaiming-normal convolutions by fan-out, Xavier-normal linear layers, zero biases; loaded tensors are left as
        they are."""
        for block in self.convs:
            init.kaiming_normal_(block.conv.weight, mode="fan_out", nonlinearity="relu")
            init.ones_(block.bn.weight)
            init.zeros_(block.bn.bias)
        for linear in (self.fc, self.class_predictor, self.box_predictor):
            init.xavier_normal_(linear.weight)
            init.zeros_(linear.bias)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            features: `(RoIs, channels, 7, 7)`.

        Returns:
            Logits `(RoIs, num_labels + 1)` and deltas `(RoIs, num_labels, 4)`, at least in float32.
        """
        for block in self.convs:
            features = block(features)
        hidden_states = F.relu(self.fc(features.flatten(1)))
        deltas = self.box_predictor(hidden_states).unflatten(1, (-1, 4))
        return at_least_float32(self.class_predictor(hidden_states)), at_least_float32(deltas)

    def loss(
        self,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        samples: Sequence[SampledRoIs],
        truths: Sequence[GroundTruth],
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy of all RoIs, and GIoU loss of the positive ones' boxes of their class, both over the number of
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
        decoded = decode_boxes(boxes, deltas[rows, labels[rows]], self.box_stds)
        box_loss = self.config.box_loss_coefficient * (1 - paired_overlaps(decoded, objects)[1]).sum()
        return {"loss_class": class_loss / normalizer, "loss_box": box_loss / normalizer}

    @torch.no_grad()
    def refine(
        self,
        boxes: torch.Tensor,
        deltas: torch.Tensor,
        classes: torch.Tensor,
        image_sizes: torch.Tensor,
    ) -> torch.Tensor:
        """The boxes for the next stage.

        Args:
            boxes: xyxy in pixels, `(..., 4)`.
            deltas: `(..., num_labels, 4)`.
            classes: Whose deltas count, int64 `(...)`.
            image_sizes: Height and width in pixels, `(..., 2)`; the leading dimensions broadcast.

        Returns:
            xyxy in pixels, clipped to the images, `(..., 4)`.
        """
        own = deltas.gather(-2, classes[..., None, None].expand(*classes.shape, 1, 4))[..., 0, :]  # (..., 4)
        return clip_boxes(decode_boxes(boxes, own, self.box_stds), image_sizes)


class CascadeMaskHead(MaskHead):
    """The mask head of a stage: that of Mask R-CNN, but for its initialisation."""

    def reset_parameters(self) -> None:
        """Kaiming-normal convolutions by fan-out with zero biases; upsampling and predictor as PyTorch has them. Loaded
        tensors are left as they are."""
        for conv in self.convs:
            init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            init.zeros_(conv.bias)
        for conv in (self.upsample, self.predictor):
            init.kaiming_uniform_(conv.weight, a=math.sqrt(5))
            bound = conv.weight[0].numel() ** -0.5
            init.uniform_(conv.bias, -bound, bound)


class CascadeMaskRCNNPreTrainedModel(TwoStageDetector):
    """The base of Cascade Mask R-CNN: its configuration, and what depends on the number of classes."""

    config: CascadeMaskRCNNConfig
    config_class = CascadeMaskRCNNConfig
    output_class = CascadeMaskRCNNInstanceSegmentationOutput
    box_head_class = CascadeBoxHead
    _may_change_shape = ("box_heads.class_predictor.", "box_heads.box_predictor.", "mask_heads.predictor.")


class CascadeMaskRCNNForInstanceSegmentation(CascadeMaskRCNNPreTrainedModel):
    """
    Backbone, feature pyramid, region proposal network, and three stages, each with a box head, whose boxes are the
    proposals of the next, and a mask head. With `config.use_masks=False` there are no mask heads: Cascade R-CNN.

    In distributed training the released code normalises over the RoIs of all processes:
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)` does that and leaves the names of the tensors as they are.
    """

    def __init__(self, config: CascadeMaskRCNNConfig):
        super().__init__(config)
        self.rpn = RegionProposalNetwork(
            config, config.rpn_allowed_border, config.rpn_box_loss_beta, config.num_proposals_train
        )
        self.box_heads = nn.ModuleList(CascadeBoxHead(config, stds) for stds in config.box_stds)
        self.mask_heads = nn.ModuleList(CascadeMaskHead(config) for _ in config.box_stds if config.use_masks)
        self.post_init()

    def compute_roi_losses(
        self,
        levels: Sequence[torch.Tensor],
        proposals: torch.Tensor,
        truths: Sequence[GroundTruth],
        image_sizes: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        config = self.config
        losses: dict[str, torch.Tensor] = {}
        boxes = list(proposals)
        valid: list[torch.Tensor] | None = list(has_area(proposals))
        for stage, weight in enumerate(config.stage_loss_weights):
            threshold = config.roi_iou_thresholds[stage]
            # No object takes proposals that are below the threshold.
            samples = sample_rois(boxes, truths, config, threshold, math.inf, self.training, valid)
            logits, deltas = self.box_heads[stage](self._pool(levels, [rois.boxes for rois in samples], BOX_SIZE))
            stage_losses = self.box_heads[stage].loss(logits, deltas, samples, truths)
            if self.mask_heads:
                features = self._pool(levels, [rois.positive_boxes for rois in samples], MASK_SIZE)
                stage_losses |= self.mask_heads[stage].loss(self.mask_heads[stage](features), samples, truths)
            losses |= {f"{name}_{stage}": value * weight for name, value in stage_losses.items()}
            boxes, valid = self._refine_samples(stage, logits, deltas, samples, truths, image_sizes), None
        return losses

    def _pool(self, levels: Sequence[torch.Tensor], boxes: Sequence[torch.Tensor], size: int) -> torch.Tensor:
        """Features `(all boxes, channels, size, size)` of the boxes of each image, `(boxes, 4)`."""
        nothing = at_least_float32(levels[0]).new_zeros(0, 4)  # all that an empty batch has
        return pool_rois(levels, to_rois([*boxes, nothing]), self.config.strides[: len(levels)], size)

    def _refine_samples(
        self,
        stage: int,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        samples: Sequence[SampledRoIs],
        truths: Sequence[GroundTruth],
        image_sizes: torch.Tensor,
    ) -> list[torch.Tensor]:
        """The proposals `(boxes, 4)` of each image for the next stage: those of this stage's RoIs that are not the
        objects themselves, by the deltas of the object's class or else of the likeliest."""
        refined, counts = [], [len(rois.boxes) for rois in samples]
        for rois, truth, size, own_logits, own_deltas in zip(
            samples, truths, image_sizes, logits.split(counts), deltas.split(counts), strict=True
        ):
            classes = own_logits[:, :-1].argmax(dim=1)  # (RoIs,)
            classes[: len(rois.objects)] = truth.class_labels[rois.objects]
            refined.append(self.box_heads[stage].refine(rois.boxes, own_deltas, classes, size)[rois.num_truths :])
        return refined

    def predict_boxes(
        self, levels: Sequence[torch.Tensor], proposals: torch.Tensor, image_sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        strides, all_logits, boxes, shape = self.config.strides[: len(levels)], [], proposals, proposals.shape[:2]
        for stage, head in enumerate(self.box_heads):
            logits, deltas = head(pool_rois(levels, flatten_rois(boxes), strides, BOX_SIZE))
            logits, deltas = logits.reshape(*shape, *logits.shape[1:]), deltas.reshape(*shape, *deltas.shape[1:])
            all_logits.append(logits)
            if stage + 1 < len(self.box_heads):
                boxes = head.refine(boxes, deltas, logits[..., :-1].argmax(dim=-1), image_sizes[:, None])
        decoded = decode_boxes(boxes[:, :, None], deltas, head.box_stds)  # (batch, proposals, num_labels, 4)
        return torch.stack(all_logits).mean(dim=0), decoded

    def list_mask_heads(self) -> list[nn.Module]:
        return list(self.mask_heads)


__all__ = [
    "CascadeMaskRCNNForInstanceSegmentation",
    "CascadeMaskRCNNInstanceSegmentationOutput",
    "CascadeMaskRCNNPreTrainedModel",
]
