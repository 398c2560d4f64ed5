"""Independent evaluation of official PVT state dicts, written from the papers as plain functions.

It shares no code with pvt_hf and is slow on purpose: every step of the papers is one visible line, in whatever dtype
the state dict has. The tests hold the models against it, in outputs and gradients.

Keys are those of the official classification checkpoints (`patch_embed1.proj.weight`, `block1.0.attn.q.weight`, ...).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

StateDict = Mapping[str, torch.Tensor]

HEADS = (1, 2, 5, 8)  # of every released variant; the shapes of a checkpoint do not tell
PATCH_EPS = 1e-5  # of the norms in patch embedding and spatial reduction; mmdetection 3's own PVT has 1e-6


def is_v1(weights: StateDict) -> bool:
    return "pos_embed1" in weights


def is_linear(weights: StateDict) -> bool:
    """B2-Li reduces in stage 4 too, where every other variant attends to all tokens."""
    return "block4.0.attn.sr.weight" in weights


def depth(weights: StateDict, stage: int) -> int:
    return 1 + max(int(key.split(".")[1]) for key in weights if key.startswith(f"block{stage}."))


def linear(weights: StateDict, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def norm(weights: StateDict, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def to_map(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, height, width).contiguous()


def to_tokens(feature_map: torch.Tensor) -> torch.Tensor:
    return feature_map.flatten(2).transpose(1, 2).contiguous()


def attention(
    weights: StateDict, name: str, tokens: torch.Tensor, height: int, width: int, heads: int, patch_eps: float
) -> torch.Tensor:
    """Spatial-reduction attention: v1 section 3.3; linear: v2 section 3.2."""
    batch, count, channels = tokens.shape
    query = linear(weights, f"{name}.q", tokens)
    reduced = tokens
    if f"{name}.sr.weight" in weights:
        feature_map, kernel = to_map(tokens, height, width), weights[f"{name}.sr.weight"]
        if is_linear(weights):
            feature_map = F.adaptive_avg_pool2d(feature_map, 7)
        reduced = to_tokens(F.conv2d(feature_map, kernel, weights[f"{name}.sr.bias"], stride=kernel.shape[-1]))
        reduced = norm(weights, f"{name}.norm", reduced, patch_eps)
        if is_linear(weights):
            reduced = F.gelu(reduced)
    key, value = linear(weights, f"{name}.kv", reduced).split(channels, dim=-1)
    outputs = []
    for q, k, v in zip(*(x.split(channels // heads, dim=-1) for x in (query, key, value)), strict=True):
        scores = torch.einsum("bqc,bkc->bqk", q, k) / (channels // heads) ** 0.5
        outputs.append(torch.einsum("bqk,bkc->bqc", scores.softmax(-1), v))
    return linear(weights, f"{name}.proj", torch.cat(outputs, dim=-1))


def mlp(weights: StateDict, name: str, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """v2 section 3.4 has a depth-wise 3 x 3 convolution before the GELU; its linear variant a ReLU before that."""
    hidden = linear(weights, f"{name}.fc1", tokens)
    if f"{name}.dwconv.dwconv.weight" in weights:
        if is_linear(weights):
            hidden = F.relu(hidden)
        kernel, bias = weights[f"{name}.dwconv.dwconv.weight"], weights[f"{name}.dwconv.dwconv.bias"]
        hidden = to_tokens(F.conv2d(to_map(hidden, height, width), kernel, bias, padding=1, groups=kernel.shape[0]))
    return linear(weights, f"{name}.fc2", F.gelu(hidden))


def blocks(
    weights: StateDict,
    stage: int,
    tokens: torch.Tensor,
    height: int,
    width: int,
    heads: Sequence[int],
    patch_eps: float,
) -> torch.Tensor:
    for index in range(depth(weights, stage)):
        name = f"block{stage}.{index}"
        normed = norm(weights, f"{name}.norm1", tokens, 1e-6)
        tokens = tokens + attention(weights, f"{name}.attn", normed, height, width, heads[stage - 1], patch_eps)
        tokens = tokens + mlp(weights, f"{name}.mlp", norm(weights, f"{name}.norm2", tokens, 1e-6), height, width)
    return tokens


def patch_embedding(
    weights: StateDict, stage: int, feature_map: torch.Tensor, patch_eps: float
) -> tuple[torch.Tensor, int, int]:
    """v1 section 3.2: stride and kernel equal. v2 section 3.3: overlapping, padded by half the kernel."""
    kernel, bias = weights[f"patch_embed{stage}.proj.weight"], weights[f"patch_embed{stage}.proj.bias"]
    padding = 0 if is_v1(weights) else kernel.shape[-1] // 2
    feature_map = F.conv2d(feature_map, kernel, bias, stride=4 if stage == 1 else 2, padding=padding)
    tokens = norm(weights, f"patch_embed{stage}.norm", to_tokens(feature_map), patch_eps)
    return tokens, *feature_map.shape[2:]


def position_embedding(
    weights: StateDict, stage: int, height: int, width: int, grid: tuple[int, int] | None
) -> torch.Tensor:
    """The patches' part of `pos_embed`, resized from the stored grid (square unless given) to the current one."""
    stored = weights[f"pos_embed{stage}"][:, 1:] if stage == 4 else weights[f"pos_embed{stage}"]
    if grid is None:
        side = round(stored.shape[1] ** 0.5)
        grid = (side, side)
    if grid == (height, width):
        return stored
    resized = F.interpolate(to_map(stored, *grid), size=(height, width), mode="bilinear", align_corners=False)
    return to_tokens(resized)


def feature_maps(
    weights: StateDict,
    pixels: torch.Tensor,
    image_size: tuple[int, int] | None = None,
    heads: Sequence[int] = HEADS,
    patch_eps: float = PATCH_EPS,
) -> list[torch.Tensor]:
    """The four maps of the official detection backbones. `image_size` is that of v1's stored positions."""
    maps: list[torch.Tensor] = []
    for stage in (1, 2, 3, 4):
        tokens, height, width = patch_embedding(weights, stage, maps[-1] if maps else pixels, patch_eps)
        if is_v1(weights):
            grid = image_size and tuple(side // 2 ** (stage + 1) for side in image_size)
            tokens = tokens + position_embedding(weights, stage, height, width, grid)
        tokens = blocks(weights, stage, tokens, height, width, heads, patch_eps)
        if not is_v1(weights):
            tokens = norm(weights, f"norm{stage}", tokens, 1e-6)
        maps.append(to_map(tokens, height, width))
    return maps


def logits(
    weights: StateDict,
    pixels: torch.Tensor,
    image_size: tuple[int, int] | None = None,
    heads: Sequence[int] = HEADS,
    patch_eps: float = PATCH_EPS,
) -> torch.Tensor:
    """The official classifiers: v1 reads the CLS token that stage 4 adds, v2 the mean of stage 4's normed tokens."""
    if not is_v1(weights):
        return linear(weights, "head", feature_maps(weights, pixels, heads=heads, patch_eps=patch_eps)[-1].mean((2, 3)))
    *_, third, _ = feature_maps(weights, pixels, image_size, heads, patch_eps)
    tokens, height, width = patch_embedding(weights, 4, third, patch_eps)
    grid = image_size and tuple(side // 32 for side in image_size)
    positions = position_embedding(weights, 4, height, width, grid)
    tokens = torch.cat((weights["cls_token"].expand(len(tokens), -1, -1), tokens), dim=1)
    tokens = tokens + torch.cat((weights["pos_embed4"][:, :1], positions), dim=1)
    tokens = norm(weights, "norm", blocks(weights, 4, tokens, height, width, heads, patch_eps), 1e-6)
    return linear(weights, "head", tokens[:, 0])
