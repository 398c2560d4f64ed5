"""Random checkpoints of the detectors as they were released, and the models that they are converted to."""

import torch
import transformers

import pvt_hf
from pvt_hf.conversion import reference, reference_heads
from tests.support import checkpoints
from tests.support import reference_detection as loops
from tests.support.small_models import STAGES, small_config

CHANNELS, CLASSES, GROUPS = 16, 5, 4


def small_resnet(**overrides):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return transformers.ResNetConfig(**(sizes | overrides))


def backbone_config(name, **overrides):
    return small_resnet(**overrides) if name == "resnet" else small_config(name, **overrides)


def official_backbone(variant):
    """A random backbone as it is in a released detector: v1 has no CLS token, final norm and head there."""
    weights = checkpoints.official_weights(variant)
    return {
        f"backbone.{key}": value.double()
        for key, value in weights.items()
        if not key.startswith(("head.", "norm.", "cls_token"))
    }


def layer(name, *shape, std=0.1):
    return {f"{name}.weight": torch.randn(shape).double() * std, f"{name}.bias": torch.randn(shape[0]).double() * std}


def neck(in_channels, num_extra, on_output=False):
    weights = {}
    for level, channels in enumerate(in_channels):
        weights |= layer(f"neck.lateral_convs.{level}.conv", CHANNELS, channels, 1, 1)
        weights |= layer(f"neck.fpn_convs.{level}.conv", CHANNELS, CHANNELS, 3, 3)
    for extra in range(num_extra):
        channels = CHANNELS if extra or on_output else in_channels[-1]
        weights |= layer(f"neck.fpn_convs.{len(in_channels) + extra}.conv", CHANNELS, channels, 3, 3)
    return weights


def standardize(weights, name, outputs, mean, std):
    """Gives a layer, whose outputs these are, other weights so that they have this mean and standard deviation."""
    factor = std / outputs.std()
    weights[f"{name}.weight"] *= factor
    weights[f"{name}.bias"] *= factor
    weights[f"{name}.bias"] += mean - factor * outputs.mean()


def feature_maps(weights, pixels):
    """Those of the backbone of a released detector."""
    backbone = {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}
    return reference.feature_maps(backbone, pixels)


def official_retinanet(variant):
    """Logits around -3.5, so that many scores are above 0.05, and boxes in some distance from their anchors."""
    weights = official_backbone(variant) | neck(variant.hidden_sizes[1:], num_extra=2)
    for index in range(4):
        for tower in ("cls", "reg"):
            weights |= layer(f"bbox_head.{tower}_convs.{index}.conv", CHANNELS, CHANNELS, 3, 3)
    weights |= layer("bbox_head.retina_cls", 9 * CLASSES, CHANNELS, 3, 3)
    weights |= layer("bbox_head.retina_reg", 36, CHANNELS, 3, 3)
    pixels = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    levels = reference_heads.pyramid(weights, feature_maps(weights, pixels)[1:])
    logits, deltas = (torch.cat(x, dim=1) for x in zip(*reference_heads.retinanet(weights, levels), strict=True))
    standardize(weights, "bbox_head.retina_cls", logits, mean=-3.5, std=1)
    standardize(weights, "bbox_head.retina_reg", deltas, mean=0, std=0.3)
    return weights


def official_adaptive(variant, name, predictors):
    """ATSS or GFL. `predictors` are their channels, and the mean and standard deviation of what they give."""
    weights = official_backbone(variant) | neck(variant.hidden_sizes[1:], num_extra=2, on_output=True)
    for tower in (f"bbox_head.{part}_convs.{index}" for part in ("cls", "reg") for index in range(4)):
        convolution = layer(f"{tower}.conv", CHANNELS, CHANNELS, 3, 3)
        weights |= {f"{tower}.conv.weight": convolution[f"{tower}.conv.weight"]}
        weights |= {key: value + key.endswith("weight") for key, value in layer(f"{tower}.gn", CHANNELS).items()}
    weights |= {f"bbox_head.scales.{level}.scale": torch.rand(()).double() + 0.5 for level in range(5)}
    for part, (channels, _, _) in predictors.items():
        weights |= layer(f"bbox_head.{name}_{part}", channels, CHANNELS, 3, 3)
    pixels = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    levels = reference_heads.pyramid(weights, feature_maps(weights, pixels)[1:], on_output=True)
    raw = zip(*getattr(reference_heads, name)(weights, levels, groups=GROUPS), strict=True)
    for (part, (_, mean, std)), outputs in zip(predictors.items(), raw, strict=True):
        standardize(weights, f"bbox_head.{name}_{part}", torch.cat(outputs, dim=1), mean, std)
    return weights


def official_atss(variant):
    return official_adaptive(variant, "atss", {"cls": (CLASSES, -2.5, 1), "reg": (4, 0, 1), "centerness": (1, 0, 1)})


def official_gfl(variant):
    weights = official_adaptive(variant, "gfl", {"cls": (CLASSES, -3.5, 1), "reg": (68, 0, 2)})
    return weights | {"bbox_head.integral.project": torch.arange(17.0).double()}


def official_mask_rcnn(variant):
    """Objectness and class scores of all sizes, and boxes in some distance from their anchors and proposals."""
    weights = official_backbone(variant) | neck(variant.hidden_sizes, num_extra=0)
    weights |= layer("rpn_head.rpn_conv", CHANNELS, CHANNELS, 3, 3)
    weights |= layer("rpn_head.rpn_cls", 3, CHANNELS, 1, 1) | layer("rpn_head.rpn_reg", 12, CHANNELS, 1, 1)
    box_head, mask_head = "roi_head.bbox_head", "roi_head.mask_head"
    weights |= layer(f"{box_head}.shared_fcs.0", 32, CHANNELS * 49) | layer(f"{box_head}.shared_fcs.1", 32, 32)
    weights |= layer(f"{box_head}.fc_cls", CLASSES + 1, 32) | layer(f"{box_head}.fc_reg", CLASSES * 4, 32)
    for index in range(4):
        weights |= layer(f"{mask_head}.convs.{index}.conv", CHANNELS, CHANNELS, 3, 3)
    weights |= layer(f"{mask_head}.upsample", CHANNELS, CHANNELS, 2, 2)
    weights |= layer(f"{mask_head}.conv_logits", CLASSES, CHANNELS, 1, 1)
    pixels = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    levels = reference_heads.pyramid(weights, feature_maps(weights, pixels))
    raw = reference_heads.region_proposals(weights, levels)
    logits, deltas = (torch.cat(x, dim=1) for x in zip(*raw, strict=True))
    standardize(weights, "rpn_head.rpn_cls", logits, mean=0, std=2)
    standardize(weights, "rpn_head.rpn_reg", deltas, mean=0, std=0.3)
    boxes = (torch.rand(40, 2).double() * 50).repeat(1, 2) + torch.tensor([0, 0, 20, 25])
    logits, deltas = reference_heads.box_head(weights, loops.roi_features(levels, [boxes.tolist()], 7))
    standardize(weights, f"{box_head}.fc_cls", logits, mean=0, std=1)
    standardize(weights, f"{box_head}.fc_reg", deltas, mean=0, std=1)
    masks = reference_heads.mask_head(weights, loops.roi_features(levels, [boxes.tolist()], 14))
    standardize(weights, f"{mask_head}.conv_logits", masks, mean=0, std=1)
    return weights


def converted(model, weights, architecture):
    """`model` in float64 and evaluation mode with the tensors of a released checkpoint, all of them."""
    model.double().eval().load_state_dict(architecture.from_official(weights), strict=True)
    return model


def tiny_backbone(version, out_features=STAGES[1:]):
    """The configuration for `checkpoints.TINY`."""
    variant = checkpoints.TINY[version]
    sizes = {field: list(getattr(variant, field)) for field in ("hidden_sizes", "mlp_ratios", "depths")}
    if version == "v1":
        return pvt_hf.PvtConfig(out_features=list(out_features), **sizes)
    return pvt_hf.PvtV2Config(out_features=list(out_features), linear_attention=version == "v2_linear", **sizes)


def padded_batch(sizes, input_size, dtype=torch.float64):
    """Random images of these sizes, padded with zeros to `input_size`, and the mask."""
    pixels = torch.zeros(len(sizes), 3, *input_size, dtype=dtype)
    mask = torch.zeros(len(sizes), *input_size, dtype=torch.long)
    for index, (height, width) in enumerate(sizes):
        pixels[index, :, :height, :width] = torch.randn(3, height, width, dtype=dtype)
        mask[index, :height, :width] = 1
    return pixels, mask


def labels_of(objects, sizes):
    """Labels for a detector.

    Args:
        objects: For each image a list of boxes, xyxy in pixels, and their classes.
        sizes: (height, width) of each image without its padding.
    """
    return [
        {
            "class_labels": torch.tensor([label for _, label in image], dtype=torch.long),
            "boxes": relative([box for box, _ in image], size),
        }
        for image, size in zip(objects, sizes, strict=True)
    ]


def relative(boxes, size):
    """xyxy in pixels to cxcywh relative to (height, width)."""
    x0, y0, x1, y1 = torch.as_tensor(boxes, dtype=torch.float64).reshape(-1, 4).unbind(dim=1)
    height, width = size
    return torch.stack(((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height), dim=1)
