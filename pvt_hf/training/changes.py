"""What a run may have otherwise when it resumes than before, and what it may not: everything else."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ..data.fingerprint import fingerprint
from ..writing.text import escape_control
from .machines import check_same_run, is_first_of_machine

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .trainer import VisionTrainer

# What happens to settings that may change, and which they are: names of arguments, with * for any ending.
MAY_CHANGE: dict[str, tuple[str, ...]] = {
    "The schedule goes on as that of a run with this peak. (One that follows the metrics cannot: refused.)": (
        "learning_rate",
    ),
    "The schedule goes on as that of a run of this length, which must not be over before the step that is resumed from."
    " A run that has reached its end trains on.": ("num_train_epochs", "max_steps", "recipe.steps"),
    "The next step has it.": ("weight_decay", "max_grad_norm"),
    "It holds from the next step on. An evaluation that it makes due at the step that is resumed from comes first.": (
        *("logging_*", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "do_*"),
    ),
    "It holds from the next checkpoint on.": ("save_*",),
    "Evaluations are made with it.": (
        *("per_device_eval_batch_size", "eval_accumulation_steps", "bf16_full_eval", "fp16_full_eval"),
        *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics"),
        "include_for_metrics",
    ),
    "Images are read with it: the same ones in the same order.": (
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
    ),
    "It changes time and memory; numbers may differ by rounding.": (
        *("torch_compile*", "activation_checkpointing*", "gradient_checkpointing*", "torch_empty_cache_steps"),
        *("use_cpu", "ddp_*", "fsdp", "fsdp_config", "settings.channels_last", "versions.*"),
    ),
    "It is said, shown or uploaded so from now on.": (
        *("output_dir", "run_name", "project", "report_to", "trackio_*", "push_to_hub", "hub_*", "log_*"),
        *("disable_tqdm", "skip_memory_metrics", "include_num_input_tokens_seen", "debug"),
    ),
    "It is of the program, not of the run.": (
        *("resume_from_checkpoint", "restore_callback_states_from_checkpoint", "local_rank"),
    ),
}
# Schedules whose rates follow from the metrics, and are no multiples of the peak.
METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
OWN_SCHEDULE = "the recipe's"
# What the layout of a checkpoint has, which is compared by rules of its own.
_OF_LAYOUT = ("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed")
# They are otherwise in every program, or `Trainer`s of ours set them, or they name folders and accounts, which no
# checkpoint shall publish.
_UNTOLD = (
    *("resume_from_checkpoint", "local_rank", "remove_unused_columns"),
    *("output_dir", "run_name", "hub_*", "project", "trackio_*"),
)
# Of a configuration: what is no part of the model.
_NO_PART = ("transformers_version", "_name_or_path", "architectures", "dtype", "auto_map", "label2id")
# Where what only one of the runs has is a difference. (Elsewhere another version of a library has other fields.)
_COMPLETE = ("settings", "train_dataset", "eval_dataset")
_CHECKSUMS = {"names": "file names", "sizes": "file sizes", "annotations": "annotations"}
_OWNERS = {"train_dataset": "training set", "eval_dataset": "validation set"}


def describe_run(trainer: VisionTrainer) -> dict[str, Any]:
    """All that a run is, by names of arguments, as JSON has it. Every process calls this; the first one of each machine
    looks at its data.

    Args:
        trainer: Before it trains.

    Raises:
        SettingError: If it is not the same on all machines.
    """
    return check_same_run(_describe(trainer) if is_first_of_machine() else {})


def _describe(trainer: VisionTrainer) -> dict[str, Any]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    sections = {
        "model": _list_fields(model.config.to_dict()) | {"trained parameters": f"{sum(trained)} of {len(trained)}"},
        "settings": trainer.describe_settings(),
        "train_dataset": fingerprint(trainer.train_dataset),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
    evaluated = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    sections |= {f"eval_dataset {name}".strip(): fingerprint(dataset) for name, dataset in evaluated.items()}
    return describe_arguments(trainer.args, trainer.recipe) | _flatten(sections)


def describe_arguments(arguments: TrainingArguments, recipe: Any = None) -> dict[str, Any]:
    """That part of [`describe_run`] that a program knows before it looks at the data.

    Args:
        arguments: Of the run.
        recipe: A dataclass of [`~pvt_hf.recipes`] (default: none, it depends on the data).
    """
    told = {
        name: value
        for name, value in arguments.to_dict().items()
        if name not in _OF_LAYOUT and not _matches(name, _UNTOLD)
    }
    return _flatten({"": told, "recipe": {} if recipe is None else dataclasses.asdict(recipe)})


def _flatten(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By `section.name`, values as JSON gives them back."""
    flat = {f"{section}.{name}".strip("."): value for section, part in sections.items() for name, value in part.items()}
    return {name: json.loads(json.dumps(_make_finite(value), default=_name_type)) for name, value in flat.items()}


def _list_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, and as `backbone_config.depths` those of one in it."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if name == "id2label":
            fields[name] = list(value.values())
        elif isinstance(value, Mapping) and name != "label2id":
            fields |= {f"{name}.{key}": entry for key, entry in _list_fields(value).items()}
        elif name not in _NO_PART:
            fields[name] = value
    return fields


def _make_finite(value: Any) -> Any:
    """JSON has no infinity, which a field may be."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _name_type(value: Any) -> str:
    return type(value).__name__


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def find_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between a run and the one that wrote the checkpoint.

    Args:
        saved: Of the checkpoint, from [`describe_run`].
        now: Of this run.

    Returns:
        What refuses the resume, and what may be so, in words.
    """
    refused, said = [], []
    for name in dict.fromkeys([*now, *saved]):
        is_common = name in saved and name in now
        if saved.get(name) == now.get(name) or not (is_common or name.startswith(_COMPLETE)):
            continue
        change = _describe_change(name, saved, now)
        if (effect := _find_effect(name, now)) is None:
            refused.append(change)
        else:
            said.append(f"{change}. {effect}")
    return refused, said


def _find_effect(name: str, now: Mapping[str, Any]) -> str | None:
    """What happens where a setting has changed, or `None` where it must not."""
    is_multiplied = now.get("settings.schedule") == OWN_SCHEDULE or now.get("lr_scheduler_type") not in METRIC_SCHEDULES
    if name == "learning_rate" and not is_multiplied:
        return None
    return next((effect for effect, patterns in MAY_CHANGE.items() if _matches(name, patterns)), None)


def _describe_change(name: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    section, _, key = name.partition(".")
    owner = section.split(" ")[0]
    if owner in _OWNERS and key in _CHECKSUMS:
        return f"the {_OWNERS[owner]} has other {_CHECKSUMS[key]} (`{name}`)"
    return escape_control(f"`{name}` is {now.get(name)!r:.200}, and was {saved.get(name)!r:.200}")
