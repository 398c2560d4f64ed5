"""SIGTERM and SIGUSR1 end a run with a complete checkpoint, from which it ends as if it had never been asked to."""

import signal

import pytest

from pvt_hf.training.preemption import PREEMPTED, Preempted
from pvt_hf.training.run_checkpoints import last_complete_checkpoint
from tests.support import classification_run
from tests.support.preempted import ask_in, assert_same_results, results

STEPS = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
EPOCHS = {"save_strategy": "epoch", "eval_strategy": "epoch"}
RANDOM = {"recipe": {"mixup": 0.8, "random_erasing": 0.25}, "model": {"drop_path_rate": 0.2}}


def build_classifier(folder, **settings):
    settings = {"images": 32, "evaluation": 9, "trainer": {"ema_decay": 0.9}} | RANDOM | settings
    return classification_run.build(folder, **settings)


def run(trainer, resume=None):
    """The whole program, as the commands do it."""
    trainer.train(resume)
    trainer.finish()
    return trainer


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """What uninterrupted runs give, with checkpoints by steps and by epochs."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        name: results(run(build_classifier(folder / name, **settings)))
        for name, settings in {"steps": STEPS, "epochs": EPOCHS}.items()
    }


# Where the signal comes (a method of the trainer and its call), and the step of the checkpoint that is there then.
MOMENTS = {
    "loader's start": ("steps", "get_train_dataloader", 1, None),
    "step": ("steps", "training_step", 2, 2),
    "step with a checkpoint and an evaluation": ("steps", "training_step", 3, 3),
    "evaluation": ("steps", "prediction_step", 2, 3),
    "checkpoint": ("steps", "_save_optimizer_and_scheduler", 1, 3),
    "last step of an epoch": ("epochs", "training_step", 4, 4),
    "evaluation of an epoch": ("epochs", "prediction_step", 1, 4),
    "last step": ("steps", "training_step", 8, 8),
    "last evaluation of the training": ("epochs", "prediction_step", 5, 8),
    "last evaluation": ("steps", "prediction_step", 11, 8),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_costs_nothing(moment, whole_runs, tmp_path):
    strategy, method, call, step = MOMENTS[moment]
    settings = STEPS if strategy == "steps" else EPOCHS
    asked = build_classifier(tmp_path, **settings)
    ask_in(asked, method, call)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as ended:
        run(asked)
    assert ended.value.code == PREEMPTED == 75 and signal.getsignal(signal.SIGTERM) is before
    found = last_complete_checkpoint(tmp_path)
    assert found == (step and str(tmp_path / f"checkpoint-{step}"))
    resumed = run(build_classifier(tmp_path, **settings), True)
    assert_same_results(resumed, whole_runs[strategy])
