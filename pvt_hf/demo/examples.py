"""Images to begin with, which come with installed packages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from gradio.media import get_image
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from ..data.digits import CLASSES, draw_scene
from ..prediction.predictor import Predictor, find_task

_OF_GRADIO = ("lion.jpg", "cheetah.jpg", "tower.jpg")
_DIGITS = 6


def write_examples(predictors: Iterable[Predictor], folder: Path) -> list[Path]:
    """Writes images for models: photographs, and for models of the bundled digits such digits or scenes of them.

    Args:
        predictors: Of the models.
        folder: Where they are written.

    Returns:
        The files; none of a photograph if all models know digits only.
    """
    images: dict[str, Image.Image] = {}
    for predictor in predictors:
        if not set(CLASSES) <= set(predictor.label_names):
            images |= _read_photographs()
        elif find_task(predictor.model.config).models == "classifier":
            images |= _read_digits()
        else:
            images |= _draw_scenes()
    for name, image in images.items():
        image.save(folder / name)
    return [folder / name for name in images]


def _read_photographs() -> dict[str, Image.Image]:
    samples = load_sample_images()
    names = [Path(name).name for name in samples.filenames]
    return {name: Image.open(get_image(name)).convert("RGB") for name in _OF_GRADIO} | dict(
        zip(names, map(Image.fromarray, samples.images), strict=True)
    )


def _load_glyphs() -> tuple[np.ndarray, Sequence[int]]:
    """The digits, uint8 `(digits, 8, 8)`, and their labels."""
    pixels, labels = load_digits(return_X_y=True)  # float64 (digits, 64), 0 to 16
    return (pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), labels.tolist()


def _read_digits() -> dict[str, Image.Image]:
    glyphs, labels = _load_glyphs()
    return {f"digit-{labels[place]}.png": Image.fromarray(glyphs[place]) for place in range(_DIGITS)}


def _draw_scenes() -> dict[str, Image.Image]:
    glyphs, labels = _load_glyphs()
    scenes = [draw_scene(glyphs, labels, np.random.default_rng(seed)) for seed in range(_DIGITS)]
    return {f"scene-{number}.png": Image.fromarray(scene.pixels) for number, scene in enumerate(scenes)}
