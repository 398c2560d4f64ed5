"""Predicts what is on the images of a folder, with a checkpoint of any task.

    pvt-hf predict --model_name_or_path runs/segmentation --images photos --output_dir masks --binary_masks
    pvt-hf predict --model_name_or_path converted/semantic_fpn_pvt_s --images photos --window 512 --stride 341
    pvt-hf predict --model_name_or_path converted/pvt_v2_b2 --images photos --tta_flip

A segmenter writes a PNG for each image, of its size as it is seen, which is turned as EXIF says: the labels of the maps
that it was trained on, or with `--binary_masks` 0 and 255. A classifier writes `predictions.csv`, a detector
`predictions.json` in COCO's format for results, with the names of files and classes.
"""

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    PreTrainedModel,
)
from transformers.utils import logging

from ..data.checks import check_images, describe_problems
from ..data.images import IMAGE_ENDINGS, ImageError, decode, prepare
from ..evaluation.classifier_views import ClassifierViews
from ..evaluation.label_map_predictor import LabelMapPredictor
from ..evaluation.metrics import coco_results
from ..training.arguments import STRIDE, TTA_FLIP, TTA_SCALES, WINDOW, check_together, option
from ..writing.files import atomic_file
from ..writing.text import escape_control
from .measure import CLASSIFIER, SEGMENTER, check_options, task_of
from .parser import parse_arguments
from .shared import read_config


@dataclass
class PredictionArguments:
    """What is predicted, and how."""

    model_name_or_path: str | None = option(
        None, "checkpoint of any task: a folder, or a repository of the Hub (default: none)"
    )
    images: str | None = option(None, "folder of images, in folders or not, or one image (default: none)")
    output_dir: str = option("runs/predictions", "where predictions are written (default: runs/predictions)")
    binary_masks: bool = option(False, "of segmenters of two classes: write 0 and 255, not 0 and 1 (default: false)")
    window: int | None = option(None, f"of segmenters: {WINDOW}")
    stride: int | None = option(None, f"of segmenters: {STRIDE}")
    tta_scales: list[float] | None = option(None, f"of segmenters and classifiers: {TTA_SCALES}")
    tta_flip: bool = option(False, f"of segmenters and classifiers: {TTA_FLIP}")
    threshold: float = option(0.3, "of detectors: least score of what is written (default: 0.3)")
    top_k: int = option(1, "of classifiers: how many classes are written for each image (default: 1)")
    skip_corrupt: bool = option(False, "skip corrupt images and list them (default: false, an error)")
    use_cpu: bool = option(False, "predict on the CPU also where there is a GPU (default: false)")

    def __post_init__(self) -> None:
        check_together(self, "window", "stride")
        if self.model_name_or_path is None or self.images is None:
            raise ValueError("--model_name_or_path and --images are needed")


@dataclass(frozen=True)
class Predictor:
    """A model with all that it needs to predict.

    Args:
        model: In evaluation mode.
        image_processor: Of the model.
        options: Of the program.
    """

    model: PreTrainedModel
    image_processor: BaseImageProcessor
    options: PredictionArguments


def predict_classes(predictor: Predictor, image: Image.Image, path: str, name: str) -> list[Any]:
    """Name, class and probability of the best classes."""
    options, model = predictor.options, predictor.model
    pixel_values = prepare(image, predictor.image_processor, path)[None].to(model.device)
    views = ClassifierViews(model, options.tta_scales or (), options.tta_flip)
    best = views(pixel_values).logits[0].softmax(dim=0).topk(min(options.top_k, model.config.num_labels))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(name, model.config.id2label[label], round(score, 6)) for label, score in pairs]


def predict_objects(predictor: Predictor, image: Image.Image, path: str, name: str) -> list[Any]:
    """COCO results, with masks where the model has them."""
    options, model, processor = predictor.options, predictor.model, predictor.image_processor
    outputs = model(**processor(image, return_tensors="pt").to(model.device))
    sizes = [image.size[::-1]]
    (found,) = processor.post_process_object_detection(outputs, options.threshold, sizes)
    if getattr(model.config, "use_masks", False):
        (instances,) = processor.post_process_instance_segmentation(
            outputs, options.threshold, target_sizes=sizes, return_binary_maps=True
        )
        found["masks"] = instances["segmentation"]
    results = coco_results([found], [0], range(model.config.num_labels))[0]
    names = model.config.id2label
    return [
        {"file_name": name, "category": names[result["category_id"]]}
        | {field: value for field, value in result.items() if field != "image_id"}
        for result in results
    ]


def write_mask(predictor: Predictor, image: Image.Image, path: str, name: str) -> list[Any]:
    """A PNG of the classes, numbered as in the maps that the model was trained on. No rows."""
    options, model = predictor.options, predictor.model
    segment = LabelMapPredictor(
        predictor.image_processor, options.window, options.stride, options.tta_scales or (), options.tta_flip
    )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, height, width)
    labels, _ = segment(model, [view.to(model.device) for view in segment.prepare(pixels, path)], image.size[::-1])
    if options.binary_masks:
        labels = labels * 255
    elif getattr(predictor.image_processor, "do_reduce_labels", False):
        labels = labels + 1
    dtype = np.uint8 if model.config.num_labels < 255 else np.uint16
    with atomic_file(Path(options.output_dir) / mask_name(name)) as file:
        Image.fromarray(labels.cpu().numpy().astype(dtype)).save(file)
    return []


def mask_name(name: str) -> str:
    return Path(name).with_suffix(".png").as_posix()


def write_classes(rows: Sequence[Any], folder: Path) -> None:
    # Names of files need not be UTF-8: the bytes are written as they are.
    with (
        atomic_file(folder / "predictions.csv") as path,
        path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        csv.writer(file).writerows([("image", "class", "probability"), *rows])


def write_objects(rows: Sequence[Any], folder: Path) -> None:
    with atomic_file(folder / "predictions.json") as file:
        file.write_text(json.dumps(list(rows), indent=1))


# The Auto class; what happens to an image in RGB with its path and its name in the folder, and may give rows; and what
# writes the rows of all images in the end.
CLASSIFICATION = (AutoModelForImageClassification, predict_classes, write_classes)
SEGMENTATION = (AutoModelForSemanticSegmentation, write_mask, None)
DETECTION = (AutoModelForObjectDetection, predict_objects, write_objects)


def find_images(folder: str) -> dict[str, str]:
    """The paths of the images in a folder by their names in it, or the one image."""
    root = Path(folder)
    if root.is_file():
        return {root.name: folder}
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and path.name[0] != ".")
    if not paths:
        raise SystemExit(f"There are no images in {folder}: their names end with {', '.join(sorted(IMAGE_ENDINGS))}")
    return {path.relative_to(root).as_posix(): str(path) for path in paths}


def check_names(names: Sequence[str]) -> None:
    """Ends the program if two images would have one mask."""
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(mask_name(name), name)) != name:
            both = f"{other} and {name} differ in their endings only: both masks would be {mask_name(name)}"
            raise SystemExit(escape_control(both))


def check_files(images: dict[str, str]) -> None:
    """Ends the program if there are images that cannot be opened; what follows their headers is not looked at yet."""
    problems = [result.problem for result in check_images(list(images.values())) if result.problem]
    if problems:
        raise SystemExit(f"{describe_problems(problems, len(images), 'images')}\n--skip_corrupt skips them")


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    (options,) = parse_arguments((PredictionArguments,), argv, "pvt-hf predict", __doc__, {})
    config = read_config(options.model_name_or_path)
    check_options(options, options.model_name_or_path, config)
    kind = task_of(config)
    auto_class, predict, write = {CLASSIFIER: CLASSIFICATION, SEGMENTER: SEGMENTATION}.get(kind, DETECTION)
    if options.binary_masks and config.num_labels != 2:
        raise SystemExit(f"--binary_masks is for a segmenter of two classes; this one has {config.num_labels}")
    images = find_images(options.images)
    if kind is SEGMENTER:
        check_names(list(images))
    if not options.skip_corrupt:
        check_files(images)
    device = "cuda" if torch.cuda.is_available() and not options.use_cpu else "cpu"
    model = auto_class.from_pretrained(options.model_name_or_path, dtype=torch.float32).eval().to(device)
    predictor = Predictor(model, AutoImageProcessor.from_pretrained(options.model_name_or_path), options)
    rows, problems = [], []
    for name, path in logging.tqdm(images.items(), desc="predicting", delay=2):
        try:
            rows += predict(predictor, decode({"path": path}, path), path, name)
        except ImageError as error:
            if not options.skip_corrupt:
                raise SystemExit(str(error)) from error
            problems.append(str(error))
    if write is not None:
        write(rows, Path(options.output_dir))
    if problems:
        print(describe_problems(problems, len(images), "images", shown=len(problems)))
    print(f"predictions for {len(images) - len(problems)} images are in {options.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
