"""Resizing as the released detectors and segmenters were trained: OpenCV's, to the last bit, with OpenCV or without."""

from functools import cache
from types import ModuleType

import numpy as np
import torch


def keep_ratio_size(
    height: int, width: int, shortest_edge: float, longest_edge: float = float("inf")
) -> tuple[int, int]:
    """The largest height and width of the same aspect ratio within both limits, each rounded to the nearest pixel
    (mmcv's `rescale_size`).

    Args:
        height: In pixels.
        width: In pixels.
        shortest_edge: Limit of the shorter side in pixels.
        longest_edge: Limit of the longer side in pixels (default: none).
    """
    factor = min(longest_edge / max(height, width), shortest_edge / min(height, width))
    return scale_sides(height, width, factor)


def scale_sides(height: int, width: int, factor: float) -> tuple[int, int]:
    """Both sides times the factor, rounded to the nearest pixel, at least one.

    Args:
        height: In pixels.
        width: In pixels.
        factor: Of both.
    """
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def _find_taps(source: int, target: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For every target pixel of an axis the left one of its two source pixels, which may lie outside the image, and
    the weight of the right one: int64 and float32, `(target,)`."""
    centres = (torch.arange(target, dtype=torch.float64, device=device) + 0.5) * (source / target) - 0.5
    centres = centres.float()
    left = centres.floor()
    return left.long(), centres - left


def resize_bilinear(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear without antialiasing, as OpenCV's `INTER_LINEAR`.

    Args:
        image: `(..., height, width)`. For uint8 the result has the bits of OpenCV's fixed-point arithmetic, and where
            OpenCV is installed it computes on a CPU; any other dtype is computed in float32 (or float64) with the same
            weights.
        size: `(height, width)` in pixels.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    if image.dtype == torch.uint8:
        is_picture = image.ndim == 3 and 1 <= len(image) <= 4 and image.device.type == "cpu"
        cv2 = find_opencv() if is_picture else None
        return _resize_with_opencv(cv2, image, size) if cv2 else _resize_uint8(image, size)
    dtype = torch.promote_types(image.dtype, torch.float32)
    (left, right), (top, bottom), weights = _find_sources(image, size)
    to_left, to_right, to_top, to_bottom = (weight.to(dtype) for weight in weights)
    pixels = image.to(dtype)
    pixels = pixels[..., left] * to_left + pixels[..., right] * to_right
    return pixels[..., top, :] * to_top[:, None] + pixels[..., bottom, :] * to_bottom[:, None]


def _find_sources(
    image: torch.Tensor, size: tuple[int, int]
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor], list[torch.Tensor]]:
    """The left and the right column of every target column, the upper and the lower row of every target row, and the
    weights of all four."""
    (rows, row_weights), (columns, column_weights) = (
        _find_taps(source, target, image.device) for source, target in zip(image.shape[-2:], size, strict=True)
    )
    last_row, last_column = image.shape[-2] - 1, image.shape[-1] - 1
    # Beyond the border the columns lose their weight and the rows only their index: the same but for rounding.
    column_weights = column_weights.masked_fill((columns < 0) | (columns >= last_column), 0)
    left, top = columns.clamp(0, last_column), rows.clamp(0, last_row)
    right, bottom = (left + 1).clamp(max=last_column), (rows + 1).clamp(0, last_row)
    return (left, right), (top, bottom), [1 - column_weights, column_weights, 1 - row_weights, row_weights]


@cache
def find_opencv() -> ModuleType | None:
    """OpenCV, where it is installed and gives the bits that are computed here without it: for some processors it is
    built with other arithmetic."""
    try:
        import cv2
    except ImportError:
        return None
    probe = torch.arange(3 * 37 * 53).mul(97).fmod(251).byte().reshape(3, 37, 53)
    for size in ((61, 88), (20, 31), (37, 60)):
        if not _resize_with_opencv(cv2, probe, size).equal(_resize_uint8(probe, size)):
            return None
    return cv2


def _resize_with_opencv(cv2: ModuleType, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Several times as fast, with no more threads than torch has."""
    if cv2.getNumThreads() > torch.get_num_threads():
        cv2.setNumThreads(torch.get_num_threads())
    pixels = image.permute(1, 2, 0).contiguous().numpy()  # (height, width, channels), as images are read
    resized = torch.from_numpy(cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_LINEAR))
    return resized.reshape(*size, len(image)).permute(2, 0, 1)


# Rows of the result that a CPU computes together: what belongs to them stays in the cache.
_CHUNK = 32


def _resize_uint8(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """As OpenCV does: weights are whole numbers up to 2048, the sum of two columns is cut by four of its 19 bits, what
    two rows then add is cut to ten, and their sum is rounded to eight."""
    (left, right), (top, bottom), weights = _find_sources(image, size)
    weights = [(weight * 2048).round() for weight in weights]
    to_left, to_right = weights[0] / 16, weights[1] / 16  # in float32, which has all bits of the sum
    to_top, to_bottom = (weight.int()[:, None] for weight in weights[2:])
    image = image.contiguous()
    resized = torch.empty(*image.shape[:-2], *size, dtype=torch.uint8, device=image.device)
    chunk = _CHUNK if image.device.type == "cpu" else size[0]
    for start in range(0, size[0], chunk):
        here = slice(start, start + chunk)
        first, end = (0, image.shape[-2]) if chunk == size[0] else (int(top[here][0]), int(bottom[here][-1]) + 1)
        source = image[..., first:end, :]
        mixed = _take_columns(source, left).float().mul_(to_left)
        mixed = mixed.addcmul_(_take_columns(source, right).float(), to_right).int()  # (..., rows, target width)
        pixels = mixed.index_select(-2, top[here] - first).mul_(to_top[here]).bitwise_and_(-1 << 16)
        # The sum of a number without its lower 16 bits and another one has the upper bits of both.
        pixels.addcmul_(mixed.index_select(-2, bottom[here] - first), to_bottom[here])
        resized[..., here, :] = pixels.add_(2 << 16).bitwise_right_shift_(18)
    return resized


def _take_columns(image: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    if image.device.type != "cpu":
        return image.index_select(-1, columns)
    return torch.from_numpy(np.take(image.numpy(), columns.numpy(), axis=-1))  # several times as fast


def resize_nearest(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Nearest, as OpenCV's `INTER_NEAREST`: for masks and label maps.

    Args:
        image: `(..., height, width)` of any dtype.
        size: `(height, width)` in pixels.
    """
    rows, columns = (
        (torch.arange(target, dtype=torch.float64, device=image.device) * (1 / (target / source))).long()
        for source, target in zip(image.shape[-2:], size, strict=True)
    )
    return image[..., rows.clamp(max=image.shape[-2] - 1), :][..., columns.clamp(max=image.shape[-1] - 1)]
