"""Options of the programs: every one says what it does; files, presets and the command line, which wins."""

import dataclasses
import json

import pytest
from transformers import TrainingArguments

from pvt_hf.commands import parser, predict, presets
from pvt_hf.training import arguments, segmentation_arguments

PROGRAMS = {
    "train-classification": (arguments.CLASSIFICATION, presets.CLASSIFICATION),
    "train-detection": (arguments.DETECTION, presets.DETECTION),
    "train-segmentation": (segmentation_arguments.SEGMENTATION, presets.SEGMENTATION),
    "predict": ((predict.PredictionArguments,), {}),
    "evaluate": ((arguments.EvaluationArguments,), presets.EVALUATION),
}


def parse(program: str, *argv: str):
    types, program_presets = PROGRAMS[program]
    return parser.parse_arguments(types, [*argv], f"pvt-hf {program}", "What it does.", program_presets)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_says_what_it_does_and_its_default(program, capsys):
    with pytest.raises(SystemExit):
        parse(program, "--help")
    text = capsys.readouterr().out
    assert text.startswith(f"usage: pvt-hf {program} [arguments.yaml] [--option value ...]\n\nWhat it does.\n")
    types, _ = PROGRAMS[program]
    for entry in (entry for group in types for entry in dataclasses.fields(group) if entry.init):
        assert f"--{entry.name} " in text or f"--{entry.name}," in text
        is_own = TrainingArguments.__dataclass_fields__.get(entry.name) is not entry
        assert "(default: " in entry.metadata["help"] or not is_own, entry.name


@pytest.mark.parametrize("program", PROGRAMS)
def test_presets_are_options(program):
    """Of each program, with values that it takes."""
    types, program_presets = PROGRAMS[program]
    known = {name for group in types for name in group.__dataclass_fields__}
    assert all(preset.keys() <= known for preset in program_presets.values())
    required = ["--model_name_or_path", "x"] if program == "evaluate" else []
    for name in program_presets.keys() - {"default"}:
        chosen = {}
        for group in parse(program, f"--{name}", *required):
            chosen |= vars(group)
        assert chosen == chosen | program_presets[name]


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_command_line_wins_over_the_file_and_that_over_the_preset(kind, tmp_path):
    values = {"smoke": True, "recipe": "mask_rcnn_1x", "shortest_edges": [96, 128], "learning_rate": 0.5, "seed": None}
    values |= {"longest_edge": 160, "config_overrides": {"neck_channels": 8}, "fsdp_config": {"fsdp_version": 2}}
    file = tmp_path / f"arguments.{kind}"
    file.write_text(json.dumps(values).replace("0.5", "1e-3"))  # which YAML takes for a string
    model_args, data_args, recipe_args, options = parse("train-detection", str(file), "--longest_edge", "192")
    assert recipe_args.smoke and recipe_args.recipe == "mask_rcnn_1x" and recipe_args.shortest_edges == [96, 128]
    assert recipe_args.longest_edge == 192 and options.learning_rate == 1e-3 and options.seed == 0
    assert model_args.config_overrides == {"neck_channels": 8} and data_args.num_scenes == 16
    assert options.num_train_epochs == 2 and recipe_args.flip == 0.0
    _, _, recipe_args, options = parse("train-detection", str(file), "--smoke", "false")
    assert options.num_train_epochs is None and recipe_args.flip is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "learning_rat: 1\nseed: 0", "a.yaml has an unknown option 'learning_rat'. Nearest: learning_rate"),
        ("a.yaml", "- seed", "a.yaml must hold names and values of options, got list"),
        ("a.yaml", "seed: [", "a.yaml cannot be read: "),
        ("a.yaml", "seed: much", "argument --seed: invalid int value: 'much'"),
        ("a.json", None, "a.json cannot be read: "),
        ("a.json", "[" * 600, "a.json cannot be read: "),
        ("a.txt", "seed: 0", "the first argument must be an option, or a YAML or JSON file of options, got "),
    ],
)
def test_wrong_file_is_a_usage_error(name, content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as error:
        parse("train-segmentation", str(tmp_path / name))
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_unknown_option_is_a_usage_error(capsys):
    with pytest.raises(SystemExit):
        parse("train-detection", "--smoke", "--shortest_egde", "3")
    assert "unrecognized arguments: --shortest_egde 3" in capsys.readouterr().err
