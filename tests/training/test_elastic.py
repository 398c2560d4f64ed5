"""Runs that resume with their images split otherwise, and with other steps."""

import pytest
import torch
from transformers import Trainer

from pvt_hf.training.elastic import GROUP_SIZE, STEPS_PER_EPOCH, compare_layouts, seed_of_process
from pvt_hf.training.optimization import scheduled_learning_rate
from pvt_hf.training.run_checkpoints import CheckpointError
from tests.support.classification_run import build
from tests.support.preempted import log, train_until
from tests.support.small_models import assert_close

LAYOUT = {"images per batch": 4, "accumulated batches": 2, "processes": 3, "seed": 0}
SAVED = LAYOUT | {STEPS_PER_EPOCH: 9, GROUP_SIZE: 2}
SPLITS = [(24, 1, 1), (2, 4, 3), (1, 1, 24)]
# SGD, because Adam's first steps are signs, which rounding turns.
SMALL = {"images": 22, "evaluation": 4, "optim": "sgd", "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 2}


def split_batch(batch, accumulated):
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}


def split_as(batch, accumulated, processes):
    return LAYOUT | {"images per batch": batch, "accumulated batches": accumulated, "processes": processes}


@pytest.mark.parametrize("split", SPLITS)
def test_a_run_is_the_same_however_its_steps_are_split(split):
    now = split_as(*split) | {GROUP_SIZE: 8}
    assert compare_layouts(SAVED, now, is_stream=False) == []
    assert compare_layouts(SAVED, now | {"seed": 1}, is_stream=False) == ["seed is 1, not 0"]
    assert len(compare_layouts(SAVED, now, is_stream=True)) >= 2  # which deals its images to processes and workers


def test_other_steps_are_another_run_unless_they_are_allowed():
    now = split_as(4, 2, 1)
    (change,) = compare_layouts(SAVED, now, is_stream=False)
    assert change == "images per step are 8, not 24 (--allow_batch_change resumes nevertheless)"
    assert compare_layouts(SAVED, now, is_stream=False, allow_batch_change=True) == []
    assert compare_layouts(SAVED, now, is_stream=True, allow_batch_change=True)


@pytest.mark.parametrize("wrong", [None, 0, True, "4", [4]])
@pytest.mark.parametrize("name", [*sorted(LAYOUT.keys() - {"seed"}), STEPS_PER_EPOCH, GROUP_SIZE])
def test_layouts_that_are_none_are_another_run(name, wrong):
    assert "must be at least 1" in compare_layouts(SAVED | {name: wrong}, LAYOUT | {GROUP_SIZE: 4}, False, True)[0]


def test_run_goes_on_with_its_images_split_otherwise(tmp_path):
    """8 images at once, then 2 four times: losses and weights of the run that has 8 at once. Of 22 images an epoch has
    two such steps, though 11 batches of 2."""
    whole = build(tmp_path / "whole", **SMALL)
    whole.train()
    train_until(build(tmp_path / "parts", **SMALL), 1)
    parts = build(tmp_path / "parts", **SMALL, **split_batch(2, 4))
    parts.train(True)
    assert log(parts) == pytest.approx(log(whole), rel=1e-4) and len(log(whole)) == 4
    assert log(parts, "learning_rate") == log(whole, "learning_rate")
    assert_close(parts.model.state_dict(), whole.model.state_dict())


def test_other_steps_go_on_by_the_images_seen(tmp_path):
    """Three epochs of 64 images in steps of 8. After 11 of them, an epoch and 24 images, the steps are of 16."""
    settings = SMALL | {"images": 64, "num_train_epochs": 3, "recipe": {"warmup_epochs": 1}}
    names: list[str] = []

    def build_noting(**changes):
        trainer = build(tmp_path, **settings | changes)
        take_step = trainer.training_step
        trainer.training_step = lambda model, inputs, *args: (
            names.extend(inputs["names"]),
            take_step(model, inputs, *args),
        )[1]
        return trainer

    train_until(build_noting(), 11)
    with pytest.raises(CheckpointError, match="images per step are 16, not 8 \\(--allow_batch_change"):
        build(tmp_path, **settings | split_batch(16, 1)).train(True)
    # 5 steps of 16 images are the last ones that are not more than 88. The steps that were taken stay counted.
    train_until(build_noting(learning_rate=0.2, **split_batch(16, 1)), 13, True, allow_batch_change=True)
    last = build_noting(learning_rate=0.2, **split_batch(4, 4))
    last.train(True)
    assert last.state.global_step == last.state.max_steps == 11 + 7 and last.state.epoch == 3
    rates = [scheduled_learning_rate(step // 8, 3, 1, 0.1, 1e-6, 1e-5) for step in range(11)]
    rates += [scheduled_learning_rate(step // 4, 3, 1, 0.2, 1e-6, 1e-5) for step in range(5, 12)]
    assert log(last, "learning_rate") == pytest.approx(rates)
    assert len({*names[:64]}) == len({*names[64:80], *names[88:136]}) == len({*names[136:]}) == 64
    assert {*names[80:88]} <= {*names[88:136]} and len(names) == 200  # what was seen of an incomplete step, again


def test_schedules_that_follow_the_metrics_keep_their_steps(tmp_path, monkeypatch):
    trainer = build(tmp_path, **SMALL)
    trainer.lr_scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(trainer.create_optimizer())
    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", lambda *_: None)
    trainer.former = {"layout": trainer._layout()}
    trainer._load_optimizer_and_scheduler("checkpoint-3")
    trainer.former["layout"]["processes"] = 2
    with pytest.raises(CheckpointError, match=r"no function of the step \(ReduceLROnPlateau\) keeps its images"):
        trainer._load_optimizer_and_scheduler("checkpoint-3")


def test_processes_draw_anew_where_they_were_others(tmp_path, monkeypatch):
    """As many processes have the random states of the checkpoint, each its own."""
    seeds = {seed_of_process(*numbers) for numbers in [(0, 3, 0), (0, 3, 1), (0, 4, 0), (1, 3, 0)]}
    assert len(seeds) == 4 and all(0 <= seed < 2**32 for seed in seeds)
    trainer, loaded = build(tmp_path, **SMALL), []
    monkeypatch.setattr(Trainer, "_load_rng_state", lambda _, checkpoint: loaded.append(checkpoint))
    trainer.state.global_step = 3
    for processes in (1, 2):
        torch.manual_seed(0)
        trainer.former = {"layout": {"processes": processes}}
        trainer._load_rng_state("checkpoint-3")
        assert loaded == ["checkpoint-3"]
        assert torch.initial_seed() == (0 if processes == 1 else seed_of_process(0, 3, 0))
