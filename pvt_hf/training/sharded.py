"""Weights and optimiser of a run in shards: each process writes its own, and any number of processes reads them.

The writer and the reader are those of torch's distributed checkpoint for safetensors: its other format is pickled, and
would be unpickled.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..untrusted import UntrustedFileError, read_json_object
from .machines import is_lost_process
from .run_checkpoints import CheckpointError

_MODEL, _OPTIMIZER = "model_shards", "optimizer_shards"
_VALUES = "optimizer.json"  # what of the optimiser is no tensor, which safetensors do not hold
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def is_sharded(checkpoint: str | Path) -> bool:
    """Whether a checkpoint has its weights in shards."""
    return (Path(checkpoint) / _MODEL).is_dir()


def save_shards(checkpoint: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, is_main: bool) -> None:
    """Writes the shards of this process. All processes have to.

    Args:
        checkpoint: A folder that all of them see.
        model: Of this process.
        optimizer: Of its parameters.
        is_main: Whether it also writes what all have.
    """
    folder = Path(checkpoint)
    tensors, values = _split_optimizer(model, optimizer)
    _write(folder / _MODEL, get_model_state_dict(model))
    _write(folder / _OPTIMIZER, tensors)
    if is_main:
        (folder / _VALUES).write_text(json.dumps(values, indent=1))


def load_model_shards(checkpoint: str | Path, model: nn.Module) -> None:
    """Fills a model, sharded over any number of processes or whole, from shards. All processes have to.

    Args:
        checkpoint: As [`save_shards`] left it.
        model: To be filled.

    Raises:
        CheckpointError: If they are not of this model.
    """
    state = get_model_state_dict(model)
    _read(Path(checkpoint) / _MODEL, state)
    set_model_state_dict(model, state)


def load_optimizer_shards(checkpoint: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fills an optimiser as [`load_model_shards`] does a model.

    Args:
        checkpoint: As [`save_shards`] left it.
        model: Of this process.
        optimizer: Of its parameters, to be filled.

    Raises:
        CheckpointError: If they are not of this optimiser.
    """
    folder = Path(checkpoint)
    tensors, values = _split_optimizer(model, optimizer)
    try:
        saved = read_json_object(folder / _VALUES)
    except UntrustedFileError as error:
        raise CheckpointError(f"{folder / _VALUES} {error}") from error
    if saved.keys() != values.keys():
        wrong = sorted(saved.keys() ^ values.keys())
        raise CheckpointError(f"{folder / _VALUES} is of another optimiser: it differs in {', '.join(wrong)[:200]}.")
    _read(folder / _OPTIMIZER, tensors)
    set_optimizer_state_dict(model, optimizer, tensors | saved, options=_FLAT)


def gather_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole weights of a model that is sharded, on the CPU of the main process. All processes have to ask."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _split_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of an optimiser, and the other values of it, by the names of the parameters."""
    state = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return tensors, {key: value for key, value in state.items() if key not in tensors}


@contextmanager
def _ignore_warnings() -> Iterator[None]:
    """torch says that nothing is distributed where one process reads, and that it uses old parts of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _write(folder: Path, state: dict[str, Any]) -> None:
    state = {name: tensor.contiguous() for name, tensor in state.items()}  # safetensors are
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _ignore_warnings():
        dcp.save(state, storage_writer=writer)


def _read(folder: Path, state: dict[str, Any]) -> None:
    try:
        with _ignore_warnings():
            reader = dcp.HuggingFaceStorageReader(str(folder))
            dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:  # of any process
        reason, _ = next(iter(error.failures.values()))
        if is_lost_process(reason):
            raise reason from error
        raise CheckpointError(f"{folder} has no shards of this model and optimiser: {reason!s:.300}") from error
    except (SafetensorError, AssertionError, LookupError, ValueError) as error:
        raise CheckpointError(f"{folder} has no shards that can be read: {error!s:.300}") from error
