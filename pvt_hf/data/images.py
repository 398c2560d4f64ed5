"""Images as they are stored: decoded, with errors that name the file, and augmented by seed."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image


class ImageError(RuntimeError):
    """An image, or a file of images, that cannot be read. The message names it."""


@contextmanager
def keep_random_state() -> Iterator[None]:
    """The random generators of Python, NumPy and PyTorch (on the CPU) go on afterwards as if nothing had been drawn."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def seed_random_state(*numbers: int) -> Iterator[None]:
    """The same random generators start from these numbers, and go on afterwards as if nothing had been drawn.

    What is drawn inside is the same in every process, worker and resumed run that comes here with the same numbers.

    Args:
        *numbers: Integers of at least 0; all of them together are the seed.
    """
    with keep_random_state():
        seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield


def decode(image: Mapping[str, Any] | None, name: str, mode: str | None = "RGB") -> Image.Image:
    """Decodes an image as `datasets.Image(decode=False)` stores it.

    Args:
        image: `{"bytes": ..., "path": ...}`, of which one may be `None` or missing.
        name: For the message of an error.
        mode: Pillow's mode of the result (default: `"RGB"`); `None` leaves the mode of the file.

    Raises:
        ImageError: If the image is corrupt or missing; the message has `name`.
    """
    image = image or {}
    try:
        with Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]) as opened:
            return opened.convert(mode) if mode else opened.copy()
    except Exception as error:  # Pillow's decoders raise whatever a corrupt file leads them to
        raise ImageError(f"{name} cannot be read: {type(error).__name__}: {error}.") from error


def drop_skipped(rows: Iterable[dict[str, Any] | None]) -> tuple[list[dict[str, Any]], int]:
    """The images of a batch that could be read, and the number of the others.

    Args:
        rows: Items of a data set for training, which are `None` where a corrupt image is skipped.

    Raises:
        ImageError: If all of them are corrupt.
    """
    rows = list(rows)
    kept = [row for row in rows if row is not None]
    if not kept:
        raise ImageError(f"All {len(rows)} images of a batch are corrupt.")
    return kept, len(rows) - len(kept)
