"""Training recipes: the papers' hyper-parameters, learning-rate schedule, parameter groups and frozen stages."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from .variants import backbone_config, get_variant

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class ImageNetRecipe:
    """The official training of a variant on ImageNet-1k (v1 section 5.1, v2 section 4.1; `classification/main.py`).

    Attributes:
        epochs, warmup_epochs: Length of the run and of its linear warm-up.
        learning_rate: Peak learning rate for `reference_batch_size` images per step; it grows with the batch.
        warmup_learning_rate, min_learning_rate: Where the warm-up starts and the cosine ends, whatever the batch.
        weight_decay: Of AdamW, for tensors of two and more dimensions without the CLS token.
        max_grad_norm: Gradients are clipped to it; 0 for no clipping.
        drop_path_rate: Stochastic depth of the last block.
        label_smoothing, mixup, cutmix, mixup_switch_prob: Of timm's `Mixup`.
        auto_augment, color_jitter, random_erasing: Of timm's `create_transform`; bicubic, erased by noise per pixel.
        repeats: How often an image is drawn, with different augmentations, in an epoch that sees a third of the images.
    """

    epochs: int = 300
    warmup_epochs: int = 5
    learning_rate: float = 5e-4
    reference_batch_size: int = 512
    warmup_learning_rate: float = 1e-6
    min_learning_rate: float = 1e-5
    weight_decay: float = 0.05
    max_grad_norm: float = 0.0
    drop_path_rate: float = 0.1
    label_smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_switch_prob: float = 0.5
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    random_erasing: float = 0.25
    repeats: int = 3


def imagenet_recipe(variant: str) -> ImageNetRecipe:
    """The recipe of a variant. The deep ones (M, L, B3, B4, B5) have more stochastic depth, and clipped gradients."""
    rate = get_variant(variant).drop_path_rate
    return ImageNetRecipe(drop_path_rate=rate, max_grad_norm=1.0 if rate > 0.1 else 0.0)


def images_per_step(arguments: TrainingArguments) -> int:
    """How many images all the processes together take for one step of the optimiser."""
    return arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps


def scheduled_learning_rate(
    epoch: int, epochs: int, warmup_epochs: int, peak: float, warmup_start: float, minimum: float
) -> float:
    """The official learning rate during an epoch, counted from 0: linear warm-up, then a cosine.

    The official loop calls `scheduler.step(epoch)` *after* the epoch, so that epochs 0 and 1 both have the first value
    of timm's `CosineLRScheduler`, and the last value is never used.
    """
    position = min(max(epoch - 1, 0), epochs)
    if position < warmup_epochs:
        return warmup_start + position * (peak - warmup_start) / warmup_epochs
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * position / epochs)) / 2


def imagenet_factor(recipe: ImageNetRecipe, peak: float, step: int, steps_per_epoch: int, steps: int) -> float:
    """The factor of every learning rate at a step of a run: the official rate during its epoch, divided by `peak`.

    Raises:
        ValueError: If the run is not longer than the warm-up.
    """
    epochs = math.ceil(steps / steps_per_epoch)
    if recipe.warmup_epochs >= epochs:
        raise ValueError(
            f"`warmup_epochs` must be less than the {epochs} epochs of the run (`num_train_epochs`, `max_steps`), got "
            f"{recipe.warmup_epochs}."
        )
    lowest = recipe.warmup_learning_rate, recipe.min_learning_rate
    return scheduled_learning_rate(step // steps_per_epoch, epochs, recipe.warmup_epochs, peak, *lowest) / peak


@dataclass(frozen=True)
class DetectionRecipe:
    """The official training of a detector on COCO (v1 section 5.2, v2 section 4.2; `detection/configs/`).

    Attributes:
        system: `"retinanet"`, `"mask_rcnn"` or `"detr"`.
        epochs: Length of the run.
        decay_epochs: After each of them the learning rate is a tenth of what it was. In a run of another length it
            happens after the same parts of the run.
        learning_rate: For `reference_batch_size` images per step; it grows with the batch.
        backbone_rate: Factor of the backbone's learning rate.
        warmup_iterations, warmup_ratio: Steps of the linear warm-up, and the factor of the learning rate at its start.
        weight_decay: Of AdamW.
        decays_norms: Whether parameters with `norm` in their names are decayed as all others (officially biases too).
        max_grad_norm: Gradients are clipped to it; 0 for no clipping.
        drop_path_rate: Stochastic depth of the backbone's last block.
        short_sides, longest_side, crop_short_sides, flip: Of a [`~pvt_hf.augmentation.DetectionAugmentation`].
    """

    system: str
    epochs: int = 12
    decay_epochs: tuple[int, ...] = (8, 11)
    learning_rate: float = 1e-4
    reference_batch_size: int = 16
    backbone_rate: float = 1.0
    warmup_iterations: int = 500
    warmup_ratio: float = 0.001
    weight_decay: float = 1e-4
    decays_norms: bool = True
    max_grad_norm: float = 0.0
    drop_path_rate: float = 0.1
    short_sides: Sequence[int] = (800,)
    longest_side: int = 1333
    crop_short_sides: Sequence[int] = ()
    flip: float = 0.5


_LONG = {"epochs": 36, "decay_epochs": (27, 33), "decays_norms": False}
# RetinaNet's 3x run is in the paper only (v1 section 5.2); its norms are treated as in the 3x configuration there is.
DETECTION_RECIPES = {
    "retinanet_1x": DetectionRecipe("retinanet"),
    "retinanet_3x_ms": DetectionRecipe("retinanet", short_sides=range(640, 801), **_LONG),
    "mask_rcnn_1x": DetectionRecipe("mask_rcnn", learning_rate=2e-4),
    "mask_rcnn_3x_ms": DetectionRecipe(
        "mask_rcnn", weight_decay=0.05, short_sides=range(480, 801, 32), crop_short_sides=(400, 500, 600), **_LONG
    ),
    "detr_50ep": DetectionRecipe(
        "detr",
        epochs=50,
        decay_epochs=(33,),
        backbone_rate=0.1,
        warmup_iterations=0,
        max_grad_norm=0.1,
        short_sides=range(640, 801, 32),
    ),
}
# What was trained with 8 images per step, one per GPU, at a 1.4 times lower rate.
_BATCHES_OF_EIGHT = {
    "retinanet_1x": ("pvt_v2_b4", "pvt_v2_b5"),
    "mask_rcnn_1x": ("pvt_large", "pvt_v2_b4", "pvt_v2_b5"),
}


def detection_recipe(name: str, variant: str | None = None) -> DetectionRecipe:
    """One of `DETECTION_RECIPES` for a variant: the largest have smaller batches, v1's deep ones no stochastic depth.

    Raises:
        ValueError: If there is no such recipe.
    """
    if name not in DETECTION_RECIPES:
        raise ValueError(f"`name` must be one of {', '.join(DETECTION_RECIPES)}, got {name!r}.")
    recipe = DETECTION_RECIPES[name]
    if variant in _BATCHES_OF_EIGHT.get(name, ()):
        recipe = replace(recipe, learning_rate=recipe.learning_rate / 1.4, reference_batch_size=8)
    return replace(recipe, drop_path_rate=0.0) if variant in ("pvt_medium", "pvt_large") else recipe


def detection_factor(recipe: DetectionRecipe, step: int, steps_per_epoch: int, steps: int) -> float:
    """The factor of every learning rate at a step of a run, counted from 0 (mmcv's `StepLrUpdaterHook`).

    Raises:
        ValueError: If the run is not longer than the warm-up.
    """
    if recipe.warmup_iterations >= steps:
        raise ValueError(
            f"`warmup_iterations` must be less than the {steps} steps of the run (`num_train_epochs`, `max_steps`), "
            f"got {recipe.warmup_iterations}."
        )
    # In integers: `steps_per_epoch` divides the steps of a whole run, and decays begin with an epoch.
    factor = 0.1 ** sum(step * recipe.epochs >= epoch * steps for epoch in recipe.decay_epochs)
    if step < recipe.warmup_iterations:
        factor *= 1 - (1 - step / recipe.warmup_iterations) * (1 - recipe.warmup_ratio)
    return factor


@dataclass(frozen=True)
class SegmentationRecipe:
    """The official training of Semantic FPN on ADE20K (v1 section 5.3; `segmentation/configs/sem_fpn/PVT`).

    Attributes:
        steps: Length of the run.
        learning_rate: At the first step, for `reference_batch_size` images per step; it grows with the batch.
        power: The rate falls to 0 as this power of what is left of the run, from step to step and without a warm-up.
        weight_decay: Of AdamW, for every parameter: biases, norms and position embeddings too.
        max_grad_norm: Gradients are clipped to it; 0 for no clipping.
        drop_path_rate: Stochastic depth of the backbone's last block, the same for every variant.
        loss_normalization: See [`SemanticFPNConfig`](configuration_semantic_fpn.py).
        shortest_edge, longest_edge: Limits of the sides in pixels at the scale 1, also in evaluation.
        crop_size, scales, max_share, flip, distortion: See [`~pvt_hf.augmentation.SegmentationAugmentation`].
    """

    steps: int = 40_000
    learning_rate: float = 2e-4
    reference_batch_size: int = 32
    power: float = 0.9
    weight_decay: float = 1e-4
    max_grad_norm: float = 0.0
    drop_path_rate: float = 0.1
    loss_normalization: str = "all"
    shortest_edge: int = 512
    longest_edge: int = 2048
    crop_size: int = 512
    scales: tuple[float, float] = (0.5, 2.0)
    max_share: float = 0.75
    flip: float = 0.5
    distortion: bool = True


SEGMENTATION_RECIPES = {"semantic_fpn_40k": SegmentationRecipe()}


def polynomial_factor(power: float, step: int, steps_per_epoch: int, steps: int) -> float:
    """The factor of every learning rate at a step of a run that ends at 0 (mmcv's `PolyLrUpdaterHook`)."""
    return (1 - min(step, steps) / steps) ** power


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether the official code decays a parameter: v1's position embeddings yes; biases, norms and CLS token no."""
    return parameter.ndim > 1 and not name.endswith("cls_token")


def block_index(name: str, depths: Iterable[int]) -> int:
    """The depth at which a parameter works, for layer-wise rates: 0 for the first patch embedding, the number of the
    block (from 1, through all stages) for a block, and for the rest of a stage the block that it stands beside.

    Args:
        name: A parameter of any model with a PVT inside, for example `pvt.encoder.block.2.0.mlp.dense1.weight`.
        depths: `config.depths`.
    """
    depths = list(depths)
    before = [sum(depths[:stage]) for stage in range(len(depths))]
    if match := re.search(r"encoder\.(?:block|layers)\.(\d+)\.(?:blocks\.)?(\d+)\.", name):
        return before[int(match[1])] + int(match[2]) + 1
    if match := re.search(r"encoder\.(?:patch_embeddings|layers)\.(\d+)\.(\w+)", name):
        # A patch embedding stands before the blocks of its stage, v2's norm behind them.
        stage = int(match[1])
        return before[stage] + (depths[stage] if match[2] == "layer_norm" and "layers" in name else 0)
    return sum(depths) + 1


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for an optimiser: decayed or not, and with layer-wise learning rates one pair per depth.

    Args:
        model: Any model with a PVT inside; frozen parameters are left out.
        learning_rate: Of the head, and of everything if `layer_decay` is 1.
        weight_decay: Of the parameters that the official code decays.
        layer_decay: Factor of the learning rate from each block to the one before it (0.65 to 0.9 in fine-tuning).

    Returns:
        Dictionaries with `params`, their `names`, `lr` and `weight_decay`.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"`layer_decay` must be above 0 and at most 1, got {layer_decay}.")
    config = backbone_config(model.config)

    def settings(name: str, parameter: nn.Parameter) -> tuple[float, float]:
        depth = sum(config.depths) + 1 - block_index(name, config.depths) if layer_decay < 1 else 0
        return learning_rate * layer_decay**depth, weight_decay if is_decayed(name, parameter) else 0.0

    return _grouped(model, settings)


def detection_parameter_groups(
    model: nn.Module, recipe: DetectionRecipe, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """As [`parameter_groups`], of a detector: its biases are decayed too, its norms where the recipe says so."""

    def settings(name: str, parameter: nn.Parameter) -> tuple[float, float]:
        rate = learning_rate * (recipe.backbone_rate if "backbone" in name else 1)
        return rate, weight_decay if recipe.decays_norms or "norm" not in name else 0.0

    return _grouped(model, settings)


def segmentation_parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """As [`parameter_groups`], of a segmenter: one group, since everything is decayed, norms and biases too."""
    return _grouped(model, lambda name, parameter: (learning_rate, weight_decay))


def _grouped(model: nn.Module, settings: Callable[[str, nn.Parameter], tuple[float, float]]) -> list[dict[str, Any]]:
    """The trainable parameters by what `settings` gives for them, learning rate and weight decay."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate, decay = settings(name, parameter)
            group = groups.setdefault((rate, decay), {"params": [], "names": [], "lr": rate, "weight_decay": decay})
            group["params"].append(parameter)
            group["names"].append(name)
    return list(groups.values())


def freeze_stages(model: nn.Module, stages: int) -> list[str]:
    """Stops the training of the first `stages` stages: patch embedding, blocks and norm, as detectors do.

    Returns:
        The names of the frozen parameters.

    Raises:
        ValueError: If the model does not have that many stages.
    """
    config = backbone_config(model.config)
    if not 0 <= stages <= len(config.depths):
        raise ValueError(f"`stages` must be between 0 and {len(config.depths)}, got {stages}.")
    frozen = []
    for name, parameter in model.named_parameters():
        match = re.search(r"encoder\.(?:block|layers|patch_embeddings)\.(\d+)\.", name)
        # DETR has an encoder of its own, behind the backbone.
        if match and int(match[1]) < stages and (config is model.config or "backbone" in name):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen
