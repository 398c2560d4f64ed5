"""Trains a detector of pvt_hf or DETR on PVT with one of the papers' recipes, and measures COCO's AP.

    accelerate launch -m pvt_hf.commands.train_detection --recipe retinanet_1x \\
        --backbone_checkpoint converted/pvt_small \\
        --train_annotations coco/annotations/instances_train2017.json --train_images coco/train2017 \\
        --eval_annotations coco/annotations/instances_val2017.json --eval_images coco/val2017
    pvt-hf train-detection --smoke --output_dir runs/smoke                          # all of it in a minute, offline
    pvt-hf train-detection --demo --backbone_checkpoint runs/quickstart             # learns digits in minutes
    pvt-hf train-detection arguments.yaml --learning_rate 1e-4                      # a file of options, and others
    pvt-hf train-detection --recipe mask_rcnn_1x --model_name_or_path converted/mask_rcnn_pvt_s ...
    pvt-hf train-detection --recipe detr_50ep --dataset_name cppe-5 --eval_split test ...
    pvt-hf train-detection --dataset_name my_export --warmup_iterations 50 ...      # a folder of YOLO, VOC or Roboflow

    pvt-hf train-detection --output_dir runs/x --resume_from_checkpoint true ...    # as if never interrupted

The first is a cell of the papers' table. Every argument of TrainingArguments works too. Without data, it draws digits
on scenes. The learning rate is that of the recipe for the real number of images per step; a short run needs a short
--warmup_iterations.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

from transformers import (
    AutoConfig,
    AutoModelForObjectDetection,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

import pvt_hf

from ..data.augmentation import DetectionAugmentation
from ..data.class_names import read_class_names
from ..data.detection import EvaluationDetections, TrainingDetections, read_coco
from ..data.detection_records import DetectionData
from ..models.configuration_pvt import label_fields
from ..recipes import DETECTION_RECIPES, DetectionRecipe, detection_recipe
from ..training.arguments import (
    DETECTION,
    DetectionDataArguments,
    DetectionModelArguments,
    build_training_arguments,
    override_recipe,
)
from ..training.detection import DetectionTrainer
from ..training.optimization import freeze_stages
from . import presets, shared
from .parser import parse_arguments


def parse(
    argv: Sequence[str] | None,
) -> tuple[tuple[Any, ...], PreTrainedConfig, DetectionRecipe, TrainingArguments]:
    """The groups of arguments, the backbone's configuration, the recipe, and the `TrainingArguments`."""
    groups = parse_arguments(DETECTION, argv, "pvt-hf train-detection", __doc__, presets.DETECTION)
    model_args, data_args, recipe_args, options = groups
    architecture = DETECTION_RECIPES[recipe_args.recipe].architecture
    if model_args.model_name_or_path:
        model_type = shared.read_config(model_args.model_name_or_path).model_type
        if model_type.removeprefix("pvt_hf_") != architecture:
            raise SystemExit(f"--recipe {recipe_args.recipe} is not for a {model_type}")
    shared.check_code(options, "detr" if architecture == "detr" else f"pvt_hf_{architecture}")
    checkpoint = model_args.model_name_or_path or model_args.backbone_checkpoint
    backbone, model_args.variant = shared.read_backbone_config(checkpoint, model_args.variant)
    recipe = override_recipe(detection_recipe(recipe_args.recipe, model_args.variant), recipe_args)
    if model_args.config_overrides is None:
        small = recipe_args.smoke or recipe_args.demo
        model_args.config_overrides = presets.SMALL_DETECTORS[architecture] if small else {}
    return groups, backbone, recipe, build_training_arguments(options, recipe, num_train_epochs=recipe.epochs)


def load_splits(data_args: DetectionDataArguments, args: TrainingArguments) -> tuple[DetectionData, DetectionData]:
    """The training set and the validation set, with the same classes."""
    names = read_class_names(data_args.class_names) if data_args.class_names else None
    train, *others = _read_splits(data_args, args, names)
    options = data_args.allow_missing_classes, "--allow_missing_classes trains nevertheless."
    if names:
        train = train.reorder(names, (str(data_args.class_names), "the training set"), *options)
    if data_args.train_val_split is not None:
        return train.split(data_args.train_val_split, args.seed)
    return train, others[0].reorder(train.label_names, ("The training set", "the validation set"), *options)


def _read_splits(
    data_args: DetectionDataArguments, args: TrainingArguments, names: list[str] | None
) -> list[DetectionData]:
    """The training set and the validation set, or only the first where that is part of it."""
    count = 1 if data_args.train_val_split is not None else 2
    if data_args.dataset_name:
        splits: list[DetectionData] = []
        for split in (data_args.train_split, data_args.eval_split)[:count]:
            known = splits[0].label_names if splits else names
            with args.main_process_first(desc="loading the data"):  # which are then in the cache of each machine
                splits.append(shared.read_detection_split(data_args, split, known, args.dataloader_num_workers))
        return splits
    files: list[tuple[Any, Any]] = [
        (data_args.train_annotations, data_args.train_images),
        (data_args.eval_annotations, data_args.eval_images),
    ]
    if not data_args.train_annotations:
        scenes = shared.draw_scenes(args, data_args.num_scenes)
        files = [(scenes / split / "annotations.json", scenes / split / "images") for split in ("train", "validation")]
    return [read_coco(*pair, data_args.allow_outside, data_args.bbox_format) for pair in files[:count]]


def check_splits(
    splits: tuple[DetectionData, DetectionData],
    model: PreTrainedModel,
    data_args: DetectionDataArguments,
    max_detections: int,
    args: TrainingArguments,
) -> tuple[DetectionData, DetectionData]:
    """What is trained on and evaluated: everything that can be known about it is checked and printed."""
    masks = getattr(model.config, "use_masks", False)
    train = splits[0].for_training(
        empty=data_args.keep_empty,
        masks=masks,
        skip_without_mask=data_args.skip_without_mask,
        allow_missing=data_args.allow_missing_classes,
    )
    checked = []
    for name, split in (("the training set", train), ("the validation set", splits[1].for_evaluation(masks))):
        with args.main_process_first(desc="checking the images"):
            split = split.check_images(name, data_args.skip_corrupt, args.dataloader_num_workers)
        split.warn_of_limit(max_detections, name)
        for field in ("num_queries", "num_proposals"):
            if limit := getattr(model.config, field, None):
                split.warn_of_limit(limit, name, f"`{field}` (`--config_overrides`)")
        checked.append(split)
        if args.process_index == 0:
            print(f"{name}: {split.summary()}")
    return checked[0], checked[1]


def build_detector(architecture: str, backbone: PreTrainedConfig, values: dict[str, Any]) -> PreTrainedModel:
    """A detector with random weights; `values` are fields of its configuration."""
    if architecture == "detr":
        return pvt_hf.build_detr(pvt_hf.build_detr_config(backbone, **values))
    config_class = type(AutoConfig.for_model(f"pvt_hf_{architecture}"))
    if unknown := values.keys() - {field.name for field in fields(config_class)}:
        raise SystemExit(f"--config_overrides: a {config_class.__name__} has no fields {sorted(unknown)}")
    backbone.out_features = list(config_class.backbone_out_features)
    return AutoModelForObjectDetection.from_config(config_class(backbone_config=backbone, **values))


def load_model(
    model_args: DetectionModelArguments, backbone: PreTrainedConfig, recipe: DetectionRecipe, names: list[str]
) -> PreTrainedModel:
    if model_args.model_name_or_path:
        model = AutoModelForObjectDetection.from_pretrained(
            model_args.model_name_or_path, ignore_mismatched_sizes=True, **label_fields(names)
        )
    else:
        backbone.drop_path_rate = recipe.drop_path_rate
        values = label_fields(names) | cast(dict, model_args.config_overrides)
        model = build_detector(recipe.architecture, backbone, values)
    shared.load_backbone(model, model_args.backbone_checkpoint)
    freeze_stages(model, model_args.freeze_stages)
    return model


@shared.exit_on_bad_run()
def main(argv: Sequence[str] | None = None) -> int:
    (model_args, data_args, recipe_args, options), backbone, recipe, args = parse(argv)
    shared.check_resume(args, recipe)
    set_seed(args.seed)

    with shared.exit_on_bad_data():
        splits = load_splits(data_args, args)
    model = load_model(model_args, backbone, recipe, splits[0].label_names)
    max_detections = model_args.max_detections or getattr(model.config, "max_detections", 100)
    with shared.exit_on_bad_data():
        train, validation = check_splits(splits, model, data_args, max_detections, args)

    size = {"shortest_edge": max(recipe.shortest_edges), "longest_edge": recipe.longest_edge}
    augment = DetectionAugmentation(recipe.shortest_edges, recipe.longest_edge, recipe.flip, recipe.crop_shortest_edges)
    trainer = DetectionTrainer(
        model=model,
        args=args,
        recipe=recipe,
        recipe_schedule=options.lr_scheduler_type is None,
        max_detections=max_detections,
        left_out=[*train.left_out, *validation.left_out],
        ema_decay=recipe_args.ema_decay,
        channels_last=model_args.channels_last,
        train_dataset=TrainingDetections(
            train, augment, masks=getattr(model.config, "use_masks", False), skip_corrupt=data_args.skip_corrupt
        ),
        eval_dataset=EvaluationDetections(validation),
        processing_class=pvt_hf.PvtDetectionImageProcessor(size=size, num_labels=len(train.label_names)),
        dataset_name=data_args.dataset_name or data_args.train_annotations,
        dataset_title=options.dataset_title,
        initial_weights=model_args.model_name_or_path or model_args.backbone_checkpoint,
        license=options.license,
        with_code=options.with_code,
        settings={name: getattr(model_args, name) for name in ("variant", "config_overrides", "freeze_stages")},
    )
    trainer.train(args.resume_from_checkpoint, allow_batch_change=options.allow_batch_change)
    return shared.finish(trainer)


if __name__ == "__main__":
    sys.exit(main())
