"""Pictures of semantic segmentation: image, truth and prediction side by side, with the names of the classes."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .image_processing_segmentation import IGNORED

_OPACITY = 0.65


def palette(num_labels: int) -> torch.Tensor:
    """A colour for every class, uint8 `(num_labels, 3)`. The first is grey, which suits a background; the hues of the
    others are far apart from one class to the next."""
    colors = [(0.5, 0.5, 0.5)]
    for label in range(1, num_labels):
        hue = label * 0.618034 % 1
        colors.append(colorsys.hsv_to_rgb(hue, (0.9, 0.6)[label // 7 % 2], (1.0, 0.75)[label // 14 % 2]))
    return (torch.tensor(colors[:num_labels]) * 255).round().to(torch.uint8)


def overlay(image: torch.Tensor, labels: torch.Tensor, colors: torch.Tensor) -> torch.Tensor:
    """An image in the colours of its classes, through which its brightness shows.

    Args:
        image: uint8 `(3, height, width)`, RGB.
        labels: int64 `(height, width)`; where they are 255 the pixels are black.
        colors: uint8 `(num_labels, 3)`, from [`palette`].

    Returns:
        uint8 `(3, height, width)`.
    """
    brightness = image.float().mean(0)
    ignored = labels == IGNORED
    painted = colors[labels.masked_fill(ignored, 0)].movedim(-1, 0).float()
    mixed = _OPACITY * painted + (1 - _OPACITY) * brightness
    return mixed.masked_fill(ignored, 0).round().to(torch.uint8)


def draw_overlays(
    samples: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], names: Mapping[int, str], file: str | Path
) -> None:
    """Writes a PNG with a row for each sample: image, truth, prediction, and a legend of the classes in either.

    Args:
        samples: Image, uint8 `(3, height, width)`, RGB; truth and prediction, int64 `(height, width)`, 255 where
            ignored, which is black.
        names: Of all classes.
        file: To be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colors = palette(len(names))
    figure = Figure(figsize=(11, 2.7 * len(samples) + 0.3), layout="constrained")
    grid = figure.subplots(len(samples), 4, squeeze=False, width_ratios=(3, 3, 3, 2))
    for axes, (image, truth, prediction) in zip(grid, samples, strict=True):
        for axis in axes:
            axis.axis("off")
        pictures = (image, overlay(image, truth, colors), overlay(image, prediction, colors))
        for axis, picture in zip(axes, pictures, strict=False):
            axis.imshow(picture.movedim(0, -1).numpy())
        valid = truth != IGNORED
        axes[2].set_title(f"{100 * (truth == prediction)[valid].float().mean():.1f} % of the pixels right", fontsize=8)
        present = torch.cat([truth[valid], prediction.flatten()]).unique().tolist()
        handles = [Patch(color=(colors[label] / 255).tolist(), label=names[label]) for label in present]
        if not valid.all():
            handles.append(Patch(color="black", label="ignored"))
        axes[3].legend(handles=handles, loc="center left", frameon=False, fontsize=9, ncols=1 + len(handles) // 13)
    for axis, title in zip(grid[0], ("image", "truth", "prediction"), strict=False):
        axis.set_title("\n".join(filter(None, (title, axis.get_title()))), fontsize=9)
    figure.savefig(file, dpi=100)
