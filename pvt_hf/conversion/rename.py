"""Rules that rename the tensors of an official PVT to pvt_hf's names, which are transformers' own, and back.

The official names are the hub: each of the other formats (`formats.py`) is renamed to them first.
"""

import re
from collections import Counter
from collections.abc import Iterable

import torch

from ..writing.text import escape_control

StateDict = dict[str, torch.Tensor]


class ConversionError(ValueError):
    """What is wrong with a checkpoint, or with where it should go, on one line for the one who has it."""

    def __init__(self, message: object):
        super().__init__(escape_control(" ".join(str(message).splitlines())))


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
_KEY_VALUE = re.compile(r"(block\d+\.\d+\.attn\.)(k|v)\.(weight|bias)", re.ASCII)
_NUMBER = "0|[1-9][0-9]{0,3}"  # as programs write them: `int` reads digits of other scripts too


def quote(names: Iterable[str], limit: int = 8) -> str:
    """The first of these names for a message, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"{name!r:.200}" for name in names[:limit]) + more


def add_base_prefix(tensors: StateDict) -> StateDict:
    """The tensors of a bare [`PvtModel`] or backbone (`encoder...`) with the names that they have in a classifier."""
    if not tensors or not all(key.startswith("encoder.") for key in tensors):
        return tensors
    prefix = "pvt_v2" if any(key.startswith("encoder.layers.") for key in tensors) else "pvt"
    return {f"{prefix}.{key}": tensor for key, tensor in tensors.items()}


def remove_base_prefix(tensors: StateDict) -> StateDict:
    """The inverse of [`add_base_prefix`]."""
    return {key.removeprefix("pvt.").removeprefix("pvt_v2."): tensor for key, tensor in tensors.items()}


def rename_keys(
    keys: Iterable[str], rules: Iterable[tuple[str, str]], stage_offset: int, block_offset: int = 0
) -> dict[str, str]:
    """The new name of every key. Raises a `ConversionError` for keys without a rule or with the same new name."""
    compiled = [
        (
            re.compile(re.escape(source).replace(r"\{s\}", f"(?P<s>{_NUMBER})").replace(r"\{n\}", f"(?P<n>{_NUMBER})")),
            target,
        )
        for source, target in rules
    ]
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
    if twice := [name for name, count in Counter(renamed.values()).items() if count > 1]:
        raise ConversionError(f"Several tensors would get the same name: {quote(twice)}.")
    return renamed


def invert(rules: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(other, official) for official, other in rules]


def fuse(parts: StateDict) -> torch.Tensor:
    """Projections as one, in their order. Raises a `ConversionError` unless they have one shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    if len(set(shapes.values())) > 1 or () in shapes.values():
        raise ConversionError(f"These must have one shape with dimensions, to be fused: {shapes}.")
    return torch.cat(list(parts.values()))


def from_official(state_dict: StateDict) -> StateDict:
    """The tensors of an official classification checkpoint with the names of [`PvtForImageClassification`] or of the v2
    class. The fused keys and values are split into views; no value changes.

    Raises:
        ConversionError: For tensors that no rule knows.
    """
    split: StateDict = {}
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
    names = rename_keys(state_dict, invert(_V1_RULES if is_v1 else _V2_RULES), 1)
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
            official[f"{start}kv.{end}"] = fuse({key: tensor, partner: renamed[partner]})
    return official


def check_complete(tensors: StateDict, wanted: StateDict) -> None:
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
