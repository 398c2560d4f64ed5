"""Configuration of PVT v1."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin


def check_stage_fields(config: PreTrainedConfig, *fields: str) -> None:
    """Raises a `ValueError` unless each of `fields` has one value per stage and the heads divide the hidden sizes."""
    for field in fields:
        value = getattr(config, field)
        if len(value) != config.num_encoder_blocks:
            raise ValueError(
                f"`{field}` must have one value for each of the {config.num_encoder_blocks} stages "
                f"(`num_encoder_blocks`), got {len(value)}: {list(value)}."
            )
    for stage, (hidden_size, heads) in enumerate(zip(config.hidden_sizes, config.num_attention_heads, strict=True)):
        if heads < 1 or hidden_size % heads:
            raise ValueError(
                f"`hidden_sizes[{stage}]` must be divisible by `num_attention_heads[{stage}]`, got {hidden_size} and "
                f"{heads}."
            )


def label_fields(names: Sequence[str]) -> dict[str, dict]:
    """The fields `id2label` and `label2id` of a configuration.

    Args:
        names: Of the classes, by label.
    """
    return {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}


def read_class_names(id2label: Mapping | None) -> dict[int, str] | None:
    """`id2label` with integer keys, which a JSON file cannot have."""
    if id2label is None:
        return None
    if not isinstance(id2label, Mapping):
        raise ValueError(f"`id2label` must map class indices to names, got a {type(id2label).__name__}.")
    for label in id2label:
        if not isinstance(label, int) and not str(label).isdecimal():
            raise ValueError(f"`id2label` must map class indices to names, got the key {label!r}; see `label2id`.")
    return {int(label): name for label, name in id2label.items()}


def read_num_labels(num_labels: int) -> int:
    """`num_labels`, if it is a number of classes."""
    if not isinstance(num_labels, Integral) or isinstance(num_labels, bool) or num_labels < 0:
        raise ValueError(f"`num_labels` must be a number of classes, got {num_labels!r}.")
    return int(num_labels)


def read_problem_type(problem_type: str | None) -> str | None:
    """`problem_type`, if it is one of transformers'."""
    known = ("regression", "single_label_classification", "multi_label_classification")
    if problem_type is not None and problem_type not in known:
        raise ValueError(f"`problem_type` must be one of {known} or None, got {problem_type!r}.")
    return problem_type


_LABEL_FIELDS: dict[str, Callable[[Any], Any]] = {
    "id2label": read_class_names,
    "num_labels": read_num_labels,
    "problem_type": read_problem_type,
}


class LabelledConfig(PreTrainedConfig):
    """Base of all configurations here: labels that are checked, and a number of classes that every `config.json` has.

    transformers does not write two classes without names, because they are its own default.
    """

    default_num_labels: ClassVar[int] = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.id2label is None and kwargs.get("num_labels") is None:
            kwargs["num_labels"] = self.default_num_labels
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _LABEL_FIELDS[name](value) if name in _LABEL_FIELDS else value)

    def to_dict(self) -> dict[str, Any]:
        # transformers' own PvtConfig reads the number of classes from here and ignores `id2label`.
        return super().to_dict() | {"num_labels": self.num_labels}


@strict
class PvtConfig(BackboneConfigMixin, LabelledConfig):
    r"""
    Configuration of the Pyramid Vision Transformer (PVT v1, [arXiv
    2102.12122](https://huggingface.co/papers/2102.12122)). The defaults are PVT-Tiny, as in
    [Xrenya/pvt-tiny-224](https://huggingface.co/Xrenya/pvt-tiny-224); [`build_config`] gives every variant. The fields
    are those of transformers' own `PvtConfig`, so that each loads the other's `config.json`.

    Args:
        image_size (`int` or `list[int]`, *optional*, defaults to 224):
            Height and width, in pixels, for which position embeddings are stored: one number or `(height, width)`. The
            model takes images of any size and interpolates them.
        num_channels (`int`, *optional*, defaults to 3):
            Number of input channels.
        num_encoder_blocks (`int`, *optional*, defaults to 4):
            Number of stages.
        depths (`list[int]`, *optional*, defaults to `[2, 2, 2, 2]`):
            Number of blocks in each stage.
        sequence_reduction_ratios (`list[int]`, *optional*, defaults to `[8, 4, 2, 1]`):
            Spatial-reduction ratio of the keys and values, per side, in each stage.
        hidden_sizes (`list[int]`, *optional*, defaults to `[64, 128, 320, 512]`):
            Channels of each stage.
        patch_sizes (`list[int]`, *optional*, defaults to `[4, 2, 2, 2]`):
            Kernel size of each stage's patch embedding.
        strides (`list[int]`, *optional*, defaults to `[4, 2, 2, 2]`):
            Stride of each stage's patch embedding.
        num_attention_heads (`list[int]`, *optional*, defaults to `[1, 2, 5, 8]`):
            Attention heads of each stage.
        mlp_ratios (`list[int]`, *optional*, defaults to `[8, 8, 4, 4]`):
            Width of the MLP relative to the channels, per stage.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLP; `"gelu"` is the exact one.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout after the embeddings and the linear layers.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout on the attention probabilities.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the truncated normal of linear layers, position embeddings and CLS token.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth of the last block; the rates of the others grow linearly from 0.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the norms in the blocks and of the final norm.
        patch_layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the norms of patch embedding and spatial reduction. (mmdetection 3's own PVT has 1e-6.)
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Whether query, key and value have a bias.
        num_labels (`int`, *optional*, defaults to 1000):
            Number of classes, where `id2label` does not give them.
        out_features (`list[str]`, *optional*, defaults to the last stage):
            Feature maps of [`PvtBackbone`]: some of `"stage1"` ... `"stage4"`.
        out_indices (`list[int]`, *optional*, defaults to the last stage):
            The same as indices, 0 ... 3, instead of `out_features`.

    Raises:
        ValueError: If a per-stage field does not have `num_encoder_blocks` values, or heads do not divide channels.
    """

    model_type = "pvt"
    default_num_labels = 1000

    image_size: int | list[int] | tuple[int, int] = 224
    num_channels: int = 3
    num_encoder_blocks: int = 4
    depths: list[int] | tuple[int, ...] = (2, 2, 2, 2)
    sequence_reduction_ratios: list[int] | tuple[int, ...] = (8, 4, 2, 1)
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 320, 512)
    patch_sizes: list[int] | tuple[int, ...] = (4, 2, 2, 2)
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
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_stage_fields(
            self,
            "depths",
            "sequence_reduction_ratios",
            "hidden_sizes",
            "patch_sizes",
            "strides",
            "num_attention_heads",
            "mlp_ratios",
        )
        if len(self.image_shape) != 2:
            raise ValueError(f"`image_size` must be one number or (height, width), got {self.image_size}.")
        self.stage_names = [f"stage{stage}" for stage in range(1, self.num_encoder_blocks + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`image_size` as (height, width), in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else tuple(self.image_size)


__all__ = ["PvtConfig"]
