"""Runs of the trainers in processes of their own, one after the other."""

import importlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.support.forks import Fork
from tests.support.processes import list_variables

# The task, the folder of the run, and its settings: what `main` of `{task}_run` takes.
Run = tuple[str, str | Path, dict[str, Any]]


def list_arguments(runs: list[Run]) -> list[str]:
    """Of a Python that does these runs."""
    return ["-m", "tests.support.training_processes", json.dumps(runs, default=str)]


def run_in_two_processes(runs: list[Run]) -> None:
    """Does these runs in a group of two processes (gloo). One is fresh: forks have sets in the same order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    first, second = (list_variables() | group | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01")
    fork = Fork(list_arguments(runs), second)
    command, pipes = [sys.executable, *list_arguments(runs)], {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=first, text=True, **pipes) as fresh:
        try:
            _, errors = fresh.communicate(timeout=280)
            assert fresh.returncode == 0, errors[-3000:]
            assert fork.wait(280) == 0, fork.read()[1][-3000:]
        finally:
            fork.kill()
            fresh.kill()


def kill_after(checkpoint: Path, task: str, settings: dict[str, Any]) -> None:
    """Starts a run in the folder of this checkpoint, and kills it (SIGKILL) when it has written that."""
    step = int(checkpoint.name.split("-")[1])
    run = (task, checkpoint.parent, settings | {"pause_after": step})
    process = Fork(list_arguments([run]), list_variables())
    try:
        while not (checkpoint / "complete.json").exists():
            assert process.poll() is None, process.read()[1][-3000:]
            time.sleep(0.02)
    finally:
        process.kill()


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
