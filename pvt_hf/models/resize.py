"""Resizing as the released detectors and segmenters were trained: OpenCV's, to the last bit, without OpenCV."""

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
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * (source / target) - 0.5
    centres = centres.float()
    left = centres.floor()
    return left.long().to(device), (centres - left).to(device)


def resize_bilinear(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear without antialiasing, as OpenCV's `INTER_LINEAR`.

    Args:
        image: `(..., height, width)`. For uint8 the result has the bits of OpenCV's fixed-point arithmetic; any other
            dtype is computed in float32 (or float64) with the same weights.
        size: `(height, width)` in pixels.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    (rows, row_weights), (columns, column_weights) = (
        _find_taps(source, target, image.device) for source, target in zip(image.shape[-2:], size, strict=True)
    )
    last_row, last_column = image.shape[-2] - 1, image.shape[-1] - 1
    # Beyond the border the columns lose their weight and the rows only their index: the same but for rounding.
    column_weights = column_weights.masked_fill((columns < 0) | (columns >= last_column), 0)
    left, top = columns.clamp(0, last_column), rows.clamp(0, last_row)
    right, bottom = (left + 1).clamp(max=last_column), (rows + 1).clamp(0, last_row)
    fixed_point = image.dtype == torch.uint8
    dtype = torch.int32 if fixed_point else torch.promote_types(image.dtype, torch.float32)
    weights = [1 - column_weights, column_weights, 1 - row_weights, row_weights]
    if fixed_point:
        weights = [(weight * 2048).round() for weight in weights]
    to_left, to_right, to_top, to_bottom = (weight.to(dtype) for weight in weights)
    pixels = image.to(dtype)
    pixels = pixels[..., left] * to_left + pixels[..., right] * to_right
    to_top, to_bottom = to_top[:, None], to_bottom[:, None]
    if not fixed_point:
        return pixels[..., top, :] * to_top + pixels[..., bottom, :] * to_bottom
    pixels >>= 4
    pixels = (pixels[..., top, :] * to_top >> 16) + (pixels[..., bottom, :] * to_bottom >> 16)
    return (pixels + 2 >> 2).to(torch.uint8)


def resize_nearest(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Nearest, as OpenCV's `INTER_NEAREST`: for masks and label maps.

    Args:
        image: `(..., height, width)` of any dtype.
        size: `(height, width)` in pixels.
    """
    rows, columns = (
        (torch.arange(target, dtype=torch.float64) * (1 / (target / source))).long().to(image.device)
        for source, target in zip(image.shape[-2:], size, strict=True)
    )
    return image[..., rows.clamp(max=image.shape[-2] - 1), :][..., columns.clamp(max=image.shape[-1] - 1)]
