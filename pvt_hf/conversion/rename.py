"""Rules that rename the tensors of every known checkpoint format to the official names, and those to pvt_hf's.

The official names are the hub: timm -> official -> pvt_hf (which is transformers' own format), and back.
"""

import re
from collections.abc import Iterable

import torch

StateDict = dict[str, torch.Tensor]


class ConversionError(ValueError):
    """What is wrong with a checkpoint, or with where it should go, in words for the one who has it."""


# (official, other). `{n}` is a number and `{s}` a stage, which the official code counts from 1, everybody else from 0.
# The first match counts.
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
_KEY_VALUE = re.compile(r"(block\d+\.\d+\.attn\.)(k|v)\.(weight|bias)")
_FUSED_PROJECTION = re.compile(r"backbone\.(layers\.\d+\.1\.\d+\.attn\.attn\.)in_proj_(weight|bias)")

# A tensor that only checkpoints of the format have.
_SIGNATURES = (
    ("patch_embed1.proj.weight", "official"),
    ("stages.0.blocks.0.attn.kv.weight", "timm"),
    ("pvt.encoder.patch_embeddings.0.projection.weight", "transformers"),
    ("pvt_v2.encoder.layers.0.patch_embedding.proj.weight", "transformers"),
    ("backbone.patch_embed1.proj.weight", "mmdetection"),
    ("backbone.layers.0.0.projection.weight", "mmdetection 3"),
)
# The systems of mmdetection and mmsegmentation, by the tensors of their heads.
_SYSTEMS = (
    ("bbox_head.retina_cls.", "RetinaNet"),
    ("bbox_head.transformer.", "DETR"),
    ("roi_head.mask_head.", "Mask R-CNN"),
    ("roi_head.bbox_head.", "Faster R-CNN"),
    ("decode_head.scale_heads.", "Semantic FPN"),
)


def quote(names: Iterable[str], limit: int = 8) -> str:
    """The first of these names for a message, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def detect_format(keys: Iterable[str]) -> str:
    """`"official"`, `"timm"`, `"transformers"`, `"mmdetection"`, `"mmdetection 3"` or `"mmsegmentation"`.

    mmdetection 3 has a PVT of its own; `"mmdetection"` is the official one in mmdetection 2.

    Raises:
        ConversionError: For the names of any other network.
    """
    keys = set(keys)
    for signature, name in _SIGNATURES:
        if signature in keys:
            return "mmsegmentation" if any(key.startswith("decode_head.") for key in keys) else name
    raise ConversionError(
        f"These are not the tensors of a PVT of the official code, timm, transformers, mmdetection or mmsegmentation: "
        f"{quote(keys) or 'there are none'}."
    )


def with_base_prefix(weights: StateDict) -> StateDict:
    """The tensors of a bare [`PvtModel`] or backbone (`encoder...`) with the names that they have in a classifier."""
    if not weights or not all(key.startswith("encoder.") for key in weights):
        return weights
    prefix = "pvt_v2" if any(key.startswith("encoder.layers.") for key in weights) else "pvt"
    return {f"{prefix}.{key}": tensor for key, tensor in weights.items()}


def system_name(keys: Iterable[str]) -> str:
    """What an mmdetection or mmsegmentation checkpoint is, in words."""
    keys = list(keys)
    for prefix, name in _SYSTEMS:
        if any(key.startswith(prefix) for key in keys):
            return name
    return f"a system with {quote({key.split('.')[0] for key in keys if not key.startswith('backbone.')})}"


def rename_keys(
    keys: Iterable[str], rules: Iterable[tuple[str, str]], stage_offset: int, block_offset: int = 0
) -> dict[str, str]:
    """The new name of every key. Raises a `ConversionError` for keys without a rule or with the same new name."""
    compiled = []
    for source, target in rules:
        pattern = re.escape(source).replace(r"\{s\}", r"(?P<s>\d+)").replace(r"\{n\}", r"(?P<n>\d+)")
        compiled.append((re.compile(pattern), target))
    renamed, unknown = {}, []
    for key in keys:
        for pattern, target in compiled:
            if match := pattern.match(key):
                numbers = match.groupdict()
                for letter, offset in (("s", stage_offset), ("n", block_offset)):
                    if letter in numbers:
                        numbers[letter] = int(numbers[letter]) + offset
                renamed[key] = target.format(**numbers) + key[match.end() :]
                break
        else:
            unknown.append(key)
    if unknown:
        raise ConversionError(f"No rule renames {len(unknown)} tensors: {quote(unknown)}.")
    taken = set()
    if twice := {name for name in renamed.values() if name in taken or taken.add(name)}:
        raise ConversionError(f"Several tensors would get the same name: {quote(twice)}.")
    return renamed


def inverse(rules: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(other, official) for official, other in rules]


def from_official(state_dict: StateDict) -> StateDict:
    """The tensors of an official classification checkpoint with the names of [`PvtForImageClassification`] or of the v2
    class. The fused keys and values are split into views; no value changes.

    Raises:
        ConversionError: For tensors that no rule knows.
    """
    split = {}
    for key, tensor in state_dict.items():
        if ".attn.kv." in key:
            if not tensor.ndim or len(tensor) % 2:
                raise ConversionError(f"{key!r} must hold keys and values, got shape {tuple(tensor.shape)}.")
            split |= {key.replace(".kv.", f".{part}."): half for part, half in zip("kv", tensor.chunk(2), strict=True)}
        else:
            split[key] = tensor
    names = rename_keys(split, _V1_RULES if "pos_embed1" in state_dict else _V2_RULES, -1)
    return {names[key]: tensor for key, tensor in split.items()}


def to_official(state_dict: StateDict) -> StateDict:
    """The inverse of [`from_official`]: the names, and keys and values fused.

    Raises:
        ConversionError: For tensors that no rule knows, and for a key without its value or the reverse.
    """
    is_v1 = any(key.startswith("pvt.") for key in state_dict)
    names = rename_keys(state_dict, inverse(_V1_RULES if is_v1 else _V2_RULES), 1)
    renamed = {names[key]: tensor for key, tensor in state_dict.items()}
    official = {}
    for key, tensor in renamed.items():
        if not (match := _KEY_VALUE.fullmatch(key)):
            official[key] = tensor
            continue
        start, part, end = match.groups()
        if (partner := f"{start}{'v' if part == 'k' else 'k'}.{end}") not in renamed:
            raise ConversionError(f"{key!r} has no {partner!r} to be fused with.")
        if part == "k":
            official[f"{start}kv.{end}"] = torch.cat((tensor, renamed[partner]))
    return official


def timm_to_official(state_dict: StateDict) -> StateDict:
    """timm's `pvt_v2_*` with the official names. (timm has no v1.)"""
    names = rename_keys(state_dict, inverse(_TIMM_RULES), 1)
    return {names[key]: tensor for key, tensor in state_dict.items()}


def official_to_timm(state_dict: StateDict) -> StateDict:
    """The inverse of [`timm_to_official`]."""
    if "pos_embed1" in state_dict:
        raise ConversionError("timm has no PVT v1.")
    if any(key.startswith("backbone.") for key in state_dict):
        raise ConversionError("timm has no detectors and segmenters.")
    names = rename_keys(state_dict, _TIMM_RULES, -1)
    return {names[key]: tensor for key, tensor in state_dict.items()}


def mmdetection_3_to_official(state_dict: StateDict) -> StateDict:
    """A detector of mmdetection 3 with its backbone's tensors as the official code has them (`backbone...`).

    Query, key and value are fused there, the linear layers of the MLP are 1 x 1 convolutions, and v1 has no position
    for a CLS token: that row, which no detector uses, becomes zero.

    Raises:
        ConversionError: For tensors that no rule knows.
    """
    start, official, parts = "backbone.", {}, {}
    for key, tensor in state_dict.items():
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
    rules = inverse(_MMDETECTION_3_V1_RULES if is_v1 else _MMDETECTION_3_V2_RULES)
    names = rename_keys(parts, rules, 1, -1 if is_v1 else 0)
    for key, name in names.items():
        tensor = parts[key]
        if name == "pos_embed4":
            tensor = torch.cat((torch.zeros_like(tensor[:, :1]), tensor), dim=1)
        official[start + name] = tensor
    return official


def check_filled(tensors: StateDict, wanted: StateDict) -> None:
    """Raises a `ConversionError` that lists the differences unless `tensors` has the names and shapes of `wanted`."""
    complaints = []
    if missing := wanted.keys() - tensors.keys():
        complaints.append(f"it lacks {len(missing)}: {quote(missing)}")
    if unused := tensors.keys() - wanted.keys():
        complaints.append(f"{len(unused)} have no place: {quote(unused)}")
    wrong = [
        f"{key} {tuple(tensor.shape)} for {tuple(wanted[key].shape)}"
        for key, tensor in tensors.items()
        if key in wanted and tensor.shape != wanted[key].shape
    ]
    if wrong:
        complaints.append(f"{len(wrong)} have another shape: {quote(wrong)}")
    if complaints:
        raise ConversionError(f"The tensors do not fill the model; {'; '.join(complaints)}.")
