"""The 3 x 3 convolutions of necks and heads, which a CPU infers by Winograd's minimal filtering F(4 x 4, 3 x 3).

A tile of 4 x 4 results takes 36 multiplications of each pair of channels instead of 144, and the rest is in two small
products with fixed matrices (arXiv 1509.09308). The interpolation is at 0, ±1/√2, ±√2 and infinity: in float32 its
results are several times as near to those of the convolution as with the usual 0, ±1, ±2.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from .chunks import fit_caches, share
from .layers import infers_on_cpu

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
        if not infers_on_cpu(feature_map) or min(self.weight.shape[:2]) < self.min_channels or feature_map.ndim != 4:
            return False
        weights = [weight for weight in (self.weight, self.bias) if weight is not None]
        dtypes = {tensor.dtype for tensor in (feature_map, *weights)}
        is_plain = all(type(weight) is nn.Parameter for weight in weights)
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
    states, out_channels = feature_map.permute(0, 2, 3, 1), len(weight)
    results = states.new_empty(batch, rows * TILE, columns * TILE, out_channels)
    row_size = columns * PATCH**2 * max(in_channels, out_channels)  # of what a row of tiles becomes
    num_rows = fit_caches(chunk_bytes, row_size * states.element_size())  # of tiles, in a chunk
    num_images, num_rows = share(batch, num_rows // rows), share(rows, num_rows)
    window = states.new_zeros(num_images, num_rows * TILE + 2, columns * TILE + 2, in_channels)
    buffers = states.new_empty(2, num_images * num_rows * row_size)
    weights = _filter_kernels(weight)
    for image, row in product(range(0, batch, num_images), range(0, rows, num_rows)):
        images, start, stop = slice(image, image + num_images), row * TILE, min(row + num_rows, rows) * TILE
        patches = _cut(_fill(window, states[images], start), (stop - start) // TILE, columns)
        _filter(patches, weights, bias, buffers, results[images, start:stop])
    return results[:, :height, :width].contiguous().permute(0, 3, 1, 2)


@convolve.register_fake
def _compute_nothing(feature_map, weight, *_):
    batch, _, height, width = feature_map.shape
    return feature_map.new_empty(batch, height, width, len(weight)).permute(0, 3, 1, 2)


@register_flop_formula(torch.ops.pvt_hf.conv3x3)
def _count_flops(input_shape: Sequence[int], weight_shape: Sequence[int], *_, out_shape: Sequence[int], **__) -> int:
    """Those of the convolution, which is what has to be computed."""
    return conv_flop_count(list(input_shape), list(weight_shape), list(out_shape))


def _fill(window: torch.Tensor, states: torch.Tensor, start: int) -> torch.Tensor:
    """Copies maps (images, height, width, channels) to a window with a zero column on each side: from the row above
    `start` on, and zeros for rows that they do not have."""
    height, width = states.shape[1:3]
    window = window[: len(states)]
    first, stop = max(start - 1, 0), min(start - 1 + window.shape[1], height)
    above, below = first - (start - 1), stop - (start - 1)
    window[:, :above] = 0
    window[:, above:below, 1 : width + 1] = states[:, first:stop]
    window[:, below:] = 0
    return window


def _cut(window: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The patches of so many tiles, which overlap: (6, 6, images, rows, columns, channels)."""
    image, row, column, channel = window.stride()
    strides = row, column, image, TILE * row, TILE * column, channel
    return window.as_strided((PATCH, PATCH, len(window), rows, columns, window.shape[3]), strides)


def _filter_kernels(weight: torch.Tensor) -> torch.Tensor:
    """(out_channels, in_channels, 3, 3) -> (36, in_channels, out_channels)"""
    out_channels, in_channels = weight.shape[:2]
    kernels = weight.transpose(0, 1).reshape(-1, 9)  # (in_channels * out_channels, 9)
    return (_transforms(weight.dtype).kernels @ kernels.t()).view(-1, in_channels, out_channels)


def _filter(
    patches: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None, buffers: torch.Tensor, part: torch.Tensor
) -> None:
    """Writes the results of patches to the part of the map (images, rows * 4, columns * 4, out_channels) that is
    theirs. What is computed from one of the two buffers goes to the other."""
    transforms, (*tiles, in_channels), out_channels = _transforms(patches.dtype), patches.shape[2:], part.shape[3]
    num_tiles = math.prod(tiles)
    copies = _take(buffers[0], *patches.shape).copy_(patches).view(PATCH**2, -1)
    filtered = torch.mm(transforms.patches, copies, out=_take(buffers[1], PATCH**2, num_tiles * in_channels))
    filtered = filtered.view(PATCH**2, num_tiles, in_channels)
    products = torch.bmm(filtered, weights, out=_take(buffers[0], PATCH**2, num_tiles, out_channels))
    products = products.view(PATCH**2, num_tiles * out_channels)
    sums = torch.mm(transforms.results, products, out=_take(buffers[1], TILE**2, num_tiles * out_channels))
    sums = sums.view(TILE, TILE, *tiles, out_channels).permute(2, 3, 0, 4, 1, 5)
    part = part.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE))  # (images, rows, 4, columns, 4, out_channels)
    part.copy_(sums) if bias is None else torch.add(sums, bias, out=part)


def _take(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    """The start of a buffer as a tensor of this shape."""
    return buffer[: math.prod(shape)].view(shape)


class _Transforms(NamedTuple):
    """Matrices that act on both sides of a square, of which the rows come one after another.

    Attributes:
        patches: (36, 36)
        kernels: (36, 9)
        results: (16, 36), of the products of the two.
    """

    patches: torch.Tensor
    kernels: torch.Tensor
    results: torch.Tensor


@cache
def _transforms(dtype: torch.dtype) -> _Transforms:
    """Of the algorithm of Toom and Cook, in which a kernel is a polynomial, known by its values at five points and
    infinity, and so are results."""
    points = torch.tensor(_POINTS, dtype=torch.float64)
    differences = points[:, None] - points + torch.eye(len(points))
    results = torch.cat([points ** torch.arange(TILE)[:, None], torch.eye(TILE)[:, -1:]], dim=1)  # (4, 6)
    kernels = torch.cat([points[:, None] ** torch.arange(3) / differences.prod(1)[:, None], torch.eye(3)[-1:]])
    patches = torch.zeros(PATCH, PATCH, dtype=torch.float64)
    for index in range(PATCH):
        roots = points[torch.arange(len(points)) != index]  # the last polynomial has all of them
        patches[index, : len(roots) + 1] = _multiply_out(roots)
    return _Transforms(*(torch.kron(matrix, matrix).to(dtype) for matrix in (patches, kernels, results)))


def _multiply_out(roots: torch.Tensor) -> torch.Tensor:
    """The coefficients of the polynomial with these roots, the lowest first."""
    coefficients = roots.new_ones(1)
    for root in roots:
        coefficients = F.pad(coefficients, (1, 0)) - root * F.pad(coefficients, (0, 1))
    return coefficients


__all__ = ["Conv3x3", "convolve"]
