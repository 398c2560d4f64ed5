"""Parses the options of a command: their dataclasses, presets, a file of options, and the command line, which wins."""

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser


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

    Returns:
        An instance of each of `dataclass_types`.

    Raises:
        SystemExit: If an option is not known, or a value is wrong.
    """
    parser = HfArgumentParser(
        dataclass_types,
        prog=prog,
        usage=f"{prog} [arguments.yaml] [--option value ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parser.set_defaults(**presets.get("default", {}))
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv = [*_read_file(argv[0], parser), *argv[1:]]
    chosen = parser.parse_args(argv)
    for name, values in presets.items():
        if getattr(chosen, name, False):
            argv = [*_to_argv(values), *argv]
    try:
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:
        return parser.error(str(error))


def _read_file(file: str, parser: argparse.ArgumentParser) -> list[str]:
    """The options of a YAML or JSON file, as a command line."""
    if not file.endswith((".yaml", ".yml", ".json")):
        parser.error(f"the first argument must be an option, or a YAML or JSON file of options, got {file!r}")
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text())  # YAML contains JSON
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        parser.error(f"{file} cannot be read: {error}")
    if not isinstance(values, dict):
        parser.error(f"{file} must hold names and values of options, got {type(values).__name__}")
    known = [action.dest for action in parser._actions if action.dest != "help"]
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
