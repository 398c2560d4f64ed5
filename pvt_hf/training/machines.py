"""What the processes of a job, on one machine or several, have to agree on, and what is said when one is gone."""

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from ..writing.files import hidden_folder
from .optimization import SettingError
from .run_checkpoints import CheckpointError, check_states, last_complete_checkpoint, read_run, recall_incompleteness

_NUMBER_OF_PROCESSES = "WORLD_SIZE"  # the launchers' variable


def gather(value: Any) -> list[Any]:
    """What every process of the job has, in the order of their numbers.

    Args:
        value: Of this process: what pickle can write.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class Answer(NamedTuple):
    """What one machine of a job says."""

    process: int  # the number of its first process
    host: str
    value: Any


def is_first_of_machine() -> bool:
    """Whether this process is the one that looks at the disk for all processes of its machine."""
    if not (dist.is_available() and dist.is_initialized()):
        return True
    from accelerate import PartialState

    return PartialState().local_process_index <= 0  # -1: no launcher has said it, and each looks for itself


def ask_machines(look: Callable[[], Any]) -> list[Answer]:
    """What the first process of each machine finds on its disk. All processes have to ask; the others wait for it.

    Args:
        look: Gives what pickle can write, and raises nothing.
    """
    found = gather((socket.gethostname(), look()) if is_first_of_machine() else None)
    return [Answer(number, *answer) for number, answer in enumerate(found) if answer is not None]


def start_cpu_group(backend: str | None, timeout: int) -> None:
    """Starts the group of a job on CPUs, where a launcher has started several processes: `TrainingArguments` would,
    but leaves out `ddp_timeout` there.

    Args:
        backend: `ddp_backend` of the arguments; `None` for gloo.
        timeout: Seconds that a process waits for another.
    """
    if backend in (None, "gloo") and int(os.environ.get(_NUMBER_OF_PROCESSES, 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def find_missing_processes(variables: Mapping[str, str]) -> str | None:
    """What a launcher was asked for and did not do, in words, where this process is the only one of its job.

    Args:
        variables: The environment of the process.
    """
    if "ACCELERATE_MIXED_PRECISION" in variables and "MASTER_PORT" in variables:  # it sets them for several processes
        return (
            "accelerate was asked for several processes and started one, as it does with --cpu: start them with "
            "torchrun, or with --multi_gpu in place of --cpu."
        )
    if (count := int(variables.get("SLURM_STEP_NUM_TASKS", 1))) > 1:
        return (
            f"srun started {count} processes that know nothing of each other, so that each trains for itself: let it "
            "start one torchrun or accelerate launch per machine."
        )
    return None


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of the job is gone, or gave no answer in time."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error) or "gloo/rendezvous" in str(error)


def explain_lost_process(error: BaseException) -> str:
    """What happened and what to do, for the one who started the job."""
    reason = " ".join(str(error).split(". This is typically", maxsplit=1)[0].split())
    return (
        f"The job has lost a process: {reason:.300}. It ended, and said why on its machine, or gave no answer for as "
        "many seconds as --ddp_timeout says (default: 1800). --resume_from_checkpoint true resumes from the last "
        "complete checkpoint."
    )


def shares_folder(folder: str | Path) -> bool:
    """Whether all processes of the job see the same folder under this path. All of them have to ask.

    Args:
        folder: Made by the main process if it is not there.
    """
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    with hidden_folder(Path(folder)) if is_main else nullcontext() as hidden:
        name = gather(hidden and hidden.parent.name)[0]
        return all(gather((Path(folder) / name).exists()))


def check_same_run(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Compares what a run is between its processes, each of which has read its own arguments and data.

    Args:
        facts: What has to be the same in all of them; empty in a process that is not to be compared.

    Returns:
        Those of the main process.

    Raises:
        SettingError: In all of them, for the first process that differs from the main one.
    """
    (main, _), *others = gather((dict(facts), socket.gethostname()))
    for number, (own, host) in enumerate(others, start=1):
        names = sorted(main.keys() | own.keys()) if own else ()
        pairs = ((name, own.get(name), main.get(name)) for name in names)
        if wrong := [f"{name} is {here!r:.100}, not {there!r:.100}" for name, here, there in pairs if here != there]:
            raise SettingError(
                f"Process {number} (on {host}) is of another run than process 0: {'; '.join(wrong[:5])}. All machines "
                "need the same arguments and data."
            )
    return main


def agree_on_checkpoint(output_dir: str | Path, given: str | bool | None) -> str | None:
    """The checkpoint that all processes resume from, each from its own disk; `None` if none of them has one. The first
    process of each machine looks, once for files that have not changed since.

    Args:
        output_dir: Of the run.
        given: The path of a checkpoint, or `True` for the newest that is complete for every process.

    Raises:
        CheckpointError: In all of them, if some have a checkpoint that others lack.
    """
    if given is True:
        found = [answer.value for answer in ask_machines(lambda: last_complete_checkpoint(output_dir))]
        steps = [int(Path(path).name.rpartition("-")[2]) for path in found if path]
        if len(set(found)) == 1:
            return found[0]
        # A killed job may have written its last one on some of the machines only.
        given = str(Path(output_dir) / f"checkpoint-{min(steps)}")
    if not given:
        return None
    answers = ask_machines(lambda: recall_incompleteness(given))
    lacking = [answer for answer in answers if answer.value]
    if lacking and len(answers) > 1:
        number, host, reason = lacking[0]
        raise CheckpointError(
            f"{given} is not a complete checkpoint for process {number} (on {host}): {reason}. Every machine reads "
            "what it resumes from: let all of them share the output folder, copy the checkpoint to each, or let each "
            "write it (--save_on_each_node true)."
        )
    return str(given)


def read_agreed_run(checkpoint: str | Path, states: bool = False) -> dict[str, Any]:
    """What the run that wrote a checkpoint was like, for all processes of the job, as the main one reads it.

    Args:
        checkpoint: Which all machines have.
        states: Whether the first process of each machine also looks at what `Trainer` will read (default: `False`).

    Raises:
        CheckpointError: In all of them, if one machine cannot resume from it.
    """

    def look() -> tuple[dict[str, Any], str | None]:
        try:
            run = read_run(checkpoint)
            if states:
                check_states(checkpoint)
        except CheckpointError as error:
            return {}, str(error)
        return run, None

    answers = ask_machines(look)
    for number, host, (_, reason) in answers:
        if reason:
            raise CheckpointError(reason if len(answers) == 1 else f"Process {number} (on {host}): {reason}")
    run, _ = answers[0].value
    return run
