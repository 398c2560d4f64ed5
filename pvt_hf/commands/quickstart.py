"""Fine-tunes PVT on images, saves it, loads it back as a stranger would, and draws what it predicts.

    pvt-hf quickstart                                                # PVT v2-B0 on scikit-learn's digits, offline
    pvt-hf quickstart --data_dir my_images --variant pvt_small
    pvt-hf quickstart --data_dir my_images --model_name_or_path OpenGVLab/pvt_v2_b2

`my_images` holds one folder of images per class, or a folder `train` and a folder `validation` of such folders. The
program is one to read: it uses `Trainer` and `pipeline` of transformers as any other does.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from matplotlib.figure import Figure
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

import pvt_hf

from ..data.digits import load_digits_dataset
from ..models.configuration_pvt import label_fields
from ..training.report import RunFacts, check_license, training_card
from ..writing.files import atomic_file, why_unwritable
from . import shared


def load_splits(data_dir: str | None) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and validation images. Where the data has no validation split, a fifth of each class becomes one."""
    try:
        data = datasets.load_dataset("imagefolder", data_dir=data_dir) if data_dir else {"train": load_digits_dataset()}
    except (FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--data_dir {data_dir} cannot be read: {error}") from error
    if "train" not in data or "label" not in data["train"].features:
        raise ValueError(f"--data_dir must have a folder of images for each class, and {data_dir} has not")
    validation = next((data[split] for split in ("validation", "test") if split in data), None)
    if validation is not None:
        return data["train"], validation
    splits = data["train"].train_test_split(0.2, stratify_by_column="label", seed=0)
    return splits["train"], splits["test"]


def load_model(args: argparse.Namespace, names: list[str]) -> tuple[PreTrainedModel, Any]:
    """A checkpoint with a new classifier, or a variant from random weights; and its image processor."""
    labels = label_fields(names)
    if args.model_name_or_path:
        model = AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path, ignore_mismatched_sizes=True, **labels
        )
        size = {"crop_size": args.image_size} if args.image_size else {}
        return model, AutoImageProcessor.from_pretrained(args.model_name_or_path, **size)
    side = args.image_size or (224 if args.data_dir else 64)
    # The digits fill their images: nothing of them may be cropped away.
    size = {"crop_size": side} if args.data_dir else {"size": {"height": side, "width": side}}
    config = pvt_hf.build_config(args.variant, image_size=side, drop_path_rate=0.05, **labels)
    return AutoModelForImageClassification.from_config(config), pvt_hf.PvtImageProcessor(**size)


def draw(
    path: Path, images: list, truths: list[str], predictions: list[dict], log: list[dict], accuracy: float
) -> None:
    """Validation images with their predictions (red where wrong), above the training curve."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 2))
    axes = top.subplots(3, 8).ravel()
    for axis, image, truth, best in zip(axes, images, truths, predictions, strict=False):
        axis.imshow(image.convert("RGB"))
        axis.set_title(f"{best['label']}  {best['score']:.2f}", color="green" if best["label"] == truth else "red")
    for axis in axes:
        axis.axis("off")
    loss_axis = bottom.subplots()
    accuracy_axis = loss_axis.twinx()
    for axis, key, color, name in (
        (loss_axis, "loss", "tab:blue", "training loss"),
        (accuracy_axis, "eval_accuracy", "tab:orange", "validation accuracy"),
    ):
        points = [(entry["epoch"], entry[key]) for entry in log if key in entry]
        axis.plot(*zip(*points, strict=True), color=color)
        axis.set_ylabel(name, color=color)
    loss_axis.set_xlabel("epoch")
    figure.suptitle(f"validation accuracy {accuracy:.3f}")
    figure.savefig(path, dpi=100)


def build_trainer(
    args: argparse.Namespace,
    model: PreTrainedModel,
    image_processor: Any,
    train: datasets.Dataset,
    validation: datasets.Dataset,
) -> Trainer:
    def transform(batch: dict) -> dict:
        return image_processor(batch["image"], return_tensors="pt") | {"labels": torch.tensor(batch["label"])}

    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=2 * args.batch_size,
            learning_rate=args.learning_rate or (1e-4 if args.model_name_or_path else 1e-3),
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.05,
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="no",
            remove_unused_columns=False,
            report_to="none",
        ),
        train_dataset=train.with_transform(transform),
        eval_dataset=validation.with_transform(transform),
        processing_class=image_processor,
        compute_metrics=lambda output: {
            "accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean()),
            "images": len(output.label_ids),
        },
    )


def write_card(args: argparse.Namespace, trainer: Trainer) -> None:
    """What was trained, on what, and what was measured, with the picture; and how to load it."""
    settings = {"epochs": args.epochs, "learning_rate": trainer.args.learning_rate, "images per step": args.batch_size}
    facts = RunFacts(
        name=args.output_dir.resolve().name,
        task="image-classification",
        dataset=args.data_dir,
        initial_weights=args.model_name_or_path,
        license=args.license,
        settings=settings | {"weight decay": 0.05, "schedule": "cosine, after a tenth of warm-up"},
    )
    log, pictures = trainer.state.log_history, ("predictions.png",)
    card = training_card(facts, trainer.model.config, log, {"accuracy": "accuracy"}, pictures)
    with atomic_file(args.output_dir / "README.md") as path:
        card.save(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pvt-hf quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="pvt_v2_b0", choices=list(pvt_hf.VARIANTS), help="default: pvt_v2_b0")
    parser.add_argument("--model_name_or_path", help="a checkpoint on the Hub or in a folder, instead of --variant")
    parser.add_argument("--data_dir", help="an image folder, instead of the digits")
    parser.add_argument("--output_dir", default="runs/quickstart", type=Path, help="default: runs/quickstart")
    parser.add_argument("--image_size", type=int, help="pixels: 64 for digits, 224 for a folder, or a checkpoint's own")
    parser.add_argument("--epochs", type=int, default=10, help="default: 10")
    parser.add_argument("--learning_rate", type=float, help="1e-4 for a checkpoint, 1e-3 for random weights")
    parser.add_argument("--batch_size", type=int, default=32, help="images per step (default: 32)")
    parser.add_argument("--license", help="licence of the weights in the model card, as the Hub writes it: apache-2.0")
    args = parser.parse_args(argv)
    if reason := why_unwritable(args.output_dir):
        parser.error(f"--output_dir {args.output_dir} cannot be written: {reason}")
    try:
        check_license(args.license)
    except ValueError as error:
        parser.error(str(error))
    if args.model_name_or_path:
        shared.read_config(args.model_name_or_path)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    set_seed(0)
    with shared.exit_on_bad_data():
        train, validation = load_splits(args.data_dir)
    names = train.features["label"].names
    model, image_processor = load_model(args, names)
    trainer = build_trainer(args, model, image_processor, train, validation)
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(args.output_dir)

    classifier = pipeline("image-classification", model=str(args.output_dir), top_k=1)
    shown = validation.shuffle(seed=0).select(range(min(24, len(validation))))
    predictions = [best for (best,) in classifier(list(shown["image"]))]
    truths = [names[label] for label in shown["label"]]
    picture = args.output_dir / "predictions.png"
    draw(picture, list(shown["image"]), truths, predictions, trainer.state.log_history, accuracy)
    write_card(args, trainer)
    right = sum(best["label"] == truth for best, truth in zip(predictions, truths, strict=True))
    print(f"validation accuracy {accuracy:.4f}; {right} of {len(truths)} right through the reloaded pipeline")
    print(f"model, image processor, card and {picture.name} are in {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
