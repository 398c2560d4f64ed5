"""Draws the pictures of the recipes with the code of their pages.

    python docs/pictures/recipes.py                          # Grad-CAM and attention maps
    python docs/pictures/recipes.py --detector detector      # supervision, with what notebooks/detection.ipynb trained

The first trains a small PVT v1 and a small PVT v2 to tell circles, squares and triangles, in a few minutes of a CPU.
"""

import argparse
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw
from pytorch_grad_cam.utils.image import show_cam_on_image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

import pvt_hf

FOLDER = Path(__file__).resolve().parent
COLORS = {"circle": (215, 70, 60), "square": (70, 150, 80), "triangle": (70, 95, 205)}
NAMES = (*COLORS, "nothing")  # so that the place of a shape matters
SIDE = 96
PLACES = [(48, 48), (144, 48), (96, 8)]  # (x, y) from which the attention is drawn
SMALL = {
    "depths": [1, 1, 2, 1],
    "hidden_sizes": [32, 64, 96, 128],
    "num_attention_heads": [1, 2, 3, 4],
    "mlp_ratios": [4, 4, 4, 4],
    "image_size": SIDE,
    "id2label": dict(enumerate(NAMES)),
}
PROCESSOR = pvt_hf.PvtImageProcessor(do_resize=False, do_center_crop=False)


def read_recipe(page: str) -> dict:
    """What the first block of a page defines."""
    text, namespace = (FOLDER.parent / "recipes" / page).read_text(), {}
    exec(re.search(r"^```python[^\n]*\n(.*?)^```$", text, re.M | re.S)[1], namespace)
    return namespace


def draw_shapes(rng: np.random.Generator, labels: list[int]) -> Image.Image:
    """A texture with these shapes beside each other, each in a square of its own."""
    coarse = rng.integers(110, 150, (SIDE // 16, len(labels) * SIDE // 16, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((len(labels) * SIDE, SIDE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for index, label in enumerate(labels):
        if NAMES[label] == "nothing":
            continue
        side = int(rng.integers(30, 48))
        x, y = index * SIDE + int(rng.integers(SIDE - side)), int(rng.integers(SIDE - side))
        box = (x, y, x + side - 1, y + side - 1)
        color = tuple(value + int(rng.integers(-30, 31)) for value in COLORS[NAMES[label]])
        if NAMES[label] == "circle":
            pen.ellipse(box, fill=color)
        elif NAMES[label] == "square":
            pen.rectangle(box, fill=color)
        else:
            pen.polygon([(x + side // 2, y), (x, y + side - 1), (x + side - 1, y + side - 1)], fill=color)
    return image


def train(model: torch.nn.Module, steps: int, learning_rate: float = 1e-3) -> torch.nn.Module:
    """AdamW on images with one shape each; says how many of 60 others are told."""
    rng = np.random.default_rng(0)

    def draw_batch(size: int) -> dict[str, torch.Tensor]:
        labels = rng.integers(len(NAMES), size=size)
        pixels = PROCESSOR([draw_shapes(rng, [label]) for label in labels], return_tensors="pt").pixel_values
        return {"pixel_values": pixels, "labels": torch.from_numpy(labels)}

    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    for _ in range(steps):
        model(**draw_batch(16)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    batch = draw_batch(60)
    with torch.no_grad():
        right = (model.eval()(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).sum()
    print(f"{type(model).__name__}: {right} of 60 right")
    return model


def draw_grad_cam(model: torch.nn.Module, image: Image.Image) -> None:
    """The image, and the heat of two classes."""
    explain = read_recipe("grad-cam.md")["explain"]
    pixel_values = PROCESSOR(image, return_tensors="pt").pixel_values
    pictures = {"image": np.asarray(image)}
    for label in (0, 1):
        heat = explain(model, pixel_values, label)[0]
        pictures[f"{NAMES[label]}?"] = show_cam_on_image(np.float32(image) / 255, heat, use_rgb=True)
    figure, axes = plt.subplots(1, 3, figsize=(12, 2.3), layout="constrained")
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture)
        axis.set_title(title)
        axis.axis("off")
    figure.savefig(FOLDER / "grad-cam.png", dpi=70)


def draw_attention_maps(model: torch.nn.Module, image: Image.Image) -> None:
    """From the CLS token, and from three places in a block of the third stage."""
    recipe = read_recipe("attention-maps.md")
    pixel_values = PROCESSOR(image, return_tensors="pt").pixel_values
    places = {"CLS token, last block": (-1, None)}
    places |= {f"block 3, from {point}": (3, point) for point in PLACES}
    figure, axes = plt.subplots(2, 2, figsize=(12, 6.4), layout="constrained")
    for axis, (title, (block, point)) in zip(axes.flat, places.items(), strict=True):
        axis.imshow(recipe["draw"](image, recipe["attention_map"](model, pixel_values, block, point)))
        if point:
            axis.plot(*point, marker="x", color="white", markersize=12, markeredgewidth=3)
        axis.set_title(title)
        axis.axis("off")
    figure.savefig(FOLDER / "attention-maps.png", dpi=70)


def draw_detections(folder: str) -> None:
    """Four images with the detections on them."""
    recipe = read_recipe("supervision.md")
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    rng, rows = np.random.default_rng(0), []
    for row in (([0, 1], [2, 0]), ([1, 2], [0, 2])):
        arrays = [np.asarray(draw_shapes(rng, labels).resize((4 * SIDE, 2 * SIDE))) for labels in row]
        rows.append(np.hstack([recipe["draw"](array, recipe["detect"](model, processor, array)) for array in arrays]))
    Image.fromarray(np.vstack(rows)).save(FOLDER / "supervision.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", help="folder of a detector of circles, squares and triangles (default: none)")
    if folder := parser.parse_args().detector:
        return draw_detections(folder)
    torch.manual_seed(0)
    v1 = train(pvt_hf.PvtForImageClassification(pvt_hf.PvtConfig(**SMALL, attn_implementation="eager")), steps=300)
    v2 = train(pvt_hf.PvtV2ForImageClassification(pvt_hf.PvtV2Config(**SMALL)), steps=300)
    image = draw_shapes(np.random.default_rng(7), [0, 1])
    draw_grad_cam(v2, image)
    draw_attention_maps(v1, image)


if __name__ == "__main__":
    main()
