"""Parses the options of a command: their dataclasses, presets, a file of options, and the command line, which wins."""

import argparse
import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

_FILE_ENDINGS = (".yaml", ".yml", ".json")  # of options


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a help text that does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if "(default: " in (action.help or "") else super()._get_help_string(action)


def parse_arguments(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None,
    prog: str,
    description: str | None,
    presets: dict[str, dict[str, Any]],
    positional: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Any, ...]:
    """The arguments of a program, from a file of them and from the command line, which wins.

    Args:
        dataclass_types: Whose fields are the options.
        argv: The command line without the name of the program; `None` for that of this process. Its first argument may
            be a YAML or JSON file of options.
        prog: The name of the program.
        description: The text above the list of options, as it is.
        presets: Values of options: under `"default"` those of the program, under another name those that hold where the
            option of that name is set, unless file or command line give others.
        positional: Arguments without a name, in their order, with what `argparse` shall know of each: `help`, `nargs`
            (default: none).

    Returns:
        An instance of each of `dataclass_types`, and with `positional` a namespace of these.

    Raises:
        SystemExit: If an option is not known, or a value is wrong.
    """
    parser = HfArgumentParser(
        dataclass_types,
        prog=prog,
        usage=" ".join([prog, "[arguments.yaml]", *map(_show, (positional or {}).items()), "[--option value ...]"]),
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    for name, settings in (positional or {}).items():
        parser.add_argument(name, metavar=name.upper(), **settings)
    parser.set_defaults(**presets.get("default", {}))
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-") and (not positional or argv[0].endswith(_FILE_ENDINGS)):
        argv = [*_read_file(argv[0], parser), *argv[1:]]
    chosen = parser.parse_args(argv)
    for name, values in presets.items():
        if getattr(chosen, name, False):
            argv = [*_to_argv(values), *argv]
    try:
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:
        return parser.error(str(error))


# Options that are not for all models.
_MODELS_OF_OPTIONS = (
    dict.fromkeys(("annotations", "objects_column", "bbox_format", "max_detections"), ("detector",))
    | dict.fromkeys(("threshold",), ("detector", "universal segmenter"))
    | dict.fromkeys(("maps", "map_column", "reduce_labels", "binary_masks", "palette"), ("segmenter",))
    | dict.fromkeys(("window", "stride"), ("segmenter",))
    | dict.fromkeys(("label_column", "top_k"), ("classifier",))
    | dict.fromkeys(("tta_scales", "tta_flip"), ("classifier", "segmenter"))
    | dict.fromkeys(("subtask",), ("universal segmenter",))
)


def check_options(options: Any, checkpoint: str, models: str) -> None:
    """Ends the program if options are given that a model has no use for.

    Args:
        options: A dataclass.
        checkpoint: Of the model, for the message.
        models: What such models are called.
    """
    given = [entry.name for entry in fields(options) if getattr(options, entry.name) != entry.default]
    if useless := [f"--{name}" for name in given if models not in _MODELS_OF_OPTIONS.get(name, (models,))]:
        raise SystemExit(f"{checkpoint} is a {models}, which has no {' and no '.join(useless)}")


def _show(argument: tuple[str, Mapping[str, Any]]) -> str:
    name, settings = argument
    return name.upper() + ("..." if settings.get("nargs") == "+" else "")


def _read_file(file: str, parser: argparse.ArgumentParser) -> list[str]:
    """The options of a YAML or JSON file, as a command line."""
    if not file.endswith(_FILE_ENDINGS):
        parser.error(f"the first argument must be an option, or a YAML or JSON file of options, got {file!r}")
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text())  # YAML contains JSON
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        parser.error(f"{file} cannot be read: {error}")
    if not isinstance(values, dict):
        parser.error(f"{file} must hold names and values of options, got {type(values).__name__}")
    known = [action.dest for action in parser._actions if action.option_strings and action.dest != "help"]
    for name in values:
        if name not in known:
            nearest = ", ".join(difflib.get_close_matches(str(name), known, n=3))
            parser.error(f"{file} has an unknown option {name!r}" + (f". Nearest: {nearest}" if nearest else ""))
    return _to_argv(values)


def _to_argv(values: dict[str, Any]) -> list[str]:
    """Options and their values as a command line. What is `None` is left out."""
    argv = []
    for name, value in values.items():
        if isinstance(value, list | tuple):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{name}={json.dumps(value) if isinstance(value, dict | bool) else value}")
    return argv
