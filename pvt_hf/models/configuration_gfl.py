"""Configuration of GFL."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_atss import check_adaptive_head
from .configuration_dense import BackboneSpec
from .configuration_pvt import LabelledConfig


@strict
class GFLConfig(LabelledConfig):
    r"""
    Configuration of GFL ([arXiv 2006.04388](https://huggingface.co/papers/2006.04388)) on any backbone. The defaults
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
        reg_max (`int`, *optional*, defaults to 16):
            Largest distance between the centre and a side of a box, in strides. A side has a distribution over the
            distances 0, 1, ..., `reg_max`.
        box_loss_weight (`float`, *optional*, defaults to 2.0):
            Weight of the boxes' loss.
        distribution_loss_weight (`float`, *optional*, defaults to 0.25):
            Weight of the distributions' loss.
        focal_gamma (`float`, *optional*, defaults to 2.0):
            Exponent of the quality focal loss (beta in the paper), by which well-scored anchors lose their weight.
        prior_probability (`float`, *optional*, defaults to 0.01):
            Score of every class at the start of training.
        nms_threshold (`float`, *optional*, defaults to 0.6):
            Detections of a class do not overlap by a larger IoU.
        num_labels (`int`, *optional*, defaults to 80):
            Number of classes, where `id2label` does not give them.

    Raises:
        ValueError: If there are not five strides, or a number of groups, candidates or bins does not fit.
    """

    model_type = "pvt_hf_gfl"
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
    reg_max: int = 16
    box_loss_weight: float | int = 2.0
    distribution_loss_weight: float | int = 0.25
    focal_gamma: float | int = 2.0
    prior_probability: float = 0.01
    nms_threshold: float | int = 0.6

    def __post_init__(self, **kwargs: Any) -> None:
        check_adaptive_head(self)
        if self.reg_max < 1:
            raise ValueError(f"`reg_max` must be at least 1, got {self.reg_max}.")
        super().__post_init__(**kwargs)


__all__ = ["GFLConfig"]
