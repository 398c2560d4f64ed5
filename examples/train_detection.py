"""Trains RetinaNet, Mask R-CNN or DETR on PVT with the papers' recipes, on one process or many, and measures COCO's AP.

    accelerate launch examples/train_detection.py --recipe retinanet_1x --backbone_checkpoint converted/pvt_small \\
        --train_annotations coco/annotations/instances_train2017.json --train_images coco/train2017 \\
        --eval_annotations coco/annotations/instances_val2017.json --eval_images coco/val2017       # a table row
    python examples/train_detection.py --smoke --output_dir runs/smoke             # all of it in a minute, offline
    python examples/train_detection.py --demo --backbone_checkpoint runs/quickstart       # learns digits in minutes
    python examples/train_detection.py --recipe mask_rcnn_1x --model_name_or_path converted/mask_rcnn_pvt_s ...
    python examples/train_detection.py --recipe detr_50ep --dataset_name cppe-5 --eval_split test ...
    python examples/train_detection.py --output_dir runs/x --resume_from_checkpoint true ...           # goes on exactly

Every argument of TrainingArguments works too. Without data, it draws digits on scenes. The learning rate is that of
the recipe for the real number of images per step; a short run needs a short --warmup_iterations.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForObjectDetection, PreTrainedConfig, TrainingArguments, set_seed

import pvt_hf
from pvt_hf.data.augmentation import DetectionAugmentation
from pvt_hf.data.classification import load_images
from pvt_hf.data.detection import (
    DetectionData,
    EvaluationDetections,
    TrainingDetections,
    read_coco,
    read_detection_dataset,
)
from pvt_hf.data.digits import write_scenes
from pvt_hf.recipes import DETECTION_RECIPES, detection_recipe
from pvt_hf.training.arguments import parse, training_arguments, training_parser
from pvt_hf.training.detection import DetectionTrainer
from pvt_hf.training.optimization import freeze_stages
from pvt_hf.variants import backbone_config, find_variant

# Of the bundled data: digits have no mirror images, and scenes are small.
SCENES = {"shortest_edges": [128], "longest_edge": 192, "flip": 0.0, "drop_path_rate": 0.0, "learning_rate": 5e-4}
SCENES |= {"per_device_train_batch_size": 4, "dataloader_num_workers": 0, "max_grad_norm": 1.0}
DEMO = SCENES | {"num_train_epochs": 12, "warmup_iterations": 100, "logging_steps": 20, "save_strategy": "no"}
DEMO |= {"eval_strategy": "steps", "eval_steps": 480}
SMOKE = SCENES | {"num_train_epochs": 2, "warmup_iterations": 2, "logging_steps": 1, "scenes": 16}
SMALL = {
    "retinanet": {"neck_channels": 64},
    "mask_rcnn": {
        "neck_channels": 64, "box_head_size": 256, "roi_num_samples": 64,
        "num_candidates": 200, "num_candidates_train": 200, "num_proposals": 200,
    },
    "detr": {
        "d_model": 128, "num_queries": 20, "encoder_layers": 2, "decoder_layers": 3,
        "encoder_ffn_dim": 512, "decoder_ffn_dim": 512,
        # Early on, dropout alone would make the queries differ, and validation boxes be one and the same.
        "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    },
}  # fmt: skip
# The backbone's stages that each system works on.
STAGES = {
    "retinanet": ["stage2", "stage3", "stage4"],
    "mask_rcnn": ["stage1", "stage2", "stage3", "stage4"],
    "detr": ["stage4"],
}
CLASSES = {
    "retinanet": (pvt_hf.RetinaNetConfig, pvt_hf.RetinaNetForObjectDetection),
    "mask_rcnn": (pvt_hf.MaskRCNNConfig, pvt_hf.MaskRCNNForInstanceSegmentation),
}


def parse_arguments() -> tuple[argparse.Namespace, TrainingArguments]:
    parser = training_parser(
        __doc__, output_dir="runs/detection", num_train_epochs=None, per_device_train_batch_size=2,
        per_device_eval_batch_size=1, dataloader_num_workers=4,
    )  # fmt: skip
    parser.add_argument("--recipe", choices=list(DETECTION_RECIPES), default="retinanet_1x")
    parser.add_argument("--variant", choices=list(pvt_hf.VARIANTS), help="of the backbone; pvt_v2_b0 if missing")
    parser.add_argument("--backbone_checkpoint", help="a classifier whose weights the backbone starts from")
    for split in ("train", "eval"):
        parser.add_argument(f"--{split}_annotations", help="COCO json")
        parser.add_argument(f"--{split}_images", help="the folder of its images")
    parser.add_argument("--scenes", type=int, default=1000, help="how many are drawn for training, without data")
    parser.add_argument("--keep_empty", action="store_true", help="train on images without objects too")
    parser.add_argument(
        "--shortest_edges", type=int, nargs="+", help="pixels, one of them by chance; official if missing"
    )
    for name in ("longest_edge", "warmup_iterations"):
        parser.add_argument(f"--{name}", type=int, help="official if missing")
    for name in ("flip", "drop_path_rate"):
        parser.add_argument(f"--{name}", type=float, help="official if missing")
    parser.add_argument(
        "--config_overrides",
        type=json.loads,
        help="of the detector, as '{\"neck_channels\": 64}'; not with a checkpoint",
    )
    parser.add_argument("--demo", action="store_true", help="a small detector that learns the scenes in minutes")
    if parser.parse_known_args()[0].demo:
        parser.set_defaults(**DEMO)
    options = parse(parser, SMOKE)
    files = [getattr(options, f"{split}_{kind}") for split in ("train", "eval") for kind in ("annotations", "images")]
    if any(files) and not all(files):
        raise SystemExit("--train_annotations, --train_images, --eval_annotations and --eval_images go together")
    options.backbone = read_backbone_config(options)
    found = find_variant(options.backbone)
    if options.variant and (found is None or found.name != options.variant):
        raise SystemExit(f"The checkpoint is not a {options.variant}")
    options.variant = found.name if found else None
    recipe = detection_recipe(options.recipe, options.variant)
    given = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    options.recipe = recipe = dataclasses.replace(recipe, **given)
    if options.config_overrides is None:
        options.config_overrides = SMALL[recipe.architecture] if options.smoke or options.demo else {}
    return options, training_arguments(options, recipe, num_train_epochs=recipe.epochs)


def read_backbone_config(options: argparse.Namespace) -> PreTrainedConfig:
    """Of the checkpoint, the detector's or the classifier's, or of the variant."""
    if options.model_name_or_path:
        config = AutoConfig.from_pretrained(options.model_name_or_path)
        if not config.model_type.endswith(DETECTION_RECIPES[options.recipe].architecture):
            raise SystemExit(f"--recipe {options.recipe} is not for a {config.model_type}")
        return config.backbone_config
    if options.backbone_checkpoint:
        return backbone_config(AutoConfig.from_pretrained(options.backbone_checkpoint))
    return pvt_hf.build_config(options.variant or "pvt_v2_b0")


def load_data(options: argparse.Namespace, args: TrainingArguments) -> tuple[DetectionData, DetectionData]:
    """To train on, and to evaluate on."""
    if options.train_annotations:
        train = read_coco(options.train_annotations, options.train_images)
        return train, read_coco(options.eval_annotations, options.eval_images)
    if options.dataset_name:
        name, config = options.dataset_name, options.dataset_config_name
        return tuple(
            read_detection_dataset(load_images(name, split, config))
            for split in (options.train_split, options.eval_split)
        )
    folder = Path(args.output_dir).parent / f"scenes-{options.scenes}"
    with args.main_process_first(desc="drawing scenes"):
        write_scenes(folder, options.scenes, validation=max(8, options.scenes // 5))
    splits = (folder / split for split in ("train", "validation"))
    return tuple(read_coco(split / "annotations.json", split / "images") for split in splits)


def build_detector(system: str, backbone: PreTrainedConfig, fields: dict[str, Any]):
    if system == "detr":
        return pvt_hf.build_detr(pvt_hf.build_detr_config(backbone, **fields))
    config_class, model_class = CLASSES[system]
    if unknown := fields.keys() - {field.name for field in dataclasses.fields(config_class)}:
        raise SystemExit(f"--config_overrides: a {config_class.__name__} has no fields {sorted(unknown)}")
    return model_class(config_class(backbone_config=backbone, **fields))


def load_model(options: argparse.Namespace, names: list[str]):
    fields = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    recipe, backbone = options.recipe, options.backbone
    if options.model_name_or_path:
        model = AutoModelForObjectDetection.from_pretrained(
            options.model_name_or_path, ignore_mismatched_sizes=True, **fields
        )
    else:
        backbone.out_features, backbone.drop_path_rate = STAGES[recipe.architecture], recipe.drop_path_rate
        model = build_detector(recipe.architecture, backbone, fields | options.config_overrides)
    if options.backbone_checkpoint:
        count = pvt_hf.load_pretrained_backbone(model, options.backbone_checkpoint)
        print(f"all {count} tensors of the backbone are from {options.backbone_checkpoint}")
    freeze_stages(model, options.freeze_stages)
    return model


def main() -> None:
    options, args = parse_arguments()
    set_seed(args.seed)
    train, validation = load_data(options, args)
    if train.label_names != validation.label_names:
        raise SystemExit(f"Training has the classes {train.label_names}, evaluation {validation.label_names}")
    model, recipe = load_model(options, train.label_names), options.recipe
    limits = {"shortest_edge": max(recipe.shortest_edges), "longest_edge": recipe.longest_edge}
    image_processor = pvt_hf.PvtDetectionImageProcessor(size=limits, num_labels=len(train.label_names))
    augment = DetectionAugmentation(recipe.shortest_edges, recipe.longest_edge, recipe.flip, recipe.crop_shortest_edges)
    masks = getattr(model.config, "use_masks", False)
    trainer = DetectionTrainer(
        model=model,
        args=args,
        recipe=recipe,
        official_schedule=options.lr_scheduler_type is None,
        ema_decay=options.ema_decay,
        channels_last=options.channels_last,
        train_dataset=TrainingDetections(
            train.for_training(empty=options.keep_empty), augment, masks, options.skip_corrupt
        ),
        eval_dataset=EvaluationDetections(validation),
        processing_class=image_processor,
        dataset_name=options.dataset_name or options.train_annotations,
        initial_weights=options.model_name_or_path or options.backbone_checkpoint,
        settings={key: getattr(options, key) for key in ("variant", "config_overrides", "freeze_stages")},
    )
    trainer.train(args.resume_from_checkpoint)
    summary = trainer.finish()
    if trainer.is_world_process_zero():
        print(summary)


if __name__ == "__main__":
    main()
