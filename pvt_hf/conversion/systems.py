"""Names of the official detectors and segmenter, in mmdetection 2.13 and mmsegmentation 0.13, to ours and back."""

import re

import torch

from . import rename
from .rename import StateDict

_NECK = (
    ("neck.lateral_convs.{n}.conv.", "neck.lateral_convs.{n}."),
    ("neck.fpn_convs.{n}.conv.", "neck.output_convs.{n}."),
)


def _transformer_rules(part: str, *attentions: str) -> list[tuple[str, str]]:
    """Those of DETR's encoder or decoder, whose layers have a norm after each attention and after the MLP."""
    official, ours = f"bbox_head.transformer.{part}.layers.{{n}}", f"model.{part}.layers.{{n}}"
    rules = [
        (f"{official}.ffns.0.layers.0.0.", f"{ours}.mlp.fc1."),
        (f"{official}.ffns.0.layers.1.", f"{ours}.mlp.fc2."),
    ]
    for index, attention in enumerate(attentions):
        for projection, other in (("out", "o"), ("q", "q"), ("k", "k"), ("v", "v")):
            name = f"{official}.attentions.{index}.attn.{projection}_proj."
            rules.append((name, f"{ours}.{attention}.{other}_proj."))
    norms = [f"{attention}_layer_norm" for attention in attentions] + ["final_layer_norm"]
    return rules + [(f"{official}.norms.{index}.", f"{ours}.{norm}.") for index, norm in enumerate(norms)]


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
    # transformers' own DETR.
    "DETR": (
        ("bbox_head.input_proj.", "model.input_projection."),
        ("bbox_head.query_embedding.", "model.query_position_embeddings."),
        *_transformer_rules("encoder", "self_attn"),
        *_transformer_rules("decoder", "self_attn", "encoder_attn"),
        ("bbox_head.transformer.decoder.post_norm.", "model.decoder.layernorm."),
        ("bbox_head.fc_cls.", "class_labels_classifier."),
        ("bbox_head.reg_ffn.layers.0.0.", "bbox_predictor.layers.0."),
        ("bbox_head.reg_ffn.layers.1.", "bbox_predictor.layers.1."),
        ("bbox_head.fc_reg.", "bbox_predictor.layers.2."),
    ),
}
_RULES["Faster R-CNN"] = _RULES["Mask R-CNN"]
# Where our model has its backbone, if not at `backbone.`, where the official one always has it.
_BACKBONES = {"DETR": "model.backbone.model."}
# DETR's names before mmdetection 2.13, and since.
_FORMER_NAMES = (
    (".self_attn.", ".attentions.0."),
    (".multihead_attn.", ".attentions.1."),
    (".ffn.", ".ffns.0."),
    (".decoder.norm.", ".decoder.post_norm."),
)
_FUSED = re.compile(r"(bbox_head\.transformer\..+\.)in_proj_(weight|bias)")
_SPLIT = re.compile(r"(bbox_head\.transformer\..+\.)([qkv])_proj\.(weight|bias)")


def from_official(state_dict: StateDict, system: str, base_prefix: str) -> StateDict:
    """The tensors of an official system with the names of pvt_hf's, or of transformers' where that has the system.

    Args:
        state_dict: With the official names. DETR may have those of mmdetection before 2.13 (see
            [`with_current_names`]).
        system: As `rename.system_name` calls it.
        base_prefix: `base_model_prefix` of the backbone's class: `"pvt"` or `"pvt_v2"`.

    Raises:
        ConversionError: For tensors that no rule knows.
    """
    backbone, heads = _parts(state_dict, "backbone.")
    backbone = rename.from_official(backbone)
    place = _BACKBONES.get(system, "backbone.")
    renamed = {f"{place}{key.removeprefix(f'{base_prefix}.')}": tensor for key, tensor in backbone.items()}
    if system == "DETR":
        heads = _split(heads)
    names = rename.rename_keys(heads, _RULES[system], 0)
    return renamed | {name: heads[key] for key, name in names.items()}


def to_official(state_dict: StateDict, system: str, base_prefix: str) -> StateDict:
    """The inverse of [`from_official`], with the names of mmdetection 2.13."""
    backbone, heads = _parts(state_dict, _BACKBONES.get(system, "backbone."))
    backbone = rename.to_official({f"{base_prefix}.{key}": tensor for key, tensor in backbone.items()})
    official = {f"backbone.{key}": tensor for key, tensor in backbone.items()}
    names = rename.rename_keys(heads, rename.inverse(_RULES[system]), 0)
    heads = {name: heads[key] for key, name in names.items()}
    return official | (_fuse(heads) if system == "DETR" else heads)


def _parts(state_dict: StateDict, place: str) -> tuple[StateDict, StateDict]:
    """The backbone's tensors, by their names in it, and the others."""
    backbone = {key.removeprefix(place): tensor for key, tensor in state_dict.items() if key.startswith(place)}
    return backbone, {key: tensor for key, tensor in state_dict.items() if not key.startswith(place)}


def with_current_names(state_dict: StateDict) -> StateDict:
    """DETR's tensors with the names of mmdetection 2.13 where they have those of the versions before it."""
    renamed = {}
    for key, tensor in state_dict.items():
        for former, name in _FORMER_NAMES if key.startswith("bbox_head.transformer.") else ():
            key = key.replace(former, name)
        renamed[key] = tensor
    return renamed


def _split(heads: StateDict) -> StateDict:
    """DETR's official tensors with the names of mmdetection 2.13, and with query, key and value apart, as views."""
    split = {}
    for key, tensor in with_current_names(heads).items():
        if not (match := _FUSED.fullmatch(key)):
            split[key] = tensor
            continue
        if not tensor.ndim or len(tensor) % 3:
            raise rename.ConversionError(f"{key!r} must hold queries, keys and values, got {tuple(tensor.shape)}.")
        start, end = match.groups()
        split |= {f"{start}{part}_proj.{end}": third for part, third in zip("qkv", tensor.chunk(3), strict=True)}
    return split


def _fuse(heads: StateDict) -> StateDict:
    """The inverse of `_split`."""
    official = {}
    for key, tensor in heads.items():
        if not (match := _SPLIT.fullmatch(key)):
            official[key] = tensor
            continue
        start, part, end = match.groups()
        names = [f"{start}{letter}_proj.{end}" for letter in "qkv"]
        if missing := [name for name in names if name not in heads]:
            raise rename.ConversionError(f"{key!r} has no {rename.quote(missing)} to be fused with.")
        if part == "q":
            official[f"{start}in_proj_{end}"] = torch.cat([heads[name] for name in names])
    return official
