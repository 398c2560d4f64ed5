"""Region proposal network (arXiv 1506.01497, section 3.1) on a feature pyramid, as mmdetection 2.13 has it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .boxes import (
    AnchorGrid,
    at_least_float32,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    flatten_to_anchors,
    has_area,
    match_boxes,
    move_together,
    pairwise_iou,
    sample_batch,
    suppress,
    take_rows,
)
from .layers import place_numbers
from .targets import GroundTruth, pad_image_sizes
from .winograd import Conv3x3


class RegionProposalNetwork(nn.Module):
    """For every anchor, whether it holds an object and where: one convolution and two predictors that all levels
    share.

    Args:
        config: Of the model.
        allowed_border: Anchors that reach out of the image by more pixels do not take part in training (default: any
            may).
        box_loss_beta: Below this difference the loss of a delta is quadratic (default: 0, nowhere).
        num_proposals_train: Proposals per image in training, at most (default: `config.num_proposals`).
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        allowed_border: float | None = None,
        box_loss_beta: float = 0.0,
        num_proposals_train: int | None = None,
    ):
        super().__init__()
        self.config = config
        self.allowed_border, self.box_loss_beta = allowed_border, box_loss_beta
        self.num_proposals_train = num_proposals_train
        self.anchor_grid = AnchorGrid(config.strides, config.anchor_scales, config.anchor_ratios)
        channels, num_anchors = config.neck_channels, self.anchor_grid.num_per_cell
        self.conv = Conv3x3(channels, channels)
        self.objectness_predictor = nn.Conv2d(channels, num_anchors, 1)
        self.box_predictor = nn.Conv2d(channels, num_anchors * 4, 1)

    def reset_parameters(self) -> None:
        """Normal weights of 0.01 and zero biases; loaded tensors are left as they are."""
        for conv in self.children():
            init.normal_(conv.weight, std=0.01)
            init.zeros_(conv.bias)

    def forward(self, levels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            levels: Maps `(batch, channels, height, width)`, finest first.

        Returns:
            Objectness logits `(batch, anchors)` and deltas `(batch, anchors, 4)`, at least in float32.
        """
        objectness, deltas = [], []
        for level in levels:
            hidden_states = F.relu(self.conv(level), inplace=True)
            objectness.append(flatten_to_anchors(self.objectness_predictor(hidden_states), 1)[..., 0])
            deltas.append(flatten_to_anchors(self.box_predictor(hidden_states), 4))
        return at_least_float32(torch.cat(objectness, dim=1)), at_least_float32(torch.cat(deltas, dim=1))

    def find_valid(
        self,
        level_shapes: Sequence[tuple[int, int]],
        anchors: torch.Tensor,
        image_sizes: Sequence[Sequence[int]],
        input_size: Sequence[int],
    ) -> list[torch.Tensor]:
        """Which anchors take part in training.

        Args:
            level_shapes: Height and width of each level in cells.
            anchors: xyxy in pixels, `(anchors, 4)`.
            image_sizes: Height and width in pixels of each image.
            input_size: Height and width in pixels of the batch.

        Returns:
            For each image bool `(anchors,)`.
        """
        padded = pad_image_sizes(image_sizes, input_size)
        valid = [self.anchor_grid.find_valid(level_shapes, size, anchors.device) for size in padded]
        if self.allowed_border is None:
            return valid
        starts = (anchors[:, :2] >= -self.allowed_border).all(dim=1)
        border, (dtype, device) = self.allowed_border, (anchors.dtype, anchors.device)
        ends = [
            (anchors[:, 2:] < place_numbers([width, height], dtype, device) + border).all(dim=1)
            for height, width in image_sizes
        ]
        return [flags & starts & end for flags, end in zip(valid, ends, strict=True)]

    def loss(
        self,
        objectness: torch.Tensor,
        deltas: torch.Tensor,
        anchors: torch.Tensor,
        valid: Sequence[torch.Tensor],
        truths: Sequence[GroundTruth],
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy of the sampled anchors and L1 loss (smooth with a `box_loss_beta`) of the positive ones'
        deltas, both over the number of samples.

        Args:
            objectness: Logits `(batch, anchors)`.
            deltas: `(batch, anchors, 4)`.
            anchors: xyxy in pixels, `(anchors, 4)`.
            valid: For each image, which anchors take part: bool `(anchors,)`.
            truths: The objects of each image.

        Returns:
            `loss_objectness` and `loss_rpn_box`, scalars.
        """
        config = self.config
        all_matches = [  # (anchors,) of each image
            match_boxes(
                pairwise_iou(truth.boxes, anchors),
                config.rpn_positive_iou_threshold,
                config.rpn_negative_iou_threshold,
                config.rpn_negative_iou_threshold,
                valid_anchors,
            )
            for valid_anchors, truth in zip(valid, truths, strict=True)
        ]
        max_positives = int(config.rpn_num_samples * config.rpn_positive_fraction)
        chosen = sample_batch(all_matches, config.rpn_num_samples, max_positives, shuffle=self.training)
        all_samples = move_together([torch.cat(pair) for pair in chosen], objectness.device)
        objectness_loss, box_loss, normalizer = objectness[:0].sum(), deltas[:0].sum(), 0
        for index, (matches, samples, truth) in enumerate(zip(all_matches, all_samples, truths, strict=True)):
            num_positives, num_negatives = map(len, chosen[index])
            targets = (matches[samples] >= 0).to(objectness.dtype)  # (samples,)
            objectness_loss = objectness_loss + F.binary_cross_entropy_with_logits(
                objectness[index, samples], targets, reduction="sum"
            )
            positives = samples[:num_positives]
            wanted = encode_boxes(anchors[positives], truth.boxes[matches[positives]])  # (positives, 4)
            box_loss = box_loss + F.smooth_l1_loss(
                deltas[index, positives], wanted, reduction="sum", beta=self.box_loss_beta
            )
            normalizer += max(num_positives, 1) + max(num_negatives, 1)
        normalizer = max(normalizer, 1)
        return {"loss_objectness": objectness_loss / normalizer, "loss_rpn_box": box_loss / normalizer}

    @torch.no_grad()
    def select_proposals(
        self,
        objectness: torch.Tensor,
        deltas: torch.Tensor,
        anchors: torch.Tensor,
        level_sizes: Sequence[int],
        image_sizes: torch.Tensor,
    ) -> torch.Tensor:
        """The best boxes of each image, after suppression within each level.

        Args:
            objectness: Logits `(batch, anchors)`.
            deltas: `(batch, anchors, 4)`.
            anchors: xyxy in pixels, `(anchors, 4)`.
            level_sizes: Number of anchors of each level.
            image_sizes: Height and width in pixels of each image, `(batch, 2)`.

        Returns:
            xyxy in pixels, `(batch, proposals, 4)`, best first. All of them have an area, but those of zeros
            where there are not so many.
        """
        config, count = self.config, self.config.num_proposals
        num_candidates = config.num_candidates_train if self.training else config.num_candidates
        if self.training and self.num_proposals_train is not None:
            count = self.num_proposals_train
        chosen, level_ids, start = [], [], 0
        for level, size in enumerate(level_sizes):
            logits = objectness[:, start : start + size]  # (batch, anchors of the level)
            best = logits.topk(torch.sym_min(num_candidates, size), dim=1).indices
            chosen.append(start + best)
            level_ids.append(best.new_full((best.shape[1],), level))
            start += size
        chosen, level_ids = torch.cat(chosen, dim=1), torch.cat(level_ids)  # (batch, candidates) and (candidates,)
        boxes = decode_boxes(anchors[chosen], take_rows(deltas, chosen))  # (batch, candidates, 4)
        boxes = clip_boxes(boxes, image_sizes[:, None])
        scores = take_rows(objectness, chosen).sigmoid()
        kept = suppress(boxes, scores, level_ids, has_area(boxes), config.proposal_nms_threshold, count)
        return take_rows(boxes, kept.clamp(min=0)).where(kept[..., None] >= 0, 0)


__all__ = ["RegionProposalNetwork"]
