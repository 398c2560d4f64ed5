"""Runs that a callback stops early: they end where uninterrupted ones do, and stay ended."""

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils.logging import _get_library_root_logger, get_logger

from pvt_hf.untrusted import read_json_object
from tests.support.classification_run import build
from tests.training.test_ends import difference, finish

# An evaluation and a checkpoint after each of the steps. No loss is better than the first one, by so much.
SETTINGS = {"images": 24, "evaluation": 5, "max_steps": 9, "save_strategy": "steps", "save_steps": 1}
SETTINGS |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": False}


def build_early(folder, patience=3, **settings):
    trainer = build(folder, **SETTINGS | settings)
    trainer.add_callback(EarlyStoppingCallback(patience, early_stopping_threshold=100.0))
    return trainer


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """What a run left that was stopped after its fourth step, the third without an improvement, and its folder."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    left = finish(build_early(folder))
    assert left.pop("steps") == 4 and "checkpoint-4/optimizer.pt" in left
    return folder, left


def count(folder, step):
    state = read_json_object(folder / f"checkpoint-{step}" / "trainer_state.json")
    return state["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"]


def test_checkpoints_have_what_the_evaluation_of_their_step_has_counted(stopped):
    folder, _ = stopped
    assert [count(folder, step) for step in (1, 2, 3, 4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("restore", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_run_that_was_stopped_early_is_finished_again(stopped, restore, caplog, monkeypatch):
    """Not a step more: the same bits, metrics, curves and card."""
    for logger in (_get_library_root_logger(), get_logger("pvt_hf.training.resumable")):
        monkeypatch.setattr(logger, "propagate", True)
    folder, expected = stopped
    again = build_early(folder, restore_callback_states_from_checkpoint=restore)
    found = finish(again, resume=True)
    assert found.pop("steps") == 0 and again.state.global_step == 4
    assert difference(found, expected) == []
    assert "ended at step 4: EarlyStoppingCallback has seen 3 evaluations without an improvement" in caplog.text


def test_run_that_was_killed_in_the_evaluation_that_stops_it_takes_no_step_more(stopped, tmp_path):
    """The resumed run makes that evaluation first, and knows what was counted before."""
    _, expected = stopped
    assert finish(build_early(tmp_path / "run"), killed_in=4) == {}
    found = finish(build_early(tmp_path / "run"), resume=True)
    assert found.pop("steps") == 0
    assert difference(found, expected) == []


def test_run_trains_on_with_more_patience_or_without_the_callback(stopped, tmp_path):
    folder, _ = stopped
    for name, patience, steps in (("patient", 5, 2), ("free", 10**6, 3)):
        trainer = build_early(tmp_path / name, patience, max_steps=7)
        if name == "free":
            trainer.remove_callback(EarlyStoppingCallback)
        trainer.train(str(folder / "checkpoint-4"))
        assert trainer.state.global_step == 4 + steps


class Counter(TrainerCallback, ExportableState):
    """Somebody's own: it counts steps by so many at a time, and ends a program after two."""

    def __init__(self, by: int):
        self.by, self.seen, self.total = by, 0, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.seen, self.total = self.seen + 1, self.total + self.by
        if self.seen == 2:
            control.should_training_stop = True

    def state(self):
        return {"args": {"by": self.by}, "attributes": {"total": self.total}}


def test_callbacks_of_others_count_on_and_their_stop_is_no_end(tmp_path):
    """Several of a class each have their own count, and one that is new at a resume is saved too."""
    for end in (2, 4):
        trainer = build(tmp_path, **SETTINGS | {"max_steps": 6})
        counters = [Counter(1), Counter(10)]
        for callback in (*counters, *([EarlyStoppingCallback(9)] if end == 4 else [])):
            trainer.add_callback(callback)
        trainer.train(end == 4)
        assert trainer.state.global_step == end
        assert [counter.total for counter in counters] == [end, 10 * end]
    assert "EarlyStoppingCallback" in trainer.state.stateful_callbacks


def test_evaluation_at_the_start_of_a_run_is_not_repeated_when_it_resumes(tmp_path):
    settings = SETTINGS | {"eval_strategy": "no", "save_strategy": "epoch", "max_steps": 3, "eval_on_start": True}
    expected = finish(build(tmp_path, **settings))
    assert expected.pop("steps") == 3
    found = finish(build(tmp_path, **settings), resume=True)
    assert found.pop("steps") == 0 and difference(found, expected) == []
