"""Configuration of Cascade Mask R-CNN."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_dense import BackboneSpec
from .configuration_pvt import LabelledConfig

# Fields that have a value for each stage of the cascade.
_STAGE_FIELDS = ("roi_iou_thresholds", "stage_loss_weights", "box_stds")


@strict
class CascadeMaskRCNNConfig(LabelledConfig):
    r"""
    Configuration of Cascade Mask R-CNN ([arXiv 1906.09756](https://huggingface.co/papers/1906.09756)) on any backbone.
    The defaults are those of PVT v2's paper (mmdetection 2.13), with the 80 classes of COCO, but on PVT v2 B0.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*, defaults to PVT v2 B0):
            Of any backbone with four `out_features`, of strides 4, 8, 16 and 32.
        use_masks (`bool`, *optional*, defaults to `True`):
            Whether there are mask heads. Without them the model is Cascade R-CNN.
        neck_channels (`int`, *optional*, defaults to 256):
            Channels of the feature pyramid, of the region proposal network and of the heads' convolutions.
        num_box_convs (`int`, *optional*, defaults to 4):
            Convolutions of each box head, with batch normalisation, before its linear layer.
        box_head_size (`int`, *optional*, defaults to 1024):
            Width of each box head's linear layer.
        num_mask_convs (`int`, *optional*, defaults to 4):
            Convolutions of each mask head before its upsampling.
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
        rpn_allowed_border (`float`, *optional*, defaults to 0):
            Anchors that reach out of the image by more pixels do not take part in training.
        rpn_box_loss_beta (`float`, *optional*, defaults to 1 / 9):
            Below this difference the loss of an anchor's delta is quadratic.
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
        num_proposals_train (`int`, *optional*, defaults to 2000):
            Proposals per image after suppression, at most, in training.
        num_proposals (`int`, *optional*, defaults to 1000):
            The same in evaluation.
        roi_iou_thresholds (`list[float]`, *optional*, defaults to `[0.5, 0.6, 0.7]`):
            Of each stage: from this IoU with an object on a proposal is positive and learns that object; below, it is
            negative.
        stage_loss_weights (`list[float]`, *optional*, defaults to `[1, 0.5, 0.25]`):
            Weight of the losses of each stage.
        box_stds (`list[list[float]]`, *optional*, defaults to `[[0.1, 0.1, 0.2, 0.2], ...]`):
            Units of the four deltas of each stage.
        box_loss_coefficient (`float`, *optional*, defaults to 10):
            Weight of the generalised-IoU loss of the boxes.
        roi_num_samples (`int`, *optional*, defaults to 512):
            RoIs per image that each stage learns from: proposals, and the objects' own boxes.
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
        ValueError: If there are not five strides, or not as many thresholds, weights and units as stages.
    """

    model_type = "pvt_hf_cascade_mask_rcnn"
    default_num_labels = 80
    # The stages that the head wants, of PVT or whatever a backbone calls those of the same strides.
    backbone_out_features: ClassVar[tuple[str, ...]] = ("stage1", "stage2", "stage3", "stage4")
    sub_configs_defaults = {"backbone_config": BackboneSpec("pvt_v2", backbone_out_features)}

    backbone_config: dict | PreTrainedConfig | None = None
    use_masks: bool = True
    neck_channels: int = 256
    num_box_convs: int = 4
    box_head_size: int = 1024
    num_mask_convs: int = 4
    strides: list[int] | tuple[int, ...] = (4, 8, 16, 32, 64)
    anchor_scales: list[float | int] | tuple[float | int, ...] = (8.0,)
    anchor_ratios: list[float | int] | tuple[float | int, ...] = (0.5, 1.0, 2.0)
    rpn_positive_iou_threshold: float | int = 0.7
    rpn_negative_iou_threshold: float | int = 0.3
    rpn_allowed_border: float | int = 0
    rpn_box_loss_beta: float | int = 1 / 9
    rpn_num_samples: int = 256
    rpn_positive_fraction: float | int = 0.5
    num_candidates_train: int = 2000
    num_candidates: int = 1000
    proposal_nms_threshold: float | int = 0.7
    num_proposals_train: int = 2000
    num_proposals: int = 1000
    roi_iou_thresholds: list[float | int] | tuple[float | int, ...] = (0.5, 0.6, 0.7)
    stage_loss_weights: list[float | int] | tuple[float | int, ...] = (1.0, 0.5, 0.25)
    box_stds: list | tuple = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
    box_loss_coefficient: float | int = 10
    roi_num_samples: int = 512
    roi_positive_fraction: float | int = 0.25
    score_threshold: float | int = 0.05
    nms_threshold: float | int = 0.5
    max_detections: int = 100

    def __post_init__(self, **kwargs: Any) -> None:
        if len(self.strides) != 5:
            raise ValueError(f"`strides` must have one value for each of the 5 levels, got {list(self.strides)}.")
        lengths = {field: len(getattr(self, field)) for field in _STAGE_FIELDS}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise ValueError(f"`{'`, `'.join(_STAGE_FIELDS)}` must have one value for each stage, got {lengths}.")
        super().__post_init__(**kwargs)


__all__ = ["CascadeMaskRCNNConfig"]
