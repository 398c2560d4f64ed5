"""The formats in which checkpoints hold a PVT: how to tell them apart, and their names by way of the official ones."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from . import rename
from .rename import ConversionError, StateDict, invert, quote, rename_keys
from .verify import timm_outputs

# (official, other) names, see `rename.py`.
_TIMM_RULES = (
    ("patch_embed1.", "patch_embed."),
    ("patch_embed{s}.", "stages.{s}.downsample."),
    ("block{s}.{n}.mlp.dwconv.dwconv.", "stages.{s}.blocks.{n}.mlp.dwconv."),
    ("block{s}.{n}.", "stages.{s}.blocks.{n}."),
    ("norm{s}.", "stages.{s}.norm."),
    ("head.", "head."),
)
# mmdetection 3's own PVT. In v1 the first of a stage's blocks is its position embedding.
_MMDETECTION_3_BLOCK = (
    ("block{s}.{n}.norm1.", "layers.{s}.1.{n}.norm1."),
    ("block{s}.{n}.attn.q.", "layers.{s}.1.{n}.attn.attn.q."),
    ("block{s}.{n}.attn.kv.", "layers.{s}.1.{n}.attn.attn.kv."),
    ("block{s}.{n}.attn.proj.", "layers.{s}.1.{n}.attn.attn.out_proj."),
    ("block{s}.{n}.attn.sr.", "layers.{s}.1.{n}.attn.sr."),
    ("block{s}.{n}.attn.norm.", "layers.{s}.1.{n}.attn.norm."),
    ("block{s}.{n}.norm2.", "layers.{s}.1.{n}.norm2."),
    ("block{s}.{n}.mlp.fc1.", "layers.{s}.1.{n}.ffn.layers.0."),
    ("patch_embed{s}.proj.", "layers.{s}.0.projection."),
    ("patch_embed{s}.norm.", "layers.{s}.0.norm."),
)
_MMDETECTION_3_V1_RULES = (
    ("pos_embed{s}", "layers.{s}.1.0.pos_embed"),
    ("block{s}.{n}.mlp.fc2.", "layers.{s}.1.{n}.ffn.layers.3."),
    *_MMDETECTION_3_BLOCK,
)
_MMDETECTION_3_V2_RULES = (
    ("block{s}.{n}.mlp.dwconv.dwconv.", "layers.{s}.1.{n}.ffn.layers.1."),
    ("block{s}.{n}.mlp.fc2.", "layers.{s}.1.{n}.ffn.layers.4."),
    ("norm{s}.", "layers.{s}.2."),
    *_MMDETECTION_3_BLOCK,
)
_FUSED_PROJECTION = re.compile(r"backbone\.(layers\.\d+\.1\.\d+\.attn\.attn\.)in_proj_(weight|bias)", re.ASCII)


def timm_to_official(tensors: StateDict) -> StateDict:
    """timm's `pvt_v2_*` with the official names. (timm has no v1.)"""
    names = rename_keys(tensors, invert(_TIMM_RULES), 1)
    return {names[key]: tensor for key, tensor in tensors.items()}


def official_to_timm(tensors: StateDict) -> StateDict:
    """The inverse of [`timm_to_official`]."""
    if "pos_embed1" in tensors:
        raise ConversionError("timm has no PVT v1.")
    if any(key.startswith("backbone.") for key in tensors):
        raise ConversionError("timm has no detectors and segmenters.")
    names = rename_keys(tensors, _TIMM_RULES, -1)
    return {names[key]: tensor for key, tensor in tensors.items()}


def mmdetection_3_to_official(tensors: StateDict) -> StateDict:
    """A detector of mmdetection 3 with its backbone's tensors as the official code has them (`backbone...`).

    Query, key and value are fused there, the linear layers of the MLP are 1 x 1 convolutions, and v1 has no position
    for a CLS token: that row, which no detector uses, becomes zero.

    Raises:
        ConversionError: For tensors that no rule knows.
    """
    start = "backbone."
    official: StateDict = {}
    parts: StateDict = {}
    for key, tensor in tensors.items():
        if not key.startswith(start):
            official[key] = tensor
        elif match := _FUSED_PROJECTION.fullmatch(key):
            name, end = match.groups()
            if not tensor.ndim or len(tensor) % 3:
                raise ConversionError(f"{key!r} must hold queries, keys and values, got shape {tuple(tensor.shape)}.")
            size = len(tensor) // 3
            parts |= {f"{name}q.{end}": tensor[:size], f"{name}kv.{end}": tensor[size:]}
        else:
            is_linear = ".ffn." in key and tensor.ndim == 4 and tensor.shape[1] > 1
            parts[key.removeprefix(start)] = tensor.flatten(1) if is_linear else tensor
    is_v1 = "layers.0.1.0.pos_embed" in parts
    rules = invert(_MMDETECTION_3_V1_RULES if is_v1 else _MMDETECTION_3_V2_RULES)
    names = rename_keys(parts, rules, 1, -1 if is_v1 else 0)
    for key, name in names.items():
        tensor = parts[key]
        if name == "pos_embed4":
            if tensor.ndim != 3:
                raise ConversionError(f"{key!r} must have 3 dimensions, got shape {tuple(tensor.shape)}.")
            tensor = torch.cat((torch.zeros_like(tensor[:, :1]), tensor), dim=1)
        official[start + name] = tensor
    return official


@dataclass(frozen=True)
class Format:
    """
    Attributes:
        name: As messages and model cards say it.
        signature: A tensor that every checkpoint of the format has.
        head: How the name of another one starts; empty if there need be none.
        to_official: Gives the tensors their official names, but for those of a detector's or segmenter's heads.
        from_official: The inverse; `None` for a format that is only read.
        is_dense: Whether it holds detectors or segmenters, with their backbone below `backbone.`.
        patch_layer_norm_eps: Of its own PVT, where that has another epsilon than the official one in the norms of patch
            embedding and spatial reduction.
        evaluate: Gives the outputs of the format's own model from tensors, a configuration, and whether they are a
            backbone's. The result is compared with them instead of with those of the independent reference.
        reference: What the result is compared with, in words.
    """

    name: str
    signature: str
    head: str = ""
    to_official: Callable[[StateDict], StateDict] = dict
    from_official: Callable[[StateDict], StateDict] | None = None
    is_dense: bool = False
    patch_layer_norm_eps: float | None = None
    evaluate: Callable[[StateDict, PreTrainedConfig, bool], list[torch.Tensor]] | None = None
    reference: str = "an independent implementation of the papers"


# The first that fits counts.
FORMATS = (
    Format("official", "patch_embed1.proj.weight", from_official=dict),
    Format(
        "timm",
        "stages.0.blocks.0.attn.kv.weight",
        to_official=timm_to_official,
        from_official=official_to_timm,
        evaluate=timm_outputs,
        reference="timm's model",
    ),
    Format("transformers", "pvt.encoder.patch_embeddings.0.projection.weight", to_official=rename.to_official),
    Format("transformers", "pvt_v2.encoder.layers.0.patch_embedding.proj.weight", to_official=rename.to_official),
    # Versions 0.x and 2.x, with the official code's PVT.
    Format("mmsegmentation", "backbone.patch_embed1.proj.weight", head="decode_head.", is_dense=True),
    Format("mmdetection", "backbone.patch_embed1.proj.weight", is_dense=True),
    Format(
        "mmdetection 3",
        "backbone.layers.0.0.projection.weight",
        to_official=mmdetection_3_to_official,
        is_dense=True,
        patch_layer_norm_eps=1e-6,  # its own PVT has the same epsilon in all norms
    ),
)
# How to write a format, by its name.
FROM_OFFICIAL = {item.name: item.from_official for item in FORMATS if item.from_official is not None}


def detect_format(names: Iterable[str]) -> Format:
    """The format of a checkpoint, from the names of its tensors.

    Raises:
        ConversionError: For the names of any other network.
    """
    names = set(names)
    for candidate in FORMATS:
        if candidate.signature in names and any(name.startswith(candidate.head) for name in names):
            return candidate
    raise ConversionError(
        f"These are not the tensors of a PVT of the official code, timm, transformers, mmdetection or mmsegmentation: "
        f"{quote(names) or 'there are none'}."
    )
