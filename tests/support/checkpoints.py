"""Random checkpoints with the names and shapes of the official ones, and the converter as the tests call it."""

from pathlib import Path

import safetensors.torch
import torch

from pvt_hf.commands import convert
from pvt_hf.variants import Variant

# Small, with the official numbers of heads, which no checkpoint stores.
TINY_SIZES = {"hidden_sizes": (8, 16, 40, 64), "mlp_ratios": (2, 2, 2, 2), "paper_top1": 0, "paper_params": 0}
TINY = {
    "v1": Variant("tiny_v1", "pvt", (1, 2, 1, 1), paper_gflops=0, **TINY_SIZES),
    "v2": Variant("tiny_v2", "pvt_v2", (1, 2, 1, 1), paper_gflops=0, **TINY_SIZES),
    "v2_linear": Variant("tiny_li", "pvt_v2", (1, 2, 1, 1), paper_gflops=0, linear_attention=True, **TINY_SIZES),
}


def official_shapes(variant: Variant) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official classification checkpoint, from the papers' tables (see `../keys/*.tsv`)."""
    is_v1 = variant.model_type == "pvt"
    reductions = (1, 1, 1, 1) if variant.linear_attention else (8, 4, 2, None)
    shapes, channels_in = {}, 3

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    for stage, channels in enumerate(variant.hidden_sizes, start=1):
        if is_v1:
            positions = (224 // 2 ** (stage + 1)) ** 2
            shapes[f"pos_embed{stage}"] = (1, positions + (stage == 4), channels)
        kernel = (4 if stage == 1 else 2) if is_v1 else (7 if stage == 1 else 3)
        layer(f"patch_embed{stage}.proj", channels, channels_in, kernel, kernel)
        layer(f"patch_embed{stage}.norm", channels)
        hidden, reduction = channels * variant.mlp_ratios[stage - 1], reductions[stage - 1]
        for block in (f"block{stage}.{index}" for index in range(variant.depths[stage - 1])):
            layer(f"{block}.norm1", channels)
            layer(f"{block}.attn.q", channels, channels)
            layer(f"{block}.attn.kv", 2 * channels, channels)
            layer(f"{block}.attn.proj", channels, channels)
            if reduction or variant.linear_attention:
                layer(f"{block}.attn.sr", channels, channels, reduction, reduction)
                layer(f"{block}.attn.norm", channels)
            layer(f"{block}.norm2", channels)
            layer(f"{block}.mlp.fc1", hidden, channels)
            if not is_v1:
                layer(f"{block}.mlp.dwconv.dwconv", hidden, 1, 3, 3)
            layer(f"{block}.mlp.fc2", channels, hidden)
        if not is_v1:
            layer(f"norm{stage}", channels)
        channels_in = channels
    if is_v1:
        shapes["cls_token"] = (1, 1, channels)
        layer("norm", channels)
    layer("head", 1000, channels)
    return shapes


def official_weights(variant: Variant, std: float = 0.05) -> dict[str, torch.Tensor]:
    """A random checkpoint with the names and shapes of the official one."""
    weights = {}
    for name, shape in official_shapes(variant).items():
        is_norm = "norm" in name and name.endswith("weight")
        weights[name] = torch.empty(shape).normal_(std=std).add_(1 if is_norm else 0)
    return weights


def save(weights: dict, path: Path) -> Path:
    """In the format that the ending of `path` says."""
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(weights, path)
    return path


def equal(actual: dict, expected: dict) -> bool:
    """Whether names, dtypes and every bit are the same."""
    same = actual.keys() == expected.keys()
    return same and all(actual[k].dtype == v.dtype and torch.equal(actual[k], v) for k, v in expected.items())


def without(weights: dict, *names: str) -> dict:
    return {key: value for key, value in weights.items() if key not in names}


def run(*arguments) -> int:
    """The exit code of `pvt-hf convert`."""
    return convert.main([str(argument) for argument in arguments])
