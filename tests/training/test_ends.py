"""Runs that have ended are finished again, and those that were killed in an evaluation end as they would have."""

import json
from pathlib import Path

import pytest

from tests.support.classification_run import build

# Three steps an epoch, and four in all: the run ends within its second epoch.
SHORT = {"images": 24, "evaluation": 5, "max_steps": 4, "save_total_limit": 2, "trainer": {"ema_decay": 0.5}}
# (The best checkpoint, that of the highest loss, is not the last one.)
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
STRATEGIES = {
    "steps": {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3},
    "epoch": {"save_strategy": "epoch", "eval_strategy": "epoch", "save_total_limit": 1} | BEST,
    "mixed": {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "epoch"},
}


def keep(folder: Path) -> dict[str, bytes]:
    """What a run left, but for how long it took and where it was."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files = {name: (folder / name).read_bytes() for name in names if not name.endswith(("training_args.bin", ".json"))}
    results = json.loads((folder / "eval_results.json").read_text())
    return files | {key: value for key, value in results.items() if not key.endswith(("runtime", "per_second"))}


def finish(trainer, resume: bool = False, killed_in: int | None = None) -> dict[str, bytes]:
    """The number of steps that were taken, and what the run left; or nothing where an evaluation ended it."""
    step, evaluate, steps, evaluations = trainer.training_step, trainer.evaluate, [], []

    def evaluate_or_end(*args, **kwargs):
        evaluations.append(args)
        if len(evaluations) == killed_in:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    trainer.training_step = lambda *args: steps.append(args) or step(*args)
    trainer.evaluate = evaluate_or_end
    try:
        trainer.train(resume)
    except KeyboardInterrupt:
        return {}
    trainer.finish()
    return {"steps": len(steps)} | keep(Path(trainer.args.output_dir))


@pytest.fixture(
    scope="module", params=["mixed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("steps", "epoch"))]
)
def ended(request, tmp_path_factory):
    """Settings of a run, its folder, and what it left."""
    settings = SHORT | STRATEGIES[request.param]
    folder = tmp_path_factory.mktemp("ended") / "run"
    left = finish(build(folder, **settings))
    assert left.pop("steps") == 4 and {"checkpoint-4/optimizer.pt", "ema/model.safetensors"} <= left.keys()
    assert "checkpoint-3/optimizer.pt" in left
    return settings, folder, left


def difference(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    return sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))


def test_run_that_has_ended_is_finished_again(ended, tmp_path):
    """Not a step more: the same bits, metrics, curves and card, and the same checkpoints; also in another folder."""
    settings, folder, expected = ended
    moved = folder.rename(tmp_path / "run")
    try:
        again = build(moved, **settings)
        found = finish(again, resume=True)
    finally:
        moved.rename(folder)
    assert found.pop("steps") == 0 and again.state.global_step == 4
    assert difference(found, expected) == []
    assert not any("train_loss" in entry for entry in again.state.log_history[-1:])


@pytest.mark.parametrize("evaluation", [1, 2])
def test_run_that_was_killed_in_an_evaluation_ends_as_if_it_was_not(evaluation, ended, tmp_path):
    """The evaluation that was due is made up for, also that of a checkpoint that was written before it was due."""
    settings, _, expected = ended
    folder = tmp_path / "run"
    assert finish(build(folder, **settings), killed_in=evaluation) == {}
    found = finish(build(folder, **settings), resume=True)
    assert found.pop("steps") == 2 - evaluation
    assert difference(found, expected) == []
