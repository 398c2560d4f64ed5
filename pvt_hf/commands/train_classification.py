"""Trains PVT with the papers' ImageNet recipe, on one process or many. Every argument of TrainingArguments works too.

    accelerate launch -m pvt_hf.commands.train_classification --variant pvt_small --dataset_name imagenet-1k
    pvt-hf train-classification --smoke --output_dir runs/smoke                     # all of it in a minute, offline
    pvt-hf train-classification arguments.yaml --learning_rate 1e-4                 # a file of options, and others
    pvt-hf train-classification --dataset_name my_images --model_name_or_path converted/pvt_v2_b2 \\
        --num_train_epochs 30 --learning_rate 1e-4 --layer_decay 0.8 --freeze_stages 1
    pvt-hf train-classification --variant pvt_v2_b2 --streaming --dataset_name 'train/*.tar' \\
        --eval_dataset_name 'val/*.tar' --samples_per_epoch 1281167 --num_labels 1000
    pvt-hf train-classification --output_dir runs/x --resume_from_checkpoint true ...       # as if never interrupted

The first is a row of the papers' table. `--dataset_name` is a data set of the Hub, a folder of images per class, or a
pattern of parquet files or WebDataset shards.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, PreTrainedModel, TrainingArguments, set_seed

import pvt_hf

from ..data import classification as images
from ..data.augmentation import build_training_transform
from ..data.class_names import match_class_names, read_class_names
from ..models.configuration_pvt import label_fields
from ..recipes import ImageNetRecipe, imagenet_recipe
from ..training.arguments import (
    CLASSIFICATION,
    ClassificationDataArguments,
    ClassificationModelArguments,
    build_training_arguments,
    override_recipe,
)
from ..training.classification import ImageClassificationTrainer
from ..training.optimization import freeze_stages
from . import presets, shared
from .parser import parse_arguments

Images: TypeAlias = "datasets.Dataset | datasets.IterableDataset"


def parse(argv: Sequence[str] | None) -> tuple[tuple[Any, ...], ImageNetRecipe, TrainingArguments]:
    """The groups of arguments, the recipe, and the `TrainingArguments`."""
    groups = parse_arguments(CLASSIFICATION, argv, "pvt-hf train-classification", __doc__, presets.CLASSIFICATION)
    model_args, data_args, recipe_args, options = groups
    backbone, model_args.variant = shared.read_backbone_config(model_args.model_name_or_path, model_args.variant)
    shared.check_code(options, backbone.model_type)
    recipe = override_recipe(imagenet_recipe(model_args.variant or shared.DEFAULT_VARIANT), recipe_args)
    return groups, recipe, build_training_arguments(options, recipe, num_train_epochs=recipe.epochs, fp16=True)


def load_model(model_args: ClassificationModelArguments, recipe: ImageNetRecipe, names: list[str]) -> PreTrainedModel:
    fields = label_fields(names) | {"drop_path_rate": recipe.drop_path_rate}
    if model_args.model_name_or_path:
        model = AutoModelForImageClassification.from_pretrained(
            model_args.model_name_or_path, ignore_mismatched_sizes=True, **fields
        )
    else:
        config = pvt_hf.build_config(
            model_args.variant or shared.DEFAULT_VARIANT, image_size=model_args.image_size, **fields
        )
        model = AutoModelForImageClassification.from_config(config)
    if rank := model_args.lora_rank:
        from peft import LoraConfig, get_peft_model

        layers = ["query", "key", "value"]
        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, modules_to_save=["classifier"])
        model = get_peft_model(model, adapter)
    freeze_stages(model, model_args.freeze_stages)
    return model


def load_splits(data_args: ClassificationDataArguments, args: TrainingArguments) -> tuple[Images, datasets.Dataset]:
    """The training set, perhaps a stream, and the validation set."""
    config, source = data_args.dataset_config_name, data_args.eval_dataset_name or data_args.dataset_name
    image_column = data_args.image_column
    train = images.load_images(
        data_args.dataset_name, data_args.train_split, config, data_args.streaming, image_column=image_column
    )
    train = images.encode_names(train, data_args.label_column)
    if data_args.train_val_split:
        parts = train.train_test_split(data_args.train_val_split, seed=args.seed)
        return parts["train"], parts["test"]
    if not data_args.streaming:
        validation = images.load_images(source, data_args.eval_split, config, image_column=image_column)
        return train, images.encode_names(validation, data_args.label_column)
    stream = images.load_images(source, data_args.eval_split, config, streaming=True, image_column=image_column)
    return train, images.cache_stream(stream)


def match_labels(
    rows: Images, classes: tuple[str, list[str]], owners: tuple[str, str] = ("The training set", "the validation set")
) -> tuple[list[str], list[int]]:
    """The classes of these images, and which of the given ones each of them is. They may lack some."""
    column, names = classes
    if not isinstance(rows.features.get(column), datasets.ClassLabel):
        images.find_labels(rows, column, len(names))
        return names, list(range(len(names)))
    found = rows.features[column].names
    return found, match_class_names(names, found, owners, subset=True)


def name_classes(
    train: Images, data_args: ClassificationDataArguments, args: TrainingArguments
) -> tuple[tuple[str, list[str]], tuple[list[str], list[int]]]:
    """The column of labels and the classes, those of `--class_names` or of the training set; and the classes of that,
    see [`match_labels`]."""
    given = read_class_names(data_args.class_names) if data_args.class_names else None
    column, names = images.find_labels(train, data_args.label_column, data_args.num_labels, given)
    classes = column, given or names
    found, places = match_labels(train, classes, (str(data_args.class_names), "the training set"))
    missing = [name for label, name in enumerate(classes[1]) if label not in places]
    if missing and args.process_index == 0:
        print(f"the training set has none of the classes {missing}")
    return classes, (found, places)


def check_splits(
    train: Images,
    validation: datasets.Dataset,
    classes: tuple[str, list[str]],
    found: list[str],
    data_args: ClassificationDataArguments,
    args: TrainingArguments,
) -> tuple[Images, datasets.Dataset, list[str]]:
    """All that can be known about the images is checked and printed, of a stream nothing. Also the problems of what is
    left out. `classes` are of the training set, with its column of labels, `found` of the validation set."""
    column, names = classes
    options = data_args.skip_corrupt, args.dataloader_num_workers
    left_out: list[str] = []
    with args.main_process_first(desc="checking the data"):
        if not data_args.streaming:
            train, problems = images.check_images_and_labels(train, column, len(names), "the training set", *options)
            left_out += problems
        validation, problems = images.check_images_and_labels(
            validation, column, len(found), "the validation set", *options
        )
    if args.process_index == 0:
        if not data_args.streaming:
            print(f"the training set: {images.summarize_labels(train, column, names)}")
        print(f"the validation set: {images.summarize_labels(validation, column, found)}")
    return train, validation, [*left_out, *problems]


def build_training_set(
    rows: Images,
    column: str,
    places: Sequence[int],
    transform: Callable,
    data_args: ClassificationDataArguments,
    args: TrainingArguments,
) -> Dataset:
    """The augmented images: of a stream, those of this process. `places` has the model's label of each of theirs."""
    options: dict[str, Any] = {"skip_corrupt": data_args.skip_corrupt, "places": places}
    if not data_args.streaming:
        return images.TrainingImages(rows, column, len(places), transform, **options)
    length = data_args.samples_per_epoch or images.count_images(rows, data_args.train_split)
    if length is None:
        raise SystemExit("The stream does not say how many images it has: pass --samples_per_epoch")
    return images.StreamedImages(
        rows,
        column,
        len(places),
        transform,
        samples_per_epoch=length,
        seed=args.seed,
        rank=args.process_index,
        world_size=args.world_size,
        buffer_size=-(-data_args.shuffle_buffer // max(1, args.dataloader_num_workers)),
        **options,
    )


@shared.exit_on_bad_run()
def main(argv: Sequence[str] | None = None) -> int:
    (model_args, data_args, recipe_args, options), recipe, args = parse(argv)
    shared.check_resume(args, recipe)
    set_seed(args.seed)
    with shared.exit_on_bad_data():
        with args.main_process_first(desc="loading the data"):  # which are then in the cache of each machine
            train, validation = load_splits(data_args, args)
        (column, names), (trained, trained_places) = name_classes(train, data_args, args)
        found, places = match_labels(validation, (column, names))
        train, validation, left_out = check_splits(train, validation, (column, trained), found, data_args, args)
    image_processor = pvt_hf.PvtImageProcessorPil(crop_size=model_args.image_size)
    transform = build_training_transform(recipe, model_args.image_size)
    trainer = ImageClassificationTrainer(
        model=load_model(model_args, recipe, names),
        args=args,
        recipe=recipe,
        recipe_schedule=options.lr_scheduler_type is None,
        layer_decay=recipe_args.layer_decay,
        ema_decay=recipe_args.ema_decay,
        channels_last=model_args.channels_last,
        train_dataset=build_training_set(train, column, trained_places, transform, data_args, args),
        eval_dataset=images.EvaluationImages(validation, column, len(found), image_processor, places),
        left_out=left_out,
        processing_class=image_processor,
        dataset_name=data_args.dataset_name,
        dataset_title=options.dataset_title,
        initial_weights=model_args.model_name_or_path,
        license=options.license,
        with_code=options.with_code,
        settings={name: getattr(model_args, name) for name in ("variant", "image_size", "freeze_stages", "lora_rank")},
    )
    trainer.train(args.resume_from_checkpoint, allow_batch_change=options.allow_batch_change)
    if model_args.lora_rank:  # the adapter for itself, and the complete model with it for everybody
        trainer.save_model(adapter := Path(args.output_dir) / "adapter")
        (adapter / "README.md").unlink(missing_ok=True)  # peft's, with gaps to fill in and paths of this machine
        trainer.model = trainer.model_wrapped = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    return shared.finish(trainer)


if __name__ == "__main__":
    sys.exit(main())
