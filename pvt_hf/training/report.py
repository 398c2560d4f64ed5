"""What a training run leaves for people: curves and a model card with the numbers that it measured."""

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig, TrainerState, TrainingArguments

from ..evaluation.visualization import draw_legend
from ..models.backbone import get_backbone_config
from ..writing.text import code_span, escape_control, escape_markdown, python_string
from .optimization import images_per_step

LogHistory = list[dict[str, float]]
# The Auto class that loads a model, by the task as the Hub calls it.
TASK_AUTO_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "object-detection": "AutoModelForObjectDetection",
    "image-segmentation": "AutoModelForSemanticSegmentation",
}
_BUNDLED_DATA = "scikit-learn digits"
# Fields of the recipes that only their own schedules read.
_OF_SCHEDULE = {
    "warmup_epochs",
    "warmup_learning_rate",
    "min_learning_rate",
    "warmup_iterations",
    "warmup_ratio",
    "decay_epochs",
    "power",
}


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
        found = {name: [(row["epoch"], row[key]) for row in log_history if key in row] for key, name in names.items()}
        drawn = {name: points for name, points in found.items() if points}
        for points in drawn.values():
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None)
        if drawn:
            draw_legend(axis, axis.lines, list(drawn))
        axis.grid(alpha=0.3)
    rates = [(entry["epoch"], entry["learning_rate"]) for entry in log_history if "learning_rate" in entry]
    if rates:
        axis = top.twinx()
        axis.plot(*zip(*rates, strict=True), color="grey", linewidth=0.8)
        axis.set_ylabel("learning rate", color="grey")
        axis.set_ylim(bottom=0)
    bottom.set_xlabel("epoch")
    figure.savefig(file, dpi=100)


@dataclass(frozen=True)
class RunFacts:
    """What a model card says of a run beside its numbers: what the user told, and paths only by their last part.

    Attributes:
        name: Of the run: the last part of its folder's path, or of its repository's name.
        task: As the Hub calls it, one of `TASK_AUTO_CLASSES`.
        dataset: A repository of the Hub or a path of this machine, `None` for the bundled data.
        dataset_title: What the card calls the data; by default the repository or the last part of the path.
        initial_weights: The repository or path of the checkpoint that training began with, `None` for random weights.
        license: The Hub's identifier of a licence; none is guessed.
        repository: The one of the Hub that it is uploaded to, `None` for a folder of this machine.
        has_code: Whether the code is saved with the model.
        settings: Recipe and arguments of the run.
    """

    name: str
    task: str
    dataset: str | None = None
    dataset_title: str | None = None
    initial_weights: str | None = None
    license: str | None = None
    repository: str | None = None
    has_code: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_license(self.license)

    @property
    def data(self) -> str:
        """What the card calls the data."""
        return self.dataset_title or (publish_name(self.dataset) if self.dataset else _BUNDLED_DATA)


def check_license(license: str | None) -> None:
    """Raises a `ValueError` unless this can be what the Hub calls a licence, or is none."""
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(f"`license` must be the Hub's identifier of a licence, such as apache-2.0, got {license!r}.")


def is_on_hub(name: str | None) -> bool:
    """Whether a data set or checkpoint of this name is a repository of the Hub, and not of this machine.

    Args:
        name: As the user gave it: a name, a path, a pattern of files; `None` is none of the Hub's.
    """
    if name is None or os.path.exists(name):  # which is false, and no error, for names that no file can have
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def publish_name(name: str) -> str:
    """What a published card may call a data set or checkpoint: of a path of this machine the last part.

    Args:
        name: As the user gave it.
    """
    return escape_control(name if is_on_hub(name) else os.path.basename(os.path.abspath(name)) or name)


def training_card(
    facts: RunFacts,
    config: PreTrainedConfig,
    log_history: LogHistory,
    metric_names: dict[str, str],
    pictures: Sequence[str] = ("curves.png",),
) -> ModelCard:
    """A model card that says what was measured and how it was trained, and nothing else.

    Args:
        facts: What there is to say of the run.
        config: Of the model.
        log_history: `trainer.state.log_history` with evaluations (`eval_images` and `eval_` with each metric), the last
            of which is that of the model, and perhaps one of the EMA weights (`ema_images` ...).
        metric_names: Keys of metrics with values in [0, 1], the most important first, and what they are called. An
            evaluation lacks those that it had no ground truth for.
        pictures: Names of files beside the card.
    """
    evaluations = [entry for entry in log_history if "eval_images" in entry]
    of_ema = [entry for entry in log_history if "ema_images" in entry]
    values = {key: evaluations[-1][f"eval_{key}"] for key in metric_names if f"eval_{key}" in evaluations[-1]}
    metadata = _metadata(facts, config, values, metric_names)
    ema = f"\nThe EMA weights (in `ema`) reach {_percentages(of_ema[-1], 'ema', metric_names)}.\n" if of_ema else ""
    shown = "\n\n".join(f"![{Path(picture).stem}]({picture})" for picture in pictures)
    weights = code_span(publish_name(facts.initial_weights)) if facts.initial_weights else "random weights"
    return ModelCard(
        f"""---
{metadata.to_yaml()}
---

# {escape_markdown(facts.name)}

A `{config.model_type}` with {config.num_labels} classes, trained by pvt_hf on {code_span(facts.data)} from
{weights}. On the {evaluations[-1]["eval_images"]} validation
images it reaches {_percentages(evaluations[-1], "eval", metric_names)}.
{ema}
What it is for and where it fails, whoever publishes it should say here.

## How to use

{_usage(facts)}

## Training

{shown}

{_history_table(evaluations, metric_names)}

## Settings

{_table(("setting", "value"), [(name, _publish_value(value)) for name, value in facts.settings.items()])}

## Licence

{facts.license or "No licence was chosen for these weights: whoever publishes them has to."}
"""
    )


def _usage(facts: RunFacts) -> str:
    """Programs that load the model and use it."""
    place = "" if facts.repository else "\n`model` is the path of this folder, or its repository on the Hub."
    without = ""
    if facts.has_code:
        without = f"\nThe code is here too. Where pvt_hf is not installed:\n\n{_program(facts, installed=False)}\n"
    return f"""Install pvt_hf (`pip install pvt_hf`) and import it: else transformers has no such model, or takes its
own PVT, whose numbers differ.{place}

{_program(facts, installed=True)}
{without}
`{TASK_AUTO_CLASSES[facts.task]}` and `AutoImageProcessor` load the parts."""


def _program(facts: RunFacts, installed: bool) -> str:
    first, options = ("import pvt_hf\n\n", "") if installed else ("", ", trust_remote_code=True")
    return f"""```python
from PIL import Image
from transformers import pipeline

{first}predict = pipeline("{facts.task}", model={python_string(facts.repository or facts.name)}{options})
print(predict(Image.open("image.jpg")))
```"""


def _publish_value(value: Any) -> Any:
    """A setting without the folders of this machine."""
    return publish_name(value) if isinstance(value, str) and os.path.exists(value) else value


def _metadata(
    facts: RunFacts, config: PreTrainedConfig, values: dict[str, float], metric_names: dict[str, str]
) -> ModelCardData:
    """What the Hub reads. Local folders are neither data sets nor models of it."""
    on_hub = facts.dataset if is_on_hub(facts.dataset) else None
    results = [
        EvalResult(
            task_type=facts.task,
            dataset_type=on_hub or "imagefolder",
            dataset_name=escape_control(facts.data),
            metric_type=key,
            metric_name=escape_control(metric_names[key]),
            metric_value=value,
        )
        for key, value in values.items()
    ]
    return ModelCardData(
        model_name=escape_control(facts.name),
        eval_results=results or None,
        library_name="transformers",
        pipeline_tag=facts.task,
        tags=["vision", config.model_type],
        license=facts.license,
        datasets=[on_hub] if on_hub else None,
        base_model=facts.initial_weights if is_on_hub(facts.initial_weights) else None,
    )


def _history_table(evaluations: LogHistory, metric_names: dict[str, str]) -> str:
    """Validation loss and metrics by epoch."""
    # The model in the end, which may be that of an earlier epoch, is evaluated once more.
    by_epoch = {row["epoch"]: row for row in reversed(evaluations[:-1] or evaluations)}
    columns = ["eval_loss", *(f"eval_{key}" for key in metric_names)]
    rows = [
        (f"{row['epoch']:g}", *(f"{row[column]:.4f}" if column in row else "" for column in columns))
        for row in reversed(by_epoch.values())
    ]
    return _table(("epoch", "validation loss", *metric_names.values()), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = ([escape_markdown(str(cell)) for cell in row] for row in (header, *rows))
    first, *others = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([first, "|" + "--|" * len(header), *others])


def _percentages(metrics: dict[str, float], prefix: str, metric_names: dict[str, str]) -> str:
    values = ((escape_markdown(name), metrics.get(f"{prefix}_{key}")) for key, name in metric_names.items())
    return ", ".join(
        f"no {name}, of which there is no ground truth" if value is None else f"**{100 * value:.2f} %** {name}"
        for name, value in values
    )


def run_settings(
    recipe: Any, arguments: TrainingArguments, config: PreTrainedConfig, state: TrainerState, recipe_schedule: bool
) -> dict[str, Any]:
    """What a reader needs to repeat a run: what was done, and where it differs what the recipe has.

    Args:
        recipe: A dataclass of [`~pvt_hf.recipes`].
        arguments: Of the run; they override the recipe.
        config: Of the model, whose stochastic depth may be a checkpoint's.
        state: In the end of the run.
        recipe_schedule: Whether the learning rate was the recipe's, and not `arguments.lr_scheduler_type`.
    """
    fields = dataclasses.asdict(recipe)
    images = fields.pop("reference_batch_size", None)
    done = {
        "steps": state.global_step,
        "epochs": round(state.epoch or 0.0, 2),
        "learning_rate": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "max_grad_norm": arguments.max_grad_norm,
        "drop_path_rate": getattr(get_backbone_config(config), "drop_path_rate", None),
    }
    of_whom = {"learning_rate": f"of the recipe, for {images} images per step"}
    of_recipe = {
        f"{key} {of_whom.get(key, 'of the recipe')}": fields[key]
        for key in done
        if fields.get(key) not in (None, done[key])
    }
    others = {
        key: value for key, value in fields.items() if key not in done and (recipe_schedule or key not in _OF_SCHEDULE)
    }
    if "decay_epochs" in others:  # after the same parts of a run of any length
        part = done["epochs"] / recipe.epochs
        others["decay_epochs"] = tuple(round(part * epoch, 2) for epoch in recipe.decay_epochs)
    return (
        done
        | of_recipe
        | others
        | {
            "images per step": images_per_step(arguments),
            "processes": arguments.world_size,
            "accumulated batches": arguments.gradient_accumulation_steps,
            "learning-rate schedule": "the recipe's" if recipe_schedule else str(arguments.lr_scheduler_type.value),
            "precision": "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "float32",
            "seed": arguments.seed,
        }
    )
