"""Trains PVT with the papers' ImageNet recipe, on one process or many. Every argument of TrainingArguments works too.

    accelerate launch examples/train_classification.py --variant pvt_small --dataset_name imagenet-1k   # a table row
    python examples/train_classification.py --smoke --output_dir runs/smoke        # all of it in a minute, offline
    python examples/train_classification.py --dataset_name my_images --model_name_or_path converted/pvt_v2_b2 \\
        --num_train_epochs 30 --learning_rate 1e-4 --layer_decay 0.8 --freeze_stages 1
    accelerate launch examples/train_classification.py --variant pvt_v2_b2 --streaming --dataset_name 'train/*.tar' \\
        --eval_dataset_name 'val/*.tar' --samples_per_epoch 1281167 --num_labels 1000
    python examples/train_classification.py --output_dir runs/x --resume_from_checkpoint true ...      # goes on exactly

`--dataset_name` is a data set of the Hub, a folder of images per class, or parquet files or WebDataset shards.
"""

import argparse
import dataclasses
from pathlib import Path

from transformers import AutoConfig, AutoModelForImageClassification, TrainingArguments, set_seed

import pvt_hf
from pvt_hf.data.augmentation import build_training_transform
from pvt_hf.data.classification import (
    EvaluationImages,
    StreamedImages,
    TrainingImages,
    cache_stream,
    count_images,
    find_labels,
    load_images,
)
from pvt_hf.recipes import imagenet_recipe
from pvt_hf.training.arguments import parse, training_arguments, training_parser
from pvt_hf.training.classification import ImageClassificationTrainer
from pvt_hf.training.optimization import freeze_stages
from pvt_hf.variants import find_variant

SMOKE = {"image_size": 32, "num_train_epochs": 2, "per_device_train_batch_size": 32, "learning_rate": 2e-4}
SMOKE |= {"warmup_epochs": 0, "repeats": 1, "mixup": 0.0, "cutmix": 0.0, "drop_path_rate": 0.0, "fp16": False}
SMOKE |= {"dataloader_num_workers": 0, "logging_steps": 5}


def parse_arguments() -> tuple[argparse.Namespace, TrainingArguments]:
    parser = training_parser(
        __doc__, output_dir="runs/classification", num_train_epochs=300, per_device_train_batch_size=128,
        per_device_eval_batch_size=192, dataloader_num_workers=10,
    )  # fmt: skip
    parser.add_argument("--variant", choices=list(pvt_hf.VARIANTS), help="from random weights; pvt_v2_b0 if missing")
    parser.add_argument("--eval_dataset_name", help="where --dataset_name is a pattern of files: those for evaluation")
    parser.add_argument("--train_val_split", type=float, help="hold this part of the training split out, as 0.15")
    parser.add_argument("--label_column", help="found if there is only one of class labels")
    parser.add_argument("--num_labels", type=int, help="for streamed labels without names")
    parser.add_argument("--streaming", action="store_true", help="read images when they are needed")
    parser.add_argument("--samples_per_epoch", type=int, help="for a stream that does not know its length")
    parser.add_argument("--shuffle_buffer", type=int, default=10_000, help="images of a stream each process shuffles")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--layer_decay", type=float, default=1.0, help="of the learning rate per block, in fine-tuning")
    parser.add_argument("--lora_rank", type=int, help="train LoRA adapters of query, key and value instead (peft)")
    for name in ("warmup_epochs", "repeats"):
        parser.add_argument(f"--{name}", type=int, help="official if missing")
    for name in ("mixup", "cutmix", "label_smoothing", "random_erasing", "drop_path_rate"):
        parser.add_argument(f"--{name}", type=float, help="official if missing")
    options = parse(parser, SMOKE)
    if options.model_name_or_path:
        found = find_variant(AutoConfig.from_pretrained(options.model_name_or_path))
        if options.variant and (found is None or found.name != options.variant):
            raise SystemExit(f"--model_name_or_path {options.model_name_or_path} is not a {options.variant}")
        options.variant = found.name if found else None
    else:
        options.variant = options.variant or "pvt_v2_b0"
    if options.lora_rank and not options.model_name_or_path:
        raise SystemExit("--lora_rank adapts a trained model: pass --model_name_or_path")
    recipe = imagenet_recipe(options.variant or "pvt_v2_b0")
    given = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(recipe)}
    given = {name: value for name, value in given.items() if value is not None and name != "learning_rate"}
    options.recipe = recipe = dataclasses.replace(recipe, **given)
    return options, training_arguments(options, recipe, fp16=True)


def load_model(options: argparse.Namespace, names: list[str]):
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    labels["drop_path_rate"] = options.recipe.drop_path_rate
    if options.model_name_or_path:
        model = AutoModelForImageClassification.from_pretrained(
            options.model_name_or_path, ignore_mismatched_sizes=True, **labels
        )
    else:
        config = pvt_hf.build_config(options.variant, image_size=options.image_size, **labels)
        model = AutoModelForImageClassification.from_config(config)
    if options.lora_rank:
        from peft import LoraConfig, get_peft_model

        targets = {"target_modules": ["query", "key", "value"], "modules_to_save": ["classifier"]}
        model = get_peft_model(model, LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank, **targets))
    freeze_stages(model, options.freeze_stages)
    return model


def load_splits(options: argparse.Namespace, args: TrainingArguments):
    """The images to train on, perhaps a stream, and those to evaluate on."""
    config = options.dataset_config_name
    train = load_images(options.dataset_name, options.train_split, config, options.streaming)
    if options.train_val_split:
        if options.streaming:
            raise SystemExit("--train_val_split needs all the images: leave --streaming out")
        halves = train.train_test_split(options.train_val_split, seed=args.seed)
        return halves["train"], halves["test"]
    source = options.eval_dataset_name or options.dataset_name
    if not options.streaming:
        return train, load_images(source, options.eval_split, config)
    with args.main_process_first(desc="writing the images for evaluation to the cache"):
        return train, cache_stream(load_images(source, options.eval_split, config, streaming=True))


def main() -> None:
    options, args = parse_arguments()
    if (options.dataset_name or "").endswith((".parquet", ".tar")) and not options.eval_dataset_name:
        raise SystemExit("--dataset_name is a pattern of files: pass --eval_dataset_name with those for evaluation")
    set_seed(args.seed)
    train, validation = load_splits(options, args)
    column, names = find_labels(train, options.label_column, options.num_labels)
    model = load_model(options, names)
    common = (column, len(names), build_training_transform(options.recipe, options.image_size))
    if options.streaming:
        length = options.samples_per_epoch or count_images(train, options.train_split)
        if length is None:
            raise SystemExit("The stream does not say how many images it has: pass --samples_per_epoch")
        share = {"seed": args.seed, "rank": args.process_index, "world_size": args.world_size}
        share |= {"buffer_size": options.shuffle_buffer // max(1, args.dataloader_num_workers)}
        share |= {"skip_corrupt": options.skip_corrupt}
        data = StreamedImages(train, *common, samples_per_epoch=length, **share)
    else:
        data = TrainingImages(train, *common, skip_corrupt=options.skip_corrupt)
    image_processor = pvt_hf.PvtImageProcessorPil(crop_size=options.image_size)
    trainer = ImageClassificationTrainer(
        model=model,
        args=args,
        recipe=options.recipe,
        official_schedule=options.lr_scheduler_type is None,
        layer_decay=options.layer_decay,
        ema_decay=options.ema_decay,
        channels_last=options.channels_last,
        train_dataset=data,
        eval_dataset=EvaluationImages(validation, column, len(names), image_processor),
        processing_class=image_processor,
        dataset_name=options.dataset_name,
        initial_weights=options.model_name_or_path,
        settings={key: getattr(options, key) for key in ("variant", "image_size", "freeze_stages", "lora_rank")},
    )
    trainer.train(args.resume_from_checkpoint)
    if options.lora_rank:  # the adapter for itself, and the whole model with it for everybody
        trainer.save_model(Path(args.output_dir) / "adapter")
        trainer.model = trainer.model_wrapped = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    summary = trainer.finish()
    if trainer.is_world_process_zero():
        print(summary)


if __name__ == "__main__":
    main()
