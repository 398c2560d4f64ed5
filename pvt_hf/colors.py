"""Photometric distortion in 8 bits, as mmsegmentation's models were trained with."""

import numpy as np
import torch


def to_hsv(image: torch.Tensor) -> torch.Tensor:
    """uint8 `(3, height, width)` RGB to hue in [0, 180), saturation and value in [0, 255], as OpenCV's `COLOR_RGB2HSV`
    in its fixed-point arithmetic."""
    red, green, blue = image.int().unbind()
    value, low = image.amax(0).int(), image.amin(0).int()
    difference = value - low

    def reciprocals(numerator: float) -> torch.Tensor:
        table = np.rint(numerator * 4096 / np.maximum(np.arange(256), 1)).astype(np.int32)
        table[0] = 0
        return torch.from_numpy(table).to(image.device)

    saturation = (difference * reciprocals(255)[value.long()] + 2048) >> 12
    hue = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * difference, red - green + 4 * difference),
    )
    hue = (hue * reciprocals(180 / 6)[difference.long()] + 2048) >> 12
    return torch.stack([torch.where(hue < 0, hue + 180, hue), saturation, value]).to(torch.uint8)


def to_rgb(image: torch.Tensor) -> torch.Tensor:
    """The inverse of [`to_hsv`], within a grey level of OpenCV's `COLOR_HSV2RGB`, which cuts fractions off."""
    hue, saturation, value = image.float().unbind()
    hue, saturation = hue / 30, saturation / 255
    # Each channel falls from the value by the saturation where the hue is far from that of the channel.
    channels = [
        value * (1 - saturation * (1 - ((hue - centre + 3) % 6 - 3).abs().sub(2).neg().clamp(0, 1)))
        for centre in (0, 2, 4)
    ]
    return torch.stack(channels).clamp(0, 255).to(torch.uint8)


def _linear(image: torch.Tensor, factor: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    return (image.float() * factor + offset).clamp(0, 255).to(torch.uint8)


def photometric_distortion(image: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """mmsegmentation's `PhotoMetricDistortion`: brightness up to 32 grey levels, contrast and saturation by 0.5 to 1.5,
    hue up to 18 of 180, each for half of the images; contrast before or after the colours.

    Args:
        image: uint8 `(3, height, width)`, RGB.
        generator: Decides everything.
    """

    def contrast(image: torch.Tensor) -> torch.Tensor:
        return _linear(image, generator.uniform(0.5, 1.5)) if generator.integers(2) else image

    if generator.integers(2):
        image = _linear(image, offset=generator.uniform(-32, 32))
    contrast_first = generator.integers(2)
    if contrast_first:
        image = contrast(image)
    if generator.integers(2):
        hsv = to_hsv(image)
        hsv[1] = _linear(hsv[1], generator.uniform(0.5, 1.5))
        image = to_rgb(hsv)
    if generator.integers(2):
        hsv = to_hsv(image)
        hsv[0] = ((hsv[0].int() + int(generator.integers(-18, 18))) % 180).to(torch.uint8)
        image = to_rgb(hsv)
    return image if contrast_first else contrast(image)
