"""What is checked of a whole data set before the first step: in parallel, and of each file once, until it changes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from huggingface_hub.constants import HF_HOME
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from ..models.pixels import PixelError, check_mode, read_orientation
from ..writing.files import atomic_file
from ..writing.text import escape_control
from .images import ImageError, check_source, decode

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

# A file, several that are checked together, or anything else (the number of a row), of which nothing is kept.
Item: TypeAlias = "str | tuple[str, ...] | Any"

# Fewer results are not worth a file.
_CACHED_FROM = 200
# Part of the cache's name: another number, when what a check returns has another meaning.
_FORMAT = 2
_CHUNK = 32


class Checked(NamedTuple):
    """What a check found of an item: one of the two is `None`."""

    value: Any
    problem: str | None


class _Chunks(Dataset):
    """Items, checked in chunks: an item of a loader costs more than many a check."""

    def __init__(self, check: Callable[[Any], Any], items: Sequence[Item]):
        self.check, self.items = check, items

    def __len__(self) -> int:
        return -(-len(self.items) // _CHUNK)

    def __getitem__(self, index: int) -> list[Checked]:
        return [self._check(item) for item in self.items[index * _CHUNK : (index + 1) * _CHUNK]]

    def _check(self, item: Item) -> Checked:
        try:
            return Checked(self.check(item), None)
        except (ImageError, ValueError) as error:
            return Checked(None, str(error))


def check_all(check: Callable[[Any], Any], items: Sequence[Item], description: str, workers: int = 0) -> list[Checked]:
    """Checks all items of a data set, with a progress bar where it takes more than two seconds.

    What was found of files is kept in `HF_HOME/pvt_hf`, and holds as long as they have their size and time of change.
    On several processes, let the first one go ahead (`TrainingArguments.main_process_first`).

    Args:
        check: From an item to facts about it that json can hold, such as the values of a map, not to a verdict that
            depends on options. An `ImageError` or a `ValueError` that it raises is the item's problem. Where `workers`
            do not fork, it has to be picklable.
        items: Paths, tuples of paths that are checked together, or anything else, of which nothing is kept.
        description: Of the facts ("sizes of images"): the progress bar shows it, and they are kept under it.
        workers: Processes that check (default: 0, this one).

    Returns:
        What was found of each item.
    """
    stamps = [_stamp(item) for item in items]
    cache = _cache_file(description, [stamp.name for stamp in stamps if stamp])
    known = _read_cache(cache) if cache else {}
    results = [_recall(known, stamp) for stamp in stamps]
    places = [place for place, result in enumerate(results) if result is None]
    chunks = _Chunks(check, [items[place] for place in places])
    # A generator of its own: loaders draw a seed, and the weights of the model come after.
    loader = DataLoader(
        chunks, batch_size=None, num_workers=min(workers, len(chunks)), generator=torch.Generator(), collate_fn=list
    )
    found: list[Checked] = []
    with logging.tqdm(total=len(places), desc=description, unit="file", delay=2) as bar:
        for chunk in loader:
            found += chunk
            bar.update(len(chunk))
    for place, result in zip(places, found, strict=True):
        results[place] = result
    if cache and places:
        pairs = zip(stamps, results, strict=True)
        _write_cache(cache, known | {stamp.name: [stamp.state, result] for stamp, result in pairs if stamp})
    return [result for result in results if result is not None]


class _Stamp(NamedTuple):
    """An item that is made of files: their names, and their sizes and times."""

    name: str
    state: list[list[int]]


def _stamp(item: Item) -> _Stamp | None:
    """`None` for anything else, and where a file is missing."""
    files = (item,) if isinstance(item, str) else item
    if not isinstance(files, tuple) or not all(isinstance(file, str) for file in files):
        return None
    try:
        states = [os.stat(file) for file in files]
    except (OSError, ValueError):  # a path with a NUL
        return None
    return _Stamp("\n".join(map(os.path.abspath, files)), [[state.st_size, state.st_mtime_ns] for state in states])


def _recall(known: dict[str, Any], stamp: _Stamp | None) -> Checked | None:
    """What was found of an item that has not changed since."""
    if stamp is None or stamp.name not in known:
        return None
    state, (value, problem) = known[stamp.name]
    return Checked(value, problem) if state == stamp.state else None


def _cache_file(description: str, names: Sequence[str]) -> Path | None:
    """By what is checked and the folder that all files are in."""
    if len(names) < _CACHED_FROM:
        return None
    folder = os.path.commonpath([os.path.dirname(name.split("\n")[0]) for name in names])
    name = f"{_FORMAT} {description} {folder}"
    return Path(HF_HOME) / "pvt_hf" / f"checks-{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


def _read_cache(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_cache(file: Path, content: dict[str, Any]) -> None:
    """Atomically; without it, everything is just checked again."""
    try:
        with atomic_file(file) as partial:
            partial.write_text(json.dumps(content))
    except OSError as error:
        logger.warning(f"What was checked cannot be kept in {file}: {error}.")


def describe_problems(problems: Sequence[str], count: int, subject: str, shown: int = 5) -> str:
    """The number of problems and the first of them, for the message of an error or a warning.

    Args:
        problems: Found, a sentence each.
        count: How many items were checked.
        subject: What they are, as "images of the validation set".
        shown: How many are listed (default: 5).
    """
    problems = list(map(escape_control, problems))
    others = [f"... and {len(problems) - shown} others"] if len(problems) > shown else []
    return "\n  ".join([f"{len(problems)} of {count} {subject} cannot be used:", *problems[:shown], *others])


def refuse_problems(problems: Sequence[str], count: int, subject: str, skip_corrupt: bool) -> None:
    """Raises an error if there are problems, or logs that they are left out.

    Args:
        problems: Of images, a sentence each.
        count: How many were checked.
        subject: What they are, as "images of the validation set".
        skip_corrupt: Whether they are left out instead of being an error.

    Raises:
        ImageError: With the number of problems and the first of them; also where nothing else is left.
    """
    if not problems:
        return
    message = describe_problems(problems, count, subject)
    if len(problems) == count:
        raise ImageError(message)
    if not skip_corrupt:
        raise ImageError(f"{message}\nSet `skip_corrupt` (`--skip_corrupt`) to leave them out.")
    logger.warning(f"{message}\nThey are left out.")


def check_images(images: Sequence[str] | datasets.Dataset, decoded: bool = False, workers: int = 0) -> list[Checked]:
    """Checks that images are there and can be opened.

    Args:
        images: Paths, or a data set with a column `image` that is not decoded.
        decoded: Whether the pixels are decoded too, which a truncated file does not survive (default: `False`, what
            stands before them is read, which takes no time).
        workers: Processes that check (default: 0, this one).

    Returns:
        Of each image its problem, or `height` and `width` in pixels as it is stored, and `turned`, whether its EXIF
        orientation exchanges them.
    """
    rows = None if isinstance(images, Sequence) else images.select_columns(["image"]).with_format("arrow")
    paths = images if rows is None else _find_paths(rows)
    description = "decoding images" if decoded else "sizes of images"
    return check_all(_ImageCheck(rows, decoded), paths, description, workers)


def _find_paths(rows: datasets.Dataset) -> list[str | int]:
    """The path of each image, or the number of its row where the row holds it."""
    if not len(rows) or rows[:1]["image"][0]["bytes"].is_valid:
        return list(range(len(rows)))
    cells = (cell for table in rows.iter(1000) for cell in table["image"].to_pylist())
    return [
        index if cell is None or cell["path"] is None or cell["bytes"] is not None else cell["path"]
        for index, cell in enumerate(cells)
    ]


@dataclass(frozen=True)
class _ImageCheck:
    """See [`check_images`]; `rows` are in the format of arrow, so that what is not looked at is not read."""

    rows: Any
    decoded: bool

    def __call__(self, item: str | int) -> dict[str, Any]:
        name = item if isinstance(item, str) else f"row {item}"
        if self.decoded:
            decode({"path": self._find_source(item)}, name)
        source = self._find_source(item)
        try:
            with Image.open(check_source(source)) as image:
                check_mode(image, name)
                # Orientations from 5 to 8 lie on their sides.
                return {"height": image.height, "width": image.width, "turned": read_orientation(image) >= 5}
        except PixelError as error:
            raise ImageError(str(error)) from error
        except Exception as error:  # Pillow's readers raise whatever a corrupt file leads them to
            raise ImageError(f"{name} cannot be read: {type(error).__name__}: {error}.") from error

    def _find_source(self, item: str | int) -> Any:
        """A path, or a file of the bytes in a row."""
        if isinstance(item, str):
            return item
        import pyarrow

        cell = self.rows[item : item + 1]["image"][0]
        if not cell.is_valid or not cell["bytes"].is_valid:
            raise ImageError(f"row {item} has no image.")
        return pyarrow.BufferReader(cell["bytes"].as_buffer())
