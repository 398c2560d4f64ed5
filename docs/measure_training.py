"""Measures what training on GPUs needs, as far as a CPU can tell, and writes `training_needs.csv` beside this file.

    python docs/measure_training.py             # about two minutes; then: python docs/generate_tables.py

Of every recipe and variant: the operations of a training step (thrice those of the forward pass, which torch counts),
the bytes that autograd keeps of a forward pass under bfloat16 autocast, and the images that one process decodes and
augments in a second of CPU time. `generate_tables.py` makes the table of `guides/training-at-scale.md` of it.
"""

import csv
import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pvt_hf
from pvt_hf.commands import presets
from pvt_hf.data.augmentation import DetectionAugmentation, SegmentationAugmentation, build_training_transform
from pvt_hf.data.classification import TrainingImages
from pvt_hf.data.detection import DetectionCollator, TrainingDetections, read_coco
from pvt_hf.data.segmentation import MapCollator, TrainingMaps, read_segmentation_folders
from pvt_hf.recipes import SEGMENTATION_RECIPES, detection_recipe, imagenet_recipe
from pvt_hf.variants import VARIANTS

FILE = Path(__file__).with_name("training_needs.csv")
DETECTORS = ("retinanet_1x", "mask_rcnn_1x")
DENSE_VARIANT = "pvt_v2_b2"
_KEYS = {"classification": 48, "dense": 8}  # images whose loading is measured


@dataclass
class Needs:
    """
    Attributes:
        recipe: Its name; `imagenet` of classifiers.
        variant: Of the backbone.
        images: Of a GPU in a step: the default of the program.
        gflops: Operations of a training step for an image, in 1e9; a multiply-add is two.
        parameters: Of the model, in 1e6.
        activations: MiB that autograd keeps of an image.
        loaded: Images in a second of CPU time of one process.
    """

    recipe: str
    variant: str
    images: int
    gflops: float
    parameters: float
    activations: float
    loaded: float


def draw_photo(width: int, height: int) -> Image.Image:
    """Large shapes and noise, whose JPEG takes about as many bytes as that of a photo."""
    y, x = np.mgrid[:height, :width]
    texture = np.random.default_rng(0).normal(0, 12, (height, width, 3))
    pixels = np.stack((x / 2, y / 2, (x + y) / 4), axis=-1) + 60 * np.sin(x / 9)[..., None] + texture
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def time_loading(items: Callable[[int], Any], count: int) -> float:
    """Images in a second of CPU time, the better of two rounds."""
    times = []
    for _ in range(2):
        start = time.process_time()
        for number in range(count):
            items(number)
        times.append(time.process_time() - start)
    return count / min(times)


def count_attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of attention, from shapes: torch counts those of GPUs only."""
    *batch, length, channels = query
    return 2 * math.prod(batch) * length * key[-2] * (channels + value[-1])


_OPERATORS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention}


def measure_step(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[float, float]:
    """Operations (in 1e9) and kept bytes (in MiB) of a training step, for an image."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with (
        FlopCounterMode(display=False, custom_mapping=_OPERATORS) as counter,
        torch.autocast("cpu", torch.bfloat16),
        saved,
    ):
        model(**inputs)
    count = len(inputs["pixel_values"])
    # The backward pass has twice the operations of the forward pass; torch miscounts it for depth-wise convolutions.
    return 3 * counter.get_total_flops() / 1e9 / count, sum(kept.values()) / 2**20 / count


@cache
def time_classification() -> float:
    """As the recipe of every variant loads."""
    buffer = io.BytesIO()
    draw_photo(500, 375).save(buffer, "JPEG", quality=95)  # the mean size of ImageNet's
    row = {"image": {"bytes": buffer.getvalue(), "path": "photo.jpg"}, "label": 0}
    images = TrainingImages([row], "label", 1000, build_training_transform(imagenet_recipe(DENSE_VARIANT), 224))
    return time_loading(lambda number: images[0, 0, 0, number], _KEYS["classification"])


def prepare_classification(variant: str) -> tuple[PreTrainedModel, dict[str, Any], float]:
    """The model, a batch, and the images that one process loads in a second."""
    inputs = {"pixel_values": torch.randn(2, 3, 224, 224), "labels": torch.tensor([0, 1])}
    model = AutoModelForImageClassification.from_config(pvt_hf.build_config(variant))
    return model, inputs, time_classification()


def write_coco(folder: Path) -> None:
    """One photo of COCO's most frequent size with eight objects."""
    (folder / "images").mkdir()
    draw_photo(640, 480).save(folder / "images" / "photo.jpg", quality=95)
    corners = [(40 + 70 * number, 30 + 40 * number) for number in range(8)]
    annotations = [
        {
            "id": number + 1,
            "image_id": 1,
            "category_id": 1 + number % 2,
            "bbox": [x, y, 60, 90],
            "area": 5400,
            "iscrowd": 0,
            "segmentation": [[x, y, x + 60, y, x + 60, y + 90, x, y + 90]],
        }
        for number, (x, y) in enumerate(corners)
    ]
    content = {
        "images": [{"id": 1, "file_name": "photo.jpg", "width": 640, "height": 480}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
    }
    (folder / "annotations.json").write_text(json.dumps(content))


def prepare_detection(name: str, variant: str) -> tuple[PreTrainedModel, dict[str, Any], float]:
    recipe = detection_recipe(name, variant)
    size = {"shortest_edge": max(recipe.shortest_edges), "longest_edge": recipe.longest_edge}
    processor = pvt_hf.PvtDetectionImageProcessor(size=size)
    masks = recipe.architecture == "mask_rcnn"
    with tempfile.TemporaryDirectory() as folder:
        write_coco(Path(folder))
        data = read_coco(Path(folder) / "annotations.json", Path(folder) / "images").for_training(masks=masks)
        augment = DetectionAugmentation(recipe.shortest_edges, recipe.longest_edge)
        images, make_batch = TrainingDetections(data, augment, masks=masks), DetectionCollator(processor, masks)
        loaded = time_loading(lambda number: make_batch([images[0, 0, 0, number]]), _KEYS["dense"])
        batch = make_batch([images[0, 0, 0, 0]])
    config_class = type(AutoConfig.for_model(f"pvt_hf_{recipe.architecture}"))
    backbone = pvt_hf.build_config(variant, out_features=list(config_class.backbone_out_features))
    model = AutoModelForObjectDetection.from_config(config_class(backbone_config=backbone, num_labels=80))
    return model, {key: value for key, value in batch.items() if key not in ("names", "skipped")}, loaded


def prepare_segmentation(name: str, variant: str) -> tuple[PreTrainedModel, dict[str, Any], float]:
    recipe = SEGMENTATION_RECIPES[name]
    with tempfile.TemporaryDirectory() as folder:
        for part in ("images", "maps"):
            (Path(folder) / part).mkdir()
        draw_photo(683, 512).save(Path(folder) / "images" / "photo.jpg", quality=95)  # ADE20K's shortest edges are 512
        Image.fromarray(np.tile(np.arange(683, dtype=np.uint8) % 150, (512, 1))).save(Path(folder) / "maps/photo.png")
        data = read_segmentation_folders(Path(folder) / "images", Path(folder) / "maps", num_labels=150)
        crop = (recipe.crop_size, recipe.crop_size)
        augment = SegmentationAugmentation(recipe.shortest_edge, recipe.longest_edge, scales=recipe.scales, crop=crop)
        maps = TrainingMaps(data, augment)
        loaded = time_loading(lambda number: maps[0, 0, 0, number], _KEYS["dense"])
        make_batch = MapCollator(pvt_hf.PvtSegmentationImageProcessor(), crop)
        batch = make_batch([maps[0, 0, 0, number] for number in range(2)])
    backbone = pvt_hf.build_config(variant, out_features=list(pvt_hf.SemanticFPNConfig.backbone_out_features))
    config = pvt_hf.SemanticFPNConfig(backbone_config=backbone, num_labels=150)
    model = AutoModelForSemanticSegmentation.from_config(config)
    return model, {name: batch[name] for name in ("pixel_values", "labels")}, loaded


def measure(variants: Sequence[str] = tuple(VARIANTS)) -> Iterator[Needs]:
    """Of the classifiers, and of the dense recipes with one variant."""
    for variant in variants:
        yield _measure("imagenet", variant, presets.CLASSIFICATION, *prepare_classification(variant))
    for name in DETECTORS:
        yield _measure(name, DENSE_VARIANT, presets.DETECTION, *prepare_detection(name, DENSE_VARIANT))
    name = "semantic_fpn_40k"
    yield _measure(name, DENSE_VARIANT, presets.SEGMENTATION, *prepare_segmentation(name, DENSE_VARIANT))


def _measure(
    recipe: str, variant: str, values: dict[str, Any], model: PreTrainedModel, inputs: dict[str, Any], loaded: float
) -> Needs:
    images = values["default"]["per_device_train_batch_size"]
    gflops, activations = measure_step(model, inputs)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return Needs(recipe, variant, images, *(round(value, 1) for value in (gflops, parameters, activations, loaded)))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = []
    for needs in measure():
        print(*astuple(needs), flush=True)
        found.append(astuple(needs))
    with FILE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Needs))
        writer.writerows(found)


if __name__ == "__main__":
    main()
