"""The best class of every pixel of an image, from logits that are resized twice.

A CPU looks at tiles of a few cells of the logits: most classes are the best nowhere in a tile, and need not be resized.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import lru_cache
from operator import neg
from typing import NamedTuple

import torch
import torch.nn.functional as F

# A tile begins at every so many cells, down and across. A pixel is a mean of at most 3 x 3 cells: if the first of them
# is in a tile, all are in its window.
_TILE = 4
_WINDOW = _TILE + 2
# So many logits are looked at together on a CPU, and so many values of pixels computed: they stay in its caches.
_STRIP = 2**20
_VALUES = 2**18
# So many values are resized together elsewhere, 128 MiB.
_CHUNK = 2**25
# With no more than these, finding out which ones are possible takes longer than resizing them.
_FEW_CLASSES = 12
# More than weights and sums are rounded by, of the largest of the numbers.
_ROUNDING = 1e-5
_LARGEST = 1e30  # stands for infinity, which times a weight of zero would be NaN


@torch.no_grad()
def find_classes(logits: torch.Tensor, stride: int, size: tuple[int, int]) -> torch.Tensor:
    """The class with the largest logit at every pixel after two bilinear resizes, the first of those that are equal:
    int64 `(height, width)`. (Where the logits of two classes differ by less than float32 rounds, either may be it.)

    Args:
        logits: `(classes, rows, columns)`.
        stride: Of the first resize, to that many times as many rows and columns.
        size: Height and width in pixels, of the second.
    """
    if logits.device.type != "cpu" or len(logits) <= _FEW_CLASSES:
        return _resize_all(logits[None].float(), stride, size)
    rows, columns = (_plan_axis(*axis) for axis in zip(logits.shape[1:], (stride, stride), size, strict=True))
    (down, height, _), (across, width, _) = rows.weights.shape, columns.weights.shape
    labels = torch.empty(down, across, height, width, dtype=torch.int32)
    strip = max(1, _STRIP // (_TILE * logits[:, 0].numel()))
    for start in range(0, down, strip):
        end = min(start + strip, down)
        cells = logits[:, start * _TILE : end * _TILE + _WINDOW - _TILE].float()
        _label_tiles(cells, rows.weights[start:end], columns.weights, labels[start:end].flatten(0, 1))
    labels = labels.transpose(1, 2).reshape(down * height, across * width)
    return labels.index_select(0, rows.places).index_select(1, columns.places).long()


def _resize_all(logits: torch.Tensor, stride: int, size: tuple[int, int]) -> torch.Tensor:
    """All classes of `(1, classes, rows, columns)`, a few at a time: at the size of a large photograph they take
    gigabytes."""
    sizes = [stride * side for side in logits.shape[2:]], size
    logits = _limit(logits)
    best, labels, first = None, None, 0
    for scores in logits.split(max(1, _CHUNK // max(map(math.prod, sizes))), dim=1):
        for target in sizes:
            scores = F.interpolate(scores, target, mode="bilinear", align_corners=False)
        values, indices = scores[0].max(dim=0)  # (height, width)
        if best is None:
            best, labels = values, indices
        else:
            labels = torch.where(values > best, indices + first, labels)
            best = torch.maximum(values, best)
        first += scores.shape[1]
    return labels


def _limit(logits: torch.Tensor) -> torch.Tensor:
    """Infinities as numbers, and NaN as the largest one, as which an argmax takes it."""
    return logits.nan_to_num(_LARGEST, _LARGEST, -_LARGEST)


class _Axis(NamedTuple):
    """The tiles of one axis, each of as many pixels as the one that has most.

    Attributes:
        weights: Of the cells of a tile's window in its pixels, float64 `(tiles, pixels, window)`.
        places: Which pixel of all tiles is one of the image, int64 `(size,)`.
    """

    weights: torch.Tensor
    places: torch.Tensor


@lru_cache(maxsize=64)
def _plan_axis(cells: int, stride: int, size: int) -> _Axis:
    """Both resizes along an axis are one linear map, which is what they make of the identity."""
    scaled = F.interpolate(torch.eye(cells)[None], cells * stride, mode="linear")
    weights = F.interpolate(scaled, size, mode="linear")[0].double()  # (cells, size)
    tiles = max(1, math.ceil((cells - _WINDOW + _TILE) / _TILE))  # a window beyond it would have no new cell
    tile = ((weights > 0).int().argmax(dim=0) // _TILE).clamp(max=tiles - 1)  # (size,), of a pixel's first cell
    starts = torch.searchsorted(tile, torch.arange(tiles))
    count = int(torch.bincount(tile).max())
    pixels = (starts[:, None] + torch.arange(count)).clamp(max=size - 1)  # (tiles, count)
    padding = (tiles - 1) * _TILE + _WINDOW - cells
    windows = F.pad(weights, (0, 0, 0, padding)).unfold(0, _WINDOW, _TILE)  # (tiles, size, window)
    places = tile * count + torch.arange(size) - starts[tile]
    return _Axis(windows[torch.arange(tiles)[:, None], pixels], places)


def _label_tiles(cells: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, labels: torch.Tensor) -> None:
    """Writes the labels of a strip.

    Args:
        cells: float32 `(classes, rows, columns)`.
        rows: Weights `(tiles down, height, window)`.
        columns: Weights `(tiles across, width, window)`.
        labels: int32 `(tiles, height, width)`.
    """
    _, height, width = labels.shape
    pixels = cells.permute(1, 2, 0).contiguous()  # (rows, columns, classes)
    classes, counts = _list_classes(_find_possible_classes(pixels))
    # Where the cells of a window are among all numbers: (tiles down, window) and (tiles across, window).
    inside_rows, inside_columns = (
        (torch.arange(len(tiles))[:, None] * _TILE + torch.arange(_WINDOW)).clamp(max=side - 1) * step
        for tiles, side, step in zip((rows, columns), pixels.shape, pixels.stride(), strict=False)
    )
    order = counts.argsort(descending=True)
    for start, end, count in _group(counts[order].tolist(), height * width):
        tiles = order[start:end]
        down, across = tiles // len(columns), tiles % len(columns)
        possible = classes[tiles, :count]  # (tiles, count)
        if count == 1:
            labels.index_copy_(0, tiles, possible[..., None].expand(-1, height, width))
            continue
        index = inside_columns[across][:, None, None] + possible[:, None, :, None]
        index = inside_rows[down][:, :, None, None] + index  # (tiles, window, count, window)
        window = _limit(pixels.flatten().index_select(0, index.flatten()).view_as(index))
        # In float64, of whose products neither autocast nor another setting makes fewer bits.
        wide = window.flatten(1, 2).double() @ columns[across].mT  # (tiles, window * count, width)
        wide = wide.reshape(len(tiles), _WINDOW, count * width)
        parts = rows[down].split(max(1, _VALUES // wide[:, 0].numel()), dim=1)  # (tiles, some of the height, window)
        best = [(part @ wide).unflatten(2, (count, width)).max(dim=2).indices for part in parts]
        best = torch.cat(best, dim=1)  # (tiles, height, width)
        labels.index_copy_(0, tiles, possible.gather(1, best.flatten(1)).reshape(best.shape))


def _group(counts: Sequence[int], area: int) -> Iterator[tuple[int, int, int]]:
    """Runs of tiles for which as many classes are computed as the first one has: at most twice as many as any needs.

    Args:
        counts: Possible classes of each tile, in descending order.
        area: Pixels of a tile.
    """
    start = 0
    while start < len(counts):
        count = counts[start]
        half = bisect_left(counts, -(count // 2), lo=start, key=neg)  # the first tile with no more
        end = min(half, start + max(1, _VALUES // (count * area)))
        yield start, end, count
        start = end


def _find_possible_classes(pixels: torch.Tensor) -> torch.Tensor:
    """The classes of float32 `(rows, columns, classes)` that may be the best somewhere in a tile: bool
    `(tiles, classes)`.

    A mean is neither above the largest nor below the least of what it is of: a class is left out if another one's least
    in the window is above its largest.
    """
    cells = pixels[None].permute(0, 3, 1, 2)  # (1, classes, rows, columns), channels last
    window = [min(_WINDOW, side) for side in cells.shape[2:]]
    highest = _limit(F.max_pool2d(cells, window, _TILE, ceil_mode=True))  # (1, classes, tiles down, tiles across)
    lowest = -_limit(F.max_pool2d(-cells, window, _TILE, ceil_mode=True))
    rounding = _ROUNDING * torch.maximum(highest, -lowest)
    possible = highest + rounding >= (lowest - rounding).amax(dim=1, keepdim=True)
    return possible[0].flatten(1).T


def _list_classes(possible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The possible classes of each tile in their order, int32 `(tiles, classes + 1)`, filled up with class 0; and how
    many they are, int64 `(tiles,)`."""
    count = possible.shape[1]
    places = possible.cumsum(dim=1).sub_(1).masked_fill_(~possible, count)  # the others in the last column
    classes = possible.new_zeros(len(possible), count + 1, dtype=torch.int32)
    classes.scatter_(1, places, torch.arange(count, dtype=torch.int32).expand_as(places))
    return classes, possible.sum(dim=1)
