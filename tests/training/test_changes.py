"""What may change when a run resumes takes effect, and is said; everything else is refused by name."""

import fnmatch
import functools
import re
from dataclasses import fields
from pathlib import Path

import pytest
import transformers
from transformers import TrainingArguments

from pvt_hf.training.changes import MAY_CHANGE, find_changes
from pvt_hf.training.optimization import freeze_stages
from pvt_hf.training.run_checkpoints import CheckpointError
from pvt_hf.untrusted import read_json_object
from tests.support.classification_run import build, load_split

SHORT = {"images": 24, "evaluation": 5, "save_strategy": "no", "max_steps": 6}
SCHEDULES = {
    "recipe": {},
    "linear": {"trainer": {"recipe_schedule": False}, "warmup_steps": 3},
    "greedy": {
        "trainer": {"recipe_schedule": False},
        **{"lr_scheduler_type": "greedy", "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 3},
    },
}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """The checkpoint of a run after two steps."""

    @functools.cache
    def train(schedule: str = "recipe") -> str:
        folder = tmp_path_factory.mktemp(schedule)
        build(folder, **SHORT | SCHEDULES[schedule] | {"max_steps": 2, "save_strategy": "epoch"}).train()
        return str(folder / "checkpoint-2")

    return train


def list_rates(trainer, steps: int) -> dict[int, list[float]]:
    """The learning rates of each group by the step of a run that is not resumed."""
    trainer.get_train_dataloader()
    trainer.create_optimizer_and_scheduler(steps)
    rates, schedule = {}, trainer.lr_scheduler
    for step in range(steps):
        rates[step] = schedule.get_last_lr()
        trainer.optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "changes", "steps"),
    [
        ("recipe", {"learning_rate": 4e-4, "weight_decay": 0.01, "max_grad_norm": 0.5}, 6),
        ("recipe", {"max_steps": -1, "num_train_epochs": 3, "logging_steps": 2, "eval_steps": 5, "save_steps": 4}, 9),
        ("linear", {"learning_rate": 4e-4, "max_steps": 5}, 5),
    ],
)
def test_what_may_change_holds_from_the_next_step_on(schedule, changes, steps, train, tmp_path, caplog, monkeypatch):
    """Rates are those of a run that has had them from its beginning. The log says what was and what is."""
    monkeypatch.setattr(transformers.utils.logging._get_library_root_logger(), "propagate", True)
    monkeypatch.setattr(transformers.utils.logging.get_logger("pvt_hf.training.resumable"), "propagate", True)
    settings = SHORT | SCHEDULES[schedule] | changes
    resumed, found = build(tmp_path / "resumed", **settings), {}
    step = resumed.training_step

    def note_rates(*args):
        found[resumed.state.global_step] = [group["lr"] for group in resumed.optimizer.param_groups]
        return step(*args)

    resumed.training_step = note_rates
    resumed.train(train(schedule))
    expected = list_rates(build(tmp_path / "fresh", **settings), steps)
    assert found == {number: rates for number, rates in expected.items() if number >= 2}
    groups = resumed.optimizer.param_groups
    assert {group["initial_lr"] for group in groups} == {resumed.args.learning_rate}
    assert {group["weight_decay"] for group in groups} == {0, resumed.args.weight_decay}
    state, args = resumed.state, resumed.args
    assert [state.logging_steps, state.save_steps] == [args.logging_steps, args.save_steps] and state.max_steps == steps
    assert len(found) == steps - 2
    for name, value in changes.items():
        assert re.search(f"As this run resumes, `{name}` is {value}, and was .*", caplog.text), name


def test_run_is_not_over_before_it_is_resumed(train, tmp_path):
    with pytest.raises(CheckpointError, match="checkpoint-2 has 2 steps, more than the 1 of this run"):
        build(tmp_path, **SHORT | {"max_steps": 1}).train(train())


def test_rates_that_follow_the_metrics_stay(train, tmp_path):
    with pytest.raises(CheckpointError, match=r"`learning_rate` is 0\.5, and was 0\.001"):
        build(tmp_path, **SHORT | SCHEDULES["greedy"] | {"learning_rate": 0.5}).train(train("greedy"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": {"mixup": 0.8}}, r"`recipe\.mixup` is 0\.8, and was 0\.0"),
        ({"recipe": {"warmup_epochs": 1}}, r"`recipe\.warmup_epochs` is 1, and was 0"),
        ({"optim": "sgd"}, r"`optim` is 'sgd', and was 'adamw_torch_fused'"),
        ({"adam_beta2": 0.9}, r"`adam_beta2` is 0\.9, and was 0\.999"),
        ({"bf16": True}, "`bf16` is True, and was False"),
        ({"model": {"drop_path_rate": 0.3}}, r"`model\.drop_path_rate` is 0\.3, and was 0\.0"),
        ({"version": "v1"}, r"`model\.model_type` is 'pvt', and was 'pvt_v2'"),
        ({"trainer": {"layer_decay": 0.5}}, r"`settings\.layer-wise decay` is 0\.5, and was 1\.0"),
        ({"trainer": {"recipe_schedule": False}}, r"`settings\.schedule` is 'lr_scheduler_type', and was \"the recipe"),
        ({"trainer": {"initial_weights": "a/b2"}}, r"`settings\.initial weights` is 'b2', and was None"),
        ({"trainer": {"settings": {"head": "x"}}}, r"`settings\.head` is 'x', and was None"),
        ({"evaluation": 6}, r"`eval_dataset\.images` is 6, and was 5; the validation set has other file"),
        ({"metric_for_best_model": "loss"}, "`metric_for_best_model` is 'loss', and was None"),
    ],
)
def test_everything_else_is_refused(settings, message, train, tmp_path, monkeypatch):
    """Before anything is done: nothing is loaded, and nothing written."""
    trainer = build(tmp_path, **SHORT | settings)
    monkeypatch.setattr(trainer, "_inner_training_loop", None)
    with pytest.raises(CheckpointError, match=f"checkpoint-2 is of another run: .*{message}"):
        trainer.train(train())
    assert list(tmp_path.iterdir()) == []


def test_other_images_of_the_same_number_are_refused(train, tmp_path):
    trainer = build(tmp_path, **SHORT)
    trainer.train_dataset.data = load_split("train").select(range(100, 124))
    with pytest.raises(
        CheckpointError, match=r"the training set has other file sizes .*; the training set has other ann"
    ):
        trainer.train(train())


def test_frozen_stages_are_of_the_run(train, tmp_path):
    trainer = build(tmp_path, **SHORT)
    freeze_stages(trainer.model, 1)
    with pytest.raises(CheckpointError, match=r"`model\.trained parameters` is '\d+ of 132', and was '132 of 132'"):
        trainer.train(train())


def test_names_of_others_are_no_longer_than_they_need_be(train):
    """A forged run is shown in a line, and in part."""
    saved = read_json_object(Path(train()) / "run.json")["run"]
    refused, said = find_changes(saved | {"optim": "\x1b[2J" + "x" * 10**4}, saved)
    assert len(refused) == 1 and said == [] and len(refused[0]) < 300 and refused[0].isprintable()


def test_table_names_what_there_is(train):
    """Each argument has one effect at most, and no pattern is of nothing."""
    run = read_json_object(Path(train()) / "run.json")["run"]
    names = {field.name for field in fields(TrainingArguments)} | run.keys() | {"recipe.steps"}
    patterns = [pattern for patterns in MAY_CHANGE.values() for pattern in patterns]
    assert not [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    assert not [name for name in names if sum(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) > 1]
    for name in run:
        refused, said = find_changes(run, run | {name: "other"})
        assert len(refused) + len(said) == 1, name
        assert bool(said) == any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns), name
