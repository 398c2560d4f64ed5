"""What PVT v1 and v2 do around their encoder: checks of the inputs, the choice of outputs, the loss of a classifier."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from .layers import runs_transformed

logger = logging.get_logger(__name__)


def check_pixel_values(pixel_values: torch.Tensor, num_channels: int, minimum_size: int) -> None:
    """Raises a `TypeError` or a `ValueError` that says what is wrong with `pixel_values`."""
    if runs_transformed(pixel_values):
        return
    if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
        got = pixel_values.dtype if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
        raise TypeError(f"`pixel_values` must be a floating-point tensor, got {got}. Use the image processor.")
    if pixel_values.ndim != 4:
        raise ValueError(
            f"`pixel_values` must have shape (batch, {num_channels}, height, width), got {tuple(pixel_values.shape)}."
        )
    _, channels, height, width = pixel_values.shape
    if channels != num_channels:
        raise ValueError(
            f"`pixel_values` must have {num_channels} channels (`config.num_channels`), got {channels} "
            f"in shape {tuple(pixel_values.shape)}."
        )
    if height < minimum_size or width < minimum_size:
        raise ValueError(
            f"`pixel_values` must be at least {minimum_size} pixels high and wide, got {height} x {width}."
        )


def minimum_image_size(kernels: Sequence[int], strides: Sequence[int], reduction_ratios: Sequence[int]) -> int:
    """The smallest side, in pixels, that leaves every stage one reduced key: 32 for all variants."""

    def side(stage: int) -> int:
        pixels = reduction_ratios[stage]
        for kernel, stride in zip(kernels[stage::-1], strides[stage::-1], strict=True):
            pixels = (pixels - 1) * stride + kernel
        return pixels

    return max(side(stage) for stage in range(len(reduction_ratios)))


def prepare_class_labels(
    labels: torch.Tensor | None, pixel_values: torch.Tensor, config: PreTrainedConfig
) -> torch.Tensor | None:
    """The labels as the losses want them: class indices of every integer type as int64, floats as they are.

    Raises:
        TypeError: If they are no tensor.
        ValueError: If their dtype, their shape or one of their values fits no loss of `config`.
    """
    if labels is None:
        return None
    if not runs_transformed(labels):
        check_class_labels(labels, pixel_values, config)
    return labels if isinstance(labels, torch.fx.Proxy) or labels.is_floating_point() else labels.long()


def check_class_labels(labels: torch.Tensor, pixel_values: torch.Tensor, config: PreTrainedConfig) -> None:
    """Raises a `TypeError` or a `ValueError` that says what is wrong with `labels`."""
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"`labels` must be a tensor, got {type(labels).__name__}.")
    if labels.dtype == torch.bool or labels.is_complex():
        raise ValueError(
            f"`labels` must be class indices of an integer type, or floats for several classes per image and for "
            f"regression, got {labels.dtype}."
        )
    batch_size, num_labels = len(pixel_values), config.num_labels
    problem_type = find_problem_type(labels, config)
    if problem_type == "single_label_classification":
        check_class_indices(labels, batch_size, num_labels)
    elif not labels.is_floating_point() or labels.numel() != batch_size * num_labels:
        raise ValueError(
            f"`labels` must be floats of shape {(batch_size, num_labels)} for {problem_type}, got shape "
            f"{tuple(labels.shape)} of {labels.dtype}."
        )


class ClassificationProblem(NamedTuple):
    """What transformers' loss for image classification reads in a configuration.

    Args:
        num_labels: Number of classes, or of values.
        problem_type: As in a configuration.
    """

    num_labels: int
    problem_type: str


def find_problem_type(labels: torch.Tensor, config: PreTrainedConfig) -> str:
    """What a classifier learns: as the configuration has it, or as transformers tells it from the labels."""
    if config.problem_type is not None:
        return config.problem_type
    kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    return "regression" if config.num_labels == 1 else kind


def check_class_indices(labels: torch.Tensor, batch_size: int, num_labels: int) -> None:
    """Raises a `ValueError` that says what is wrong with `labels` of one class per image."""
    if labels.is_floating_point() or labels.numel() != batch_size:
        raise ValueError(
            f"`labels` must be {batch_size} class indices, one for each image, got shape {tuple(labels.shape)} of "
            f"{labels.dtype}."
        )
    labels = labels.long()  # the unsigned types know no comparison
    wrong = (labels != -100) & ((labels < 0) | (labels >= num_labels))
    check_label_values(labels, wrong, f"class indices in [0, {num_labels}) (`config.num_labels`) or -100")


def check_label_values(labels: torch.Tensor, is_wrong: torch.Tensor, wanted: str) -> None:
    """Raises a `ValueError` that lists the wrong values among `labels`.

    A GPU is not waited for: there it is an assertion on the device, like those of PyTorch's own losses.

    Args:
        labels: Integers of any shape.
        is_wrong: Bool of the same shape.
        wanted: What they must be.
    """
    if is_wrong.is_cuda:
        torch._assert_async(~is_wrong.any(), f"`labels` must be {wanted}.")
    elif not is_wrong.is_meta and is_wrong.any():
        raise ValueError(f"`labels` must be {wanted}, got {labels[is_wrong].unique().tolist()}.")


def classification_loss(
    model: nn.Module, logits: torch.Tensor, labels: torch.Tensor | None, **kwargs: Any
) -> torch.Tensor | None:
    """transformers' loss for image classification, right under gradient accumulation for every kind of label.

    `Trainer` hands over the number of labels in the complete accumulated batch and adds the losses of its parts up. The
    cross-entropy of transformers divides by that number, its multi-label and regression losses by the part's own.
    """
    if labels is None:
        return None
    if not runs_transformed(logits) and logits.shape[-1] != model.config.num_labels:
        raise ValueError(
            f"`config.num_labels` is {model.config.num_labels}, but the classifier gives {logits.shape[-1]} logits. "
            "Set both: `model.config.num_labels = n` with `model.classifier = nn.Linear(channels, n)`."
        )
    config = model.config
    if torch.compiler.is_compiling():
        # transformers writes what it finds out into the configuration, and code that reads it would be compiled again.
        config = ClassificationProblem(config.num_labels, find_problem_type(labels, config))
    loss = model.loss_function(labels, logits, config, **kwargs)
    num_items_in_batch = kwargs.get("num_items_in_batch")
    if num_items_in_batch is None or config.problem_type == "single_label_classification":
        return loss
    return loss * (labels.numel() / num_items_in_batch)


def resolve_output_flags(
    model: nn.Module, output_attentions: bool | None, output_hidden_states: bool | int | list[int] | None
) -> tuple[bool, bool | int | list[int]]:
    """The flags of one call, with the config's values where the caller gave none."""
    config = model.config
    if output_attentions is None:
        output_attentions = config.output_attentions
    if output_hidden_states is None:
        output_hidden_states = config.output_hidden_states
    if output_attentions and config._attn_implementation != "eager" and not torch.compiler.is_compiling():
        logger.warning_once(
            f"`output_attentions=True` with `attn_implementation={config._attn_implementation!r}`, which keeps no "
            "attention probabilities: this call uses the eager implementation. Load the model with "
            '`attn_implementation="eager"` to silence this warning.'
        )
    return bool(output_attentions), output_hidden_states if output_hidden_states is not None else False


def select_hidden_states(
    hidden_states: Sequence[torch.Tensor], output_hidden_states: bool | int | list[int]
) -> tuple[torch.Tensor | None, ...] | None:
    """All of them, none, or (as elsewhere in transformers) those of the given indices with None in the other places.
    Negative indices count from the end; those out of range select nothing."""
    if isinstance(output_hidden_states, bool):
        return tuple(hidden_states) if output_hidden_states else None
    indices = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    count = len(hidden_states)
    kept = {index % count for index in indices if -count <= index < count}
    return tuple(state if index in kept else None for index, state in enumerate(hidden_states))


def stage_features(model: nn.Module, stages: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The maps of a backbone's `out_features`, from those of all the stages that it was built with."""
    feature_maps = dict(zip(model.stage_names, stages, strict=False))
    for name in model.out_features:
        if name not in feature_maps:
            raise ValueError(
                f"`out_features` asks for {name!r}, but this {type(model).__name__} was built up to "
                f"{list(feature_maps)[-1]!r}. Set `out_features` when the backbone is created."
            )
    return tuple(feature_maps[name] for name in model.out_features)
