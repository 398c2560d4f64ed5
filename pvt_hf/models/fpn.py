"""Feature pyramid network (arXiv 1612.03144), as mmdetection and mmsegmentation build it."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .winograd import Conv3x3


class FeaturePyramid(nn.Module):
    """Feature maps of a backbone in, as many or more levels of `out_channels` out, finest first.

    Convolutions have a bias, no norm and no activation; the top-down path is nearest-neighbour upsampling.

    Args:
        in_channels: Channels of the backbone's maps, finest first.
        out_channels: Channels of every level of the pyramid.
        num_extra_convs: Coarser levels that 3 x 3 convolutions of stride 2 make, each of the one before and without an
            activation between them: P6 and P7 of RetinaNet (default: 0).
        extra_convs_source: What the first of them reads, with mmdetection's names: `"on_input"`, the backbone's last
            map itself (the default, as in RetinaNet), or `"on_output"`, the last of the other levels (ATSS, GFL).
        extra_pooled_level: One coarser level that takes every second position of the last one: P6 of Mask R-CNN
            (default: False).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_extra_convs: int = 0,
        extra_convs_source: Literal["on_input", "on_output"] = "on_input",
        extra_pooled_level: bool = False,
    ):
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.output_convs = nn.ModuleList(Conv3x3(out_channels, out_channels) for _ in in_channels)
        self.extra_convs_source = extra_convs_source
        source_channels = in_channels[-1] if extra_convs_source == "on_input" else out_channels
        self.extra_convs = nn.ModuleList(
            nn.Conv2d(out_channels if index else source_channels, out_channels, 3, stride=2, padding=1)
            for index in range(num_extra_convs)
        )
        self.extra_pooled_level = extra_pooled_level

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases; loaded tensors are left as they are."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init.xavier_uniform_(module.weight)
                init.zeros_(module.bias)

    def forward(self, feature_maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """
        Args:
            feature_maps: C2 ... C5 or C3 ... C5, each `(batch, in_channels[i], height_i, width_i)`, finest first.

        Returns:
            P2 or P3 ... to P5, P6 or P7: `(batch, out_channels, height_i, width_i)`. An extra level has half the height
            and width of the level before, rounded up.
        """
        laterals = [conv(map_) for conv, map_ in zip(self.lateral_convs, feature_maps, strict=True)]
        for level in range(len(laterals) - 1, 0, -1):
            size = laterals[level - 1].shape[2:]
            laterals[level - 1] += F.interpolate(laterals[level], size=size, mode="nearest")
        levels = [conv(lateral) for conv, lateral in zip(self.output_convs, laterals, strict=True)]
        source = feature_maps[-1] if self.extra_convs_source == "on_input" else levels[-1]
        for conv in self.extra_convs:
            source = conv(source)
            levels.append(source)
        if self.extra_pooled_level:
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return levels
