"""Configuration of Mask R-CNN."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_dense import BackboneSpec
from .configuration_pvt import LabelledConfig


@strict
class MaskRCNNConfig(LabelledConfig):
    r"""
    Configuration of Mask R-CNN ([arXiv 1703.06870](https://huggingface.co/papers/1703.06870)) on any backbone. The
    defaults are the PVT papers' (mmdetection 2.13), on PVT-Tiny and with the 80 classes of COCO.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*, defaults to PVT-Tiny):
            Of any backbone with four `out_features`, of strides 4, 8, 16 and 32.
        use_masks (`bool`, *optional*, defaults to `True`):
            Whether there is a mask head. Without one the model is Faster R-CNN.
        neck_channels (`int`, *optional*, defaults to 256):
            Channels of the feature pyramid, of the region proposal network and of the mask head.
        box_head_size (`int`, *optional*, defaults to 1024):
            Width of the box head's two linear layers.
        num_mask_convs (`int`, *optional*, defaults to 4):
            Convolutions of the mask head before its upsampling.
        strides (`list[int]`, *optional*, defaults to `[4, 8, 16, 32, 64]`):
            Pixels per cell of each level: those of the backbone's maps and of one more, for proposals only.
        anchor_scales (`list[float]`, *optional*, defaults to `[8]`):
            Sides of a level's square anchors, in strides.
        anchor_ratios (`list[float]`, *optional*, defaults to `[0.5, 1, 2]`):
            Heights of the anchors over their widths.
        rpn_positive_iou_threshold (`float`, *optional*, defaults to 0.7):
            From this IoU with an object on an anchor is positive and learns that object.
        rpn_negative_iou_threshold (`float`, *optional*, defaults to 0.3):
            Below this IoU with every object an anchor is negative; between the two it is ignored. From this IoU on an
            object takes its best anchors also where they would not be positive.
        rpn_num_samples (`int`, *optional*, defaults to 256):
            Anchors per image that the region proposal network learns from.
        rpn_positive_fraction (`float`, *optional*, defaults to 0.5):
            How many of these are positive at most.
        num_candidates_train (`int`, *optional*, defaults to 2000):
            Anchors per level that become proposals, before suppression, in training.
        num_candidates (`int`, *optional*, defaults to 1000):
            The same in evaluation.
        proposal_nms_threshold (`float`, *optional*, defaults to 0.7):
            Proposals of a level do not overlap by a larger IoU.
        num_proposals (`int`, *optional*, defaults to 1000):
            Proposals per image after suppression, at most.
        roi_iou_threshold (`float`, *optional*, defaults to 0.5):
            From this IoU with an object on a proposal is positive and learns that object; below, it is negative.
        roi_num_samples (`int`, *optional*, defaults to 512):
            RoIs per image that the heads learn from: proposals, and the objects' own boxes.
        roi_positive_fraction (`float`, *optional*, defaults to 0.25):
            How many of these are positive at most.
        score_threshold (`float`, *optional*, defaults to 0.05):
            Detections have a larger score.
        nms_threshold (`float`, *optional*, defaults to 0.5):
            Detections of a class do not overlap by a larger IoU.
        max_detections (`int`, *optional*, defaults to 100):
            Detections per image, at most.
        num_labels (`int`, *optional*, defaults to 80):
            Number of classes without the background, where `id2label` does not give them.

    Raises:
        ValueError: If there are not five strides.
    """

    model_type = "pvt_hf_mask_rcnn"
    default_num_labels = 80
    # The stages that the head wants, of PVT or whatever a backbone calls those of the same strides.
    backbone_out_features: ClassVar[tuple[str, ...]] = ("stage1", "stage2", "stage3", "stage4")
    sub_configs_defaults = {"backbone_config": BackboneSpec("pvt", backbone_out_features)}

    backbone_config: dict | PreTrainedConfig | None = None
    use_masks: bool = True
    neck_channels: int = 256
    box_head_size: int = 1024
    num_mask_convs: int = 4
    strides: list[int] | tuple[int, ...] = (4, 8, 16, 32, 64)
    anchor_scales: list[float | int] | tuple[float | int, ...] = (8.0,)
    anchor_ratios: list[float | int] | tuple[float | int, ...] = (0.5, 1.0, 2.0)
    rpn_positive_iou_threshold: float | int = 0.7
    rpn_negative_iou_threshold: float | int = 0.3
    rpn_num_samples: int = 256
    rpn_positive_fraction: float | int = 0.5
    num_candidates_train: int = 2000
    num_candidates: int = 1000
    proposal_nms_threshold: float | int = 0.7
    num_proposals: int = 1000
    roi_iou_threshold: float | int = 0.5
    roi_num_samples: int = 512
    roi_positive_fraction: float | int = 0.25
    score_threshold: float | int = 0.05
    nms_threshold: float | int = 0.5
    max_detections: int = 100

    def __post_init__(self, **kwargs: Any) -> None:
        if len(self.strides) != 5:
            raise ValueError(f"`strides` must have one value for each of the 5 levels, got {list(self.strides)}.")
        super().__post_init__(**kwargs)


__all__ = ["MaskRCNNConfig"]
