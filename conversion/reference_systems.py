"""Independent evaluation of the official detectors' and the segmenter's state dicts, from feature maps to raw outputs.

As `reference.py`, which gives the feature maps: plain functions, no code of pvt_hf, in the dtype of the state dict.
Keys are those of mmdetection 2.13 and mmsegmentation 0.13 (`neck.lateral_convs.0.conv.weight`, ...).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

StateDict = Mapping[str, torch.Tensor]


def conv(weights: StateDict, name: str, x: torch.Tensor, **options) -> torch.Tensor:
    return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), **options)


def upsampled(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Nearest neighbour: output pixel i takes input pixel floor(i * input size / output size)."""
    rows = torch.arange(height) * x.shape[2] // height
    columns = torch.arange(width) * x.shape[3] // width
    return x[:, :, rows][:, :, :, columns]


def pyramid(weights: StateDict, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The neck: as many levels as maps, and one more for each convolution beyond them."""
    count = len(maps)
    merged = [conv(weights, f"neck.lateral_convs.{level}.conv", map_) for level, map_ in enumerate(maps)]
    for level in reversed(range(count - 1)):
        merged[level] = merged[level] + upsampled(merged[level + 1], *merged[level].shape[2:])
    levels = [conv(weights, f"neck.fpn_convs.{level}.conv", map_, padding=1) for level, map_ in enumerate(merged)]
    source = maps[-1]
    while f"neck.fpn_convs.{len(levels)}.conv.weight" in weights:
        source = conv(weights, f"neck.fpn_convs.{len(levels)}.conv", source, stride=2, padding=1)
        levels.append(source)
    return levels


def rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """(batch, anchors * width, height, width) to (batch, height * width * anchors, width)."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, width)


def retinanet(weights: StateDict, levels: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per level the class logits (batch, anchors, classes) and the box deltas (batch, anchors, 4)."""
    num_classes = len(weights["bbox_head.retina_cls.bias"]) // (len(weights["bbox_head.retina_reg.bias"]) // 4)
    outputs = []
    for level in levels:
        classes = boxes = level
        for index in range(4):
            classes = conv(weights, f"bbox_head.cls_convs.{index}.conv", classes, padding=1).clamp(min=0)
            boxes = conv(weights, f"bbox_head.reg_convs.{index}.conv", boxes, padding=1).clamp(min=0)
        classes = conv(weights, "bbox_head.retina_cls", classes, padding=1)
        boxes = conv(weights, "bbox_head.retina_reg", boxes, padding=1)
        outputs.append((rows(classes, num_classes), rows(boxes, 4)))
    return outputs


def region_proposals(weights: StateDict, levels: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per level, P6 included, the objectness logits (batch, anchors, 1) and the box deltas (batch, anchors, 4)."""
    outputs = []
    for level in (*levels, levels[-1][:, :, ::2, ::2]):
        hidden = conv(weights, "rpn_head.rpn_conv", level, padding=1).clamp(min=0)
        logits, deltas = conv(weights, "rpn_head.rpn_cls", hidden), conv(weights, "rpn_head.rpn_reg", hidden)
        outputs.append((rows(logits, 1), rows(deltas, 4)))
    return outputs


def box_head(weights: StateDict, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """RoI features (regions, channels, 7, 7) to class logits, background last, and box deltas of every class."""
    hidden = features.flatten(1)
    for index in range(2):
        name = f"roi_head.bbox_head.shared_fcs.{index}"
        hidden = F.linear(hidden, weights[f"{name}.weight"], weights[f"{name}.bias"]).clamp(min=0)
    return tuple(
        F.linear(hidden, weights[f"roi_head.bbox_head.{name}.weight"], weights[f"roi_head.bbox_head.{name}.bias"])
        for name in ("fc_cls", "fc_reg")
    )


def mask_head(weights: StateDict, features: torch.Tensor) -> torch.Tensor:
    """RoI features (regions, channels, 14, 14) to mask logits (regions, classes, 28, 28)."""
    for index in range(4):
        features = conv(weights, f"roi_head.mask_head.convs.{index}.conv", features, padding=1).clamp(min=0)
    kernel, bias = weights["roi_head.mask_head.upsample.weight"], weights["roi_head.mask_head.upsample.bias"]
    features = F.conv_transpose2d(features, kernel, bias, stride=2).clamp(min=0)
    return conv(weights, "roi_head.mask_head.conv_logits", features)


def semantic_fpn(weights: StateDict, levels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Class logits (batch, classes, height / 4, width / 4), in evaluation mode."""
    total = None
    for index, level in enumerate(levels):
        for block in range(max(1, index)):
            name = f"decode_head.scale_heads.{index}.{2 * block}"
            level = conv(weights, f"{name}.conv", level, padding=1)
            mean, variance, scale, shift = (
                weights[f"{name}.bn.{part}"][:, None, None]
                for part in ("running_mean", "running_var", "weight", "bias")
            )
            level = ((level - mean) / torch.sqrt(variance + 1e-5) * scale + shift).clamp(min=0)
            if index:
                level = F.interpolate(level, scale_factor=2, mode="bilinear", align_corners=False)
        if total is None:
            total = level
        else:
            total = total + F.interpolate(level, size=total.shape[2:], mode="bilinear", align_corners=False)
    return conv(weights, "decode_head.conv_seg", total)
