"""How a run reads its images: the loader of its training set, and where a stream is, in every checkpoint."""

import atexit
import json
import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler
from transformers import TrainingArguments

from ..data.streams import NumberedStream, ShardedStream, collate_numbered
from ..untrusted import UntrustedFileError, read_json_object
from ..writing.signals import SIGNALS, ignore_signals
from .run_checkpoints import CheckpointError

_STREAM = "stream.json"


def build_loader(
    dataset: Dataset, epochs: Dataset | Sampler, collate: Callable, batch_size: int, args: TrainingArguments
) -> DataLoader:
    """The loader of a training set, in whole batches.

    Args:
        dataset: The training set; of a stream, the batches also have `bookmark`.
        epochs: The order of its images; of a stream, itself.
        collate: Makes a batch, a dictionary, of rows.
        batch_size: Of one process, in images.
        args: Of the run.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "drop_last": True}
    if isinstance(dataset, IterableDataset):
        dataset.batch_size = batch_size
    else:
        options["sampler"] = epochs
    if isinstance(dataset, ShardedStream):
        dataset.split(args.dataloader_num_workers)
        options = {"batch_sampler": BatchSampler(range(len(dataset) // batch_size), 1, drop_last=True)}
        dataset, collate = NumberedStream(dataset), collate_numbered(collate)
    return DataLoader(
        dataset,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=start_worker,
        **options,
    )


def start_worker(worker_id: int) -> None:
    """In a process of a loader: signals to end are for the process that trains, which ends its loaders.

    Args:
        worker_id: Its number.
    """
    ignore_signals(*SIGNALS)


@atexit.register
def _kill_workers() -> None:
    """Python ends what is left of them by SIGTERM, which they ignore, and would wait for ever after an error. (A child
    of the program that is no loader's has a second to take it.)"""
    processes = [process for process in multiprocessing.active_children() if process.daemon]
    if processes and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # at which torch would call it an error
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(timeout=1)
        process.kill()


def save_stream(dataset: Dataset, folder: Path, is_writer: bool) -> None:
    """Writes where all processes are in a stream; every one of them calls this.

    Args:
        dataset: The training set, of which nothing is written if it is no [`~pvt_hf.data.streams.ShardedStream`].
        folder: The checkpoint.
        is_writer: Whether it is this process that writes.
    """
    if not isinstance(dataset, ShardedStream):
        return
    from accelerate.utils import gather_object

    bookmarks = {lane: entry for part in gather_object([dataset.state()["bookmarks"]]) for lane, entry in part.items()}
    if is_writer:
        (folder / _STREAM).write_text(json.dumps(dataset.state() | {"bookmarks": bookmarks}))


def restore_stream(dataset: Dataset, folder: Path, args: TrainingArguments) -> None:
    """Makes a stream go on where a run was.

    Args:
        dataset: The training set, which stays as it is if it is no [`~pvt_hf.data.streams.ShardedStream`].
        folder: The checkpoint.
        args: Of the run.

    Raises:
        CheckpointError: If it is of another stream, or these processes and workers cannot have the same images.
    """
    if not isinstance(dataset, ShardedStream):
        return
    file = folder / _STREAM
    try:
        state = read_json_object(file)
    except UntrustedFileError as error:
        raise CheckpointError(f"{file} {error}") from error
    try:
        dataset.restore(state, args.per_device_train_batch_size, args.dataloader_num_workers)
    except ValueError as error:
        raise CheckpointError(f"{folder} cannot be resumed from: {error}") from error
