"""Checkpoints of a training run that are complete or not there."""

import json
import os
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

_COMPLETE, _PARTIAL = "complete.json", "complete.json.partial"
_RUN = "run.json"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or cannot be resumed from. The message says what there is instead."""


def incompleteness(checkpoint: str | Path) -> str | None:
    """Why a checkpoint is not complete, in words; `None` if it is: every file has the size that it had in the end."""
    if not Path(checkpoint).is_dir():
        return "there is no such folder"
    try:
        sizes = json.loads((Path(checkpoint) / _COMPLETE).read_text())
    except (OSError, ValueError):
        return "it was interrupted while it was written, or another program wrote it"
    for name, size in sizes.items():
        file = Path(checkpoint) / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or has another size"
    return None


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run, if there is one. Those that are passed over are logged."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if (reason := incompleteness(folder)) is None:
            return str(folder)
        logger.warning(f"{folder} is not used: {reason}.")
    return None


def mark_incomplete(checkpoint: str | Path) -> None:
    """Before a folder is written again."""
    (Path(checkpoint) / _COMPLETE).unlink(missing_ok=True)


def mark_complete(checkpoint: str | Path, run: dict[str, Any]) -> None:
    """Everything reaches the disk, and then, by an atomic write, the list of files with their sizes.

    Args:
        checkpoint: The folder.
        run: What [`read_run`] shall return.
    """
    folder = Path(checkpoint)
    (folder / _RUN).write_text(json.dumps(run))
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files if path.name != _PARTIAL}
    partial = folder / _PARTIAL
    partial.write_text(json.dumps(sizes, indent=1))
    partial.replace(folder / _COMPLETE)


def read_run(checkpoint: str | Path) -> dict[str, Any]:
    """What the run that wrote a checkpoint was like.

    Raises:
        CheckpointError: If the checkpoint is not complete.
    """
    if reason := incompleteness(checkpoint):
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint: {reason}.")
    return json.loads((Path(checkpoint) / _RUN).read_text())
