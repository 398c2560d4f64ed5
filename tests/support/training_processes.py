"""Runs of the trainers in processes of their own, one after the other: a process takes most of its time to start."""

import importlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.support.small_models import ROOT

# The task, the folder of the run, and its settings: what `main` of `{task}_run` takes.
Run = tuple[str, str | Path, dict[str, Any]]


def start(runs: list[Run], **variables: Any) -> subprocess.Popen:
    """A process that does these runs."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.training_processes", json.dumps(runs, default=str)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_in_two_processes(runs: list[Run]) -> None:
    """Does these runs in a group of two processes (gloo)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": 2}
    processes = [start(runs, RANK=rank, LOCAL_RANK=rank, **group) for rank in range(2)]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=280)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()


def kill_after(checkpoint: Path, task: str, settings: dict[str, Any]) -> None:
    """Starts a run in the folder of this checkpoint, and kills it (SIGKILL) when it has written that."""
    step = int(checkpoint.name.split("-")[1])
    process = start([(task, checkpoint.parent, settings | {"pause_after": step})])
    try:
        while not (checkpoint / "complete.json").exists():
            assert process.poll() is None, process.stderr.read()[-3000:]
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()


def pause_after(trainer: Any, steps: int | None) -> None:
    """Lets a trainer wait after so many batches: so that there is time to be killed."""
    train_batch, seen = trainer.training_step, []

    def training_step(*args):
        if len(seen) == steps:
            time.sleep(300)
        seen.append(args)
        return train_batch(*args)

    trainer.training_step = training_step


def write_result(trainer: Any, output_dir: str | Path, **result: Any) -> None:
    """Losses, and what else there is, to `result-{rank}.json`."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    file = Path(output_dir) / f"result-{trainer.args.process_index}.json"
    file.write_text(json.dumps({"losses": losses} | result))


def read_result(output_dir: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((output_dir / f"result-{rank}.json").read_text())


def main() -> None:
    torch.set_num_threads(1)
    for task, output_dir, settings in json.loads(sys.argv[1]):
        importlib.import_module(f"tests.support.{task}_run").main(Path(output_dir), settings)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
