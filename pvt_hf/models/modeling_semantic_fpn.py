"""Semantic FPN (arXiv 1901.02446, section 3.2) as PVT's released segmentation code builds and trains it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .backbone import build_backbone
from .configuration_semantic_fpn import SemanticFPNConfig
from .fpn import FeaturePyramid
from .layers import runs_transformed
from .modeling_common import check_label_values, check_pixel_values
from .pretrained import PretrainedMixin
from .winograd import Conv3x3

_LOSS_IGNORE_INDEX = -100  # what torch, and Trainer where it counts labels, take for "no label"


def resize(feature_map: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(batch, channels, any height and width) -> (batch, channels, *size), as every bilinear step of the head."""
    return F.interpolate(feature_map, size=tuple(size), mode="bilinear", align_corners=False)


class SemanticFPNBlock(nn.Module):
    """A 3 x 3 convolution, batch norm and ReLU: (batch, channels, height, width) at the same height and width."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = Conv3x3(in_channels, out_channels, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(feature_map)), inplace=True)


class SemanticFPNHead(nn.Module):
    """Brings every level of the pyramid to stride 4 in steps of two, adds them up, and classifies each position."""

    def __init__(self, config: SemanticFPNConfig):
        super().__init__()
        channels = config.head_channels
        self.scale_heads = nn.ModuleList(
            nn.ModuleList(
                SemanticFPNBlock(channels if index else config.neck_channels, channels)
                for index in range(max(1, level))
            )
            for level in range(len(config.backbone_out_features))
        )
        self.dropout = nn.Dropout2d(config.classifier_dropout)
        self.classifier = nn.Conv2d(channels, config.num_labels, 1)

    def reset_parameters(self) -> None:
        """As mmsegmentation: Kaiming normal (fan-out), and N(0, 0.01) for the classifier."""
        for blocks in self.scale_heads:
            for block in blocks:
                init.kaiming_normal_(block.conv.weight, mode="fan_out", nonlinearity="relu")
        init.normal_(self.classifier.weight, std=0.01)
        init.zeros_(self.classifier.bias)

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Levels (batch, neck_channels, height_i, width_i) -> (batch, num_labels, height_0, width_0)"""
        total = self.scale_heads[0][0](levels[0])
        for blocks, feature_map in zip(self.scale_heads[1:], levels[1:], strict=True):
            for block in blocks:
                feature_map = F.interpolate(block(feature_map), scale_factor=2, mode="bilinear", align_corners=False)
            if runs_transformed() or feature_map.shape != total.shape:
                # Twice a height that was rounded up is one too many.
                feature_map = resize(feature_map, total.shape[2:])
            total = feature_map.add_(total)
        return self.classifier(self.dropout(total))


def check_semantic_labels(labels: torch.Tensor, pixel_values: torch.Tensor, config: SemanticFPNConfig) -> None:
    """Raises a `TypeError` or a `ValueError` that says what is wrong with `labels`."""
    if runs_transformed():
        return
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise TypeError(f"`labels` must be a tensor of class indices, got {got}.")
    batch_size, _, height, width = pixel_values.shape
    if labels.shape != (batch_size, height, width):
        raise ValueError(
            f"`labels` must have the images' batch, height and width {(batch_size, height, width)}, got "
            f"{tuple(labels.shape)}."
        )
    if config.num_labels < 2:
        raise ValueError(f"`labels` need at least two classes (`config.num_labels`), got {config.num_labels}.")
    ignored = (labels == config.semantic_loss_ignore_index) | (labels == _LOSS_IGNORE_INDEX)
    wrong = ~ignored & ((labels < 0) | (labels >= config.num_labels))
    wanted = f"class indices in [0, {config.num_labels}) (`config.num_labels`) or {config.semantic_loss_ignore_index}"
    check_label_values(labels, wrong, f"{wanted} (`config.semantic_loss_ignore_index`)")


def semantic_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = 255,
    normalization: str = "valid",
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy of logits that are resized to the labels.

    `num_items_in_batch` is `Trainer`'s count over the accumulated batch, on all processes, of labels other than -100.
    Each part weighs as much as its share of that count, so that the parts of an accumulated batch add up to the loss of
    the batch: exactly with `"all"` where ignored pixels have the `ignore_index`, and with `"valid"` where they
    are -100. (With the `ignore_index` and `"valid"`, the mean over a part's valid pixels has the weight of all of its
    pixels: the same where the parts have equal shares of valid pixels.)

    Args:
        logits: (batch, num_labels, height, width) at any stride.
        labels: (batch, label height, label width), class indices, or `ignore_index` or -100 for ignored pixels.
        ignore_index: Label of pixels that count for nothing (default: 255).
        normalization: What the sum over pixels is divided by, `"valid"` (the default) or `"all"` pixels.
        num_items_in_batch: Labels other than -100 in the complete accumulated batch; by default this is all of it.

    Returns:
        A scalar in float32 or float64; 0 if all pixels are ignored.
    """
    targets = labels.long()
    targets = targets.masked_fill(targets == ignore_index, _LOSS_IGNORE_INDEX)
    logits = resize(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.shape[1:])
    # (batch, num_labels, label height, label width) and (batch, label height, label width)
    total = F.cross_entropy(logits, targets, ignore_index=_LOSS_IGNORE_INDEX, reduction="sum")
    count = max(labels.numel(), 1) if normalization == "all" else (targets != _LOSS_IGNORE_INDEX).sum().clamp(min=1)
    loss = total / count
    if num_items_in_batch is not None:
        num_items_in_batch = torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)
        loss = loss * ((labels != _LOSS_IGNORE_INDEX).sum() / num_items_in_batch)
    return loss


class SemanticFPNPreTrainedModel(PretrainedMixin, PreTrainedModel):
    """The base of Semantic FPN: its configuration, its weight initialisation, and complete loading."""

    config: SemanticFPNConfig
    config_class = SemanticFPNConfig
    base_model_prefix = "semantic_fpn"
    _no_split_modules = ["SemanticFPNHead"]
    _may_change_shape = ("head.classifier.",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FeaturePyramid | SemanticFPNHead):
            module.reset_parameters()


class SemanticFPNForSemanticSegmentation(SemanticFPNPreTrainedModel):
    """
    A backbone, a feature pyramid and the head of Semantic FPN.

    In distributed training the released code normalises over all processes:
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)` does that and leaves the names of the tensors as they are.
    """

    def __init__(self, config: SemanticFPNConfig):
        super().__init__(config)
        self.backbone = build_backbone(config)
        self.neck = FeaturePyramid(self.backbone.channels, config.neck_channels)
        self.head = SemanticFPNHead(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SemanticSegmenterOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`):
                Normalised images. Sides that are multiples of 32 have no remainder at any stride; others work too.
            labels (`torch.Tensor` of shape `(batch, height, width)`, *optional*):
                The class index of every pixel, in `[0, num_labels)`, or `config.semantic_loss_ignore_index`, or -100.
            output_attentions (`bool`, *optional*):
                As in the backbone.
            output_hidden_states (`bool`, *optional*):
                As in the backbone.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                For gradient accumulation, see [`semantic_loss`].

        Returns:
            `SemanticSegmenterOutput`: `logits` of shape `(batch, num_labels, height / 4, width / 4)`, and `loss` where
            `labels` are given. The image processor's `post_process_semantic_segmentation` makes maps of them.

        Raises:
            TypeError: If `pixel_values` is no tensor of floats, or `labels` are not integers.
            ValueError: If `labels` have another size than the images, or values that are no class; the message lists
                them. And what the backbone raises about `pixel_values`.
        """
        check_pixel_values(pixel_values, self.backbone.config.num_channels, 1)
        if labels is not None:
            check_semantic_labels(labels, pixel_values, self.config)
        outputs = self.backbone.forward_with_filtered_kwargs(
            pixel_values,
            output_attentions=self.config.output_attentions if output_attentions is None else output_attentions,
            output_hidden_states=(
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            return_dict=True,
        )
        logits = self.head(self.neck(outputs.feature_maps))
        loss = None
        if labels is not None:
            loss = semantic_loss(
                logits,
                labels,
                self.config.semantic_loss_ignore_index,
                self.config.loss_normalization,
                kwargs.get("num_items_in_batch"),
            )
        return SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["SemanticFPNForSemanticSegmentation", "SemanticFPNPreTrainedModel"]
