"""Draws `docs/pictures/tasks.png`: what small models see, after minutes of training, on images they never saw.

The digits are the first of the validation set, the scenes some of those in which at most one digit is missed, and the
blobs new images that `notebooks/segmentation.ipynb` leaves beside its segmenter.

    pvt-hf quickstart
    pvt-hf train-detection --demo --recipe mask_rcnn_1x --num_train_epochs 3 --backbone_checkpoint runs/quickstart
    jupyter execute notebooks/segmentation.ipynb
    python docs/pictures/draw_tasks.py
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pvt_hf.data.digits import load_digits_dataset, write_scenes
from pvt_hf.prediction.drawing import draw, paint
from pvt_hf.prediction.loading import load_predictor

SCENES = ("000095.png", "000157.png")  # of the validation set
BLOBS = ("0.jpg", "1.jpg", "2.jpg")  # of the notebook's new images
THRESHOLD = 0.5  # of the detector's scores
WIDTH, HEIGHT, GAP, TITLE = 400, 300, 16, 40  # of a scene and around it, in pixels
DIGITS, COLUMNS = 12, 3


def write(sheet: Image.Image, text: str, middle: tuple[float, float], size: int) -> None:
    ImageDraw.Draw(sheet).text(middle, text, font=ImageFont.load_default(size), fill=(40, 40, 40), anchor="mm")


def draw_digits(folder: str) -> Image.Image:
    """Digits with the class that a classifier gives them."""
    predict = load_predictor(folder, device="cpu")
    images = [row["image"].convert("RGB") for row in load_digits_dataset("validation").select(range(DIGITS))]
    sheet = Image.new("RGB", (WIDTH, 2 * HEIGHT + GAP), "white")
    step_x, step_y = sheet.width // COLUMNS, sheet.height // (DIGITS // COLUMNS)
    for number, (image, prediction) in enumerate(zip(images, predict(images), strict=True)):
        _, name, score = prediction.list_best()[0]
        left, top = step_x * (number % COLUMNS), step_y * (number // COLUMNS)
        sheet.paste(image.resize((112, 112)), (left + (step_x - 112) // 2, top))
        write(sheet, f"{name}  ({100 * score:.0f} %)", (left + step_x / 2, top + 128), 18)
    return sheet


def draw_scenes(folder: str, scenes: Sequence[Path]) -> Image.Image:
    """Scenes with the objects that a detector finds, below each other."""
    predict = load_predictor(folder, device="cpu", threshold=THRESHOLD)
    images = [Image.open(scene).convert("RGB") for scene in scenes]
    sheet = Image.new("RGB", (WIDTH, 2 * HEIGHT + GAP), "white")
    for number, (image, prediction) in enumerate(zip(images, predict(images), strict=True)):
        picture = ImageOps.pad(draw(image, prediction), (WIDTH, HEIGHT), color="white")
        sheet.paste(picture, (0, number * (HEIGHT + GAP)))
    return sheet


def draw_blobs(folder: str, blobs: Sequence[Path]) -> Image.Image:
    """Images, and beside each the classes that a segmenter gives its pixels."""
    predict = load_predictor(folder, device="cpu")
    images = [Image.open(blob).convert("RGB") for blob in blobs]
    sheet = Image.new("RGB", (WIDTH, 2 * HEIGHT + GAP), "white")
    side = (WIDTH - GAP) // 2
    step = (sheet.height - side) // (len(blobs) - 1)
    for number, (image, prediction) in enumerate(zip(images, predict(images), strict=True)):
        for column, picture in enumerate((image, paint(image, prediction))):
            sheet.paste(picture.resize((side, side)), (column * (side + GAP), number * step))
    return sheet


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", default="runs/quickstart", help="default: runs/quickstart")
    parser.add_argument("--detector", default="runs/detection", help="default: runs/detection")
    parser.add_argument("--segmenter", default="notebooks/segmenter", help="default: notebooks/segmenter")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures" / "tasks.png")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        images = write_scenes(Path(folder) / "scenes", images=1) / "validation" / "images"
        blobs = Path(options.segmenter).parent / "new_images"
        panels = {
            "classification": draw_digits(options.classifier),
            "detection, instance segmentation": draw_scenes(options.detector, [images / name for name in SCENES]),
            "semantic segmentation": draw_blobs(options.segmenter, [blobs / name for name in BLOBS]),
        }
    sheet = Image.new("RGB", (3 * WIDTH + 4 * GAP, 2 * HEIGHT + 3 * GAP + TITLE), "white")
    left = GAP
    for title, panel in panels.items():
        write(sheet, title, (left + panel.width / 2, (GAP + TITLE) / 2), 24)
        sheet.paste(panel, (left, GAP + TITLE))
        left += panel.width + GAP
    sheet.quantize(256).save(options.output, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
