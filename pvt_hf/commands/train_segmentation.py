"""Trains a segmenter with the papers' recipe for ADE20K, or with one that is fitted to your own data, on one process or
many. Every argument of TrainingArguments works too.

    accelerate launch -m pvt_hf.commands.train_segmentation --recipe semantic_fpn_40k \\
        --backbone_checkpoint converted/pvt_small \\
        --dataset_name zhoubolei/scene_parse_150 --reduce_labels --class_names ade20k.json
    pvt-hf train-segmentation --backbone_checkpoint converted/pvt_v2_b2 --binary_masks --loss cross_entropy+dice \\
        --train_images train/images --train_maps train/masks --eval_images test/images --eval_maps test/masks
    pvt-hf train-segmentation --smoke --output_dir runs/smoke                       # all of it in a minute, offline
    pvt-hf train-segmentation --demo --backbone_checkpoint runs/detection           # learns digits in minutes
    pvt-hf train-segmentation arguments.yaml --learning_rate 1e-4                   # a file of options, and others
    pvt-hf train-segmentation --model_name_or_path my_segmenter --max_steps 2000 --class_names names.json \\
        --train_images data/images --train_maps data/maps --eval_images validation/images --eval_maps validation/maps
    pvt-hf train-segmentation --output_dir runs/x --resume_from_checkpoint true ... # as if never interrupted

`--dataset_name` is a data set of the Hub with two columns of images, such as `image` and `annotation`. Without one and
without folders, the data are handwritten digits on textured scenes, which are drawn for it. Maps are PNG, TIFF or BMP
files of one channel, or of a palette whose indices are the labels; 255 is ignored. Masks of 0 and 255 are read with
`--binary_masks`, also as JPEG, and maps of colours with `--palette`. All of them are looked at before the first step.
"""

import sys
from collections.abc import Sequence
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    UperNetConfig,
    set_seed,
)

import pvt_hf

from ..data import segmentation as data
from ..data.augmentation import SegmentationAugmentation
from ..data.class_names import read_class_names
from ..data.digits import CLASSES
from ..data.images import load_split
from ..data.label_maps import read_palette
from ..data.segmentation_checks import LabelSurvey, check_classes, survey_maps
from ..models.configuration_pvt import label_fields
from ..recipes import SEGMENTATION_RECIPES, SegmentationRecipe, fit_segmentation_recipe
from ..training.arguments import TrainingOptions, build_training_arguments, override_recipe
from ..training.optimization import freeze_stages, images_per_step
from ..training.segmentation import SegmentationTrainer
from ..training.segmentation_arguments import (
    SEGMENTATION,
    SegmentationDataArguments,
    SegmentationModelArguments,
    SegmentationRecipeArguments,
)
from ..training.segmentation_losses import SegmentationLoss, balance_classes
from . import presets, shared
from .parser import parse_arguments


def parse(
    argv: Sequence[str] | None,
) -> tuple[tuple[Any, ...], PreTrainedConfig, SegmentationRecipe, TrainingArguments]:
    """The groups of arguments, the backbone's configuration, the recipe before it is fitted to the data, and the
    `TrainingArguments`."""
    groups = parse_arguments(SEGMENTATION, argv, "pvt-hf train-segmentation", __doc__, presets.SEGMENTATION)
    model_args, data_args, recipe_args, options = groups
    checkpoint = model_args.model_name_or_path or model_args.backbone_checkpoint
    backbone, model_args.variant = shared.read_backbone_config(checkpoint, model_args.variant)
    if model_args.model_name_or_path:
        shared.check_code(options, shared.read_config(model_args.model_name_or_path).model_type)
    else:
        shared.check_code(options, "upernet" if model_args.head == "upernet" else "pvt_hf_semantic_fpn")
    own_data = data_args.dataset_name or data_args.train_images
    recipe = SEGMENTATION_RECIPES[recipe_args.recipe or ("small_data" if own_data else "semantic_fpn_40k")]
    recipe = override_recipe(recipe, recipe_args)
    length = {"max_steps": recipe.steps} if options.num_train_epochs is None else {}
    return groups, backbone, recipe, build_training_arguments(options, recipe, **length)


def name_classes(data_args: SegmentationDataArguments, checkpoint: str | None) -> list[str]:
    """Of the file, or of the checkpoint that is fine-tuned, or of the bundled scenes."""
    if data_args.class_names:
        return read_class_names(data_args.class_names)
    if checkpoint:
        return list(shared.read_config(checkpoint).id2label.values())
    if data_args.binary_masks:
        return ["background", "foreground"]
    if data_args.dataset_name or data_args.train_images:
        raise SystemExit(
            "--class_names is missing: a JSON, YAML or text file of the names of the classes. Masks of 0 and 255 need "
            "--binary_masks instead"
        )
    return ["background", *CLASSES]


def load_splits(
    data_args: SegmentationDataArguments, args: TrainingArguments, names: list[str]
) -> list[data.SegmentationData]:
    """The training set and the validation set."""
    settings: dict[str, Any] = {
        "num_labels": len(names),
        "reduce_labels": data_args.reduce_labels,
        "binary_masks": data_args.binary_masks,
        "palette": read_palette(data_args.palette, names) if data_args.palette else None,
    }
    if data_args.dataset_name:
        name, config = data_args.dataset_name, data_args.dataset_config_name
        chosen = [data_args.train_split, data_args.eval_split][: 1 if data_args.train_val_split else 2]
        with args.main_process_first(desc="loading the data"):  # which are then in the cache of each machine
            rows = [load_split(name, split, name=config) for split in chosen]
        columns = data_args.map_column, data_args.image_column
        splits = [data.read_segmentation_dataset(split, *columns, **settings) for split in rows]
    else:
        folders = _list_folders(data_args, args)
        splits = [data.read_segmentation_folders(*pair, **settings) for pair in folders]
    if data_args.train_val_split is None:
        return splits
    return list(splits[0].split(data_args.train_val_split, args.seed))


def _list_folders(data_args: SegmentationDataArguments, args: TrainingArguments) -> list[tuple[Any, Any]]:
    """Of images and of maps: of both splits, or of one that will be split."""
    if data_args.train_images:
        pairs = [(data_args.train_images, data_args.train_maps), (data_args.eval_images, data_args.eval_maps)]
        return pairs[: 1 if data_args.train_val_split else 2]
    scenes = shared.draw_scenes(args, data_args.num_scenes)
    return [(scenes / split / "images", scenes / split / "maps") for split in ("train", "validation")]


def check_splits(
    data_args: SegmentationDataArguments, args: TrainingArguments, names: list[str]
) -> tuple[data.SegmentationData, data.SegmentationData, LabelSurvey, list[str]]:
    """The training set, the validation set, what the maps of the first hold, and what was left out of either; says what
    both have."""
    splits = zip(("the training set", "the validation set"), load_splits(data_args, args, names), strict=True)
    workers, skip_corrupt = args.dataloader_num_workers, data_args.skip_corrupt
    with args.main_process_first(desc="checking the data"):
        (train, found), (validation, expected) = (
            survey_maps(split, subject, workers, skip_corrupt) for subject, split in splits
        )
    check_classes(found, expected, names, data_args.allow_missing_classes)
    if args.process_index == 0:
        for subject, survey in (("training", found), ("validation", expected)):
            print(f"{len(survey.sizes)} {subject} images: {survey.describe(names)}")
    return train, validation, found, [*found.left_out, *expected.left_out]


def fit_run(
    recipe: SegmentationRecipe,
    survey: LabelSurvey,
    recipe_args: SegmentationRecipeArguments,
    options: TrainingOptions,
    args: TrainingArguments,
) -> SegmentationRecipe:
    """The recipe for the training set; `args` get its length, and evaluations and checkpoints ten times in it."""
    per_step = images_per_step(args)
    recipe = override_recipe(fit_segmentation_recipe(recipe, survey.sizes, per_step), recipe_args)
    if options.num_train_epochs is None and options.max_steps is None:
        args.max_steps = recipe.steps
    steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * len(survey.sizes) // per_step
    args.eval_steps = options.eval_steps or max(1, int(steps) // 10)
    args.save_steps = options.save_steps or max(1, int(steps) // 10)
    if recipe.epochs is not None and args.process_index == 0:
        print(f"{int(steps)} steps of {per_step} crops of {recipe.crop_size} x {recipe.crop_size} pixels")
    return recipe


def build_loss(recipe_args: SegmentationRecipeArguments, survey: LabelSurvey) -> SegmentationLoss | None:
    """`None` for the model's own."""
    weights, num_labels = recipe_args.class_weights, len(survey.pixels)
    if weights is None:
        return None if recipe_args.loss in (None, "cross_entropy") else SegmentationLoss(recipe_args.loss)
    values = balance_classes(survey.pixels) if weights == ["auto"] else [float(weight) for weight in weights]
    if len(values) != num_labels:
        raise SystemExit(f"--class_weights must be {num_labels} numbers, one for each class, got {len(values)}")
    return SegmentationLoss(recipe_args.loss or "cross_entropy", values)


def build_config(
    model_args: SegmentationModelArguments,
    backbone: PreTrainedConfig,
    recipe: SegmentationRecipe,
    names: list[str],
    loss: SegmentationLoss | None,
) -> PreTrainedConfig:
    """Of a new model. UperNet has an auxiliary head where its own loss trains it."""
    backbone.out_features = list(pvt_hf.SemanticFPNConfig.backbone_out_features)
    fields: dict[str, Any] = {"backbone_config": backbone} | label_fields(names)
    if model_args.head == "upernet":
        size = model_args.head_channels or 512
        return UperNetConfig(hidden_size=size, use_auxiliary_head=loss is None, **fields)
    channels = {"neck_channels": model_args.neck_channels, "head_channels": model_args.head_channels}
    fields |= {name: value for name, value in channels.items() if value is not None}
    return pvt_hf.SemanticFPNConfig(loss_normalization=recipe.loss_normalization, **fields)


def load_model(
    model_args: SegmentationModelArguments,
    backbone: PreTrainedConfig,
    recipe: SegmentationRecipe,
    names: list[str],
    loss: SegmentationLoss | None = None,
) -> PreTrainedModel:
    if checkpoint := model_args.model_name_or_path:
        config = AutoConfig.from_pretrained(checkpoint, **label_fields(names))
        (getattr(config, "backbone_config", None) or config).drop_path_rate = recipe.drop_path_rate
        if isinstance(config, pvt_hf.SemanticFPNConfig):
            config.loss_normalization = recipe.loss_normalization
        model = AutoModelForSemanticSegmentation.from_pretrained(
            checkpoint, config=config, ignore_mismatched_sizes=True
        )
    else:
        backbone.drop_path_rate = recipe.drop_path_rate
        model = AutoModelForSemanticSegmentation.from_config(build_config(model_args, backbone, recipe, names, loss))
        shared.load_backbone(model, model_args.backbone_checkpoint)
    freeze_stages(model, model_args.freeze_stages)
    return model


@shared.exit_on_bad_run()
def main(argv: Sequence[str] | None = None) -> int:
    (model_args, data_args, recipe_args, options), backbone, recipe, args = parse(argv)
    shared.check_resume(args)
    set_seed(args.seed)
    with shared.exit_on_bad_data():
        names = name_classes(data_args, model_args.model_name_or_path)
        train, validation, survey, left_out = check_splits(data_args, args, names)
    recipe, loss = fit_run(recipe, survey, recipe_args, options, args), build_loss(recipe_args, survey)
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
        model=load_model(model_args, backbone, recipe, names, loss),
        args=args,
        recipe=recipe,
        recipe_schedule=options.lr_scheduler_type is None,
        window=model_args.window,
        stride=model_args.stride,
        loss=loss,
        ema_decay=recipe_args.ema_decay,
        channels_last=model_args.channels_last,
        train_dataset=data.TrainingMaps(train, augment, data_args.skip_corrupt),
        eval_dataset=data.EvaluationMaps(validation, image_processor),
        processing_class=image_processor,
        dataset_name=data_args.dataset_name or data_args.train_images,
        dataset_title=options.dataset_title,
        left_out=left_out,
        initial_weights=model_args.model_name_or_path or model_args.backbone_checkpoint,
        license=options.license,
        with_code=options.with_code,
        settings={name: getattr(model_args, name) for name in ("variant", "backbone_checkpoint", "freeze_stages")}
        | ({"loss": loss.name, "class weights": loss.class_weights} if loss else {}),
    )
    trainer.train(args.resume_from_checkpoint, allow_batch_change=options.allow_batch_change)
    return shared.finish(trainer)


if __name__ == "__main__":
    sys.exit(main())
