"""DETR of mmdetection 2.13, and with the names of the versions before it. The model is transformers' own."""

import re

import torch
from transformers import DetrConfig

from ...models.detr import build_detr_config
from .. import reference_heads
from ..rename import ConversionError, StateDict, fuse, quote
from .base import Detector, count_matches

# The names before mmdetection 2.13, and since.
_FORMER_NAMES = (
    (".self_attn.", ".attentions.0."),
    (".multihead_attn.", ".attentions.1."),
    (".ffn.", ".ffns.0."),
    (".decoder.norm.", ".decoder.post_norm."),
)
_FUSED = re.compile(r"(bbox_head\.transformer\..+\.)in_proj_(weight|bias)")
_SPLIT = re.compile(r"(bbox_head\.transformer\..+\.)([qkv])_proj\.(weight|bias)")


def _transformer_rules(part: str, *attentions: str) -> list[tuple[str, str]]:
    """Those of the encoder or decoder, whose layers have a norm after each attention and after the MLP."""
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


class Detr(Detector):
    name = "DETR"
    tags = ("detr",)
    is_native = True
    signature = "bbox_head.transformer."
    config_class = DetrConfig
    backbone_prefix = "model.backbone.model."
    rules = (
        ("bbox_head.input_proj.", "model.input_projection."),
        ("bbox_head.query_embedding.", "model.query_position_embeddings."),
        *_transformer_rules("encoder", "self_attn"),
        *_transformer_rules("decoder", "self_attn", "encoder_attn"),
        ("bbox_head.transformer.decoder.post_norm.", "model.decoder.layernorm."),
        ("bbox_head.fc_cls.", "class_labels_classifier."),
        ("bbox_head.reg_ffn.layers.0.0.", "bbox_predictor.layers.0."),
        ("bbox_head.reg_ffn.layers.1.", "bbox_predictor.layers.1."),
        ("bbox_head.fc_reg.", "bbox_predictor.layers.2."),
    )

    def select(self, official):
        return _rename_former(official)

    def read_fields(self, shape, official):
        start = "bbox_head.transformer"
        num_queries, d_model = shape("bbox_head.query_embedding.weight")
        return {
            "num_labels": shape("bbox_head.fc_cls.weight")[0] - 1,  # the last is no object
            "num_queries": num_queries,
            "d_model": d_model,
            "encoder_layers": count_matches(official, rf"{start}\.encoder\.layers\.(\d+)\."),
            "decoder_layers": count_matches(official, rf"{start}\.decoder\.layers\.(\d+)\."),
            "encoder_ffn_dim": shape(f"{start}.encoder.layers.0.ffns.0.layers.0.0.weight")[0],
            "decoder_ffn_dim": shape(f"{start}.decoder.layers.0.ffns.0.layers.0.0.weight")[0],
        }

    def build_config(self, backbone_config, **fields):
        return build_detr_config(backbone_config, **fields)

    def from_official(self, official):
        return super().from_official(_split_projections(_rename_former(official)))

    def to_official(self, tensors):
        return _fuse_projections(super().to_official(tensors))

    def outputs(self, model, image):
        outputs = model(image, pixel_mask=(~_mask_padding(image)).long())
        return [outputs.logits, outputs.pred_boxes]

    def head_reference(self, weights, image, feature_maps):
        logits, boxes = reference_heads.detr(weights, feature_maps[-1], _mask_padding(image))
        return [logits[-1], boxes[-1]]


def _mask_padding(image: torch.Tensor) -> torch.Tensor:
    """True in the last 32 columns (batch, height, width): the mask takes part in the comparison."""
    padding = torch.zeros(len(image), *image.shape[2:], dtype=torch.bool)
    padding[:, :, -32:] = True
    return padding


def _rename_former(official: StateDict) -> StateDict:
    """The tensors with the names of mmdetection 2.13 where they have those of the versions before it."""
    renamed = {}
    for key, tensor in official.items():
        for former, name in _FORMER_NAMES if key.startswith(Detr.signature) else ():
            key = key.replace(former, name)
        renamed[key] = tensor
    return renamed


def _split_projections(official: StateDict) -> StateDict:
    """Query, key and value of each attention apart, as views."""
    split = {}
    for key, tensor in official.items():
        if not (match := _FUSED.fullmatch(key)):
            split[key] = tensor
            continue
        if not tensor.ndim or len(tensor) % 3:
            raise ConversionError(f"{key!r} must hold queries, keys and values, got {tuple(tensor.shape)}.")
        start, end = match.groups()
        split |= {f"{start}{part}_proj.{end}": third for part, third in zip("qkv", tensor.chunk(3), strict=True)}
    return split


def _fuse_projections(split: StateDict) -> StateDict:
    """The inverse of `_split_projections`."""
    official = {}
    for key, tensor in split.items():
        if not (match := _SPLIT.fullmatch(key)):
            official[key] = tensor
            continue
        start, part, end = match.groups()
        names = [f"{start}{letter}_proj.{end}" for letter in "qkv"]
        if missing := [name for name in names if name not in split]:
            raise ConversionError(f"{key!r} has no {quote(missing)} to be fused with.")
        if part == "q":
            official[f"{start}in_proj_{end}"] = fuse({name: split[name] for name in names})
    return official
