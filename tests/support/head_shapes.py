"""Random checkpoints with the names and shapes of the official detectors and the segmenter (see `../keys/*.tsv`)."""

from collections.abc import Callable

import torch

from pvt_hf.variants import Variant
from tests.support.checkpoints import official_shapes
from tests.support.small_models import ROOT

Shapes = dict[str, tuple[int, ...]]


def listed_shapes(name: str) -> Shapes:
    """What `../keys/<name>.tsv` says."""
    lines = (ROOT / "tests" / "keys" / f"{name}.tsv").read_text().splitlines()
    rows = (line.split("\t") for line in lines)
    return {key: tuple(int(size) for size in shape.strip("()").split(",") if size.strip()) for key, shape in rows}


def conv(name: str, out_channels: int, in_channels: int, kernel: int, bias: bool = True) -> Shapes:
    shapes = {f"{name}.weight": (out_channels, in_channels, kernel, kernel)}
    return shapes | ({f"{name}.bias": (out_channels,)} if bias else {})


def linear(name: str, out_features: int, in_features: int) -> Shapes:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def neck(in_channels: tuple[int, ...], channels: int, num_extra: int = 0, on_output: bool = False) -> Shapes:
    shapes = {}
    for level, width in enumerate(in_channels):
        shapes |= conv(f"neck.lateral_convs.{level}.conv", channels, width, 1)
        shapes |= conv(f"neck.fpn_convs.{level}.conv", channels, channels, 3)
    for level in range(num_extra):
        width = channels if level or on_output else in_channels[-1]
        shapes |= conv(f"neck.fpn_convs.{len(in_channels) + level}.conv", channels, width, 3)
    return shapes


def semantic_fpn(in_channels: tuple[int, ...], num_labels: int = 150, channels: int = 256) -> Shapes:
    width = channels // 2
    shapes = neck(in_channels, channels) | conv("decode_head.conv_seg", num_labels, width, 1)
    for level in range(4):
        for block in range(max(1, level)):
            name = f"decode_head.scale_heads.{level}.{2 * block}"
            shapes |= conv(f"{name}.conv", width, width if block else channels, 3, bias=False)
            shapes |= {f"{name}.bn.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
            shapes[f"{name}.bn.num_batches_tracked"] = ()
    return shapes


def retinanet(in_channels: tuple[int, ...], num_labels: int = 80, channels: int = 256) -> Shapes:
    shapes = neck(in_channels[1:], channels, num_extra=2)
    for index in range(4):
        shapes |= conv(f"bbox_head.cls_convs.{index}.conv", channels, channels, 3)
        shapes |= conv(f"bbox_head.reg_convs.{index}.conv", channels, channels, 3)
    return (
        shapes
        | conv("bbox_head.retina_cls", 9 * num_labels, channels, 3)
        | conv("bbox_head.retina_reg", 36, channels, 3)
    )


def adaptive_head(in_channels: tuple[int, ...], channels: int) -> Shapes:
    """What ATSS and GFL have in common."""
    shapes = neck(in_channels[1:], channels, num_extra=2, on_output=True)
    for tower in ("cls", "reg"):
        for name in (f"bbox_head.{tower}_convs.{index}" for index in range(4)):
            shapes |= conv(f"{name}.conv", channels, channels, 3, bias=False)
            shapes |= {f"{name}.gn.{part}": (channels,) for part in ("weight", "bias")}
    return shapes | {f"bbox_head.scales.{level}.scale": () for level in range(5)}


def atss(in_channels: tuple[int, ...], num_labels: int = 80, channels: int = 256) -> Shapes:
    return (
        adaptive_head(in_channels, channels)
        | conv("bbox_head.atss_cls", num_labels, channels, 3)
        | conv("bbox_head.atss_reg", 4, channels, 3)
        | conv("bbox_head.atss_centerness", 1, channels, 3)
    )


def gfl(in_channels: tuple[int, ...], num_labels: int = 80, channels: int = 256) -> Shapes:
    return (
        adaptive_head(in_channels, channels)
        | conv("bbox_head.gfl_cls", num_labels, channels, 3)
        | conv("bbox_head.gfl_reg", 68, channels, 3)
        | {"bbox_head.integral.project": (17,)}
    )


def faster_rcnn(in_channels: tuple[int, ...], num_labels: int = 80, channels: int = 256, hidden: int = 1024) -> Shapes:
    return (
        neck(in_channels, channels)
        | conv("rpn_head.rpn_conv", channels, channels, 3)
        | conv("rpn_head.rpn_cls", 3, channels, 1)
        | conv("rpn_head.rpn_reg", 12, channels, 1)
        | linear("roi_head.bbox_head.fc_cls", num_labels + 1, hidden)
        | linear("roi_head.bbox_head.fc_reg", 4 * num_labels, hidden)
        | linear("roi_head.bbox_head.shared_fcs.0", hidden, 49 * channels)
        | linear("roi_head.bbox_head.shared_fcs.1", hidden, hidden)
    )


def mask_rcnn(in_channels: tuple[int, ...], num_labels: int = 80, channels: int = 256, hidden: int = 1024) -> Shapes:
    shapes = faster_rcnn(in_channels, num_labels, channels, hidden)
    for index in range(4):
        shapes |= conv(f"roi_head.mask_head.convs.{index}.conv", channels, channels, 3)
    return (
        shapes
        | conv("roi_head.mask_head.upsample", channels, channels, 2)
        | conv("roi_head.mask_head.conv_logits", num_labels, channels, 1)
    )


def detr(in_channels: tuple[int, ...], num_labels: int = 80, channels: int = 256, hidden: int = 2048) -> Shapes:
    shapes = (
        conv("bbox_head.input_proj", channels, in_channels[-1], 1)
        | linear("bbox_head.fc_cls", num_labels + 1, channels)
        | linear("bbox_head.reg_ffn.layers.0.0", channels, channels)
        | linear("bbox_head.reg_ffn.layers.1", channels, channels)
        | linear("bbox_head.fc_reg", 4, channels)
        | {"bbox_head.query_embedding.weight": (100, channels)}
        | {f"bbox_head.transformer.decoder.post_norm.{part}": (channels,) for part in ("weight", "bias")}
    )
    for part, num_attentions in (("encoder", 1), ("decoder", 2)):
        for name in (f"bbox_head.transformer.{part}.layers.{layer}" for layer in range(6)):
            for index in range(num_attentions):
                attention = f"{name}.attentions.{index}.attn"
                shapes |= {f"{attention}.in_proj_weight": (3 * channels, channels)}
                shapes |= {f"{attention}.in_proj_bias": (3 * channels,)}
                shapes |= linear(f"{attention}.out_proj", channels, channels)
            shapes |= linear(f"{name}.ffns.0.layers.0.0", hidden, channels)
            shapes |= linear(f"{name}.ffns.0.layers.1", channels, hidden)
            for index in range(num_attentions + 1):
                shapes |= {f"{name}.norms.{index}.{part_}": (channels,) for part_ in ("weight", "bias")}
    return shapes


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.{part}": (channels,) for part in ("weight", "bias")}


def sparse_rcnn(
    in_channels: tuple[int, ...],
    num_labels: int = 80,
    channels: int = 256,
    hidden: int = 2048,
    proposals: int = 300,
    heads: int = 6,
    dynamic: int = 64,
) -> Shapes:
    shapes = neck(in_channels, channels)
    shapes |= {"rpn_head.init_proposal_bboxes.weight": (proposals, 4)}
    shapes |= {"rpn_head.init_proposal_features.weight": (proposals, channels)}
    for name in (f"roi_head.bbox_head.{index}" for index in range(heads)):
        shapes |= linear(f"{name}.fc_cls", num_labels, channels) | linear(f"{name}.fc_reg", 4, channels)
        shapes |= {f"{name}.attention.attn.in_proj_weight": (3 * channels, channels)}
        shapes |= {f"{name}.attention.attn.in_proj_bias": (3 * channels,)}
        shapes |= linear(f"{name}.attention.attn.out_proj", channels, channels)
        shapes |= norm(f"{name}.attention_norm", channels)
        dynamic_conv = f"{name}.instance_interactive_conv"
        shapes |= linear(f"{dynamic_conv}.dynamic_layer", 2 * channels * dynamic, channels)
        shapes |= norm(f"{dynamic_conv}.norm_in", dynamic) | norm(f"{dynamic_conv}.norm_out", channels)
        shapes |= linear(f"{dynamic_conv}.fc_layer", channels, 49 * channels) | norm(
            f"{dynamic_conv}.fc_norm", channels
        )
        shapes |= norm(f"{dynamic_conv}_norm", channels)
        shapes |= linear(f"{name}.ffn.layers.0.0", hidden, channels) | linear(f"{name}.ffn.layers.1", channels, hidden)
        shapes |= norm(f"{name}.ffn_norm", channels)
        for layer in (f"{name}.cls_fcs.0", *(f"{name}.reg_fcs.{3 * index}" for index in range(3))):
            shapes |= {f"{layer}.weight": (channels, channels)}
            shapes |= norm(f"{layer[:-1]}{int(layer[-1]) + 1}", channels)
    return shapes


def cascade_rcnn(in_channels: tuple[int, ...], num_labels: int = 80, channels: int = 256, hidden: int = 1024) -> Shapes:
    shapes = (
        neck(in_channels, channels)
        | conv("rpn_head.rpn_conv", channels, channels, 3)
        | conv("rpn_head.rpn_cls", 3, channels, 1)
        | conv("rpn_head.rpn_reg", 12, channels, 1)
    )
    for name in (f"roi_head.bbox_head.{index}" for index in range(3)):
        shapes |= linear(f"{name}.fc_cls", num_labels + 1, hidden) | linear(f"{name}.fc_reg", 4 * num_labels, hidden)
        for layer in (f"{name}.shared_convs.{index}" for index in range(4)):
            shapes |= conv(f"{layer}.conv", channels, channels, 3, bias=False) | norm(f"{layer}.bn", channels)
            shapes |= {f"{layer}.bn.running_{part}": (channels,) for part in ("mean", "var")}
            shapes[f"{layer}.bn.num_batches_tracked"] = ()
        shapes |= linear(f"{name}.shared_fcs.0", hidden, 49 * channels)
    return shapes


def cascade_mask_rcnn(
    in_channels: tuple[int, ...], num_labels: int = 80, channels: int = 256, hidden: int = 1024
) -> Shapes:
    shapes = cascade_rcnn(in_channels, num_labels, channels, hidden)
    for name in (f"roi_head.mask_head.{index}" for index in range(3)):
        for layer in range(4):
            shapes |= conv(f"{name}.convs.{layer}.conv", channels, channels, 3)
        shapes |= conv(f"{name}.upsample", channels, channels, 2)
        shapes |= conv(f"{name}.conv_logits", num_labels, channels, 1)
    return shapes


def checkpoint_shapes(head: Callable[..., Shapes], variant: Variant, **options: int) -> Shapes:
    """Names and shapes of an official detector or segmenter on the official backbone, which has no classifier there.

    Args:
        head: Gives those of everything beside the backbone: [`retinanet`], [`detr`], ...
        variant: Of the backbone.
        options: Of `head`.
    """
    classifier = official_shapes(variant)
    kept = [key for key in classifier if not key.startswith(("head.", "norm.", "cls_token"))]
    backbone = {f"backbone.{key}": classifier[key] for key in kept}
    return backbone | head(variant.hidden_sizes, **options)


def checkpoint_weights(
    head: Callable[..., Shapes], variant: Variant, std: float = 0.05, **options: int
) -> dict[str, torch.Tensor]:
    """A random checkpoint with those names and shapes: norms near one, positive running variances."""
    weights = {}
    for name, shape in checkpoint_shapes(head, variant, **options).items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(40_000)
        elif name.endswith("running_var"):
            weights[name] = torch.empty(shape).uniform_(0.5, 2)
        elif name == "bbox_head.integral.project":
            weights[name] = torch.arange(17.0)
        else:
            is_norm = name.endswith("weight") and len(shape) == 1
            weights[name] = torch.empty(shape).normal_(std=std).add_(1 if is_norm else 0)
    return weights
