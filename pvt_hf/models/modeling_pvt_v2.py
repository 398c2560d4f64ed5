"""PVT v2 (arXiv 2106.13797): overlapping patch embedding, convolutional MLP, linear spatial-reduction attention.

Module names are those of transformers' own `pvt_v2`, because they are the checkpoint format.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .chunk_gradients import recompute_hidden_states
from .chunks import chunk_rows, compute_in_chunks
from .configuration_pvt_v2 import PvtV2Config
from .conv_gradients import keep_layout
from .layers import (
    AdaptiveAvgPool2d,
    Dropout,
    DropPath,
    SpatialReductionAttention,
    cast_once,
    copy_less,
    drop_path_rates,
    make_traceable,
    map_to_tokens,
    to_channels_last,
    tokens_to_map,
)
from .modeling_common import (
    check_pixel_values,
    classification_loss,
    minimum_image_size,
    prepare_class_labels,
    resolve_output_flags,
    select_hidden_states,
    stage_features,
)
from .pretrained import PretrainedMixin
from .residuals import add_in_place


class PvtV2OverlapPatchEmbeddings(nn.Module):
    """Overlapping patches from a zero-padded convolution (section 3.3); positions come from the padding."""

    def __init__(self, config: PvtV2Config, stage: int):
        super().__init__()
        hidden_size = config.hidden_sizes[stage]
        self.proj = nn.Conv2d(
            config.hidden_sizes[stage - 1] if stage else config.num_channels,
            hidden_size,
            kernel_size=config.patch_sizes[stage],
            stride=config.strides[stage],
            padding=config.patch_sizes[stage] // 2,
        )
        self.layer_norm = nn.LayerNorm(hidden_size, eps=config.patch_layer_norm_eps)

    def forward(self, feature_map: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """(batch, channels, height, width) -> (batch, tokens, hidden_size) and the grid of the patches."""
        feature_map = self.proj(copy_less(to_channels_last(feature_map), self.proj))
        height, width = feature_map.shape[2:]
        return self.layer_norm(map_to_tokens(feature_map)), height, width


class PvtV2SelfAttention(SpatialReductionAttention):
    """Keys and values from a strided convolution, or from a 7 x 7 average pooling if linear (section 3.2)."""

    def __init__(self, config: PvtV2Config, hidden_size: int, num_attention_heads: int, ratio: int):
        super().__init__(config, hidden_size, num_attention_heads)
        self.linear = config.linear_attention
        self.ratio = ratio
        if self.linear:
            self.pool = AdaptiveAvgPool2d(7)
            self.spatial_reduction = nn.Conv2d(hidden_size, hidden_size, kernel_size=1)
            self.act = nn.GELU()
        elif ratio > 1:
            self.spatial_reduction = nn.Conv2d(hidden_size, hidden_size, kernel_size=ratio, stride=ratio)
        if self.linear or ratio > 1:
            self.layer_norm = nn.LayerNorm(hidden_size, eps=config.patch_layer_norm_eps)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.proj_drop = Dropout(config.hidden_dropout_prob)

    def reduce(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(batch, height * width, channels) -> (batch, reduced keys, channels)"""
        if self.linear:
            feature_map = self.spatial_reduction(self.pool(tokens_to_map(hidden_states, height, width)))
            return self.act(self.layer_norm(map_to_tokens(feature_map)))
        if self.ratio > 1:
            feature_map = copy_less(tokens_to_map(hidden_states, height, width), self.spatial_reduction)
            return self.layer_norm(map_to_tokens(self.spatial_reduction(feature_map)))
        return hidden_states

    def forward(
        self, hidden_states: torch.Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, tokens, channels) -> the same shape, and (batch, heads, queries, reduced keys) or None."""
        if not self.linear:  # or else the pooling would read what is cast
            hidden_states = cast_once(hidden_states)
        reduced_states = self.reduce(hidden_states, height, width)
        hidden_states, attention = self.attend(hidden_states, reduced_states, output_attentions)
        return self.proj_drop(self.proj(hidden_states)), attention


class PvtV2DepthWiseConv(nn.Module):
    """The 3 x 3 convolution of each channel, padded with zeros."""

    def __init__(self, channels: int):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)

    @keep_layout
    def forward(self, hidden_states: torch.Tensor, height: int, width: int, rows: slice | None = None) -> torch.Tensor:
        """(batch, height * width, channels) -> those rows of the map as tokens, by default all."""
        feature_map = self.dwconv(tokens_to_map(hidden_states, height, width))
        # (Rows of the map as such would have their gradient in PyTorch's default layout, and the convolution copy it.)
        tokens = feature_map.permute(0, 2, 3, 1)  # (batch, height, width, channels)
        return (tokens if rows is None else tokens[:, rows]).flatten(1, 2)


class PvtV2ConvFeedForwardNetwork(nn.Module):
    """The MLP with a zero-padded 3 x 3 depth-wise convolution before its activation (section 3.4).

    Its hidden states are up to 8 times as wide as the block: most of a dense model's memory, and on a CPU most of its
    time, which goes into page faults. How these are avoided: see [`~pvt_hf.models.chunks.chunk_rows`].
    """

    # Of one image, by type of device: the first stage at 224 x 224. Devices that are not named store maps of any size.
    max_stored_tokens = {"cpu": 56 * 56}
    stored_bytes = 16 * 2**20
    chunk_bytes = 4 * 2**20

    def __init__(self, config: PvtV2Config, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.intermediate_size = intermediate_size
        self.dense1 = nn.Linear(hidden_size, intermediate_size)
        self.relu = nn.ReLU() if config.linear_attention else nn.Identity()
        self.dwconv = PvtV2DepthWiseConv(intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]
        self.dense2 = nn.Linear(intermediate_size, hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)

    @recompute_hidden_states
    @chunk_rows
    def forward(self, hidden_states: torch.Tensor, height: int, width: int, rows: slice | None = None) -> torch.Tensor:
        """(batch, height * width, channels) -> the same of those rows, by default of all."""
        hidden_states = self.relu(self.dense1(hidden_states))
        hidden_states = self.dwconv(hidden_states, height, width, rows)
        hidden_states = self.dropout(self.intermediate_act_fn(hidden_states))
        return self.dropout(self.dense2(hidden_states))


class PvtV2BlockLayer(GradientCheckpointingLayer):
    """One block: pre-norm attention and pre-norm convolutional MLP, each a residual branch."""

    def __init__(self, config: PvtV2Config, stage: int, drop_path_rate: float):
        super().__init__()
        hidden_size = config.hidden_sizes[stage]
        self.layer_norm_1 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = PvtV2SelfAttention(
            config, hidden_size, config.num_attention_heads[stage], config.sr_ratios[stage]
        )
        self.drop_path = DropPath(drop_path_rate)
        self.layer_norm_2 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = PvtV2ConvFeedForwardNetwork(config, hidden_size, int(hidden_size * config.mlp_ratios[stage]))

    @add_in_place("attention", "attention.proj")
    def forward(
        self, hidden_states: torch.Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, tokens, channels) -> the same shape, and (batch, heads, queries, reduced keys) or None."""
        attended, attention = self.attention(self.layer_norm_1(hidden_states), height, width, output_attentions)
        return self.add_branches(hidden_states, attended, height, width), attention

    @compute_in_chunks
    def add_branches(
        self, hidden_states: torch.Tensor, attended: torch.Tensor, height: int, width: int
    ) -> torch.Tensor:
        """The block's input and what its attention gives, both (batch, tokens, channels) -> its result."""
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.layer_norm_2(hidden_states), height, width))


class PvtV2EncoderLayer(nn.Module):
    """One stage: patch embedding, blocks, and the norm whose result is the stage's map and the next stage's input."""

    def __init__(self, config: PvtV2Config, stage: int, rates: list[float]):
        super().__init__()
        self.patch_embedding = PvtV2OverlapPatchEmbeddings(config, stage)
        self.blocks = nn.ModuleList(PvtV2BlockLayer(config, stage, rate) for rate in rates)
        self.layer_norm = nn.LayerNorm(config.hidden_sizes[stage], eps=config.layer_norm_eps)

    def forward(self, feature_map: torch.Tensor, output_attentions: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(batch, channels, height, width) -> the same at this stage's stride, and the attentions of its blocks."""
        hidden_states, height, width = self.patch_embedding(feature_map)
        attentions = []
        for block in self.blocks:
            hidden_states, attention = block(hidden_states, height, width, output_attentions)
            if output_attentions:
                attentions.append(attention)
        return tokens_to_map(self.layer_norm(hidden_states), height, width), attentions


class PvtV2Encoder(nn.Module):
    """The first `num_stages` stages. Returns their maps and, flat, the attentions of all blocks."""

    def __init__(self, config: PvtV2Config, num_stages: int):
        super().__init__()
        self.config = config
        ratios = [1] * num_stages if config.linear_attention else config.sr_ratios[:num_stages]
        self.minimum_size = minimum_image_size(config.strides, config.strides, ratios)  # padding makes up for more
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.layers = nn.ModuleList(PvtV2EncoderLayer(config, stage, rates[stage]) for stage in range(num_stages))

    def forward(
        self, pixel_values: torch.Tensor, output_attentions: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(batch, num_channels, height, width) -> what the class says."""
        check_pixel_values(pixel_values, self.config.num_channels, self.minimum_size)
        feature_maps: list[torch.Tensor] = []
        all_attentions: list[torch.Tensor] = []
        for stage in self.layers:
            feature_map = feature_maps[-1] if feature_maps else pixel_values
            feature_map, attentions = stage(feature_map, output_attentions)
            feature_maps.append(feature_map)
            all_attentions += attentions
        return feature_maps, all_attentions


class PvtV2PreTrainedModel(PretrainedMixin, PreTrainedModel):
    """The base of every PVT v2 model: its configuration and its weight initialisation."""

    config: PvtV2Config
    config_class = PvtV2Config
    base_model_prefix = "pvt_v2"
    _no_split_modules = ["PvtV2OverlapPatchEmbeddings", "PvtV2BlockLayer"]
    _can_compile_fullgraph = True
    _may_be_missing = _may_change_shape = ("classifier.",)
    _must_have_a_place = "encoder."

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the released code: truncated normal for linear layers, fan-out normal for convolutions."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))


class PvtV2Model(PvtV2PreTrainedModel):
    """The encoder, the base of [`PvtV2ForImageClassification`]."""

    def __init__(self, config: PvtV2Config):
        super().__init__(config)
        self.encoder = PvtV2Encoder(config, num_stages=config.num_encoder_blocks)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.layers[0].patch_embedding.proj

    @make_traceable
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`):
                Normalised images of any height and width of at least 32.
            output_attentions (`bool`, *optional*):
                Return one `(batch, heads, queries, reduced keys)` tensor per block.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*):
                Return one `(batch, channels, height, width)` map per stage. An index or a list of indices returns only
                those.
            **kwargs:
                Ignored, as elsewhere in transformers.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` of shape `(batch, channels, height / 32, width / 32)`,
            rounded up, normed, and `pooler_output` of shape `(batch, channels)`, its mean.

        Raises:
            TypeError: If `pixel_values` is not a floating-point tensor.
            ValueError: If it has another number of dimensions or channels, or is smaller than 32 pixels.
        """
        output_attentions, output_hidden_states = resolve_output_flags(self, output_attentions, output_hidden_states)
        feature_maps, attentions = self.encoder(pixel_values, output_attentions)
        return BaseModelOutputWithPooling(
            last_hidden_state=feature_maps[-1],
            pooler_output=feature_maps[-1].mean(dim=(2, 3)),
            hidden_states=select_hidden_states(feature_maps, output_hidden_states),
            attentions=tuple(attentions) if output_attentions else None,
        )


class PvtV2ForImageClassification(PvtV2PreTrainedModel):
    """PVT v2 with a linear classifier on the mean of the last stage's tokens."""

    def __init__(self, config: PvtV2Config):
        super().__init__(config)
        self.num_labels = config.num_labels  # as at the start: what holds is in the configuration
        self.pvt_v2 = PvtV2Model(config)
        self.classifier = (
            nn.Linear(config.hidden_sizes[-1], config.num_labels) if config.num_labels > 0 else nn.Identity()
        )
        self.post_init()

    @make_traceable
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`):
                Normalised images of any height and width of at least 32.
            labels (`torch.Tensor`, *optional*):
                Class indices of shape `(batch,)` in `[0, config.num_labels)`, of any integer type, or -100 to ignore
                (cross-entropy); floats of
                shape `(batch, num_labels)` (multi-label, binary cross-entropy); or, for `num_labels=1` or
                `problem_type="regression"`, floats (mean-square error).
            output_attentions (`bool`, *optional*):
                As in [`PvtV2Model`].
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*):
                As in [`PvtV2Model`].
            **kwargs:
                For the loss, as `num_items_in_batch`; others are ignored.

        Returns:
            `ImageClassifierOutput`: `logits` of shape `(batch, num_labels)`, and `loss` where `labels` are given.

        Raises:
            TypeError: As in [`PvtV2Model`], and for `labels` that are no tensor.
            ValueError: As in [`PvtV2Model`], and for `labels` of another shape or dtype, or class indices out of range.
        """
        labels = prepare_class_labels(labels, pixel_values, self.config)
        outputs = self.pvt_v2(
            pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output)
        return ImageClassifierOutput(
            loss=classification_loss(self, logits, labels, **kwargs),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class PvtV2Backbone(BackboneMixin, PvtV2PreTrainedModel):
    """PVT v2 as detectors and segmenters use it: the normed map of each requested stage.

    It holds just the stages up to the last of `config.out_features`, and loads them from a classification checkpoint.
    """

    def __init__(self, config: PvtV2Config):
        super().__init__(config)
        self.num_features = list(config.hidden_sizes)
        num_stages = 1 + max(index % config.num_encoder_blocks for index in config.out_indices)
        self.encoder = PvtV2Encoder(config, num_stages=num_stages)
        # What a classification checkpoint has beside the stages of this backbone.
        self._keys_to_ignore_on_load_unexpected = [r"^classifier\."]
        self._keys_to_ignore_on_load_unexpected += [
            rf"encoder\.layers\.{stage}\." for stage in range(num_stages, config.num_encoder_blocks)
        ]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.layers[0].patch_embedding.proj

    @make_traceable
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`):
                Normalised images of any height and width of at least 32.
            output_attentions (`bool`, *optional*):
                As in [`PvtV2Model`].
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*):
                As in [`PvtV2Model`].
            **kwargs:
                Ignored, as elsewhere in transformers.

        Returns:
            `BackboneOutput`: `feature_maps`, for each of `config.out_features` one
            `(batch, channels, height / stride, width / stride)` with strides 4, 8, 16, 32, rounded up.

        Raises:
            TypeError: As in [`PvtV2Model`].
            ValueError: As in [`PvtV2Model`].
        """
        output_attentions, output_hidden_states = resolve_output_flags(self, output_attentions, output_hidden_states)
        stages, attentions = self.encoder(pixel_values, output_attentions)
        return BackboneOutput(
            feature_maps=stage_features(self, stages),
            hidden_states=select_hidden_states(stages, output_hidden_states),
            attentions=tuple(attentions) if output_attentions else None,
        )


__all__ = ["PvtV2Backbone", "PvtV2ForImageClassification", "PvtV2Model", "PvtV2PreTrainedModel"]
