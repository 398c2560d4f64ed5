"""Data like those of polyp segmentation: blobs on textures, with masks of 0 and 255."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter


def draw_polyp(generator: np.random.Generator, size: int) -> tuple[Image.Image, Image.Image]:
    """A reddish blob with a soft edge on a mottled background of nearly its colour, and its mask."""
    noise = generator.normal(size=(size // 8, size // 8, 3)) * 22 + generator.normal(size=3) * 10 + (150, 90, 80)
    texture = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    y, x = np.mgrid[0:size, 0:size] / size
    angle = np.arctan2(y - (cy := generator.uniform(0.3, 0.7)), x - (cx := generator.uniform(0.3, 0.7)))
    radius = generator.uniform(0.12, 0.25) * (
        1 + 0.2 * np.sin(generator.integers(2, 5) * angle + generator.uniform(0, 6))
    )
    mask = Image.fromarray(np.where(np.hypot(y - cy, x - cx) < radius, 255, 0).astype(np.uint8))
    soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(size / 100)))[..., None] / 255
    image = (
        np.asarray(texture)
        + soft * (generator.normal(size=3) * 8 + (45, 25, 15))
        + generator.normal(size=(size, size, 1)) * 6
    )
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)), mask


def write_polyps(folder: Path, train: int, validation: int, size: int = 352) -> Path:
    """`train` and `validation`, each with `images`, JPEG, and `masks`: every other one JPEG, the others PNG."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, mask = draw_polyp(generator, size)
            image.save(folder / split / "images" / f"{index}.jpg")
            mask.save(folder / split / "masks" / f"{index}.{('png', 'jpg')[index % 2]}")
    return folder
