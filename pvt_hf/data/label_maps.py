"""Label maps as people store them: files that hold the classes, masks of 0 and 255, and maps of colours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageColor

from ..models.image_processing_segmentation import IGNORE_INDEX
from ..untrusted import UntrustedFileError, read_text
from .class_names import parse_csv

Color: TypeAlias = tuple[int, int, int]
Palette: TypeAlias = Mapping[Color, int]
_COLUMNS = ["name", "r", "g", "b"]  # of CSV
_CODE = np.array([1 << 16, 1 << 8, 1])  # red, green and blue in one integer


def read_palette(file: str | Path, names: list[str]) -> dict[Color, int]:
    """Reads which colour stands for which class.

    Args:
        file: JSON of one of three forms: a list of colours in the order of the classes; an object from the names of
            classes to colours; or an object from colours to classes, names or labels, where 255 is ignored. A colour is
            `[128, 64, 0]`, `"128,64,0"` or `"#804000"`. Or CSV (its name ends in .csv) with a row for each class: the
            columns `name`, `r`, `g` and `b` in the order that the first row says, or else in this one.
        names: Of the classes.

    Returns:
        The label of each colour (red, green, blue).

    Raises:
        ValueError: If the file is none of these, or an entry is not a colour or a class; the message names both.
    """
    is_csv = Path(file).suffix.lower() == ".csv"
    try:
        text = read_text(Path(file))
        content = parse_csv(text) if is_csv else json.loads(text)
    except UntrustedFileError as error:
        raise ValueError(f"The palette {file} {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The palette {file} cannot be read: {error}") from error
    palette: dict[Color, int] = {}
    for given, label in _pair_rows(file, content, names) if is_csv else _pair_entries(file, content, names):
        color = _parse_color(given, file)
        if color in palette:
            raise ValueError(f"The palette {file} has the colour {list(color)} twice.")
        palette[color] = _parse_label(label, names, file)
    if not palette:
        raise ValueError(f"The palette {file} is empty.")
    return palette


def _pair_entries(file: str | Path, content: Any, names: list[str]) -> list[tuple[Any, Any]]:
    """Colours and classes of what a JSON file holds."""
    if isinstance(content, list):
        return [(color, label) for label, color in enumerate(content)]
    if not isinstance(content, dict):
        raise ValueError(f"The palette {file} must be a list or an object, got {type(content).__name__}.")
    if content.keys() <= set(names):
        return [(color, name) for name, color in content.items()]
    return list(content.items())


def _pair_rows(file: str | Path, rows: list[list[str]], names: list[str]) -> list[tuple[Any, Any]]:
    """Colours and classes of the rows of CSV."""
    header = [cell.lower() for cell in rows[0]] if rows else _COLUMNS
    has_header = sorted(header) == sorted(_COLUMNS)
    pairs = []
    for row in rows[has_header:]:
        if len(row) != len(_COLUMNS):
            raise ValueError(f"The palette {file} must have the columns {', '.join(_COLUMNS)}, got the row {row}.")
        cells = dict(zip(header if has_header else _COLUMNS, row, strict=True))
        name, color = cells["name"], ",".join(cells[channel] for channel in "rgb")
        pairs.append((color, int(name) if name.isdecimal() and name not in names else name))
    return pairs


def _parse_color(given: Any, file: str | Path) -> Color:
    try:
        if isinstance(given, str):
            given = ImageColor.getrgb(given) if given.startswith("#") else [int(part) for part in given.split(",")]
        red, green, blue = given
        if all(type(channel) is int and 0 <= channel <= 255 for channel in (red, green, blue)):
            return red, green, blue
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"The palette {file} has {given!r} where a colour should be, such as [128, 64, 0], '128,64,0' or '#804000', "
        "or the name of a class."
    )


def _parse_label(given: Any, names: list[str], file: str | Path) -> int:
    label = names.index(given) if given in names else given
    if type(label) is not int or not (0 <= label < len(names) or label == IGNORE_INDEX):
        raise ValueError(
            f"The palette {file} has the class {given!r}; the classes are {names}, or their labels 0 to "
            f"{len(names) - 1}, and {IGNORE_INDEX} is ignored."
        )
    return label


def read_binary_mask(given: Image.Image, name: str) -> torch.Tensor:
    """A mask of 0 and 255 as labels: 1 from 128 on (of 16 bits, from 32768 on), else 0. Lossy compression may have
    changed its values a little.

    Args:
        given: Of any mode: of colours the brightness counts.
        name: Of the mask, for the error.

    Returns:
        int64 `(height, width)`.

    Raises:
        ValueError: If it has fractions, whose range is not known.
    """
    if given.mode == "F":
        raise ValueError(f"{name} has fractions (PIL's mode 'F'); a mask must have integers from 0 to 255.")
    values = np.asarray(given if given.mode.startswith("I") else given.convert("L"))
    return torch.from_numpy((values >= (128 if values.max(initial=0) <= 255 else 2**15)).astype(np.int64))


def read_color_codes(given: Image.Image) -> torch.Tensor:
    """The colours of a map of any mode as integers `0xRRGGBB`, int64 `(height, width)`."""
    return torch.from_numpy(np.asarray(given.convert("RGB")).astype(np.int64) @ _CODE)


def label_colors(codes: torch.Tensor, palette: Palette, name: str) -> torch.Tensor:
    """The labels of colours.

    Args:
        codes: Of [`read_color_codes`], of any shape.
        palette: The label of each colour.
        name: Of the map, for the error.

    Returns:
        int64 of the same shape.

    Raises:
        ValueError: If a colour is not in the palette; some of them are listed.
    """
    known, labels = torch.tensor(sorted((int(np.dot(color, _CODE)), label) for color, label in palette.items())).T
    places = torch.searchsorted(known.contiguous(), codes.contiguous()).clamp(max=len(known) - 1)
    if (wrong := known[places] != codes).any():
        found = codes[wrong].unique().tolist()
        listed = ", ".join(str([code >> 16, code >> 8 & 255, code & 255]) for code in found[:5])
        raise ValueError(f"{name} has {len(found)} colours that are not in the palette, such as {listed}.")
    return labels[places]


def is_jpeg(stored: Mapping[str, Any]) -> bool:
    """Whether a stored image, `{"bytes": ..., "path": ...}`, is a JPEG: by its first bytes, whatever it is called."""
    if stored.get("bytes") is not None:
        return stored["bytes"][:2] == b"\xff\xd8"
    with Path(stored["path"]).open("rb") as file:
        return file.read(2) == b"\xff\xd8"
