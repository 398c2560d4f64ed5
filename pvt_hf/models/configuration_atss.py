"""Configuration of ATSS."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_dense import BackboneSpec
from .configuration_pvt import LabelledConfig


def check_adaptive_head(config: PreTrainedConfig) -> None:
    """Raises a `ValueError` unless the fields that ATSS and GFL have in common describe a head."""
    if len(config.strides) != 5:
        raise ValueError(f"`strides` must have one value for each of the 5 levels, got {list(config.strides)}.")
    if config.norm_groups < 1 or config.neck_channels % config.norm_groups:
        raise ValueError(
            f"`norm_groups` must divide `neck_channels`, got {config.norm_groups} and {config.neck_channels}."
        )
    # A coarse level may be one cell, of which a group of one channel is one value: less it itself, nothing is left.
    if config.norm_groups == config.neck_channels:
        raise ValueError(
            "`norm_groups` must be less than `neck_channels`, so that a group has two channels at least, got "
            f"{config.norm_groups} and {config.neck_channels}."
        )
    if config.num_candidates < 1:
        raise ValueError(f"`num_candidates` must be at least 1, got {config.num_candidates}.")


@strict
class ATSSConfig(LabelledConfig):
    r"""
    Configuration of ATSS ([arXiv 1912.02424](https://huggingface.co/papers/1912.02424)) on any backbone. The defaults
    are PVT v2's (mmdetection 2.13), on B0 and with the 80 classes of COCO.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*, defaults to PVT v2-B0):
            Of any backbone with three `out_features`, of strides 8, 16 and 32.
        neck_channels (`int`, *optional*, defaults to 256):
            Channels of the feature pyramid and of the head.
        num_head_convs (`int`, *optional*, defaults to 4):
            Normed convolutions before the predictors of the head.
        norm_groups (`int`, *optional*, defaults to 32):
            Groups of the group norms of the head; they divide `neck_channels`, and each has two channels or more.
        strides (`list[int]`, *optional*, defaults to `[8, 16, 32, 64, 128]`):
            Pixels per cell of each level: those of the backbone's maps and of two more.
        anchor_scale (`float`, *optional*, defaults to 8.0):
            Side of the square anchor of each cell, in strides. It is what objects are matched with.
        num_candidates (`int`, *optional*, defaults to 9):
            Anchors of each level that an object is matched with, at most.
        box_loss_weight (`float`, *optional*, defaults to 2.0):
            Weight of the boxes' loss.
        focal_alpha (`float`, *optional*, defaults to 0.25):
            Weight of the positive classes in the focal loss; the others have 1 minus it.
        focal_gamma (`float`, *optional*, defaults to 2.0):
            Exponent of the focal loss, by which well-classified anchors lose their weight.
        prior_probability (`float`, *optional*, defaults to 0.01):
            Score of every class at the start of training.
        nms_threshold (`float`, *optional*, defaults to 0.6):
            Detections of a class do not overlap by a larger IoU.
        num_labels (`int`, *optional*, defaults to 80):
            Number of classes, where `id2label` does not give them.

    Raises:
        ValueError: If there are not five strides, or a number of groups or candidates does not fit.
    """

    model_type = "pvt_hf_atss"
    default_num_labels = 80
    # The stages that the head wants, of PVT or whatever a backbone calls those of the same strides.
    backbone_out_features: ClassVar[tuple[str, ...]] = ("stage2", "stage3", "stage4")
    sub_configs_defaults = {"backbone_config": BackboneSpec("pvt_v2", backbone_out_features)}

    backbone_config: dict | PreTrainedConfig | None = None
    neck_channels: int = 256
    num_head_convs: int = 4
    norm_groups: int = 32
    strides: list[int] | tuple[int, ...] = (8, 16, 32, 64, 128)
    anchor_scale: float | int = 8.0
    num_candidates: int = 9
    box_loss_weight: float | int = 2.0
    focal_alpha: float | int = 0.25
    focal_gamma: float | int = 2.0
    prior_probability: float = 0.01
    nms_threshold: float | int = 0.6

    def __post_init__(self, **kwargs: Any) -> None:
        check_adaptive_head(self)
        super().__post_init__(**kwargs)


__all__ = ["ATSSConfig"]
