"""What a recipe makes the optimiser do: learning-rate schedules, parameter groups, frozen stages.

A schedule is a multiplier of every learning rate, by the step (counted from 0), the steps of an epoch and those of the
run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..models.backbone import get_backbone_config
from ..recipes import DetectionRecipe, ImageNetRecipe

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import TrainingArguments


class SettingError(ValueError):
    """A setting that does not fit the others or the data. The message names it."""


def images_per_step(arguments: TrainingArguments) -> int:
    """How many images all processes together take for one step of the optimiser."""
    return arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps


def scheduled_learning_rate(
    epoch: int, epochs: int, warmup_epochs: int, peak: float, warmup_start: float, minimum: float
) -> float:
    """The released code's learning rate during an epoch: linear warm-up, then a cosine.

    Its loop calls `scheduler.step(epoch)` *after* the epoch, so that epochs 0 and 1 both have the first value
    of timm's `CosineLRScheduler`, and the last value is never used.

    Args:
        epoch: Counted from 0.
        epochs: Length of the run.
        warmup_epochs: Length of the warm-up.
        peak: The rate after the warm-up.
        warmup_start: The rate at the start of the warm-up.
        minimum: The rate at the end of the cosine.
    """
    position = min(max(epoch - 1, 0), epochs)
    if position < warmup_epochs:
        return warmup_start + position * (peak - warmup_start) / warmup_epochs
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * position / epochs)) / 2


def cosine_multiplier(recipe: ImageNetRecipe, peak: float, step: int, steps_per_epoch: int, steps: int) -> float:
    """The learning-rate multiplier at a step: [`scheduled_learning_rate`] of its epoch, divided by `peak`.

    Args:
        recipe: Its warm-up, and its lowest rates.
        peak: Peak learning rate of the run.
        step: Counted from 0.
        steps_per_epoch: Steps of an epoch.
        steps: Steps of the run.

    Raises:
        SettingError: If the run is not longer than the warm-up.
    """
    epochs = math.ceil(steps / steps_per_epoch)
    if recipe.warmup_epochs >= epochs:
        raise SettingError(
            f"`warmup_epochs` must be less than the {epochs} epochs of the run (`num_train_epochs`, `max_steps`), got "
            f"{recipe.warmup_epochs}."
        )
    lowest = recipe.warmup_learning_rate, recipe.min_learning_rate
    return scheduled_learning_rate(step // steps_per_epoch, epochs, recipe.warmup_epochs, peak, *lowest) / peak


def step_multiplier(recipe: DetectionRecipe, step: int, steps_per_epoch: int, steps: int) -> float:
    """The learning-rate multiplier at a step: a tenth after each of the recipe's epochs (mmcv's `StepLrUpdaterHook`).

    Args:
        recipe: Its warm-up, and the epochs after which the rate decays.
        step: Counted from 0.
        steps_per_epoch: Steps of an epoch.
        steps: Steps of the run.

    Raises:
        SettingError: If the run is not longer than the warm-up.
    """
    if recipe.warmup_iterations >= steps:
        raise SettingError(
            f"`warmup_iterations` must be less than the {steps} steps of the run (`num_train_epochs`, `max_steps`), "
            f"got {recipe.warmup_iterations}."
        )
    # In integers: `steps_per_epoch` divides the steps of a whole run, and decays begin with an epoch.
    multiplier = 0.1 ** sum(step * recipe.epochs >= epoch * steps for epoch in recipe.decay_epochs)
    if step < recipe.warmup_iterations:
        multiplier *= 1 - (1 - step / recipe.warmup_iterations) * (1 - recipe.warmup_ratio)
    return multiplier


def polynomial_multiplier(power: float, step: int, steps_per_epoch: int, steps: int) -> float:
    """The learning-rate multiplier at a step of a run that ends at 0 (mmcv's `PolyLrUpdaterHook`).

    Args:
        power: Of the part of the run that is left.
        step: Counted from 0.
        steps_per_epoch: Steps of an epoch, which play no part.
        steps: Steps of the run.
    """
    return (1 - min(step, steps) / steps) ** power


def set_schedule(schedule: LambdaLR, base_rates: Sequence[float], step: int) -> None:
    """Puts a schedule at a step, with the learning rates that it has there.

    Args:
        schedule: Of multipliers by step.
        base_rates: What is multiplied, of each group of the optimiser.
        step: Counted from 0.
    """
    schedule.last_epoch, schedule.base_lrs = step, list(base_rates)
    groups = zip(schedule.optimizer.param_groups, base_rates, schedule.lr_lambdas, strict=True)
    for group, rate, multiplier in groups:
        group["initial_lr"], group["lr"] = rate, rate * multiplier(step)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether the released code decays a parameter: v1's position embeddings yes; biases, norms and CLS token no."""
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
        weight_decay: Of the parameters that the released code decays.
        layer_decay: Learning-rate multiplier from each block to the one before it (0.65 to 0.9 in fine-tuning).

    Returns:
        Dictionaries with `params`, their `names`, `lr` and `weight_decay`.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"`layer_decay` must be above 0 and at most 1, got {layer_decay}.")
    config = get_backbone_config(model.config)

    def settings(name: str, parameter: nn.Parameter) -> tuple[float, float]:
        depth = sum(config.depths) + 1 - block_index(name, config.depths) if layer_decay < 1 else 0
        return learning_rate * layer_decay**depth, weight_decay if is_decayed(name, parameter) else 0.0

    return _group(model, settings)


def detection_parameter_groups(
    model: nn.Module, recipe: DetectionRecipe, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """As [`parameter_groups`], of a detector: its biases are decayed too, its norms where the recipe says so.

    Args:
        model: Frozen parameters are left out.
        recipe: The learning-rate multiplier of its backbone, and whether norms are decayed.
        learning_rate: Of everything beside the backbone.
        weight_decay: Of what is decayed.
    """

    def settings(name: str, parameter: nn.Parameter) -> tuple[float, float]:
        rate = learning_rate * (recipe.backbone_multiplier if "backbone" in name else 1)
        return rate, weight_decay if recipe.decays_norms or "norm" not in name else 0.0

    return _group(model, settings)


def segmentation_parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """As [`parameter_groups`], of a segmenter: one group, since everything is decayed, norms and biases too.

    Args:
        model: Frozen parameters are left out.
        learning_rate: Of everything.
        weight_decay: Of everything.
    """
    return _group(model, lambda name, parameter: (learning_rate, weight_decay))


def _group(model: nn.Module, settings: Callable[[str, nn.Parameter], tuple[float, float]]) -> list[dict[str, Any]]:
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
    """Stops the training of the backbone's first stages: patch embedding, blocks and norm, as detectors do.

    Args:
        model: Any model with a PVT inside.
        stages: How many.

    Returns:
        The names of the frozen parameters.

    Raises:
        ValueError: If the model does not have that many stages.
    """
    config = get_backbone_config(model.config)
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
