"""Folders that look like run checkpoints, for what does not train."""

from pathlib import Path
from typing import Any

from pvt_hf.training.run_checkpoints import mark_complete

STATES = ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")

RUN = {"layout": {}, "run": {}, "skipped": 0, "step offset": 0, "last logged step": 0, "unlogged loss": 0.0}


def write_checkpoint(folder: Path, run: dict[str, Any] | None = None, **states: bytes) -> Path:
    """A complete checkpoint with these contents of files, whose names are given without their endings."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in STATES:
        (folder / name).write_bytes(states.get(name.split(".")[0], b"content"))
    mark_complete(folder, run or {})
    return folder
