"""Images as they are stored: read, with errors that name the file, and with their random changes by seed."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
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
    """
    with keep_random_state():
        seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield


def decode(image: dict[str, Any], name: str) -> Image.Image:
    """An RGB image from `{"bytes": ..., "path": ...}`. Raises an `ImageError` that names it if it is corrupt."""
    try:
        with Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]) as opened:
            return opened.convert("RGB")
    except Exception as error:  # PIL's decoders raise whatever a corrupt file leads them to
        raise ImageError(f"{name} cannot be read: {type(error).__name__}: {error}.") from error
