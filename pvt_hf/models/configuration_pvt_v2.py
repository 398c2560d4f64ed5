"""Configuration of PVT v2."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin

from .configuration_pvt import LabelledConfig, check_stage_fields


@strict
class PvtV2Config(BackboneConfigMixin, LabelledConfig):
    r"""
    Configuration of PVT v2 ([arXiv 2106.13797](https://huggingface.co/papers/2106.13797)). The defaults are PVT v2-B0,
    as in [OpenGVLab/pvt_v2_b0](https://huggingface.co/OpenGVLab/pvt_v2_b0); [`build_config`] gives every variant. The
    fields are those of transformers' own `PvtV2Config`, so that each loads the other's `config.json`.

    Args:
        image_size (`int` or `list[int]`, *optional*, defaults to 224):
            Height and width of the training images, in pixels: one number or `(height, width)`. The model has nothing
            that depends on it.
        num_channels (`int`, *optional*, defaults to 3):
            Number of input channels.
        num_encoder_blocks (`int`, *optional*, defaults to 4):
            Number of stages.
        depths (`list[int]`, *optional*, defaults to `[2, 2, 2, 2]`):
            Number of blocks in each stage.
        sr_ratios (`list[int]`, *optional*, defaults to `[8, 4, 2, 1]`):
            Spatial-reduction ratio of the keys and values, per side, in each stage. Unused with `linear_attention`.
        hidden_sizes (`list[int]`, *optional*, defaults to `[32, 64, 160, 256]`):
            Channels of each stage.
        patch_sizes (`list[int]`, *optional*, defaults to `[7, 3, 3, 3]`):
            Kernel size of each stage's overlapping patch embedding; its padding is half of it.
        strides (`list[int]`, *optional*, defaults to `[4, 2, 2, 2]`):
            Stride of each stage's overlapping patch embedding.
        num_attention_heads (`list[int]`, *optional*, defaults to `[1, 2, 5, 8]`):
            Attention heads of each stage.
        mlp_ratios (`list[int]`, *optional*, defaults to `[8, 8, 4, 4]`):
            Width of the MLP relative to the channels, per stage.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLP; `"gelu"` is the exact one.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout after the linear layers.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout on the attention probabilities.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the truncated normal of linear layers.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth of the last block; the rates of the others grow linearly from 0.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the norms in the blocks and after the stages.
        patch_layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the norms of patch embedding and spatial reduction. (mmdetection 3's own PVT has 1e-6.)
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Whether query, key and value have a bias.
        linear_attention (`bool`, *optional*, defaults to `False`):
            Linear spatial-reduction attention (v2 section 3.2): keys and values from a 7 x 7 average pooling.
        num_labels (`int`, *optional*, defaults to 2):
            Number of classes, where `id2label` does not give them.
        out_features (`list[str]`, *optional*, defaults to the last stage):
            Feature maps of [`PvtV2Backbone`]: some of `"stage1"` ... `"stage4"`.
        out_indices (`list[int]`, *optional*, defaults to the last stage):
            The same as indices, 0 ... 3, instead of `out_features`.

    Raises:
        ValueError: If a per-stage field does not have `num_encoder_blocks` values, or heads do not divide channels.
    """

    model_type = "pvt_v2"

    image_size: int | list[int] | tuple[int, int] | dict = 224
    num_channels: int = 3
    num_encoder_blocks: int = 4
    depths: list[int] | tuple[int, ...] = (2, 2, 2, 2)
    sr_ratios: list[int] | tuple[int, ...] = (8, 4, 2, 1)
    hidden_sizes: list[int] | tuple[int, ...] = (32, 64, 160, 256)
    patch_sizes: list[int] | tuple[int, ...] = (7, 3, 3, 3)
    strides: list[int] | tuple[int, ...] = (4, 2, 2, 2)
    num_attention_heads: list[int] | tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: list[int | float] | tuple[int | float, ...] = (8, 8, 4, 4)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    drop_path_rate: float | int = 0.0
    layer_norm_eps: float = 1e-6
    patch_layer_norm_eps: float = 1e-5
    qkv_bias: bool = True
    linear_attention: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.image_size, int):
            self.image_size = (self.image_size, self.image_size)
        check_stage_fields(
            self, "depths", "sr_ratios", "hidden_sizes", "patch_sizes", "strides", "num_attention_heads", "mlp_ratios"
        )
        self.stage_names = [f"stage{stage}" for stage in range(1, self.num_encoder_blocks + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)


__all__ = ["PvtV2Config"]
