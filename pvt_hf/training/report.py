"""What a training run leaves for people: curves and a model card with the numbers that it measured."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, TrainingArguments

from .optimization import images_per_step

LogHistory = list[dict[str, float]]
# The Auto class that loads a model, by the task as the Hub calls it.
TASK_AUTO_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "object-detection": "AutoModelForObjectDetection",
    "image-segmentation": "AutoModelForSemanticSegmentation",
}
_BUNDLED_DATA = "scikit-learn digits"


def plot_curves(log_history: LogHistory, file: str | Path, metric_names: dict[str, str]) -> None:
    """Draws the training loss, the learning rate and validation metrics of a run.

    Args:
        log_history: `trainer.state.log_history`.
        file: To be written, PNG.
        metric_names: Keys of metrics, without `eval_`, and what they are called.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    losses = {"loss": "training loss", "eval_loss": "validation loss"}
    metrics = {f"eval_{key}": f"validation {name}" for key, name in metric_names.items()}
    for axis, names in ((top, losses), (bottom, metrics)):
        for key, name in names.items():
            points = [(entry["epoch"], entry[key]) for entry in log_history if key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 50 else None)
        if axis.lines:
            axis.legend()
        axis.grid(alpha=0.3)
    rates = [(entry["epoch"], entry["learning_rate"]) for entry in log_history if "learning_rate" in entry]
    if rates:
        axis = top.twinx()
        axis.plot(*zip(*rates, strict=True), color="grey", linewidth=0.8)
        axis.set_ylabel("learning rate", color="grey")
        axis.set_ylim(bottom=0)
    bottom.set_xlabel("epoch")
    figure.savefig(file, dpi=100)


def training_card(
    name: str,
    config: PreTrainedConfig,
    log_history: LogHistory,
    settings: dict[str, Any],
    dataset: str | None,
    initial_weights: str | None,
    task: str,
    metric_names: dict[str, str],
    pictures: Sequence[str] = ("curves.png",),
) -> ModelCard:
    """A model card that says what was measured and how it was trained, and nothing else.

    Args:
        name: Of the run.
        config: Of the model.
        log_history: `trainer.state.log_history` with evaluations (`eval_images` and `eval_` with each metric), the last
            of which is that of the model, and perhaps one of the EMA weights (`ema_images` ...).
        settings: Recipe and arguments of the run.
        dataset: Where the images are from, as the command named it; `None` for scikit-learn's digits.
        initial_weights: The checkpoint that training began with, or `None` for random weights.
        task: As the Hub calls it, one of `TASK_AUTO_CLASSES`.
        metric_names: Keys of metrics with values in [0, 1], the most important first, and what they are called.
        pictures: Names of files beside the card.
    """
    evaluations = [entry for entry in log_history if "eval_images" in entry]
    of_ema = [entry for entry in log_history if "ema_images" in entry]
    values = {key: evaluations[-1][f"eval_{key}"] for key in metric_names}
    metadata = _metadata(name, config, task, dataset, initial_weights, values)
    ema = f"\nThe EMA weights (in `ema`) reach {_percentages(of_ema[-1], 'ema', metric_names)}.\n" if of_ema else ""
    shown = "\n\n".join(f"![{Path(picture).stem}]({picture})" for picture in pictures)
    return ModelCard(
        f"""---
{metadata.to_yaml()}
---

# {name}

A `{config.model_type}` with {config.num_labels} classes, trained by pvt_hf on `{dataset or _BUNDLED_DATA}` from
{f"`{initial_weights}`" if initial_weights else "random weights"}. On the {evaluations[-1]["eval_images"]} validation
images it reaches {_percentages(evaluations[-1], "eval", metric_names)}.
{ema}
Use it with `import pvt_hf` and `{TASK_AUTO_CLASSES[task]}.from_pretrained`. What it is for and where it fails, whoever
publishes it should say here.

{shown}

{_history_table(evaluations, metric_names)}

## Settings

{_table(("setting", "value"), settings.items())}
"""
    )


def _metadata(
    name: str,
    config: PreTrainedConfig,
    task: str,
    dataset: str | None,
    initial_weights: str | None,
    values: dict[str, float],
) -> ModelCardData:
    """What the Hub reads. Local folders are neither data sets nor models of it."""
    results = [
        EvalResult(
            task_type=task,
            dataset_type="imagefolder" if dataset is None or Path(dataset).exists() else dataset,
            dataset_name=dataset or _BUNDLED_DATA,
            metric_type=key,
            metric_value=value,
        )
        for key, value in values.items()
    ]
    return ModelCardData(
        model_name=name,
        eval_results=results,
        library_name="transformers",
        pipeline_tag=task,
        tags=["vision", config.model_type],
        base_model=initial_weights if initial_weights and not Path(initial_weights).exists() else None,
    )


def _history_table(evaluations: LogHistory, metric_names: dict[str, str]) -> str:
    """Validation loss and metrics by epoch."""
    # The model in the end, which may be that of an earlier epoch, is evaluated once more.
    by_epoch = {row["epoch"]: row for row in reversed(evaluations[:-1] or evaluations)}
    columns = ["eval_loss", *(f"eval_{key}" for key in metric_names)]
    rows = [
        (f"{row['epoch']:g}", *(f"{row.get(column, math.nan):.4f}" for column in columns))
        for row in reversed(by_epoch.values())
    ]
    return _table(("epoch", "validation loss", *metric_names.values()), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    first, *others = (f"| {' | '.join(map(str, row))} |" for row in (header, *rows))
    return "\n".join([first, "|" + "--|" * len(header), *others])


def _percentages(metrics: dict[str, float], prefix: str, metric_names: dict[str, str]) -> str:

    values = ((name, metrics[f"{prefix}_{key}"]) for key, name in metric_names.items())
    # COCO has -1 where there are no objects.
    return ", ".join(f"**{100 * value:.2f} %** {name}" if value >= 0 else f"no {name}" for name, value in values)


def run_settings(recipe: Any, arguments: TrainingArguments, epochs: float, recipe_schedule: bool) -> dict[str, Any]:
    """What a reader needs to repeat a run.

    Args:
        recipe: A dataclass of [`~pvt_hf.recipes`].
        arguments: Of the run; they override the recipe.
        epochs: The real length of the run.
        recipe_schedule: Whether the learning rate was the recipe's, and not `arguments.lr_scheduler_type`.
    """
    overrides = {
        "epochs": round(epochs, 2),
        "learning_rate": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "max_grad_norm": arguments.max_grad_norm,
    }
    settings = dataclasses.asdict(recipe) | overrides
    settings.pop("reference_batch_size", None)
    return settings | {
        "images per step": images_per_step(arguments),
        "processes": arguments.world_size,
        "accumulated batches": arguments.gradient_accumulation_steps,
        "learning-rate schedule": "the recipe's" if recipe_schedule else str(arguments.lr_scheduler_type.value),
        "precision": "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "float32",
        "seed": arguments.seed,
    }
