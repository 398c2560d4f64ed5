"""Runs that have ended are finished again, and those that were killed in an evaluation end as they would have."""

import json
from pathlib import Path

import pytest

from pvt_hf.commands import train_classification, train_detection, train_segmentation
from tests.support.classification_run import build
from tests.support.training_processes import read_result, run_in_two_processes

# Three steps an epoch, and four in all: the run ends within its second epoch.
SHORT = {"images": 24, "evaluation": 5, "max_steps": 4, "save_total_limit": 2, "trainer": {"ema_decay": 0.5}}
SHORT |= {"logging_steps": 2}  # one of the losses is a mean of steps before a checkpoint and after it
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


SMOKE = ["--smoke", "--use_cpu", "true", "--disable_tqdm", "true", "--ema_decay", "0.9", "--save_total_limit", "2"]
PROGRAMS = {
    "classification": (train_classification, ["--save_strategy", "steps", "--save_steps", "3"], 4),
    "detection": (train_detection, [], 6),
    "segmentation": (train_segmentation, [], 8),
}


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("name", PROGRAMS)
def test_program_finishes_again_what_has_ended(name, tmp_path, capsys):
    """The same files and the same last lines; with another number of steps it trains on, and other recipes are refused
    before the data are looked at."""
    program, options, steps = PROGRAMS[name]
    arguments = [*SMOKE, *options, "--max_steps", str(steps), "--output_dir", str(folder := tmp_path / "run")]
    program.main(arguments)
    expected, printed = keep(folder), capsys.readouterr().out
    assert f"checkpoint-{steps}/ema.safetensors" in expected
    program.main([*arguments, "--resume_from_checkpoint", "true"])
    assert difference(keep(folder), expected) == []
    assert capsys.readouterr().out.splitlines()[-3:] == printed.splitlines()[-3:]
    with pytest.raises(SystemExit, match=r"is of another run: `adam_beta2` is 0\.5, and was 0\.9"):
        program.main([*arguments, "--resume_from_checkpoint", "true", "--adam_beta2", "0.5"])
    assert "images" not in capsys.readouterr().out
    program.main([*arguments, "--resume_from_checkpoint", "true", "--max_steps", str(steps + 1)])
    assert (folder / f"checkpoint-{steps + 1}").is_dir()


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("name", STRATEGIES)
def test_run_of_two_processes_that_has_ended_is_finished_again(name, tmp_path):
    settings = SHORT | STRATEGIES[name] | {"images": 48, "resume": True}
    run_in_two_processes([("classification", tmp_path, settings)])
    first = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    result = read_result(tmp_path)
    assert len(result["losses"]) == 2 and result["seed"] == 0
    run_in_two_processes([("classification", tmp_path, settings)])
    again = read_result(tmp_path)
    assert again["seed"] is None and again["losses"] == result["losses"]  # no batch was drawn
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == first
    assert again["metrics"]["eval_loss"] == result["metrics"]["eval_loss"]
