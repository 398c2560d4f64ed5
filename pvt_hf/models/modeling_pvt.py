"""PVT v1, the Pyramid Vision Transformer (arXiv 2102.12122).

Module names are those of transformers' own `pvt`, because they are the checkpoint format.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .chunk_gradients import recompute_hidden_states
from .chunks import chunk_tokens, compute_in_chunks
from .configuration_pvt import PvtConfig
from .layers import (
    Dropout,
    DropPath,
    SpatialReductionAttention,
    cast_once,
    copy_less,
    drop_path_rates,
    is_traced,
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


class PvtPatchEmbeddings(nn.Module):
    """Non-overlapping patches, a norm and learned position embeddings (section 3.2).

    The last stage of every checkpoint stores one more position embedding, in front, for the CLS token; a dense model
    has no CLS token and leaves that row alone.
    """

    def __init__(self, config: PvtConfig, stage: int, cls_token: bool):
        super().__init__()
        hidden_size = config.hidden_sizes[stage]
        # Patches (height, width) for which position embeddings are stored.
        self.grid: tuple[int, ...] = config.image_shape
        for kernel, stride in zip(config.patch_sizes[: stage + 1], config.strides[: stage + 1], strict=True):
            self.grid = tuple((side - kernel) // stride + 1 for side in self.grid)
        self.num_cls_positions = int(stage == config.num_encoder_blocks - 1)
        self.position_embeddings = nn.Parameter(
            torch.zeros(1, self.num_cls_positions + math.prod(self.grid), hidden_size)
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size)) if cls_token else None
        self.projection = nn.Conv2d(
            config.hidden_sizes[stage - 1] if stage else config.num_channels,
            hidden_size,
            kernel_size=config.patch_sizes[stage],
            stride=config.strides[stage],
        )
        self.layer_norm = nn.LayerNorm(hidden_size, eps=config.patch_layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def interpolate_position_embeddings(self, height: int, width: int) -> torch.Tensor:
        """(1, height * width, channels): the stored embeddings of the patches, bilinear wherever the grid differs."""
        position_embeddings = self.position_embeddings[:, self.num_cls_positions :]
        # An exported program has to work for every size, and a compiled one for those that its compiler leaves open:
        # they always interpolate, which at the stored grid changes nothing.
        if (
            not is_traced(height)
            and statically_known_true(height == self.grid[0])
            and statically_known_true(width == self.grid[1])
        ):
            return position_embeddings
        grid_map = tokens_to_map(position_embeddings, *self.grid)  # (1, channels, stored height, stored width)
        grid_map = nn.functional.interpolate(grid_map, size=(height, width), mode="bilinear", align_corners=False)
        return map_to_tokens(grid_map)

    def forward(self, feature_map: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """(batch, channels, height, width) -> (batch, tokens, hidden_size) and the grid of the patches."""
        feature_map = self.projection(copy_less(to_channels_last(feature_map), self.projection))
        height, width = feature_map.shape[2:]
        tokens = self.layer_norm(map_to_tokens(feature_map))
        tokens = tokens + self.interpolate_position_embeddings(height, width)
        if self.cls_token is not None:
            cls_token = self.cls_token + self.position_embeddings[:, :1]
            tokens = torch.cat((cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        return self.dropout(tokens), height, width


class PvtEfficientSelfAttention(SpatialReductionAttention):
    """Keys and values from a convolution that reduces the map by `ratio` per side (section 3.3)."""

    def __init__(self, config: PvtConfig, hidden_size: int, num_attention_heads: int, ratio: int):
        super().__init__(config, hidden_size, num_attention_heads)
        self.ratio = ratio
        if ratio > 1:
            self.sequence_reduction = nn.Conv2d(hidden_size, hidden_size, kernel_size=ratio, stride=ratio)
            self.layer_norm = nn.LayerNorm(hidden_size, eps=config.patch_layer_norm_eps)

    def reduce(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(batch, height * width, channels) -> (batch, reduced keys, channels)"""
        if self.ratio > 1:
            feature_map = copy_less(tokens_to_map(hidden_states, height, width), self.sequence_reduction)
            return self.layer_norm(map_to_tokens(self.sequence_reduction(feature_map)))
        return hidden_states

    def forward(
        self, hidden_states: torch.Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, tokens, channels) -> the same shape, and (batch, heads, queries, reduced keys) or None."""
        hidden_states = cast_once(hidden_states)
        reduced_states = self.reduce(hidden_states, height, width)
        return self.attend(hidden_states, reduced_states, output_attentions)


class PvtSelfOutput(nn.Module):
    """The output projection of the attention."""

    def __init__(self, config: PvtConfig, hidden_size: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.dense(hidden_states))


class PvtAttention(nn.Module):
    """Spatial-reduction attention and its output projection."""

    def __init__(self, config: PvtConfig, hidden_size: int, num_attention_heads: int, ratio: int):
        super().__init__()
        self.self = PvtEfficientSelfAttention(config, hidden_size, num_attention_heads, ratio)
        self.output = PvtSelfOutput(config, hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden_states, attention = self.self(hidden_states, height, width, output_attentions)
        return self.output(hidden_states), attention


class PvtFFN(nn.Module):
    """The MLP."""

    stored_bytes = 16 * 2**20
    chunk_bytes = 4 * 2**20

    def __init__(self, config: PvtConfig, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.intermediate_size = intermediate_size
        self.dense1 = nn.Linear(hidden_size, intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]
        self.dense2 = nn.Linear(intermediate_size, hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)

    @recompute_hidden_states
    @chunk_tokens
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dropout(self.intermediate_act_fn(self.dense1(hidden_states)))
        return self.dropout(self.dense2(hidden_states))


class PvtLayer(GradientCheckpointingLayer):
    """One block: pre-norm attention and pre-norm MLP, each a residual branch."""

    def __init__(self, config: PvtConfig, stage: int, drop_path_rate: float):
        super().__init__()
        hidden_size = config.hidden_sizes[stage]
        self.layer_norm_1 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = PvtAttention(
            config, hidden_size, config.num_attention_heads[stage], config.sequence_reduction_ratios[stage]
        )
        self.drop_path = DropPath(drop_path_rate)
        self.layer_norm_2 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = PvtFFN(config, hidden_size, int(hidden_size * config.mlp_ratios[stage]))

    @add_in_place("attention.self", "attention.output.dense")
    def forward(
        self, hidden_states: torch.Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, tokens, channels) -> the same shape, and (batch, heads, queries, reduced keys) or None."""
        attended, attention = self.attention(self.layer_norm_1(hidden_states), height, width, output_attentions)
        return self.add_branches(hidden_states, attended), attention

    @compute_in_chunks
    def add_branches(self, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The block's input and what its attention gives, both (batch, tokens, channels) -> its result."""
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.layer_norm_2(hidden_states)))


class PvtEncoder(nn.Module):
    """The first `num_stages` stages; with `cls_token`, the CLS token in the last one and the norm after it.

    Returns, in order: per stage the tokens and their grid, the hidden states after each block, the attentions.
    """

    def __init__(self, config: PvtConfig, num_stages: int, cls_token: bool):
        super().__init__()
        self.config = config
        ratios = config.sequence_reduction_ratios[:num_stages]
        self.minimum_size = minimum_image_size(config.patch_sizes, config.strides, ratios)
        if min(config.image_shape) < self.minimum_size:
            raise ValueError(f"`image_size` must be at least {self.minimum_size}, got {config.image_size}.")
        self.patch_embeddings = nn.ModuleList(
            PvtPatchEmbeddings(config, stage, cls_token and stage == num_stages - 1) for stage in range(num_stages)
        )
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.block = nn.ModuleList(
            nn.ModuleList(PvtLayer(config, stage, rate) for rate in rates[stage]) for stage in range(num_stages)
        )
        self.layer_norm = nn.LayerNorm(config.hidden_sizes[-1], eps=config.layer_norm_eps) if cls_token else None

    def forward(
        self, pixel_values: torch.Tensor, output_attentions: bool, output_hidden_states: bool
    ) -> tuple[list[tuple[torch.Tensor, int, int]], list[torch.Tensor], list[torch.Tensor]]:
        """(batch, num_channels, height, width) -> what the class says."""
        check_pixel_values(pixel_values, self.config.num_channels, self.minimum_size)
        stages: list[tuple[torch.Tensor, int, int]] = []
        all_hidden_states: list[torch.Tensor] = []
        attentions: list[torch.Tensor] = []
        for patch_embedding, blocks in zip(self.patch_embeddings, self.block, strict=True):
            feature_map = tokens_to_map(*stages[-1]) if stages else pixel_values
            hidden_states, height, width = patch_embedding(feature_map)
            for block in blocks:
                hidden_states, attention = block(hidden_states, height, width, output_attentions)
                if output_hidden_states:
                    all_hidden_states.append(hidden_states)
                if output_attentions:
                    attentions.append(attention)
            stages.append((hidden_states, height, width))
        return stages, all_hidden_states, attentions


class PvtPreTrainedModel(PretrainedMixin, PreTrainedModel):
    """The base of every PVT v1 model: its configuration and its weight initialisation."""

    config: PvtConfig
    config_class = PvtConfig
    base_model_prefix = "pvt"
    _no_split_modules = ["PvtPatchEmbeddings", "PvtLayer"]
    _can_compile_fullgraph = True
    _may_be_missing = _may_change_shape = ("classifier.",)
    _must_have_a_place = "encoder."

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the released code: truncated normal for linear layers and tokens, PyTorch's default for convolutions."""
        std = self.config.initializer_range
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.bias, -bound, bound)
            return
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, PvtPatchEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=std)
            if module.cls_token is not None:
                init.trunc_normal_(module.cls_token, std=std)


class PvtModel(PvtPreTrainedModel):
    """The encoder with the CLS token, the base of [`PvtForImageClassification`]."""

    def __init__(self, config: PvtConfig):
        super().__init__(config)
        if config.sequence_reduction_ratios[-1] != 1:
            raise ValueError(
                "`sequence_reduction_ratios[-1]` must be 1, because the CLS token of the last stage has no place in "
                f"the map that would be reduced; got {config.sequence_reduction_ratios[-1]}."
            )
        self.encoder = PvtEncoder(config, num_stages=config.num_encoder_blocks, cls_token=True)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.patch_embeddings[0].projection

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
                Return one `(batch, tokens, channels)` tensor per block, and the normed last one. An index or a list of
                indices returns only those.
            **kwargs:
                Ignored, as elsewhere in transformers.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` of shape `(batch, 1 + tokens of the last stage,
            channels)`, normed, CLS token first, and `pooler_output` of shape `(batch, channels)`, that token.

        Raises:
            TypeError: If `pixel_values` is not a floating-point tensor.
            ValueError: If it has another number of dimensions or channels, or is smaller than 32 pixels.
        """
        output_attentions, output_hidden_states = resolve_output_flags(self, output_attentions, output_hidden_states)
        stages, hidden_states, attentions = self.encoder(
            pixel_values, output_attentions, output_hidden_states is not False
        )
        last_hidden_state = self.encoder.layer_norm(stages[-1][0])
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state[:, 0],
            hidden_states=select_hidden_states([*hidden_states, last_hidden_state], output_hidden_states),
            attentions=tuple(attentions) if output_attentions else None,
        )


class PvtForImageClassification(PvtPreTrainedModel):
    """PVT v1 with a linear classifier on the CLS token (section 4.1)."""

    def __init__(self, config: PvtConfig):
        super().__init__(config)
        self.num_labels = config.num_labels  # as at the start: what holds is in the configuration
        self.pvt = PvtModel(config)
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
                As in [`PvtModel`].
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*):
                As in [`PvtModel`].
            **kwargs:
                For the loss, as `num_items_in_batch`; others are ignored.

        Returns:
            `ImageClassifierOutput`: `logits` of shape `(batch, num_labels)`, and `loss` where `labels` are given.

        Raises:
            TypeError: As in [`PvtModel`], and for `labels` that are no tensor.
            ValueError: As in [`PvtModel`], and for `labels` of another shape or dtype, or class indices out of range.
        """
        labels = prepare_class_labels(labels, pixel_values, self.config)
        outputs = self.pvt(
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


class PvtBackbone(BackboneMixin, PvtPreTrainedModel):
    """PVT v1 as the released detectors and segmenters use it: feature maps without CLS token and without final norm.

    It holds just the stages up to the last of `config.out_features`, and loads them from a classification checkpoint.
    """

    def __init__(self, config: PvtConfig):
        super().__init__(config)
        self.num_features = list(config.hidden_sizes)
        num_stages = 1 + max(index % config.num_encoder_blocks for index in config.out_indices)
        self.encoder = PvtEncoder(config, num_stages=num_stages, cls_token=False)
        # What a classification checkpoint has beside the stages of this backbone.
        self._keys_to_ignore_on_load_unexpected = [r"cls_token$", r"encoder\.layer_norm\.", r"^classifier\."]
        self._keys_to_ignore_on_load_unexpected += [
            rf"encoder\.(patch_embeddings|block)\.{stage}\." for stage in range(num_stages, config.num_encoder_blocks)
        ]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.patch_embeddings[0].projection

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
                As in [`PvtModel`].
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*):
                As in [`PvtModel`], without the normed hidden state.
            **kwargs:
                Ignored, as elsewhere in transformers.

        Returns:
            `BackboneOutput`: `feature_maps`, for each of `config.out_features` one
            `(batch, channels, height / stride, width / stride)` with strides 4, 8, 16, 32, rounded down.

        Raises:
            TypeError: As in [`PvtModel`].
            ValueError: As in [`PvtModel`].
        """
        output_attentions, output_hidden_states = resolve_output_flags(self, output_attentions, output_hidden_states)
        stages, hidden_states, attentions = self.encoder(
            pixel_values, output_attentions, output_hidden_states is not False
        )
        return BackboneOutput(
            feature_maps=stage_features(self, [tokens_to_map(*stage) for stage in stages]),
            hidden_states=select_hidden_states(hidden_states, output_hidden_states),
            attentions=tuple(attentions) if output_attentions else None,
        )


__all__ = ["PvtBackbone", "PvtForImageClassification", "PvtModel", "PvtPreTrainedModel"]
