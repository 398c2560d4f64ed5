"""Configuration of Semantic FPN."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_dense import BackboneSpec
from .configuration_pvt import LabelledConfig


@strict
class SemanticFPNConfig(LabelledConfig):
    r"""
    Configuration of Semantic FPN ([arXiv 1901.02446](https://huggingface.co/papers/1901.02446)) on any backbone. The
    defaults are the PVT papers' (mmsegmentation 0.13), on PVT-Tiny and with the 150 classes of
    ADE20K, but for the loss.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*, defaults to PVT-Tiny):
            Of a backbone with four `out_features`, at strides 4, 8, 16 and 32.
        neck_channels (`int`, *optional*, defaults to 256):
            Channels of the feature pyramid's levels.
        head_channels (`int`, *optional*, defaults to 128):
            Channels of the segmentation head.
        classifier_dropout (`float`, *optional*, defaults to 0.1):
            Probability with which a channel is dropped everywhere before the classifier.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels that the loss ignores. -100 is ignored too, whatever this is.
        loss_normalization (`str`, *optional*, defaults to `"valid"`):
            What the summed cross-entropy is divided by: `"valid"` is the number of pixels that are not ignored, as
            everywhere in transformers; `"all"` is the number of all pixels, as in mmsegmentation.
        num_labels (`int`, *optional*, defaults to 150):
            Number of classes, where `id2label` does not give them.
    """

    model_type = "pvt_hf_semantic_fpn"
    default_num_labels = 150
    # The stages that the head wants, of PVT or whatever a backbone calls those of the same strides.
    backbone_out_features: ClassVar[tuple[str, ...]] = ("stage1", "stage2", "stage3", "stage4")
    sub_configs_defaults = {"backbone_config": BackboneSpec("pvt", backbone_out_features)}

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    neck_channels: int = 256
    head_channels: int = 128
    classifier_dropout: float | int = 0.1
    semantic_loss_ignore_index: int = 255
    loss_normalization: Literal["valid", "all"] = "valid"


__all__ = ["SemanticFPNConfig"]
