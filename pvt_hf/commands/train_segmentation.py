"""Trains a segmenter with the papers' recipe for ADE20K, on one process or many. Every argument of TrainingArguments
works too.

    accelerate launch -m pvt_hf.commands.train_segmentation --backbone_checkpoint converted/pvt_small \\
        --dataset_name zhoubolei/scene_parse_150 --reduce_labels --class_names ade20k.json
    pvt-hf train-segmentation --smoke --output_dir runs/smoke                       # all of it in a minute, offline
    pvt-hf train-segmentation --demo --backbone_checkpoint runs/detection           # learns digits in minutes
    pvt-hf train-segmentation arguments.yaml --learning_rate 1e-4                   # a file of options, and others
    pvt-hf train-segmentation --model_name_or_path my_segmenter --max_steps 2000 --class_names names.json \\
        --train_images data/images --train_maps data/maps --eval_images validation/images --eval_maps validation/maps
    pvt-hf train-segmentation --output_dir runs/x --resume_from_checkpoint true ... # as if never interrupted

`--dataset_name` is a data set of the Hub with two columns of images, such as `image` and `annotation`. Without one and
without folders, the data are handwritten digits on textured scenes, which are drawn for it. Maps are PNG files of one
channel, or of a palette whose indices are the labels; 255 is ignored.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

import pvt_hf

from ..data import segmentation as data
from ..data.augmentation import SegmentationAugmentation
from ..data.digits import CLASSES
from ..models.configuration_pvt import label_fields
from ..recipes import SEGMENTATION_RECIPES, SegmentationRecipe
from ..training.arguments import (
    SEGMENTATION,
    SegmentationDataArguments,
    SegmentationModelArguments,
    build_training_arguments,
    override_recipe,
)
from ..training.optimization import freeze_stages
from ..training.segmentation import SegmentationTrainer
from . import presets, shared
from .parser import parse_arguments


def parse(
    argv: Sequence[str] | None,
) -> tuple[tuple[Any, ...], PreTrainedConfig, SegmentationRecipe, TrainingArguments]:
    """The groups of arguments, the backbone's configuration, the recipe, and the `TrainingArguments`."""
    groups = parse_arguments(SEGMENTATION, argv, "pvt-hf train-segmentation", __doc__, presets.SEGMENTATION)
    model_args, data_args, recipe_args, options = groups
    checkpoint = model_args.model_name_or_path or model_args.backbone_checkpoint
    backbone, model_args.variant = shared.read_backbone_config(checkpoint, model_args.variant)
    recipe = override_recipe(SEGMENTATION_RECIPES[recipe_args.recipe], recipe_args)
    length = {"max_steps": recipe.steps} if options.num_train_epochs is None else {}
    return groups, backbone, recipe, build_training_arguments(options, recipe, **length)


def read_class_names(data_args: SegmentationDataArguments, checkpoint: str | None) -> list[str]:
    """Of the file, or of the checkpoint that is fine-tuned, or of the bundled scenes."""
    if data_args.class_names:
        names = json.loads(Path(data_args.class_names).read_text())
        return names if isinstance(names, list) else [names[str(label)] for label in range(len(names))]
    if checkpoint:
        return list(AutoConfig.from_pretrained(checkpoint).id2label.values())
    if data_args.dataset_name or data_args.train_images:
        raise SystemExit("--class_names is missing: a json file with the names of the classes")
    return ["background", *CLASSES]


def load_splits(
    data_args: SegmentationDataArguments, args: TrainingArguments, num_labels: int
) -> list[data.SegmentationData]:
    """The training set and the validation set."""
    settings: dict[str, Any] = {"num_labels": num_labels, "reduce_labels": data_args.reduce_labels}
    if data_args.dataset_name:
        splits = data_args.train_split, data_args.eval_split
        name, config = data_args.dataset_name, data_args.dataset_config_name
        rows = (datasets.load_dataset(name, config, split=split) for split in splits)
        return [data.read_segmentation_dataset(split, data_args.map_column, **settings) for split in rows]
    folders: list[tuple[Any, Any]]
    if data_args.train_images:
        folders = [(data_args.train_images, data_args.train_maps), (data_args.eval_images, data_args.eval_maps)]
    else:
        scenes = shared.draw_scenes(args, data_args.num_scenes)
        folders = [(scenes / split / "images", scenes / split / "maps") for split in ("train", "validation")]
    return [data.read_segmentation_folders(*pair, **settings) for pair in folders]


def load_model(
    model_args: SegmentationModelArguments, backbone: PreTrainedConfig, recipe: SegmentationRecipe, names: list[str]
) -> PreTrainedModel:
    if checkpoint := model_args.model_name_or_path:
        config = AutoConfig.from_pretrained(checkpoint, **label_fields(names))
        config.backbone_config.drop_path_rate = recipe.drop_path_rate
        if isinstance(config, pvt_hf.SemanticFPNConfig):
            config.loss_normalization = recipe.loss_normalization
        model = AutoModelForSemanticSegmentation.from_pretrained(
            checkpoint, config=config, ignore_mismatched_sizes=True
        )
    else:
        backbone.drop_path_rate = recipe.drop_path_rate
        backbone.out_features = list(pvt_hf.SemanticFPNConfig.backbone_out_features)
        config = pvt_hf.SemanticFPNConfig(
            backbone_config=backbone,
            loss_normalization=recipe.loss_normalization,
            neck_channels=model_args.neck_channels,
            head_channels=model_args.head_channels,
            **label_fields(names),
        )
        model = AutoModelForSemanticSegmentation.from_config(config)
        shared.load_backbone(model, model_args.backbone_checkpoint)
    freeze_stages(model, model_args.freeze_stages)
    return model


def main(argv: Sequence[str] | None = None) -> int:
    (model_args, data_args, recipe_args, options), backbone, recipe, args = parse(argv)
    set_seed(args.seed)
    names = read_class_names(data_args, model_args.model_name_or_path)
    train, validation = load_splits(data_args, args, len(names))
    size = {"shortest_edge": recipe.shortest_edge, "longest_edge": recipe.longest_edge}
    image_processor = pvt_hf.PvtSegmentationImageProcessor(size=size, do_reduce_labels=data_args.reduce_labels)
    augment = SegmentationAugmentation(
        recipe.shortest_edge,
        recipe.longest_edge,
        scales=recipe.scales,
        crop=(recipe.crop_size, recipe.crop_size),
        max_share=recipe.max_share,
        flip=recipe.flip,
        distortion=recipe.distortion,
    )
    trainer = SegmentationTrainer(
        model=load_model(model_args, backbone, recipe, names),
        args=args,
        recipe=recipe,
        recipe_schedule=options.lr_scheduler_type is None,
        window=model_args.window,
        stride=model_args.stride,
        ema_decay=recipe_args.ema_decay,
        channels_last=model_args.channels_last,
        train_dataset=data.TrainingMaps(train, augment, data_args.skip_corrupt),
        eval_dataset=data.EvaluationMaps(validation, image_processor),
        processing_class=image_processor,
        dataset_name=data_args.dataset_name or data_args.train_images,
        dataset_title=options.dataset_title,
        initial_weights=model_args.model_name_or_path or model_args.backbone_checkpoint,
        license=options.license,
        settings={name: getattr(model_args, name) for name in ("variant", "freeze_stages")},
    )
    trainer.train(args.resume_from_checkpoint)
    return shared.finish(trainer)


if __name__ == "__main__":
    sys.exit(main())
