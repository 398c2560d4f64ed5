"""Names of the official detectors and segmenter, in mmdetection 2.13 and mmsegmentation 0.13, to ours and back."""

from conversion import rename
from conversion.rename import StateDict

_NECK = (
    ("neck.lateral_convs.{n}.conv.", "neck.lateral_convs.{n}."),
    ("neck.fpn_convs.{n}.conv.", "neck.output_convs.{n}."),
)
# (official, pvt_hf) of everything beside the backbone, by the name of the system. The first match counts.
_RULES = {
    "RetinaNet": (
        ("neck.fpn_convs.3.conv.", "neck.extra_convs.0."),
        ("neck.fpn_convs.4.conv.", "neck.extra_convs.1."),
        *_NECK,
        ("bbox_head.cls_convs.{n}.conv.", "head.class_convs.{n}."),
        ("bbox_head.reg_convs.{n}.conv.", "head.box_convs.{n}."),
        ("bbox_head.retina_cls.", "head.class_predictor."),
        ("bbox_head.retina_reg.", "head.box_predictor."),
    ),
    "Mask R-CNN": (
        *_NECK,
        ("rpn_head.rpn_conv.", "rpn.conv."),
        ("rpn_head.rpn_cls.", "rpn.objectness_predictor."),
        ("rpn_head.rpn_reg.", "rpn.box_predictor."),
        ("roi_head.bbox_head.shared_fcs.0.", "box_head.fc1."),
        ("roi_head.bbox_head.shared_fcs.1.", "box_head.fc2."),
        ("roi_head.bbox_head.fc_cls.", "box_head.class_predictor."),
        ("roi_head.bbox_head.fc_reg.", "box_head.box_predictor."),
        ("roi_head.mask_head.convs.{n}.conv.", "mask_head.convs.{n}."),
        ("roi_head.mask_head.upsample.", "mask_head.upsample."),
        ("roi_head.mask_head.conv_logits.", "mask_head.predictor."),
    ),
    "Semantic FPN": (
        *_NECK,
        # The official sequence alternates blocks and upsampling, which has no tensors: 0, 2, 4.
        ("decode_head.scale_heads.{n}.0.conv.", "head.scale_heads.{n}.0.conv."),
        ("decode_head.scale_heads.{n}.0.bn.", "head.scale_heads.{n}.0.norm."),
        ("decode_head.scale_heads.{n}.2.conv.", "head.scale_heads.{n}.1.conv."),
        ("decode_head.scale_heads.{n}.2.bn.", "head.scale_heads.{n}.1.norm."),
        ("decode_head.scale_heads.{n}.4.conv.", "head.scale_heads.{n}.2.conv."),
        ("decode_head.scale_heads.{n}.4.bn.", "head.scale_heads.{n}.2.norm."),
        ("decode_head.conv_seg.", "head.classifier."),
    ),
}
_RULES["Faster R-CNN"] = _RULES["Mask R-CNN"]


def from_official(state_dict: StateDict, system: str, base_prefix: str) -> StateDict:
    """The tensors of an official system with the names of pvt_hf's.

    Args:
        state_dict: With the official names.
        system: As `rename.system_name` calls it.
        base_prefix: `base_model_prefix` of the backbone's class: `"pvt"` or `"pvt_v2"`.

    Raises:
        ConversionError: For tensors that no rule knows.
    """
    official_backbone = {key.removeprefix("backbone."): state_dict[key] for key in state_dict if _is_backbone(key)}
    renamed = {
        f"backbone.{key.removeprefix(f'{base_prefix}.')}": tensor
        for key, tensor in rename.from_official(official_backbone).items()
    }
    names = rename.rename_keys([key for key in state_dict if not _is_backbone(key)], _RULES[system], 0)
    return renamed | {name: state_dict[key] for key, name in names.items()}


def to_official(state_dict: StateDict, system: str, base_prefix: str) -> StateDict:
    """The inverse of [`from_official`]."""
    backbone = {
        f"{base_prefix}.{key.removeprefix('backbone.')}": state_dict[key] for key in state_dict if _is_backbone(key)
    }
    official = {f"backbone.{key}": tensor for key, tensor in rename.to_official(backbone).items()}
    heads = [key for key in state_dict if not _is_backbone(key)]
    names = rename.rename_keys(heads, rename.inverse(_RULES[system]), 0)
    return official | {name: state_dict[key] for key, name in names.items()}


def _is_backbone(key: str) -> bool:
    return key.startswith("backbone.")
