"""Predicts what is on the images of a folder, with a checkpoint of any task.

    pvt-hf predict --model_name_or_path runs/segmentation --images photos --output_dir masks --binary_masks
    pvt-hf predict --model_name_or_path converted/semantic_fpn_pvt_s --images photos --window 512 --stride 341
    pvt-hf predict --model_name_or_path converted/pvt_v2_b2 --images photos --tta_flip

A segmenter writes a PNG for each image, of its size, with the labels of the maps that it was trained on, or with
`--binary_masks` 0 and 255. A classifier writes `predictions.csv`, a detector `predictions.json`, in COCO's format for
results with the names of files and classes.
"""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
)
from transformers.utils import logging

from ..data.checks import check_images, describe_problems
from ..data.images import ImageError, decode, prepare
from ..evaluation.classifier_views import ClassifierViews
from ..evaluation.label_maps import LabelMapPredictor
from ..evaluation.metrics import coco_results
from ..training.arguments import PredictionArguments
from . import shared
from .parser import parse_arguments

# From an image, RGB, and its name in the folder to a row of what is written in the end.
Predict = Callable[[Image.Image, str], list[Any]]
_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def find_images(folder: str) -> list[str]:
    """The paths of the images in the folder, or of the one image."""
    if Path(folder).is_file():
        return [folder]
    paths = (path for path in sorted(Path(folder).rglob("*")) if not path.name.startswith("."))
    if found := [str(path) for path in paths if path.suffix.lower() in _ENDINGS]:
        return found
    raise SystemExit(f"There are no images in {folder}; their names must end with {', '.join(sorted(_ENDINGS))}")


def name_masks(folder: str, paths: Sequence[str]) -> dict[str, str]:
    """The file of each image's mask in the output folder.

    Raises:
        SystemExit: If two images would have one mask.
    """
    root = Path(folder) if Path(folder).is_dir() else Path(folder).parent
    names = {path: Path(path).relative_to(root).with_suffix(".png").as_posix() for path in paths}
    images: dict[str, str] = {}
    for path, name in names.items():
        if name in images:
            raise SystemExit(f"{images[name]} and {path} differ in their endings only: both masks would be {name}")
        images[name] = path
    return names


@contextmanager
def write_atomically(file: Path) -> Iterator[Path]:
    """A path beside the file, which becomes the file when it is written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    yield partial
    os.replace(partial, file)
