"""Predictors of checkpoints: of folders, of repositories of the Hub, and of the released variants by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig

from ..conversion.convert import convert
from ..conversion.infer_config import imagenet_labels
from ..conversion.rename import ConversionError
from ..models.pretrained import list_tensors
from ..variants import VARIANTS, build_config
from .predictor import Predictor, Task, find_task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelError(ValueError):
    """A checkpoint that cannot be used. The message names it."""


def find_checkpoint(name: str) -> str:
    """The folder or repository that a name stands for.

    Args:
        name: A folder, a repository of the Hub, or the name of a variant (unless there is such a folder), whose
            released checkpoint is downloaded, converted and verified once, into `HF_HOME/pvt_hf/converted`.

    Raises:
        ModelError: If the checkpoint of a variant cannot be had.
    """
    if not _is_released(name):
        return name
    folder = _released_folder(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):
        if find_converted(name) is None:
            try:
                convert(name, folder)
            except ConversionError as error:
                raise ModelError(str(error)) from error
    return str(folder)


def find_converted(name: str) -> str | None:
    """The folder of a released variant that [`find_checkpoint`] has converted already; `None` for another model.

    Args:
        name: Of the model.
    """
    folder = _released_folder(name)
    return str(folder) if _is_released(name) and (folder / "config.json").is_file() else None


def _is_released(name: str) -> bool:
    return name in VARIANTS and not Path(name).exists()


def _released_folder(name: str) -> Path:
    return Path(HF_HOME) / "pvt_hf" / "converted" / name


def read_config(name: str) -> PreTrainedConfig:
    """The configuration of a model. Nothing else is downloaded.

    Args:
        name: Of the model: see [`find_checkpoint`].

    Raises:
        ModelError: If there is none, with what transformers says about it.
    """
    if _is_released(name):
        return build_config(name, id2label=dict(enumerate(imagenet_labels())))
    if Path(name).is_file():
        raise ModelError(
            f"{name} is a file: the model must be a folder with a config.json, a repository of the Hub or one of "
            f"{', '.join(VARIANTS)}. `pvt-hf convert` makes a folder of a checkpoint's file."
        )
    return read_saved_config(
        name, "a folder with a model's config.json, a repository of the Hub, or the name of a released variant"
    )


def read_saved_config(
    checkpoint: str, wanted: str = "a folder with a model's config.json, or a repository of the Hub"
) -> PreTrainedConfig:
    """The configuration of a checkpoint, which is no variant's name.

    Args:
        checkpoint: A folder, or a repository of the Hub.
        wanted: What it must be, for the error.

    Raises:
        ModelError: If there is none, with what transformers says about it.
    """
    try:
        return AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{checkpoint} cannot be loaded: it must be {wanted}. {reason}") from error


def read_task(name: str) -> tuple[PreTrainedConfig, Task]:
    """The configuration of a model, and what it does.

    Args:
        name: Of the model: see [`find_checkpoint`].

    Raises:
        ModelError: If there is no such model, or it predicts nothing.
    """
    config = read_config(name)
    try:
        return config, find_task(config)
    except ValueError as error:
        raise ModelError(f"{name} predicts nothing: {error}.") from error


def load_predictor(
    name: str, device: str | torch.device | None = None, dtype: str | torch.dtype = "float32", **settings: Any
) -> Predictor:
    """Loads a model of any task with its image processor.

    Args:
        name: Of the model: see [`find_checkpoint`].
        device: Where it computes (default: a GPU if there is one, else the CPU).
        dtype: In which it computes: `float32` (default), `bfloat16` or `float16`.
        **settings: Of the [`Predictor`].

    Raises:
        ModelError: If there is no such model, it predicts nothing, or tensors of it would be at random.
        ValueError: If `device` or `dtype` is none that torch has here.
    """
    device, dtype = choose_device(device), _choose_dtype(dtype)
    config, task = read_task(name)
    model_class, checkpoint = task.mapping[type(config)], find_checkpoint(name)
    try:
        model, loaded = model_class.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
        image_processor = AutoImageProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name} cannot be loaded: {error}") from error
    lost, unused = set(loaded["missing_keys"]), set(loaded["unexpected_keys"])
    if lost or unused:
        raise ModelError(
            f"{name} is not a complete checkpoint of a {model_class.__name__}: it lacks {list_tensors(lost)}, and has "
            f"{list_tensors(unused)} without a place."
        )
    return Predictor(model.eval().to(device), image_processor, **settings)


def choose_device(device: str | torch.device | None) -> torch.device:
    """A device that torch has here.

    Args:
        device: Its name; `None` for a GPU if there is one, else the CPU.

    Raises:
        ValueError: If torch has no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"`device` must be one that torch has here, such as cpu, got {str(device)!r}: {reason}"
        ) from error


def _choose_dtype(dtype: str | torch.dtype) -> torch.dtype:
    chosen = DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    return chosen
