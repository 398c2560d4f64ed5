"""What a training run leaves for people: curves and a model card with the numbers that it measured."""

import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from .recipes import images_per_step

LogHistory = list[dict[str, float]]


def plot_curves(log_history: LogHistory, file: str | Path) -> None:
    """Draws the training loss, the learning rate and the held-out accuracies of `trainer.state.log_history`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axis, keys in ((top, ("loss", "eval_loss")), (bottom, ("eval_accuracy", "eval_top5_accuracy"))):
        for key in keys:
            points = [(entry["epoch"], entry[key]) for entry in log_history if key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 50 else None)
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
) -> ModelCard:
    """A model card of a classifier that says what was measured and how it was trained, and nothing else.

    Args:
        name: Of the run.
        config: Of the model.
        log_history: `trainer.state.log_history`, with held-out metrics of
            [`~pvt_hf.metrics.classification_metrics`] (`eval_accuracy` ...), the last of which are those of the model,
            and perhaps those of averaged weights (`ema_accuracy` ...).
        settings: Recipe and arguments of the run.
        dataset: Where the images are from, as the command named it; `None` for scikit-learn's digits.
        initial_weights: The checkpoint that was fine-tuned, or `None` for random weights.
    """
    evaluations = [entry for entry in log_history if "eval_accuracy" in entry]
    averages = [entry for entry in log_history if "ema_accuracy" in entry]
    metrics = evaluations[-1]
    accuracy = {key: metrics[f"eval_{key}"] for key in ("accuracy", "top5_accuracy")}
    origin = dataset or "scikit-learn digits"
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="imagefolder" if dataset is None or Path(dataset).exists() else dataset,
            dataset_name=origin,
            metric_type=key,
            metric_value=value,
        )
        for key, value in accuracy.items()
    ]
    metadata = ModelCardData(
        model_name=name,
        eval_results=results,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["vision", config.model_type],
        base_model=initial_weights if initial_weights and not Path(initial_weights).exists() else None,
    )
    # The model in the end, which may be that of an earlier epoch, is evaluated once more.
    by_epoch = {row["epoch"]: row for row in reversed(evaluations[:-1] or evaluations)}
    history = "\n".join(
        f"| {row['epoch']:g} | {row['eval_loss']:.4f} | {row['eval_accuracy']:.4f} | {row['eval_top5_accuracy']:.4f} |"
        for row in reversed(by_epoch.values())
    )
    average = ""
    if averages:
        top1, top5 = (100 * averages[-1][f"ema_{key}"] for key in ("accuracy", "top5_accuracy"))
        average = f"\nThe averaged weights (in `ema`) reach {top1:.2f} % top-1 and {top5:.2f} % top-5.\n"
    table = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
    return ModelCard(
        f"""---
{metadata.to_yaml()}
---

# {name}

A `{config.model_type}` with {config.num_labels} classes, trained by pvt_hf on `{origin}` from
{f"`{initial_weights}`" if initial_weights else "random weights"}. On the {metrics["eval_images"]} held-out images it
reaches **{100 * accuracy["accuracy"]:.2f} %** top-1 and **{100 * accuracy["top5_accuracy"]:.2f} %** top-5.
{average}
Use it with `import pvt_hf` and `AutoModelForImageClassification.from_pretrained`. What it is for and where it fails,
whoever publishes it should say here.

![Loss and accuracy](curves.png)

| epoch | held-out loss | top-1 | top-5 |
|--|--|--|--|
{history}

## Settings

| setting | value |
|--|--|
{table}
"""
    )


def run_settings(recipe: Any, arguments: Any, epochs: float, official_schedule: bool) -> dict[str, Any]:
    """What a reader needs to repeat a run: the recipe with what `TrainingArguments` overrode, and its real length."""
    overrides = {
        "epochs": round(epochs, 2),
        "learning_rate": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "max_grad_norm": arguments.max_grad_norm,
    }
    settings = dataclasses.asdict(recipe) | overrides
    del settings["reference_batch_size"]
    return settings | {
        "images per step": images_per_step(arguments),
        "processes": arguments.world_size,
        "accumulated batches": arguments.gradient_accumulation_steps,
        "learning-rate schedule": "official, by epochs"
        if official_schedule
        else str(arguments.lr_scheduler_type.value),
        "precision": "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "float32",
        "seed": arguments.seed,
    }
