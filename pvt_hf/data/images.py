"""Images as they are stored: decoded, with errors that name the file, and augmented by seed."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..models.pixels import PixelError, read_file
from ..writing.text import escape_lines

if TYPE_CHECKING:
    from transformers import BaseImageProcessor


# Of the files that are taken for images.
IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


class ImageError(RuntimeError):
    """An image, or a file of images, that cannot be read. The message names it."""

    def __init__(self, message: object):
        super().__init__(escape_lines(str(message)))


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
        torch.default_generator.manual_seed(seed)  # that of the CPU: `torch.manual_seed` seeds the GPUs' too
        yield


def load_split(source: str, split: str, builder: str | None = None, **options: Any) -> Any:
    """Loads a split of a data set, as `datasets.load_dataset` does, or of a folder that `save_to_disk` wrote.

    Args:
        source: Its name on the Hub, or where it is.
        split: For example `train`.
        builder: What `load_dataset` shall take in place of `source` (default: nothing else).
        **options: Of `load_dataset`.

    Raises:
        ImageError: If there is no such data, with what `datasets` says about it.
    """
    import datasets

    try:
        if (Path(source) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(source)
            if split not in saved:
                raise ValueError(f"it has the splits {list(saved)}")
            return saved[split]
        return datasets.load_dataset(builder or source, split=split, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ImageError(f"Split {split!r} of {source!r} cannot be loaded: {error}") from error


def decode(image: Mapping[str, Any] | None, name: str, mode: str | None = "RGB", turn: bool = True) -> Image.Image:
    """Decodes an image as `datasets.Image(decode=False)` stores it.

    Args:
        image: `{"bytes": ..., "path": ...}`, of which one may be `None` or missing.
        name: For the message of an error.
        mode: `"RGB"` (default), by the same rule as the image processors read pixels; or `None`, which leaves the mode
            of the file, for label maps.
        turn: Whether the image is turned as its EXIF says, which is how it is seen everywhere else (default: `True`).

    Raises:
        ImageError: If the image is corrupt or missing, or has pixels that cannot become RGB; the message has `name`.
    """
    image = image or {}
    if image.get("bytes") is None and image.get("path") is None:
        raise ImageError(f"{name} is missing: there is neither a file nor bytes.")
    try:
        source = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else check_source(image["path"])
        return read_file(source, name, mode, turn)
    except PixelError as error:
        raise ImageError(str(error)) from error
    except Exception as error:  # Pillow's decoders raise whatever a corrupt file leads them to
        raise ImageError(f"{name} cannot be read: {type(error).__name__}: {error}.") from error


def check_source(source: Any) -> Any:
    """Where an image is, unless that is something that would be waited for: a pipe.

    Args:
        source: A path, of a file or of nothing, or an open file.

    Raises:
        OSError: If there is something else.
    """
    if isinstance(source, str) and os.path.exists(source) and not os.path.isfile(source):
        raise OSError("it is no regular file")
    return source


def decode_to_fit(image: Mapping[str, Any] | None, name: str, size: tuple[int, int]) -> torch.Tensor:
    """Decodes an image to which annotations or a map belong: turned as its EXIF says, unless they have the size of the
    pixels as they are stored. Where neither fits, it is turned.

    Args:
        image: As [`decode`] takes it.
        name: For the message of an error.
        size: (height, width) in pixels of what belongs to it.

    Returns:
        uint8 `(3, height, width)`, RGB.

    Raises:
        ImageError: If it cannot be read, see [`decode`].
    """
    turned = decode(image, name)
    stored = turned if turned.size == size[::-1] else decode(image, name, turn=False)
    fitting = stored if stored.size == size[::-1] else turned
    return torch.from_numpy(np.array(fitting)).permute(2, 0, 1)


def prepare(
    image: Image.Image | torch.Tensor, image_processor: BaseImageProcessor, name: str, **settings: Any
) -> torch.Tensor:
    """`pixel_values` `(3, height, width)` of one image.

    Args:
        image: As [`decode`] or [`decode_to_fit`] gives it.
        image_processor: Of the model.
        name: For the message of an error.
        **settings: Of the processor, in place of its own.

    Raises:
        ImageError: If the processor refuses the image; the message has `name`.
    """
    try:
        return image_processor(image, return_tensors="pt", **settings).pixel_values[0]
    except ValueError as error:
        raise ImageError(f"{name} cannot be prepared: {error}") from error


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
