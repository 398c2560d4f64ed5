"""Signals that end a run in this process, and what it would have given without them."""

import os
import signal
from typing import Any

import pytest
import torch

from pvt_hf.training.preemption import Preempted


def ask_in(trainer: Any, name: str, call: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal in the `call`-th call of a method of a trainer."""
    method, calls = getattr(trainer, name), []

    def asked(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return method(*args, **kwargs)

    setattr(trainer, name, asked)


def train_until(trainer: Any, step: int, resume: bool | None = None, **options: Any) -> None:
    """Trains up to a step, in which the last process is asked to end."""
    take_step, asked = trainer.training_step, []

    def training_step(*args):
        is_last = trainer.args.process_index == trainer.args.world_size - 1
        if is_last and trainer.state.global_step == step - 1 and not asked:
            asked.append(os.kill(os.getpid(), signal.SIGUSR1))
        return take_step(*args)

    trainer.training_step = training_step
    with pytest.raises(Preempted):
        trainer.train(resume, **options)
    assert trainer.state.global_step == step


def log(trainer: Any, key: str = "loss") -> list[Any]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def results(trainer: Any) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """All that was logged and is no time, and the weights."""
    logged = [
        {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]
    return logged, {key: value.clone() for key, value in trainer.model.state_dict().items()}


def assert_same_results(trainer: Any, expected: tuple[list[dict[str, Any]], dict[str, torch.Tensor]]) -> None:
    """To the bit."""
    logged, weights = results(trainer)
    assert logged == expected[0]
    assert all(torch.equal(value, expected[1][key]) for key, value in weights.items())
