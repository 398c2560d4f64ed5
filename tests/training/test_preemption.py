"""SIGTERM and SIGUSR1 end a run with a complete checkpoint, from which it ends as if it had never been asked to."""

import importlib
import signal
import subprocess
import sys

import pytest

from pvt_hf.data.digits import write_scenes
from pvt_hf.training.optimization import SettingError
from pvt_hf.training.preemption import PREEMPTED, SIGNALS, Preempted, start_worker
from pvt_hf.training.run_checkpoints import last_complete_checkpoint
from pvt_hf.writing import signals
from tests.support import classification_run, detection_run, segmentation_run
from tests.support.preempted import ask_in, assert_same_results, results, train_until

STEPS = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 3}
EPOCHS = {"save_strategy": "epoch", "eval_strategy": "epoch"}
RANDOM = {"recipe": {"mixup": 0.8, "random_erasing": 0.25}, "model": {"drop_path_rate": 0.2}}
# Two epochs of 4 steps. Where each program is asked to end (a method of its trainer, and the call of it), and the step
# of the last checkpoint then.
CHAINS = {
    "short": (STEPS, [
        ("prediction_step", 2, 3),  # the first evaluation
        ("prediction_step", 11, 8),  # the last one, after that of the EMA weights
    ]),
    "steps": (STEPS, [
        ("get_train_dataloader", 1, None),  # before the first step
        ("training_step", 3, 3),  # before an evaluation
        ("_save_optimizer_and_scheduler", 1, 4),
        ("training_step", 2, 6),
        ("_evaluate", 1, 6),  # which is due before the first step
        ("training_step", 2, 8),  # the last step
        ("_evaluate", 1, 8),
    ]),
    "epochs": (EPOCHS, [
        ("training_step", 4, 4),  # the last one of an epoch
        ("prediction_step", 2, 4),
        ("_evaluate", 2, 8),
    ]),
}  # fmt: skip


def build(folder, **settings):
    return classification_run.build(
        folder, **{"images": 32, "evaluation": 9, "trainer": {"ema_decay": 0.9}} | RANDOM | settings
    )


def run(trainer, resume=None):
    """The whole program, as the commands do it."""
    trainer.train(resume)
    trainer.finish()
    return trainer


@pytest.mark.process
@pytest.mark.parametrize(
    "chain", ["short", *(pytest.param(name, marks=pytest.mark.slow) for name in ("steps", "epochs"))]
)
def test_a_run_that_is_asked_to_end_again_and_again_is_that_of_an_uninterrupted_one(chain, tmp_path, monkeypatch):
    settings, moments = CHAINS[chain]
    monkeypatch.setattr(signals, "_ONE_SIGNAL", 600)
    expected = results(run(build(tmp_path / "whole", **settings)))
    before = signal.getsignal(signal.SIGTERM)
    for method, call, step in moments:
        asked = build(tmp_path / "asked", **settings)
        ask_in(asked, method, call)
        ask_in(asked, "_save_last_step", 1)  # as a launcher passes on what it got too
        with pytest.raises(Preempted) as ended:
            run(asked, True)
        assert ended.value.code == PREEMPTED == 75 and signal.getsignal(signal.SIGTERM) is before
        found = last_complete_checkpoint(tmp_path / "asked")
        assert found == (step and str(tmp_path / "asked" / f"checkpoint-{step}")), method
    assert_same_results(run(build(tmp_path / "asked", **settings), True), expected)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_detectors_and_segmenters_end_at_the_next_step(task, tmp_path):
    if task == "detection":
        scenes = write_scenes(tmp_path / "data", images=8, validation=1)
        trainer = detection_run.build(tmp_path / "run", scenes, max_steps=4)
    else:
        trainer = segmentation_run.build(tmp_path / "run", segmentation_run.write_data(tmp_path))
    train_until(trainer, 1)
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")


@pytest.mark.parametrize(("method", "step"), [("training_step", 1), ("save_model", 2)])
def test_the_last_checkpoint_can_be_resumed_from_where_others_cannot(method, step, tmp_path):
    """With `save_only_model`: that of a step between two, or of a step of which the model is saved already."""
    settings = {"images": 16, "max_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    trainer = build(tmp_path, **settings)
    ask_in(trainer, method, 1)
    with pytest.raises(Preempted):
        trainer.train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step}")
    assert trainer.args.save_only_model


def test_a_handler_of_the_program_stays(tmp_path):
    seen = []
    former = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        trainer = build(tmp_path, max_steps=1)
        ask_in(trainer, "training_step", 1, signal.SIGUSR1)
        trainer.train()
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert seen == [1] and trainer.state.global_step == 1


def test_another_mechanism_of_the_kind_is_refused(tmp_path):
    with pytest.raises(SettingError, match="`enable_jit_checkpoint` is not needed"):
        build(tmp_path, enable_jit_checkpoint=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, PREEMPTED), (signal.SIGUSR1, PREEMPTED), (signal.SIGINT, 130)]
)
def test_programs_end_in_a_line_before_there_is_anything_to_save(task, number, code, monkeypatch, capsys):
    program = importlib.import_module(f"pvt_hf.commands.train_{task}")
    monkeypatch.setattr(program, "parse", lambda _: signal.raise_signal(number))
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell ignores it
    with pytest.raises(SystemExit) as ended:
        program.main([])
    signal.signal(signal.SIGINT, former)
    assert ended.value.code == code
    assert capsys.readouterr().err == (
        "error: interrupted; the same command with --resume_from_checkpoint true continues\n"
    )


def test_processes_of_loaders_are_ended_by_their_parent(tmp_path):
    """A signal for a group of processes comes to them too."""
    trainer = build(tmp_path)
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert loader.worker_init_fn is start_worker
    former = [signal.getsignal(number) for number in SIGNALS]
    start_worker(0)
    assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}
    for number, handler in zip(SIGNALS, former, strict=True):
        signal.signal(number, handler)


HELD_LOADER = """
import sys
from torch.utils.data import DataLoader
from pvt_hf.training.streams import start_worker
batches = iter(DataLoader(range(100), num_workers=1, worker_init_fn=start_worker))
next(batches)
sys.exit("an error")
"""


@pytest.mark.process
def test_a_program_ends_though_its_loaders_ignore_signals():
    """As after an error, which holds on to them."""
    ended = subprocess.run([sys.executable, "-c", HELD_LOADER], timeout=60, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.endswith("an error\n")
