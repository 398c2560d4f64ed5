"""Configuration of Sparse R-CNN."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_dense import BackboneSpec
from .configuration_pvt import LabelledConfig


@strict
class SparseRCNNConfig(LabelledConfig):
    r"""
    Configuration of Sparse R-CNN ([arXiv 2011.12450](https://huggingface.co/papers/2011.12450)) on any backbone. The
    defaults are those of PVT v2's paper (mmdetection 2.13), with the 80 classes of COCO, but on PVT v2 B0.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*, defaults to PVT v2 B0):
            Of any backbone with four `out_features`, of strides 4, 8, 16 and 32.
        neck_channels (`int`, *optional*, defaults to 256):
            Channels of the feature pyramid and of the proposals' features.
        strides (`list[int]`, *optional*, defaults to `[4, 8, 16, 32]`):
            Pixels per cell of each level.
        num_proposals (`int`, *optional*, defaults to 300):
            Learned boxes with their features, and so the most objects of an image that are found.
        num_heads (`int`, *optional*, defaults to 6):
            How often boxes and features are refined, each time by a head of its own.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Attention heads of each, between the proposals of an image.
        dynamic_channels (`int`, *optional*, defaults to 64):
            Channels between the two layers that a proposal makes for the features of its box.
        ffn_dim (`int`, *optional*, defaults to 2048):
            Width of the MLP of each head.
        num_class_layers (`int`, *optional*, defaults to 1):
            Linear layers before the class predictor of each head.
        num_box_layers (`int`, *optional*, defaults to 3):
            Linear layers before the box predictor of each head.
        class_cost (`float`, *optional*, defaults to 2):
            Weight of the focal cost in the matching of proposals and objects.
        bbox_cost (`float`, *optional*, defaults to 5):
            Weight of the L1 distance of the corners, relative to the image's size, in the matching.
        giou_cost (`float`, *optional*, defaults to 2):
            Weight of the generalised IoU in the matching.
        class_loss_coefficient (`float`, *optional*, defaults to 2):
            Weight of the focal loss.
        bbox_loss_coefficient (`float`, *optional*, defaults to 5):
            Weight of the L1 loss of the corners, relative to the image's size.
        giou_loss_coefficient (`float`, *optional*, defaults to 2):
            Weight of the generalised-IoU loss.
        focal_alpha (`float`, *optional*, defaults to 0.25):
            Weight of the positive classes in the focal loss and cost; the others have 1 minus it.
        focal_gamma (`float`, *optional*, defaults to 2.0):
            Exponent of the focal loss and cost, by which well-classified proposals lose their weight.
        prior_probability (`float`, *optional*, defaults to 0.01):
            Score of every class at the start of training.
        num_labels (`int`, *optional*, defaults to 80):
            Number of classes, where `id2label` does not give them.

    Raises:
        ValueError: If there are not four strides, or if `neck_channels` is no multiple of `num_attention_heads`.
    """

    model_type = "pvt_hf_sparse_rcnn"
    default_num_labels = 80
    # The stages that the head wants, of PVT or whatever a backbone calls those of the same strides.
    backbone_out_features: ClassVar[tuple[str, ...]] = ("stage1", "stage2", "stage3", "stage4")
    sub_configs_defaults = {"backbone_config": BackboneSpec("pvt_v2", backbone_out_features)}

    backbone_config: dict | PreTrainedConfig | None = None
    neck_channels: int = 256
    strides: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    num_proposals: int = 300
    num_heads: int = 6
    num_attention_heads: int = 8
    dynamic_channels: int = 64
    ffn_dim: int = 2048
    num_class_layers: int = 1
    num_box_layers: int = 3
    class_cost: float | int = 2
    bbox_cost: float | int = 5
    giou_cost: float | int = 2
    class_loss_coefficient: float | int = 2
    bbox_loss_coefficient: float | int = 5
    giou_loss_coefficient: float | int = 2
    focal_alpha: float | int = 0.25
    focal_gamma: float | int = 2.0
    prior_probability: float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        if len(self.strides) != 4:
            raise ValueError(f"`strides` must have one value for each of the 4 levels, got {list(self.strides)}.")
        if self.neck_channels % self.num_attention_heads:
            raise ValueError(
                f"`neck_channels` must be a multiple of `num_attention_heads`, got {self.neck_channels} and "
                f"{self.num_attention_heads}."
            )
        super().__post_init__(**kwargs)


__all__ = ["SparseRCNNConfig"]
