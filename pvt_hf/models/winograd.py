"""The 3 x 3 convolutions of necks and heads, which a CPU infers by Winograd's minimal filtering F(4 x 4, 3 x 3).

A tile of 4 x 4 results takes 36 multiplications of each pair of channels instead of 144, and the rest is in two small
products with fixed matrices (arXiv 1509.09308). The interpolation is at 0, ±1/√2, ±√2 and infinity: in float32 its
results are several times as near to those of the convolution as with the usual 0, ±1, ±2.
"""

from collections.abc import Sequence
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from .chunks import fit_caches
from .layers import is_traced

TILE, PATCH = 4, 6  # results per side, and what these read
_POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution that keeps the size of a map.

    What is large enough is computed by Winograd's algorithm where a CPU infers in float32 or float64: without gradients
    and outside of autocast and of what is exported.

    Args:
        in_channels: Of the map.
        out_channels: Of the result.
        bias: Whether it has one (default: True).
    """

    chunk_bytes = 4 * 2**20  # of the transformed map, for each thread
    min_tiles, min_channels = 64, 128  # from which on it pays

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """(batch, in_channels, height, width) -> (batch, out_channels, height, width)"""
        if not self.can_filter(feature_map):
            return super().forward(feature_map)
        return convolve(feature_map, self.weight, self.bias, self.chunk_bytes, self.min_tiles)

    def can_filter(self, feature_map: torch.Tensor) -> bool:
        """Whether the weights may be transformed: nobody differentiates by them or has made something else of them."""
        if is_traced(feature_map) or torch._C._are_functorch_transforms_active():
            return False
        if feature_map.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        if feature_map.ndim != 4 or min(self.weight.shape[:2]) < self.min_channels:
            return False
        dtypes = {tensor.dtype for tensor in (feature_map, *self.parameters(recurse=False))}
        is_plain = all(type(tensor) is nn.Parameter for tensor in self.parameters(recurse=False))
        return is_plain and len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64}


@torch.library.custom_op("pvt_hf::conv3x3", mutates_args=())
def convolve(
    feature_map: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chunk_bytes: int, min_tiles: int
) -> torch.Tensor:
    """The convolution of (batch, in_channels, height, width) with (out_channels, in_channels, 3, 3), padded by 1, in
    chunks whose transformed maps fit the caches.

    Returns:
        (batch, out_channels, height, width), channels-last.
    """
    batch, in_channels, height, width = feature_map.shape
    rows, columns = (-(-side // TILE) for side in (height, width))
    if batch * rows * columns < min_tiles:
        return F.conv2d(feature_map, weight, bias, padding=1).contiguous(memory_format=torch.channels_last)
    states = feature_map.permute(0, 2, 3, 1)
    to_patches, to_weights, to_results = _transforms(feature_map.dtype)
    out_channels = len(weight)
    kernels = weight.transpose(0, 1).reshape(-1, 9)  # (in_channels * out_channels, 9)
    weights = (to_weights @ kernels.t()).view(PATCH**2, in_channels, out_channels)
    results = states.new_empty(batch, rows * TILE, columns * TILE, out_channels)
    row_bytes = columns * PATCH**2 * max(in_channels, out_channels) * states.element_size()
    num_images, num_rows = _share(batch, rows, max(1, fit_caches(chunk_bytes, row_bytes)))
    window = states.new_zeros(num_images, num_rows * TILE + 2, columns * TILE + 2, in_channels)  # with a zero border
    for image, row in product(range(0, batch, num_images), range(0, rows, num_rows)):
        images, start, stop = slice(image, image + num_images), row * TILE, min(row + num_rows, rows) * TILE
        part = results[images, start:stop]
        tiles = len(part), (stop - start) // TILE, columns
        patches = _cut(_fill(window, states[images], start), tiles)  # (36, tiles * in_channels)
        patches = torch.mm(to_patches, patches).view(PATCH**2, -1, in_channels)
        sums = torch.bmm(patches, weights).view(PATCH**2, -1)
        tiled = torch.mm(to_results, sums).view(TILE, TILE, *tiles, out_channels).permute(2, 3, 0, 4, 1, 5)
        part = part.view(tiles[0], tiles[1], TILE, columns, TILE, out_channels)
        part.copy_(tiled) if bias is None else torch.add(tiled, bias, out=part)
    return results[:, :height, :width].contiguous().permute(0, 3, 1, 2)


@convolve.register_fake
def _compute_nothing(feature_map, weight, *_):
    batch, _, height, width = feature_map.shape
    return feature_map.new_empty(batch, height, width, len(weight)).permute(0, 3, 1, 2)


@register_flop_formula(torch.ops.pvt_hf.conv3x3)
def _count_flops(input_shape: Sequence[int], weight_shape: Sequence[int], *_, out_shape: Sequence[int], **__) -> int:
    """Those of the convolution, which is what has to be computed."""
    return conv_flop_count(list(input_shape), list(weight_shape), list(out_shape))


def _share(batch: int, rows: int, num_rows: int) -> tuple[int, int]:
    """How many images and how many of their rows of tiles make a chunk, which has `num_rows` rows at most."""
    if num_rows >= rows:
        chunks = -(-batch // (num_rows // rows))
        return -(-batch // chunks), rows
    return 1, -(-rows // -(-rows // num_rows))


def _fill(window: torch.Tensor, states: torch.Tensor, start: int) -> torch.Tensor:
    """Copies rows of maps (images, height, width, channels) to the window, from the one above row `start` on, and zeros
    where the map has none."""
    height, width = states.shape[1:3]
    window = window[: len(states)]
    first, stop = max(start - 1, 0), min(start - 1 + window.shape[1], height)
    above, below = first - (start - 1), stop - (start - 1)
    window[:, :above] = 0
    window[:, above:below, 1 : width + 1] = states[:, first:stop]
    window[:, below:] = 0
    return window


def _cut(window: torch.Tensor, tiles: tuple[int, int, int]) -> torch.Tensor:
    """The patches of tiles (images, rows, columns), one for each of its 6 x 6 places: (36, tiles * channels)."""
    image, row, column, channel = window.stride()
    strides = row, column, image, TILE * row, TILE * column, channel
    return window.as_strided((PATCH, PATCH, *tiles, window.shape[3]), strides).reshape(PATCH**2, -1)


@cache
def _transforms(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The matrices that make of a patch (36), of a kernel (9) and of their products what is multiplied (36, 36), (36,
    9) and the tile of results (16, 36). All act on both sides of a square, of which the rows come one after another.

    A patch is a polynomial's values at five points and infinity; a kernel is a polynomial too (Toom and Cook).
    """
    points = torch.tensor(_POINTS, dtype=torch.float64)
    differences = points[:, None] - points + torch.eye(len(points))
    results = torch.cat([points ** torch.arange(TILE)[:, None], torch.eye(TILE)[:, -1:]], dim=1)  # (4, 6)
    weights = torch.cat(
        [points[:, None] ** torch.arange(3) / differences.prod(1)[:, None], torch.eye(3)[-1:]]
    )  # (6, 3)
    patches = torch.zeros(PATCH, PATCH, dtype=torch.float64)
    for index in range(PATCH):
        factors = points[torch.arange(len(points)) != index]  # the last polynomial has all of them
        patches[index, : len(factors) + 1] = _multiply_out(factors)
    return tuple(torch.kron(matrix, matrix).to(dtype) for matrix in (patches, weights, results))


def _multiply_out(roots: torch.Tensor) -> torch.Tensor:
    """The coefficients of the polynomial with these roots, the lowest first."""
    coefficients = roots.new_ones(1)
    for root in roots:
        coefficients = F.pad(coefficients, (1, 0)) - root * F.pad(coefficients, (0, 1))
    return coefficients


__all__ = ["Conv3x3", "convolve"]
