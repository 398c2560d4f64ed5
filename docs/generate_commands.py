"""Writes the pages of the commands, `docs/commands/*.md`, from what `--help` knows.

    python docs/generate_commands.py            # writes them
    python docs/generate_commands.py --check    # exits with 1 and names those that differ or should not be there

Of the arguments of `TrainingArguments`, which a version of transformers may change, a page has those only that the
command gives another default.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transformers import TrainingArguments

from pvt_hf.commands.main import COMMANDS, main

FOLDER = ROOT / "docs" / "commands"
INDEX = """\
# Commands

The package brings one command, `pvt-hf`, with a subcommand for each task. `pvt-hf COMMAND --help` says what an option
does, its unit and its default; these pages say the same.

{table}
A command that misses a package says which extra has it. Options of the commands that train and evaluate may stand in a
YAML or JSON file, and the command line wins:

```text
pvt-hf train-detection settings.yaml --learning_rate 1e-4
```

On several GPUs, `accelerate launch -m` takes the module of a command and the same options:

```text
accelerate launch -m pvt_hf.commands.train_detection settings.yaml
```

In a clone, `python examples/train_detection.py` and `python conversion/convert.py` start the same programs.
"""
# What commands need that look for it when they know what is asked of them.
NEEDED_LATER = {
    "convert": "`conversion` for timm's own checkpoints",
    "demo": "`demo`",
    "export": "`export`; for ExecuTorch `executorch`",
    "info": "none",
    "predict": "`training` for masks of instances, `video` for videos",
}
INHERITED = f"""
## Arguments of Trainer

Every argument of transformers'
[`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.{TrainingArguments.__name__})
is an option too. These have other defaults here:

"""


def read_parser(command: str) -> argparse.ArgumentParser:
    """The parser of a command, at the moment when it would print its help."""
    parsers = []

    def keep(parser: argparse.ArgumentParser, *args: object) -> None:
        parsers.append(parser)

    with mock.patch.object(argparse.ArgumentParser, "print_help", keep):
        try:
            main([command, "--help"])
        except SystemExit:
            return parsers[-1]
    raise RuntimeError(f"pvt-hf {command} --help did not print its help")


def escape(text: str) -> str:
    """A help text, as a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "--|" * len(header), *lines[1:], ""])


def name_option(action: argparse.Action) -> str:
    """How an option is written, with what it wants."""
    name = next((option for option in action.option_strings if option.startswith("--")), "")
    takes_value = action.nargs not in (0, "?") or not name
    type_name = getattr(action.type, "__name__", "text")
    value = (action.metavar or (type_name if name else action.dest)).upper() if takes_value else ""
    if action.choices is not None and takes_value and not action.metavar:
        value = "CHOICE"
    return f"`{name} {value}{' ...' if action.nargs in ('+', '*') else ''}`".replace("` ", "`").replace(" `", "`")


def explain_option(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """What an option does, its choices and its default."""
    text = escape(parser._get_formatter()._expand_help(action)) if action.help else ""
    if action.choices is None or action.metavar:
        return text
    return f"{text}; one of {', '.join(f'`{choice}`' for choice in action.choices)}"


def is_inherited(action: argparse.Action) -> bool:
    """Whether an option is an argument of `TrainingArguments` as it is there, its default aside."""
    inherited = {field.name: field.metadata.get("help") for field in fields(TrainingArguments)}
    return action.dest in inherited and action.help == inherited[action.dest]


def changed_defaults(actions: Sequence[argparse.Action]) -> list[tuple[str, str]]:
    """Arguments of `TrainingArguments` with a default of the command's own."""
    defaults = {
        field.name: (field.default if field.default_factory is MISSING else field.default_factory()) or None
        for field in fields(TrainingArguments)
    }
    rows = {action.dest: action.default for action in actions}
    return [(f"`--{name}`", f"`{default}`") for name, default in rows.items() if (default or None) != defaults[name]]


def command_page(command: str) -> str:
    """What a command does, and its options."""
    parser = read_parser(command)
    actions = {action.dest: action for action in reversed(parser._actions)}  # `--no_x` is the second action of `x`
    actions = [action for action in reversed(actions.values()) if action.dest != "help"]
    own = [action for action in actions if not is_inherited(action)]
    places = [name_option(action).strip("`") for action in own if not action.option_strings]
    usage = parser.usage or " ".join(["pvt-hf", command, *places, "[--option value ...]"])
    rows = [(name_option(action), explain_option(parser, action)) for action in own]
    page = f"# pvt-hf {command}\n\n```text\n{usage}\n```\n\n{(parser.description or '').strip()}\n\n## Options\n\n"
    page += markdown_table(("option", "what it does"), rows)
    if changed := changed_defaults([action for action in actions if is_inherited(action)]):
        page += INHERITED + markdown_table(("argument", "default"), changed)
    return page


def index_page() -> str:
    """All commands."""
    rows = [
        (
            f"[`pvt-hf {name}`]({name}.md)",
            command.summary,
            f"`{command.extra}`" if command.packages else NEEDED_LATER[name],
        )
        for name, command in sorted(COMMANDS.items())
    ]
    return INDEX.format(table=markdown_table(("command", "what it does", "extra that it needs"), rows))


def generate() -> Iterator[tuple[Path, str]]:
    """Every file of the folder, and its text."""
    yield FOLDER / "index.md", index_page()
    for command in COMMANDS:
        yield FOLDER / f"{command}.md", command_page(command)


def run(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing (default: write the files)")
    check = parser.parse_args(argv).check
    pages = dict(generate())
    stale = [file for file in FOLDER.glob("*.md") if file not in pages]
    stale += [file for file, text in pages.items() if not file.is_file() or file.read_text() != text]
    for file in stale:
        print(f"{file.relative_to(ROOT)}: {'differs from `--help`' if check else 'written'}")
        if not check and file in pages:
            file.write_text(pages[file])
        elif not check:
            file.unlink()
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(run())
