"""Names of classes, from a file in any of the forms that people have, and classes of two sets put beside each other."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..untrusted import UntrustedFileError, read_text
from ..writing.text import escape_lines

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MAX_DEPTH = 50  # of YAML


class ClassNameError(ValueError):
    """Class names that cannot be used. The message names the file, or has both lists."""

    def __init__(self, message: object):
        super().__init__(escape_lines(str(message)))


def list_class_names(config: PreTrainedConfig) -> list[str]:
    """The names of a model's classes in the order of their labels."""
    return [config.id2label[label] for label in range(config.num_labels)]


def read_class_names(file: str | Path) -> list[str]:
    """The names of the classes in the order of their labels.

    Args:
        file: JSON or YAML with a list of names, an object from labels (from 0 or from 1, also as strings) to names, as
            `id2label`, or from names to labels, as `label2id`; or with one of these under `names` or `id2label`, as the
            `data.yaml` of YOLO and the `config.json` of a model. Of CSV the column `name` is read, or the only one. Any
            other file is text with a name per line.

    Raises:
        ClassNameError: If the file cannot be read, labels are missing, or a name is empty or there twice.
    """
    path = Path(file)
    try:
        text = read_text(path)
    except UntrustedFileError as error:
        raise ClassNameError(f"{file} {error}") from error
    names = _list_names(file, _parse(path, text))
    if wrong := [name for name in names if not is_name(name)]:
        raise ClassNameError(f"{file}: a class name must be a string in UTF-8 that is not empty, got {wrong[0]!r}.")
    names = [name.strip() for name in names]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ClassNameError(f"{file} has class names twice: {twice[:5]}.")
    if not names:
        raise ClassNameError(f"{file} has no class names.")
    return names


def is_name(value: Any) -> bool:
    """Whether this can be the name of a class: a string that is not empty, and that can be written to files. Json may
    hold halves of characters, which cannot.

    Args:
        value: Of a file of others.
    """
    return isinstance(value, str) and value.strip() != "" and not re.search(r"[\ud800-\udfff]", value)


def _parse(path: Path, text: str) -> Any:
    try:
        if path.suffix.lower() == ".json":
            return json.loads(text)
        if path.suffix.lower() in (".yaml", ".yml"):
            return parse_yaml(text)
        if path.suffix.lower() == ".csv":
            return _list_column(parse_csv(text))
    except (ValueError, RecursionError) as error:
        raise ClassNameError(f"{path} cannot be read: {error}") from error
    lines = text.splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def parse_yaml(text: str) -> Any:
    """What a text in YAML holds.

    Args:
        text: Of anybody.

    Raises:
        ValueError: If it is no YAML, is nested deeply, or refers to parts of itself: a few lines can be read or printed
            for hours then.
    """
    import yaml

    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _MAX_DEPTH:
                raise ValueError("it has references (`*name`)" if depth <= _MAX_DEPTH else "it is nested too deeply")
        return yaml.safe_load(text)
    # Its readers of dates, integers and truth values raise whatever a wrong one leads them to.
    except (yaml.YAMLError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(error) from error


def parse_csv(text: str) -> list[list[str]]:
    """The cells of a text in CSV, row by row, without the white space around them and without empty rows.

    Args:
        text: Of anybody.

    Raises:
        ValueError: If it is no CSV.
    """
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines(), strict=True)]
    except csv.Error as error:
        raise ValueError(error) from error
    return [row for row in rows if any(row)]


def _list_column(rows: list[list[str]]) -> list[str]:
    """The column `name`, or the only one."""
    header = [cell.lower() for cell in rows[0]] if rows else []
    if "name" in header:
        place = header.index("name")
        return [row[place] if place < len(row) else "" for row in rows[1:]]
    if any(len(row) > 1 for row in rows):
        raise ValueError(f"none of its columns {rows[0]} is called name")
    return [row[0] for row in rows]


def _list_names(file: str | Path, content: Any) -> list[Any]:
    if isinstance(content, Mapping):
        for key in ("names", "id2label"):
            if isinstance(content.get(key), list | Mapping):
                content = content[key]
                break
    if isinstance(content, list):
        return content
    if not isinstance(content, Mapping):
        raise ClassNameError(
            f"{file} must have a list of class names, or an object from labels to names or from names to labels, got "
            f"{type(content).__name__}."
        )
    keys, count = [_to_label(key) for key in content], len(content)
    if None in keys:  # from names to labels
        content = {label: name for name, label in content.items() if isinstance(label, int | str)}
        keys = [_to_label(label) for label in content]
    pairs = zip(keys, content.values(), strict=True)
    labels = {label: name for label, name in pairs if label is not None}
    if len(labels) < count:
        raise ClassNameError(f"{file} must have a different integer for each class, got {str(content)[:200]}.")
    first = min(labels, default=0)
    if first not in (0, 1) or max(labels, default=0) - first >= max(len(labels), 1):
        raise ClassNameError(
            f"{file} must number the classes from 0 or from 1 without gaps, got {len(labels)} numbers from {first} to "
            f"{max(labels)}."
        )
    return [labels[label] for label in sorted(labels)]


def _to_label(value: Any) -> int | None:
    """The integer that a key or a value stands for."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    return value if type(value) is int else None


def match_class_names(
    wanted: Sequence[str], found: Sequence[str], owners: tuple[str, str], subset: bool = False, advice: str = ""
) -> list[int]:
    """The place in `wanted` of each class of `found`. Names are the same where they differ in case, `_` or `-` only.

    Args:
        wanted: Of a model, or of the training set.
        found: Of other data.
        owners: Who has the two, for the message, as `("The model", "the data")`.
        subset: Whether `found` may lack classes (default: `False`).
        advice: Of the message, where `found` only lacks classes (default: none).

    Raises:
        ClassNameError: If the classes are not the same, with both lists.
    """
    to_key = str if set(found) <= set(wanted) else _fold
    keys, others = ([to_key(name) for name in names] for names in (wanted, found))
    if keys == others:  # also where names are there twice, as in ImageNet
        return list(range(len(keys)))
    places = {key: place for place, key in enumerate(keys)}
    clear = len(places) == len(keys) and len(set(others)) == len(others)
    if not clear or not set(others) <= places.keys() or not (subset or len(others) == len(keys)):
        alone = [name for name, key in zip(wanted, keys, strict=True) if key not in others]
        new = [name for name, key in zip(found, others, strict=True) if key not in places]
        lists = [_list_some(names) for names in (wanted, found, alone, new)]
        raise ClassNameError(
            f"{owners[0]} has the classes {lists[0]}, {owners[1]} {lists[1]}: only the first has {lists[2]}, only the "
            f"second {lists[3]}." + f" {advice}" * (bool(advice) and not new)
        )
    return [places[key] for key in others]


def _list_some(names: Sequence[str], shown: int = 100) -> str:
    listed = ", ".join(map(repr, names[:shown]))
    return f"[{listed}{f', ... {len(names)} in all' if len(names) > shown else ''}]"


def _fold(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
