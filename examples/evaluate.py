"""Measures checkpoints and prints a table: what the papers state, what is measured, and the difference.

    python conversion/convert.py --all converted
    accelerate launch examples/evaluate.py --variant all --checkpoint_root converted --dataset_name imagenet-1k
    accelerate launch examples/evaluate.py --model_name_or_path converted/retinanet_pvt_s converted/retinanet_pvt_t \\
        --annotations coco/annotations/instances_val2017.json --images coco/val2017
    python examples/evaluate.py --model_name_or_path converted/semantic_fpn_pvt_s --images ade20k/images/validation \\
        --maps ade20k/annotations/validation
    python examples/evaluate.py --smoke --model_name_or_path runs/classification               # on bundled data

What is measured follows from the model: top-1 and top-5 of a classifier, COCO's AP of a detector, mIoU of a segmenter,
each as the official code counts it. The images are prepared by the checkpoint's own image processor. Several
processes count every image once.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from pvt_hf import VARIANTS
from pvt_hf.data.classification import EvaluationImages, collate, find_labels, load_images
from pvt_hf.data.detection import EvaluationDetections, read_coco, read_detection_dataset
from pvt_hf.data.digits import write_scenes
from pvt_hf.data.segmentation import EvaluationMaps, read_segmentation_dataset, read_segmentation_folders
from pvt_hf.evaluation.metrics import COCO_METRICS, classification_metrics, classification_statistics
from pvt_hf.paper_results import PUBLISHED
from pvt_hf.recipes import DETECTION_RECIPES, SEGMENTATION_RECIPES
from pvt_hf.training.detection import DetectionTrainer
from pvt_hf.training.segmentation import SegmentationTrainer
from pvt_hf.variants import backbone_config, find_variant

Measured = tuple[Trainer, dict[str, float]]
# How many images of a split are drawn where there are no others.
SCENES = 40


def check_num_labels(model: PreTrainedModel, checkpoint: str, count: int) -> None:
    if model.config.num_labels != count:
        raise SystemExit(f"{checkpoint} has {model.config.num_labels} classes and the data {count}")


def measure_classifier(checkpoint: str, recipe: str, options: argparse.Namespace) -> Measured:
    model = AutoModelForImageClassification.from_pretrained(checkpoint, dtype=torch.float32)
    data = load_images(options.dataset_name, options.split, options.dataset_config_name)
    column, names = find_labels(data, options.label_column)
    check_num_labels(model, checkpoint, len(names))
    image_processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")  # exactly as torchvision on PIL
    images = data.select(range(min(options.num_images or len(data), len(data))))
    trainer = Trainer(
        model,
        evaluation_arguments(options, batch_size=64),
        data_collator=collate,
        preprocess_logits_for_metrics=classification_statistics,
        compute_metrics=classification_metrics,
    )
    return trainer, trainer.evaluate(EvaluationImages(images, column, len(names), image_processor))


def measure_detector(checkpoint: str, recipe: str, options: argparse.Namespace) -> Measured:
    model = AutoModelForObjectDetection.from_pretrained(checkpoint, dtype=torch.float32)
    if options.annotations:
        data = read_coco(options.annotations, options.images)
    elif options.dataset_name:
        data = read_detection_dataset(load_images(options.dataset_name, options.split, options.dataset_config_name))
    else:
        folder = scenes(options)
        data = read_coco(folder / "annotations.json", folder / "images")
    check_num_labels(model, checkpoint, len(data.label_names))
    trainer = DetectionTrainer(
        model,
        evaluation_arguments(options, batch_size=1),  # officially images are not padded to others' sizes
        recipe=DETECTION_RECIPES[recipe],
        processing_class=AutoImageProcessor.from_pretrained(checkpoint),
    )
    images = dataclasses.replace(data, records=data.records[: options.num_images])
    return trainer, trainer.evaluate(EvaluationDetections(images))


def measure_segmenter(checkpoint: str, recipe: str, options: argparse.Namespace) -> Measured:
    model = AutoModelForSemanticSegmentation.from_pretrained(checkpoint, dtype=torch.float32)
    image_processor = AutoImageProcessor.from_pretrained(checkpoint)
    settings = {"num_labels": model.config.num_labels, "reduce_labels": image_processor.do_reduce_labels}
    if options.maps:
        data = read_segmentation_folders(options.images, options.maps, **settings)
    elif options.dataset_name:
        rows = datasets.load_dataset(options.dataset_name, options.dataset_config_name, split=options.split)
        data = read_segmentation_dataset(rows, options.label_column, **settings)
    else:
        folder = scenes(options)
        data = read_segmentation_folders(folder / "images", folder / "maps", **settings)
    trainer = SegmentationTrainer(
        model,
        evaluation_arguments(options, batch_size=1),
        recipe=SEGMENTATION_RECIPES[recipe],
        processing_class=image_processor,
    )
    rows = [data.rows[index] for index in range(min(options.num_images or len(data), len(data)))]
    return trainer, trainer.evaluate(EvaluationMaps(dataclasses.replace(data, rows=rows), image_processor))


def evaluation_arguments(options: argparse.Namespace, batch_size: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=options.output_dir,
        per_device_eval_batch_size=options.batch_size or batch_size,
        dataloader_num_workers=options.num_workers,
        remove_unused_columns=False,
        bf16=options.bf16,
        seed=options.seed,
    )


def scenes(options: argparse.Namespace) -> Path:
    with evaluation_arguments(options, 1).main_process_first(desc="drawing scenes"):
        return write_scenes(options.output_dir / f"scenes-{options.seed}", 1, SCENES, options.seed) / "validation"


Task = Callable[[str, str, argparse.Namespace], Measured]
SEGMENTER = (measure_segmenter, "semantic_fpn_40k", ("mIoU", "mAcc", "aAcc"))
CLASSES = {"imagenet": 1000, "semantic_fpn_40k": 150}
MASK_METRICS = [f"mask_{name}" for name in COCO_METRICS]
# By model type: how it is measured, the recipe of the paper's numbers, and the metrics.
TASKS: dict[str, tuple[Task, str, Any]] = {
    **dict.fromkeys(("pvt", "pvt_v2"), (measure_classifier, "imagenet", ("accuracy", "top5_accuracy"))),
    "pvt_hf_retinanet": (measure_detector, "retinanet_1x", COCO_METRICS),
    "pvt_hf_mask_rcnn": (measure_detector, "mask_rcnn_1x", [*COCO_METRICS, *MASK_METRICS]),
    "detr": (measure_detector, "detr_50ep", COCO_METRICS),
}


def published(recipe: str, config: PreTrainedConfig) -> dict[str, float]:
    """The papers' numbers for an architecture with the classes of ImageNet, COCO or ADE20K, by metric, in percent."""
    variant = find_variant(backbone_config(config))
    if variant is None or config.num_labels != CLASSES.get(recipe, 80):
        return {}
    if recipe == "imagenet":
        return {"accuracy": variant.paper_top1}
    result = PUBLISHED.get((recipe, variant.name))
    return result.metrics if result else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--variant", choices=["all", *VARIANTS], help="classifiers in --checkpoint_root")
    source.add_argument("--model_name_or_path", nargs="+", help="checkpoints of any task, on the Hub or in folders")
    parser.add_argument("--checkpoint_root", default="converted", type=Path, help="folder of `convert.py --all`")
    parser.add_argument("--recipe", help="whose numbers to compare with; those of the 1x schedules for detectors")
    parser.add_argument("--dataset_name", help="on the Hub, or for classifiers a folder, parquet files; else digits")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--label_column", help="of classes, or for segmenters of maps")
    parser.add_argument("--annotations", help="for detectors: COCO json")
    parser.add_argument("--images", help="for detectors and segmenters: folder of the images")
    parser.add_argument("--maps", help="for segmenters: folder of PNG maps")
    parser.add_argument("--batch_size", type=int, help="64 for classifiers, 1 for the others if missing")
    parser.add_argument("--num_workers", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output_dir", default="runs/evaluation", type=Path)
    parser.add_argument("--num_images", type=int, help="measure on the first ones only")
    parser.add_argument("--smoke", action="store_true", help="on a few bundled images, without workers")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.smoke:
        options.num_images, options.num_workers = options.num_images or 16, 0
    if bool(options.annotations or options.maps) != bool(options.images):
        raise SystemExit("--images goes with --annotations (detectors) or --maps (segmenters)")
    if options.model_name_or_path:
        checkpoints = options.model_name_or_path
    else:
        names = VARIANTS if options.variant == "all" else [options.variant]
        checkpoints = [str(options.checkpoint_root / name) for name in names]
        if missing := [path for path in checkpoints if not Path(path).is_dir()]:
            raise SystemExit(
                f"Not there: {', '.join(missing)}. `python conversion/convert.py --all converted` makes them."
            )
    options.output_dir.mkdir(parents=True, exist_ok=True)
    lines = ["| checkpoint | metric | paper | measured | difference | images |", "|--|--|--|--|--|--|"]
    results = {}
    for checkpoint in checkpoints:
        config = AutoConfig.from_pretrained(checkpoint)
        measure, recipe, metrics = TASKS.get(config.model_type, SEGMENTER)
        paper = published(options.recipe or recipe, config)
        trainer, measured = measure(checkpoint, recipe, options)
        percent = {name: 100 * measured[f"eval_{name}"] for name in metrics}
        percent = {
            name: value for name, value in percent.items() if value >= 0
        }  # COCO has -1 where there are no objects
        results[checkpoint] = percent | {"images": measured["eval_images"]}
        for name, value in percent.items():
            stated, difference = (paper[name], f"{value - paper[name]:+.2f}") if name in paper else ("", "")
            cells = (checkpoint, name, stated, f"{value:.2f}", difference, measured["eval_images"])
            lines.append(f"| {' | '.join(map(str, cells))} |")
        if trainer.is_world_process_zero():  # after each checkpoint: all of them take hours
            partial = options.output_dir / "results.json.partial"
            partial.write_text(json.dumps(results, indent=2))
            partial.replace(options.output_dir / "results.json")
    if trainer.is_world_process_zero():
        print("\n".join(lines))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
