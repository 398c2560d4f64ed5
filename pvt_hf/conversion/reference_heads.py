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


def pyramid(weights: StateDict, maps: Sequence[torch.Tensor], on_output: bool = False) -> list[torch.Tensor]:
    """The neck: as many levels as maps, and one more for each convolution beyond them. The first of these reads the
    last map, or with `on_output` the last of the other levels."""
    count = len(maps)
    merged = [conv(weights, f"neck.lateral_convs.{level}.conv", map_) for level, map_ in enumerate(maps)]
    for level in reversed(range(count - 1)):
        merged[level] = merged[level] + upsampled(merged[level + 1], *merged[level].shape[2:])
    levels = [conv(weights, f"neck.fpn_convs.{level}.conv", map_, padding=1) for level, map_ in enumerate(merged)]
    source = levels[-1] if on_output else maps[-1]
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


def normed_tower(weights: StateDict, name: str, x: torch.Tensor, groups: int) -> torch.Tensor:
    """Convolutions without a bias, each with a group norm and a ReLU, as many as there are."""
    index = 0
    while (layer := f"{name}.{index}") + ".conv.weight" in weights:
        x = conv(weights, f"{layer}.conv", x, padding=1)
        parts = []
        for part in x.chunk(groups, dim=1):
            centred = part - part.mean((1, 2, 3), keepdim=True)
            parts.append(centred / torch.sqrt(centred.square().mean((1, 2, 3), keepdim=True) + 1e-5))
        scale, shift = (weights[f"{layer}.gn.{part}"][:, None, None] for part in ("weight", "bias"))
        x = (torch.cat(parts, dim=1) * scale + shift).clamp(min=0)
        index += 1
    return x


def atss(weights: StateDict, levels: Sequence[torch.Tensor], groups: int = 32) -> list[tuple[torch.Tensor, ...]]:
    """Per level the class logits (batch, anchors, classes), the box deltas (batch, anchors, 4) and the logits of the
    centerness (batch, anchors, 1)."""
    outputs = []
    for index, level in enumerate(levels):
        classes = normed_tower(weights, "bbox_head.cls_convs", level, groups)
        boxes = normed_tower(weights, "bbox_head.reg_convs", level, groups)
        classes = conv(weights, "bbox_head.atss_cls", classes, padding=1)
        deltas = conv(weights, "bbox_head.atss_reg", boxes, padding=1) * weights[f"bbox_head.scales.{index}.scale"]
        centerness = conv(weights, "bbox_head.atss_centerness", boxes, padding=1)
        outputs.append((rows(classes, classes.shape[1]), rows(deltas, 4), rows(centerness, 1)))
    return outputs


def gfl(weights: StateDict, levels: Sequence[torch.Tensor], groups: int = 32) -> list[tuple[torch.Tensor, ...]]:
    """Per level the class logits (batch, anchors, classes) and the logits of the distances to the four sides (batch,
    anchors, 4 * bins), left, top, right and bottom."""
    outputs = []
    for index, level in enumerate(levels):
        classes = normed_tower(weights, "bbox_head.cls_convs", level, groups)
        boxes = normed_tower(weights, "bbox_head.reg_convs", level, groups)
        classes = conv(weights, "bbox_head.gfl_cls", classes, padding=1)
        distances = conv(weights, "bbox_head.gfl_reg", boxes, padding=1) * weights[f"bbox_head.scales.{index}.scale"]
        outputs.append((rows(classes, classes.shape[1]), rows(distances, distances.shape[1])))
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


def mask_head(weights: StateDict, features: torch.Tensor, name: str = "roi_head.mask_head") -> torch.Tensor:
    """RoI features (regions, channels, 14, 14) to mask logits (regions, classes, 28, 28)."""
    for index in range(4):
        features = conv(weights, f"{name}.convs.{index}.conv", features, padding=1).clamp(min=0)
    kernel, bias = weights[f"{name}.upsample.weight"], weights[f"{name}.upsample.bias"]
    features = F.conv_transpose2d(features, kernel, bias, stride=2).clamp(min=0)
    return conv(weights, f"{name}.conv_logits", features)


def cascade_box_head(
    weights: StateDict, features: torch.Tensor, stage: int, batch_statistics: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`box_head`], of a stage of the cascade; with `batch_statistics` as in training."""
    name = f"roi_head.bbox_head.{stage}"
    for index in range(4):
        features = conv(weights, f"{name}.shared_convs.{index}.conv", features, padding=1)
        scale, shift, mean, variance = (
            weights[f"{name}.shared_convs.{index}.bn.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        if batch_statistics:
            mean = features.mean((0, 2, 3), keepdim=True)
            variance = (features - mean).square().mean((0, 2, 3), keepdim=True)
        features = ((features - mean) / torch.sqrt(variance + 1e-5) * scale + shift).clamp(min=0)
    hidden = linear(weights, f"{name}.shared_fcs.0", features.flatten(1)).clamp(min=0)
    return linear(weights, f"{name}.fc_cls", hidden), linear(weights, f"{name}.fc_reg", hidden)


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


def linear(weights: StateDict, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: StateDict, name: str, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attention(
    weights: StateDict,
    name: str,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    ignored: torch.Tensor | None,
    heads: int,
) -> torch.Tensor:
    """Multi-head attention over (batch, tokens, channels); no query looks at the keys that are `ignored`."""
    matrix, bias = weights[f"{name}.in_proj_weight"], weights[f"{name}.in_proj_bias"]
    size = matrix.shape[1]
    width = size // heads
    queries, keys, values = (
        x @ matrix[part * size : (part + 1) * size].T + bias[part * size : (part + 1) * size]
        for part, x in enumerate((queries, keys, values))
    )
    outputs = []
    for head in range(heads):
        channels = slice(head * width, (head + 1) * width)
        scores = queries[..., channels] @ keys[..., channels].transpose(1, 2) / width**0.5
        if ignored is not None:
            scores = scores.masked_fill(ignored[:, None, :], -torch.inf)
        outputs.append(scores.softmax(-1) @ values[..., channels])
    return linear(weights, f"{name}.out_proj", torch.cat(outputs, -1))


def feed_forward(weights: StateDict, name: str, x: torch.Tensor) -> torch.Tensor:
    return linear(weights, f"{name}.layers.1", linear(weights, f"{name}.layers.0.0", x).clamp(min=0))


def sine_positions(ignored: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """(batch, height, width, size) for a map whose padding is `ignored`: rows in the first half, columns in the second.
    Cells are counted from 1 and the last one that is not padding gets an angle of 2 pi."""
    valid = (~ignored).to(dtype)
    halves = []
    for axis in (1, 2):
        counts = valid.cumsum(axis)
        angles = counts / (counts.narrow(axis, counts.shape[axis] - 1, 1) + 1e-6) * 2 * torch.pi
        channels = []
        for pair in range(size // 4):
            angle = angles / 10000 ** (4 * pair / size)
            channels += [angle.sin(), angle.cos()]
        halves.append(torch.stack(channels, -1))
    return torch.cat(halves, -1)


def detr(
    weights: StateDict, feature_map: torch.Tensor, mask: torch.Tensor, heads: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """The class logits (layers, batch, queries, classes + 1), no object last, and the boxes, relative cxcywh (layers,
    batch, queries, 4), of every decoder layer, in evaluation mode. The last layer gives the detections.

    `feature_map` is that of stage 4; `mask` (batch, image height, image width) is True on padding.
    """
    start = "bbox_head.transformer"
    projected = conv(weights, "bbox_head.input_proj", feature_map)
    batch, size, height, width = projected.shape
    lines = torch.arange(height) * mask.shape[1] // height
    columns = torch.arange(width) * mask.shape[2] // width
    ignored = mask[:, lines][:, :, columns]
    positions = sine_positions(ignored, size, projected.dtype).flatten(1, 2)
    ignored = ignored.flatten(1)

    memory = projected.flatten(2).transpose(1, 2)
    layer = 0
    while (name := f"{start}.encoder.layers.{layer}") + ".norms.0.weight" in weights:
        located = memory + positions
        update = attention(weights, f"{name}.attentions.0.attn", located, located, memory, ignored, heads)
        memory = norm(weights, f"{name}.norms.0", memory + update)
        memory = norm(weights, f"{name}.norms.1", memory + feed_forward(weights, f"{name}.ffns.0", memory))
        layer += 1

    queries = weights["bbox_head.query_embedding.weight"].expand(batch, -1, -1)
    state = torch.zeros_like(queries)
    logits: list[torch.Tensor] = []
    boxes: list[torch.Tensor] = []
    while (name := f"{start}.decoder.layers.{len(logits)}") + ".norms.0.weight" in weights:
        located = state + queries
        update = attention(weights, f"{name}.attentions.0.attn", located, located, state, None, heads)
        state = norm(weights, f"{name}.norms.0", state + update)
        update = attention(
            weights, f"{name}.attentions.1.attn", state + queries, memory + positions, memory, ignored, heads
        )
        state = norm(weights, f"{name}.norms.1", state + update)
        state = norm(weights, f"{name}.norms.2", state + feed_forward(weights, f"{name}.ffns.0", state))
        output = norm(weights, f"{start}.decoder.post_norm", state)
        logits.append(linear(weights, "bbox_head.fc_cls", output))
        hidden = feed_forward(weights, "bbox_head.reg_ffn", output).clamp(min=0)
        boxes.append(torch.sigmoid(linear(weights, "bbox_head.fc_reg", hidden)))
    return torch.stack(logits), torch.stack(boxes)


def interpolated(x: torch.Tensor, positions: torch.Tensor, axis: int) -> torch.Tensor:
    """Values between the cells of an axis, whose centres are at 0, 1, ...: zero beyond one cell outside of it."""
    length = x.shape[axis]
    inside = (positions >= -1) & (positions <= length)
    positions = positions.clamp(0, length - 1)
    low = positions.floor().long()
    fraction = positions - low
    shape = [-1 if index == axis else 1 for index in range(x.ndim)]
    parts = [
        x.index_select(axis, rows) * (share * inside).reshape(shape)
        for rows, share in ((low, 1 - fraction), ((low + 1).clamp(max=length - 1), fraction))
    ]
    return parts[0] + parts[1]


def region_features(levels: Sequence[torch.Tensor], boxes: torch.Tensor, size: int, samples: int) -> torch.Tensor:
    """Of boxes (batch, boxes, 4), xyxy in pixels, the features (batch, boxes, channels, size, size): means of
    `samples` x `samples` values in each of `size` x `size` parts, from the level of the box's scale (P2 ... P5)."""
    steps = (torch.arange(size * samples).to(boxes) + 0.5) / (size * samples)
    regions = []
    for image, image_boxes in enumerate(boxes):
        for x0, y0, x1, y1 in image_boxes.tolist():
            scale = torch.tensor((x1 - x0) * (y1 - y0), dtype=torch.double).sqrt() / 56 + 1e-6
            if scale.isnan():
                regions.append(levels[0].new_zeros(levels[0].shape[1], size, size))
                continue
            number = int(torch.floor(torch.log2(scale)).clamp(0, len(levels) - 1))
            stride, region = 4 * 2**number, levels[number][image]
            for axis, start, end in ((1, y0, y1), (2, x0, x1)):
                region = interpolated(region, start / stride - 0.5 + (end - start) / stride * steps, axis)
            regions.append(region.unflatten(2, (size, samples)).unflatten(1, (size, samples)).mean((2, 4)))
    return torch.stack(regions).unflatten(0, boxes.shape[:2])


def decoded(boxes: torch.Tensor, deltas: torch.Tensor, stds: Sequence[float]) -> torch.Tensor:
    """Boxes moved and scaled by deltas in the units of `stds`, all (..., 4), xyxy and not clipped."""
    dx, dy, dw, dh = (delta * std for delta, std in zip(deltas.unbind(-1), stds, strict=True))
    x0, y0, x1, y1 = boxes.unbind(-1)
    limit = 4.135166556742356
    width, height = (x1 - x0) * dw.clamp(-limit, limit).exp(), (y1 - y0) * dh.clamp(-limit, limit).exp()
    x, y = (x0 + x1) / 2 + (x1 - x0) * dx, (y0 + y1) / 2 + (y1 - y0) * dy
    return torch.stack((x - width / 2, y - height / 2, x + width / 2, y + height / 2), -1)


def dynamic_convolution(weights: StateDict, name: str, state: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """Features of the proposals (batch, proposals, channels) and of their boxes (batch, proposals, channels, 7, 7)."""
    channels = state.shape[-1]
    inner = len(weights[f"{name}.norm_in.weight"])
    parameters = linear(weights, f"{name}.dynamic_layer", state)
    matrices = parameters[..., : channels * inner].unflatten(-1, (channels, inner))
    x = norm(weights, f"{name}.norm_in", regions.flatten(3).transpose(2, 3) @ matrices).clamp(min=0)
    matrices = parameters[..., channels * inner :].unflatten(-1, (inner, channels))
    x = norm(weights, f"{name}.norm_out", x @ matrices).clamp(min=0).flatten(2)
    return norm(weights, f"{name}.fc_norm", linear(weights, f"{name}.fc_layer", x)).clamp(min=0)


def normed_layers(weights: StateDict, name: str, x: torch.Tensor) -> torch.Tensor:
    """Linear layers without a bias, each with a norm and a ReLU, as many as there are."""
    index = 0
    while f"{name}.{index}.weight" in weights:
        x = norm(weights, f"{name}.{index + 1}", x @ weights[f"{name}.{index}.weight"].T).clamp(min=0)
        index += 3
    return x


def sparse_rcnn(
    weights: StateDict, levels: Sequence[torch.Tensor], sizes: Sequence[Sequence[int]], heads: int = 8
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The class logits (batch, proposals, classes) and the boxes (batch, proposals, 4), xyxy in pixels, of every stage,
    for images of these (height, width) without padding."""
    cx, cy, w, h = weights["rpn_head.init_proposal_bboxes.weight"].unbind(-1)
    corners = torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), -1)
    boxes = torch.stack([corners * corners.new_tensor([width, height] * 2) for height, width in sizes])
    state = weights["rpn_head.init_proposal_features.weight"].expand(len(sizes), -1, -1)
    outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    while (name := f"roi_head.bbox_head.{len(outputs)}") + ".fc_cls.weight" in weights:
        regions = region_features(levels, boxes.detach(), 7, 2)
        update = attention(weights, f"{name}.attention.attn", state, state, state, None, heads)
        state = norm(weights, f"{name}.attention_norm", state + update)
        update = dynamic_convolution(weights, f"{name}.instance_interactive_conv", state, regions)
        state = norm(weights, f"{name}.instance_interactive_conv_norm", state + update)
        state = norm(weights, f"{name}.ffn_norm", state + feed_forward(weights, f"{name}.ffn", state))
        logits = linear(weights, f"{name}.fc_cls", normed_layers(weights, f"{name}.cls_fcs", state))
        deltas = linear(weights, f"{name}.fc_reg", normed_layers(weights, f"{name}.reg_fcs", state))
        outputs.append((logits, decoded(boxes, deltas, (0.5, 0.5, 1, 1))))
        boxes = outputs[-1][1].detach()
    return outputs
