"""Runs that get signals at random moments, and start again until they are finished.

A process that has imported everything forks them: they would take most of their time to start.
"""

import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pvt_hf.commands.shared import exit_on_bad_run
from pvt_hf.data.digits import write_scenes
from pvt_hf.training.preemption import PREEMPTED
from pvt_hf.writing.signals import SIGNALS
from tests.support import classification_run, segmentation_run

STEPS = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 1}
EPOCHS = {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_steps": 1}
SECONDS = 240  # for a run that is not finished then, something is wrong


def prepare(task: str, folder: Path, processes: int) -> partial:
    """What builds the trainer of a run of about 8 steps of 8 images; of an epoch of 4."""
    settings: dict[str, Any] = {"per_device_train_batch_size": 8 // processes}
    if task == "classification":
        classification_run.load_split("train"), classification_run.load_split("validation")
        settings |= STEPS | {"images": 32, "evaluation": 9, "trainer": {"ema_decay": 0.9}, "dataloader_num_workers": 1}
        settings |= {"recipe": {"mixup": 0.8, "random_erasing": 0.25}, "model": {"drop_path_rate": 0.2}}
    elif task == "detection":
        settings |= EPOCHS | {"scenes": write_scenes(folder / "scenes", images=32, validation=3)}
    else:
        settings |= STEPS | {"data": segmentation_run.write_data(folder), "max_steps": 7}
    return partial(importlib.import_module(f"tests.support.{task}_run").build, **settings)


def start(build: partial, output_dir: Path, processes: int) -> list[int]:
    """The processes of a run, as a command would do it that says `--resume_from_checkpoint true`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        if not (child := os.fork()):
            if processes > 1:
                group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes}
                os.environ |= {key: str(value) for key, value in (group | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            os._exit(work(build, output_dir, rank))
        children.append(child)
    return children


def work(build: partial, output_dir: Path, rank: int) -> int:
    log = os.open(output_dir.with_suffix(f".{rank}.log"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        with exit_on_bad_run():
            trainer = build(output_dir)
            trainer.train(True)
            trainer.finish()
            if rank == 0:
                (output_dir / "log.json").write_text(json.dumps(trainer.state.log_history))
        return 0
    except SystemExit as reason:
        print(reason, flush=True)
        return reason.code if isinstance(reason.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        return 70


def wait(children: list[int]) -> set[int]:
    """The exit codes."""
    codes, end = [], time.monotonic() + SECONDS
    for child in children:
        while not (found := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                for other in children:
                    with suppress(ProcessLookupError):
                        os.kill(other, signal.SIGKILL)
            time.sleep(0.01)
        codes.append(os.waitstatus_to_exitcode(found[1]))
    return {*codes}


def kill_sometime(build: partial, output_dir: Path, processes: int, seconds: float, chance: random.Random) -> set[int]:
    children = start(build, output_dir, processes)
    time.sleep(chance.uniform(0, 0.8 * seconds))
    number = chance.choice(SIGNALS)
    for child in children if chance.random() < 0.5 else [chance.choice(children)]:
        with suppress(ProcessLookupError):
            os.kill(child, number)
    return wait(children)


def read(output_dir: Path) -> dict[str, Any]:
    """What a finished run has left, without times."""
    log = [
        {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
        for entry in json.loads((output_dir / "log.json").read_text())
        if "train_runtime" not in entry
    ]
    return {"log": log, "weights": output_dir / "model.safetensors"}


def main(task: str, folder: Path, processes: int, kills: int, seed: int) -> None:
    """Finished runs of at least so many kills in `run-{number}`, that of none in `whole`."""
    torch.set_num_threads(1)
    import matplotlib.pyplot  # noqa: F401  what the runs import late
    import sklearn  # noqa: F401
    import timm  # noqa: F401

    build, chance, done, number = prepare(task, folder, processes), random.Random(seed), 0, 0
    start_time = time.monotonic()
    assert wait(start(build, folder / "whole", processes)) == {0}, (folder / "whole.0.log").read_text()[-3000:]
    seconds, ends = time.monotonic() - start_time, []
    while done < kills:
        number += 1
        output_dir, codes = folder / f"run-{number}", {PREEMPTED}
        while codes == {PREEMPTED}:
            codes = kill_sometime(build, output_dir, processes, seconds, chance)
            steps = sorted(int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*"))
            ends.append((sorted(codes), steps[-1:]))
            done += codes == {PREEMPTED}
        assert codes == {0}, (codes, output_dir.with_suffix(".0.log").read_text()[-3000:])
    for run in range(1, number + 1):
        for checkpoint in (folder / f"run-{run}").glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    print(json.dumps({"kills": done, "runs": number, "seconds": round(seconds, 1), "ends": ends}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
