"""How `pvt-hf evaluate` measures a checkpoint of each task, and what the papers state for it."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import pvt_hf

from ..data.class_names import ClassNameError, list_class_names, match_class_names, read_class_names
from ..data.classification import (
    EvaluationImages,
    check_images_and_labels,
    collate,
    encode_names,
    find_labels,
    load_images,
)
from ..data.detection import EvaluationDetections, read_coco
from ..data.digits import write_scenes
from ..data.images import load_split
from ..data.label_maps import read_palette
from ..data.segmentation import EvaluationMaps, SegmentationData, read_segmentation_dataset, read_segmentation_folders
from ..data.segmentation_checks import check_classes, survey_maps
from ..evaluation.classifier_views import ClassifierViews
from ..evaluation.metrics import COCO_METRICS, classification_metrics, classification_statistics
from ..models.backbone import get_backbone_config
from ..models.image_processing_segmentation import IGNORE_INDEX
from ..paper_results import PUBLISHED
from ..prediction.predictor import find_task
from ..recipes import DETECTION_RECIPES, SEGMENTATION_RECIPES
from ..training.arguments import EvaluationArguments
from ..training.detection import DetectionTrainer
from ..training.segmentation import SegmentationTrainer
from ..variants import find_variant
from ..writing.text import escape_control
from .shared import read_detection_split

Measured = tuple[Trainer, dict[str, float]]
# How many scenes of a split are drawn where there are no other images.
NUM_SCENES = 40


def build_evaluation_arguments(options: EvaluationArguments, batch_size: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=options.output_dir,
        per_device_eval_batch_size=options.per_device_eval_batch_size or batch_size,
        dataloader_num_workers=options.dataloader_num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        bf16=options.bf16,
        seed=options.seed,
    )


def match_classes(
    model: PreTrainedModel, checkpoint: str, found: list[str], options: EvaluationArguments
) -> tuple[list[str], list[int]]:
    """The names of the data's classes, and the label of each of them in the model.

    Raises:
        ClassNameError: If the classes are not the same, with both lists.
    """
    known = list_class_names(model.config)
    names = read_class_names(options.class_names) if options.class_names else found
    for count in (len(names), len(found)):
        if len(known) != count:
            raise ClassNameError(f"{checkpoint} has {len(known)} classes and the data {count}: {known} and {names}.")
    for owner, given in ((checkpoint, known), ("the data", names)):
        if _is_numbered(given):
            print(f"{owner} has no class names: labels are compared as numbers. --class_names names those of the data")
            return known, list(range(len(known)))
    places = match_class_names(known, names, (checkpoint, "the data"))
    if places != sorted(places):
        print(f"the data has the classes of {checkpoint} in another order: they are mapped by their names")
    return names, places


def _is_numbered(names: list[str]) -> bool:
    """Whether these are no names, but numbers of classes, or ImageNet's 1000 folders, whose order is that of its
    classes."""
    patterns = ("LABEL_{}", "{}", "class_{}")
    numbered = any(names == [pattern.format(label) for label in range(len(names))] for pattern in patterns)
    return numbered or (len(names) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names))


def print_left_out(problems: list[str]) -> None:
    if problems:
        print("\n  ".join([f"{len(problems)} corrupt images are left out:", *map(escape_control, problems)]))


class _MappedMaps(EvaluationMaps):
    """Label maps with the labels of the model; `places` has that of each label of the data."""

    places: torch.Tensor

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        table = torch.arange(max(len(self.places), IGNORE_INDEX + 1))  # what is ignored stays so
        table[: len(self.places)] = self.places
        return row | {"labels": table[row["labels"]]}


def draw_validation_scenes(options: EvaluationArguments) -> Path:
    """The folder of the validation scenes."""
    with build_evaluation_arguments(options, 1).main_process_first(desc="drawing scenes"):
        folder = Path(options.output_dir) / f"scenes-{options.seed}"
        return write_scenes(folder, 1, NUM_SCENES, options.seed) / "validation"


def measure_classifier(checkpoint: str, recipe: str, options: EvaluationArguments) -> Measured:
    model = AutoModelForImageClassification.from_pretrained(checkpoint, dtype=torch.float32)
    rows = load_images(
        options.dataset_name, options.eval_split, options.dataset_config_name, image_column=options.image_column
    )
    rows = encode_names(rows, options.label_column)
    column, names = find_labels(rows, options.label_column)
    if not isinstance(rows.features[column], datasets.ClassLabel):  # integers, of which some may not be there
        names = list(map(str, range(max(len(names), model.config.num_labels))))
    names, places = match_classes(model, checkpoint, names, options)

    image_processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")  # exactly as torchvision on PIL
    augmented = options.tta_scales or options.tta_flip
    trainer = Trainer(
        ClassifierViews(model, options.tta_scales or (), options.tta_flip) if augmented else model,
        build_evaluation_arguments(options, batch_size=64),
        data_collator=collate,
        preprocess_logits_for_metrics=classification_statistics,
        compute_metrics=classification_metrics,
    )
    rows = rows.select(range(len(rows))[: options.max_eval_samples])
    rows, left_out = check_images_and_labels(
        rows, column, len(names), "the data", options.skip_corrupt, options.dataloader_num_workers
    )
    print_left_out(left_out)
    return trainer, trainer.evaluate(EvaluationImages(rows, column, len(names), image_processor, places))


def measure_detector(checkpoint: str, recipe: str, options: EvaluationArguments) -> Measured:
    model = AutoModelForObjectDetection.from_pretrained(checkpoint, dtype=torch.float32)
    known = list_class_names(model.config)
    if options.annotations and options.images:
        data = read_coco(options.annotations, options.images, options.allow_outside, options.bbox_format)
    elif options.dataset_name:
        names = read_class_names(options.class_names) if options.class_names else known
        data = read_detection_split(options, options.eval_split, names, options.dataloader_num_workers)
    else:
        scenes = draw_validation_scenes(options)
        data = read_coco(scenes / "annotations.json", scenes / "images")
    names, _ = match_classes(model, checkpoint, data.label_names, options)
    data = replace(data, label_names=names).reorder(known, (checkpoint, "the data"))

    trainer = DetectionTrainer(
        model,
        build_evaluation_arguments(options, batch_size=1),  # as mmdetection: no image is padded to another's size
        recipe=DETECTION_RECIPES[recipe],
        max_detections=options.max_detections,
        processing_class=AutoImageProcessor.from_pretrained(checkpoint),
    )
    data = replace(data, records=data.records[: options.max_eval_samples]).for_evaluation(trainer.masks)
    data = data.check_images("the data", options.skip_corrupt, options.dataloader_num_workers)
    data.warn_of_limit(trainer.max_detections, "the data")
    print_left_out(data.left_out)
    return trainer, trainer.evaluate(EvaluationDetections(data))


def read_label_maps(names: list[str], reduce_labels: bool, options: EvaluationArguments) -> SegmentationData:
    """The images and maps of the options, with classes of these names."""
    settings: dict[str, Any] = {
        "num_labels": len(names),
        "reduce_labels": reduce_labels if options.reduce_labels is None else options.reduce_labels,
        "binary_masks": options.binary_masks,
        "palette": read_palette(options.palette, names) if options.palette else None,
    }
    if options.maps and options.images:
        return read_segmentation_folders(options.images, options.maps, **settings)
    if options.dataset_name:
        rows = load_split(options.dataset_name, options.eval_split, name=options.dataset_config_name)
        return read_segmentation_dataset(rows, options.map_column, options.image_column, **settings)
    scenes = draw_validation_scenes(options)
    return read_segmentation_folders(scenes / "images", scenes / "maps", **settings)


def measure_segmenter(checkpoint: str, recipe: str, options: EvaluationArguments) -> Measured:
    model = AutoModelForSemanticSegmentation.from_pretrained(checkpoint, dtype=torch.float32)
    image_processor = AutoImageProcessor.from_pretrained(checkpoint)
    known = list_class_names(model.config)
    names, places = match_classes(model, checkpoint, known, options)
    scales, args = options.tta_scales or (), build_evaluation_arguments(options, batch_size=1)
    data = read_label_maps(names, getattr(image_processor, "do_reduce_labels", False), options)
    data = data.select(range(len(data))[: options.max_eval_samples])
    with args.main_process_first(desc="checking the data"):
        data, survey = survey_maps(data, "the data", options.dataloader_num_workers, options.skip_corrupt)
    check_classes(None, survey, names)
    print_left_out(survey.left_out)
    trainer = SegmentationTrainer(
        model,
        args,
        recipe=SEGMENTATION_RECIPES[recipe],
        processing_class=image_processor,
        window=options.window,
        stride=options.stride,
        tta_scales=scales,
        tta_flip=options.tta_flip,
    )
    maps = _MappedMaps(data, image_processor, scales)
    maps.places = torch.tensor(places)
    metrics = trainer.evaluate(maps)
    if trainer.is_world_process_zero():
        print(trainer.describe_classes())
    return trainer, metrics


@dataclass(frozen=True)
class Measurement:
    """How models are measured, and which of the papers' numbers they are compared with.

    Attributes:
        measure: From a checkpoint, `recipe` and the arguments to the trainer and its metrics.
        recipe: Whose numbers the papers state.
        metrics: The names of the metrics, without `eval_`.
        num_labels: How many classes the papers' data set has.
    """

    measure: Callable[[str, str, EvaluationArguments], Measured]
    recipe: str
    metrics: tuple[str, ...]
    num_labels: int


_BOX_METRICS = tuple(COCO_METRICS)
_BOX_AND_MASK_METRICS = (*_BOX_METRICS, *(f"mask_{name}" for name in COCO_METRICS))
_FOREGROUND_METRICS = ("dice_images", "dice_set", "iou_images", "iou_set")  # of two classes
CLASSIFIER = Measurement(measure_classifier, "imagenet", ("accuracy", "top5_accuracy"), 1000)
SEGMENTER = Measurement(measure_segmenter, "semantic_fpn_40k", ("mIoU", "mAcc", "aAcc", *_FOREGROUND_METRICS), 150)
# By model type; and whatever is a segmenter is measured as one.
MEASUREMENTS = {
    "pvt": CLASSIFIER,
    "pvt_v2": CLASSIFIER,
    "pvt_hf_retinanet": Measurement(measure_detector, "retinanet_1x", _BOX_METRICS, 80),
    "pvt_hf_atss": Measurement(measure_detector, "atss_3x_ms", _BOX_METRICS, 80),
    "pvt_hf_gfl": Measurement(measure_detector, "gfl_3x_ms", _BOX_METRICS, 80),
    "pvt_hf_mask_rcnn": Measurement(measure_detector, "mask_rcnn_1x", _BOX_AND_MASK_METRICS, 80),
    "pvt_hf_cascade_mask_rcnn": Measurement(measure_detector, "cascade_mask_rcnn_3x_ms", _BOX_AND_MASK_METRICS, 80),
    "pvt_hf_sparse_rcnn": Measurement(measure_detector, "sparse_rcnn_3x_ms", _BOX_METRICS, 80),
    "detr": Measurement(measure_detector, "detr_50ep", _BOX_METRICS, 80),
}


def find_measurement(config: PreTrainedConfig) -> Measurement:
    """How a model is measured.

    Args:
        config: Of a model of any task.

    Raises:
        ValueError: If it predicts nothing, or nothing that is measured here.
    """
    models = find_task(config).models
    if models == "segmenter":
        return SEGMENTER
    if config.model_type not in MEASUREMENTS:
        raise ValueError(
            f"the model is a {models} of type {config.model_type}: measured are {', '.join(MEASUREMENTS)}, and "
            "whatever transformers loads with AutoModelForSemanticSegmentation"
        )
    return MEASUREMENTS[config.model_type]


def published_metrics(config: PreTrainedConfig, recipe: str | None = None) -> dict[str, float]:
    """The papers' numbers for an architecture with the classes of ImageNet, COCO or ADE20K.

    Args:
        config: Of a model of any task.
        recipe: With which it was trained; by default the one of its task that most numbers are of.

    Returns:
        Percentages by metric; none for an architecture or a number of classes that the papers do not have.
    """
    measurement, variant = find_measurement(config), find_variant(get_backbone_config(config))
    if variant is None or config.num_labels != measurement.num_labels:
        return {}
    if measurement is SEGMENTER and config.model_type != pvt_hf.SemanticFPNConfig.model_type:
        return {}
    if measurement is CLASSIFIER:
        return {"accuracy": variant.paper_top1}
    result = PUBLISHED.get((recipe or measurement.recipe, variant.name))
    return result.metrics if result else {}
