"""Reads the configuration of a PVT from the names and shapes of its tensors."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torchvision.models import ResNet50_Weights
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..models.configuration_pvt import PvtConfig, label_fields
from ..models.configuration_pvt_v2 import PvtV2Config
from .rename import ConversionError, StateDict, quote

_CONFIG_CLASSES: dict[str, type[PvtConfig] | type[PvtV2Config]] = {"pvt": PvtConfig, "pvt_v2": PvtV2Config}


def infer_fields(weights: StateDict) -> dict[str, Any]:
    """The fields of the configuration that the official names and shapes determine, `model_type` among them.

    Raises:
        ConversionError: If a tensor that they are read from is missing.
    """

    def shape(key: str, ndim: int) -> tuple[int, ...]:
        if key not in weights:
            raise ConversionError(f"The checkpoint lacks {key!r} (by its official name), and is not a complete PVT.")
        if weights[key].ndim != ndim or not weights[key].numel():
            wanted = f"{ndim} dimensions" + (" that are not 0" if weights[key].ndim == ndim else "")
            raise ConversionError(f"{key!r} must have {wanted}, got shape {tuple(weights[key].shape)}.")
        return tuple(weights[key].shape)

    stages = (1, 2, 3, 4)
    projections = [shape(f"patch_embed{stage}.proj.weight", 4) for stage in stages]
    hidden_sizes = [channels for channels, *_ in projections]
    ratios = [
        shape(f"block{stage}.0.mlp.fc1.weight", 2)[0] / size for stage, size in zip(stages, hidden_sizes, strict=True)
    ]
    fields = {
        "model_type": "pvt" if "pos_embed1" in weights else "pvt_v2",
        "num_channels": projections[0][1],
        "depths": [len({key.split(".")[1] for key in weights if key.startswith(f"block{stage}.")}) for stage in stages],
        "hidden_sizes": hidden_sizes,
        "patch_sizes": [kernel for *_, kernel in projections],
        "mlp_ratios": [int(ratio) if ratio.is_integer() else ratio for ratio in ratios],
        "qkv_bias": "block1.0.attn.q.bias" in weights,
    }
    reductions = [shape(key, 4)[-1] if (key := f"block{stage}.0.attn.sr.weight") in weights else 1 for stage in stages]
    if fields["model_type"] == "pvt":
        shape("pos_embed1", 3)
        fields["sequence_reduction_ratios"] = reductions
    elif "block4.0.attn.sr.weight" in weights:  # only the linear variant reduces in stage 4
        fields["linear_attention"] = True
    else:
        fields |= {"linear_attention": False, "sr_ratios": reductions}
    if "head.weight" in weights:
        fields["num_labels"] = shape("head.weight", 2)[0]
    return fields


def infer_config(weights: StateDict, known: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """The configuration of a checkpoint with official names.

    Args:
        weights: Tensors with official names; v1 with `pos_embed1`, classifiers with `head.weight`.
        known: The `config.json` beside the checkpoint, for what shapes do not tell: labels, attention heads, rates of
            dropout, the height and width of oblong images. Without it, these are the official ones.

    Raises:
        ConversionError: If tensors are missing or `known` contradicts them.
    """
    fields = infer_fields(weights)
    config_class = _CONFIG_CLASSES[fields.pop("model_type")]
    known = known or {}
    if isinstance(known.get("model_type"), str) and known["model_type"] in _CONFIG_CLASSES:
        if known["model_type"] != config_class.model_type:
            raise ConversionError(
                f"`config.json` says model_type {known['model_type']!r}, but the tensors are those of a "
                f"{config_class.model_type!r}."
            )
        names = {field.name for field in dataclasses.fields(config_class)} - {"_out_features", "_out_indices", "dtype"}
        stated = {name: known[name] for name in names if known.get(name) is not None}
        wrong = [
            f"{name} {stated[name]!s:.80} for {value}"
            for name, value in fields.items()
            if stated.get(name, value) != value
        ]
        if wrong:
            raise ConversionError(f"`config.json` does not describe the tensors: {'; '.join(sorted(wrong))}.")
        fields = stated | fields
    if config_class is PvtConfig:
        fields["image_size"] = _image_size(weights["pos_embed1"].shape[1], fields)
    num_labels = fields.pop("num_labels", None)
    if num_labels is not None:
        fields |= label_fields(_classifier_labels(num_labels, known))
    try:
        config = config_class(**fields)
        if config.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of transformers' activations, got {config.hidden_act!r:.80}")
        return config
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError, StrictDataclassError) as error:
        raise ConversionError(f"There is no PVT with these shapes and this `config.json`: {error}") from error


def _image_size(positions: int, fields: dict[str, Any]) -> int | list[int]:
    stride, stated = fields["patch_sizes"][0], fields.get("image_size")
    if stated is not None:
        sides = [stated, stated] if isinstance(stated, int) else stated
        if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
            raise ConversionError(f"`config.json` must have one or two numbers as image_size, got {stated!r}.")
        height, width = sides
        if (height // stride) * (width // stride) != positions:
            raise ConversionError(
                f"`config.json` says image_size {stated}, but 'pos_embed1' has {positions} positions."
            )
        return stated
    side = math.isqrt(positions)
    if side * side != positions:
        raise ConversionError(
            f"'pos_embed1' has {positions} positions, which is no square: put a `config.json` with `image_size` "
            "(height, width) beside the checkpoint and call it model.safetensors or pytorch_model.bin."
        )
    return side * stride


def imagenet_labels() -> list[str]:
    """The 1000 classes of ImageNet-1k in torchvision's words, each of them once."""
    return ResNet50_Weights.IMAGENET1K_V1.meta["categories"]


def label_names(num_labels: int, stated: Sequence[str], default: Sequence[str]) -> list[str]:
    """`stated` if there are any, else `default` if it has as many, else LABEL_0, LABEL_1, ...

    Raises:
        ConversionError: If `stated` has another number of names.
    """
    if stated and len(stated) != num_labels:
        raise ConversionError(
            f"The checkpoint names {len(stated)} classes ({quote(stated, 3)}), but its head has {num_labels}."
        )
    if len(default) == num_labels and not stated:
        stated = default
    return list(stated) or [f"LABEL_{index}" for index in range(num_labels)]


def _classifier_labels(num_labels: int, known: Mapping[str, Any]) -> list[str]:
    """Those of `config.json` (transformers' or timm's), or ImageNet's for 1000 classes, or LABEL_0, LABEL_1, ..."""
    placeholders = [f"LABEL_{index}" for index in range(num_labels)]
    stated = known.get("id2label") or known.get("label_names") or {}
    if isinstance(stated, list):
        stated = dict(enumerate(stated))
    if not isinstance(stated, dict) or (stated and {str(key) for key in stated} != set(map(str, range(num_labels)))):
        raise ConversionError(f"`config.json` does not name the {num_labels} labels of the checkpoint's head.")
    names = [name for _, name in sorted(stated.items(), key=lambda item: int(item[0]))]
    return label_names(num_labels, [] if names == placeholders else names, imagenet_labels())
