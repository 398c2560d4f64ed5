"""Rules that rename the tensors of official checkpoints to those of pvt_hf (and transformers) and back."""

import re

import torch

StateDict = dict[str, torch.Tensor]

# (official, pvt_hf): each `{n}` is a number, `{s}` a stage, which the official code counts from 1. The first match
# counts.
_V1_RULES = (
    ("pos_embed{s}", "pvt.encoder.patch_embeddings.{s}.position_embeddings"),
    ("cls_token", "pvt.encoder.patch_embeddings.3.cls_token"),
    ("patch_embed{s}.proj.", "pvt.encoder.patch_embeddings.{s}.projection."),
    ("patch_embed{s}.norm.", "pvt.encoder.patch_embeddings.{s}.layer_norm."),
    ("block{s}.{n}.norm1.", "pvt.encoder.block.{s}.{n}.layer_norm_1."),
    ("block{s}.{n}.norm2.", "pvt.encoder.block.{s}.{n}.layer_norm_2."),
    ("block{s}.{n}.attn.q.", "pvt.encoder.block.{s}.{n}.attention.self.query."),
    ("block{s}.{n}.attn.k.", "pvt.encoder.block.{s}.{n}.attention.self.key."),
    ("block{s}.{n}.attn.v.", "pvt.encoder.block.{s}.{n}.attention.self.value."),
    ("block{s}.{n}.attn.sr.", "pvt.encoder.block.{s}.{n}.attention.self.sequence_reduction."),
    ("block{s}.{n}.attn.norm.", "pvt.encoder.block.{s}.{n}.attention.self.layer_norm."),
    ("block{s}.{n}.attn.proj.", "pvt.encoder.block.{s}.{n}.attention.output.dense."),
    ("block{s}.{n}.mlp.fc1.", "pvt.encoder.block.{s}.{n}.mlp.dense1."),
    ("block{s}.{n}.mlp.fc2.", "pvt.encoder.block.{s}.{n}.mlp.dense2."),
    ("norm.", "pvt.encoder.layer_norm."),
    ("head.", "classifier."),
)
_V2_RULES = (
    ("patch_embed{s}.proj.", "pvt_v2.encoder.layers.{s}.patch_embedding.proj."),
    ("patch_embed{s}.norm.", "pvt_v2.encoder.layers.{s}.patch_embedding.layer_norm."),
    ("block{s}.{n}.norm1.", "pvt_v2.encoder.layers.{s}.blocks.{n}.layer_norm_1."),
    ("block{s}.{n}.norm2.", "pvt_v2.encoder.layers.{s}.blocks.{n}.layer_norm_2."),
    ("block{s}.{n}.attn.q.", "pvt_v2.encoder.layers.{s}.blocks.{n}.attention.query."),
    ("block{s}.{n}.attn.k.", "pvt_v2.encoder.layers.{s}.blocks.{n}.attention.key."),
    ("block{s}.{n}.attn.v.", "pvt_v2.encoder.layers.{s}.blocks.{n}.attention.value."),
    ("block{s}.{n}.attn.sr.", "pvt_v2.encoder.layers.{s}.blocks.{n}.attention.spatial_reduction."),
    ("block{s}.{n}.attn.norm.", "pvt_v2.encoder.layers.{s}.blocks.{n}.attention.layer_norm."),
    ("block{s}.{n}.attn.proj.", "pvt_v2.encoder.layers.{s}.blocks.{n}.attention.proj."),
    ("block{s}.{n}.mlp.fc1.", "pvt_v2.encoder.layers.{s}.blocks.{n}.mlp.dense1."),
    ("block{s}.{n}.mlp.dwconv.", "pvt_v2.encoder.layers.{s}.blocks.{n}.mlp.dwconv."),
    ("block{s}.{n}.mlp.fc2.", "pvt_v2.encoder.layers.{s}.blocks.{n}.mlp.dense2."),
    ("norm{s}.", "pvt_v2.encoder.layers.{s}.layer_norm."),
    ("head.", "classifier."),
)
_KEY_VALUE = re.compile(r"(block\d+\.\d+\.attn\.)(k|v)\.(weight|bias)$")


def _rename(key: str, rules: list[tuple[str, str]], stage_offset: int) -> str:
    for source, target in rules:
        pattern = re.escape(source).replace(r"\{s\}", r"(?P<s>\d+)").replace(r"\{n\}", r"(?P<n>\d+)")
        if match := re.match(pattern, key):
            numbers = match.groupdict()
            if "s" in numbers:
                numbers["s"] = int(numbers["s"]) + stage_offset
            return target.format(**numbers) + key[match.end() :]
    raise ValueError(f"No rule renames the tensor {key!r}.")


def from_official(state_dict: StateDict) -> StateDict:
    """An official classification checkpoint with the names of [`PvtForImageClassification`] or the v2 class.

    The fused keys and values are split; no value changes.

    Raises:
        ValueError: For a tensor that no rule knows.
    """
    rules = list(_V1_RULES if "pos_embed1" in state_dict else _V2_RULES)
    renamed = {}
    for key, tensor in state_dict.items():
        if ".attn.kv." in key:
            for part, half in zip("kv", tensor.chunk(2), strict=True):
                renamed[_rename(key.replace(".kv.", f".{part}."), rules, -1)] = half
        else:
            renamed[_rename(key, rules, -1)] = tensor
    return renamed


def to_official(state_dict: StateDict) -> StateDict:
    """The inverse of [`from_official`]: the names, and keys and values fused."""
    is_v1 = any(key.startswith("pvt.") for key in state_dict)
    rules = [(target, source) for source, target in (_V1_RULES if is_v1 else _V2_RULES)]
    renamed = {_rename(key, rules, 1): tensor for key, tensor in state_dict.items()}
    official = {}
    for key, tensor in renamed.items():
        if not (match := _KEY_VALUE.match(key)):
            official[key] = tensor
        elif match[2] == "k":
            official[f"{match[1]}kv.{match[3]}"] = torch.cat((tensor, renamed[f"{match[1]}v.{match[3]}"]))
    return official
