"""Configuration of RetinaNet."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_dense import BackboneSpec
from .configuration_pvt import LabelledConfig


@strict
class RetinaNetConfig(LabelledConfig):
    r"""
    Configuration of RetinaNet ([arXiv 1708.02002](https://huggingface.co/papers/1708.02002)) on any backbone. The
    defaults are the PVT papers' (mmdetection 2.13), on PVT-Tiny and with the 80 classes of COCO.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*, defaults to PVT-Tiny):
            Of any backbone with three `out_features`, of strides 8, 16 and 32.
        neck_channels (`int`, *optional*, defaults to 256):
            Channels of the feature pyramid and of the head.
        num_head_convs (`int`, *optional*, defaults to 4):
            Convolutions before each of the two predictors of the head.
        strides (`list[int]`, *optional*, defaults to `[8, 16, 32, 64, 128]`):
            Pixels per cell of each level: those of the backbone's maps and of two more.
        anchor_scales (`list[float]`, *optional*, defaults to `[4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)]`):
            Sides of a level's square anchors, in strides.
        anchor_ratios (`list[float]`, *optional*, defaults to `[0.5, 1, 2]`):
            Heights of the anchors over their widths.
        positive_iou_threshold (`float`, *optional*, defaults to 0.5):
            From this IoU with an object on an anchor is positive and learns that object.
        negative_iou_threshold (`float`, *optional*, defaults to 0.4):
            Below this IoU with every object an anchor is negative. Between the two it is ignored.
        focal_alpha (`float`, *optional*, defaults to 0.25):
            Weight of the positive classes in the focal loss; the others have 1 minus it.
        focal_gamma (`float`, *optional*, defaults to 2.0):
            Exponent of the focal loss, by which well-classified anchors lose their weight.
        prior_probability (`float`, *optional*, defaults to 0.01):
            Score of every class at the start of training.
        num_labels (`int`, *optional*, defaults to 80):
            Number of classes, where `id2label` does not give them.

    Raises:
        ValueError: If there are not five strides.
    """

    model_type = "pvt_hf_retinanet"
    default_num_labels = 80
    # The stages that the head wants, of PVT or whatever a backbone calls those of the same strides.
    backbone_out_features: ClassVar[tuple[str, ...]] = ("stage2", "stage3", "stage4")
    sub_configs_defaults = {"backbone_config": BackboneSpec("pvt", backbone_out_features)}

    backbone_config: dict | PreTrainedConfig | None = None
    neck_channels: int = 256
    num_head_convs: int = 4
    strides: list[int] | tuple[int, ...] = (8, 16, 32, 64, 128)
    anchor_scales: list[float | int] | tuple[float | int, ...] = tuple(4 * 2 ** (octave / 3) for octave in range(3))
    anchor_ratios: list[float | int] | tuple[float | int, ...] = (0.5, 1.0, 2.0)
    positive_iou_threshold: float | int = 0.5
    negative_iou_threshold: float | int = 0.4
    focal_alpha: float | int = 0.25
    focal_gamma: float | int = 2.0
    prior_probability: float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        if len(self.strides) != 5:
            raise ValueError(f"`strides` must have one value for each of the 5 levels, got {list(self.strides)}.")
        super().__post_init__(**kwargs)


__all__ = ["RetinaNetConfig"]
