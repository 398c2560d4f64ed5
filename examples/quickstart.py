"""Fine-tunes PVT on images, saves it, loads it back as a stranger would, and draws what it predicts.

    python examples/quickstart.py                                    # PVT v2-B0 on scikit-learn's digits, offline
    python examples/quickstart.py --data_dir my_images --variant pvt_small
    python examples/quickstart.py --data_dir my_images --model_name_or_path OpenGVLab/pvt_v2_b2

`my_images` holds one folder of images per class, or a folder `train` and a folder `validation` of such folders.
"""

import argparse
from pathlib import Path

import datasets
import matplotlib
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

import pvt_hf
from pvt_hf.data.digits import load_digits_dataset

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend is chosen first)


def load_splits(data_dir: str | None) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and validation images. Where the data has no validation split, a fifth of each class becomes one."""
    data = datasets.load_dataset("imagefolder", data_dir=data_dir) if data_dir else {"train": load_digits_dataset()}
    validation = next((data[split] for split in ("validation", "test") if split in data), None)
    if validation is not None:
        return data["train"], validation
    splits = data["train"].train_test_split(0.2, stratify_by_column="label", seed=0)
    return splits["train"], splits["test"]


def load_model(args: argparse.Namespace, names: list[str]):
    """A checkpoint with a new classifier, or a variant from random weights; and its image processor."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
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
    figure = plt.figure(figsize=(12, 8), layout="constrained")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="pvt_v2_b0", choices=list(pvt_hf.VARIANTS))
    parser.add_argument("--model_name_or_path", help="a checkpoint on the Hub or in a folder, instead of --variant")
    parser.add_argument("--data_dir", help="an image folder, instead of the digits")
    parser.add_argument("--output_dir", default="runs/quickstart", type=Path)
    parser.add_argument("--image_size", type=int, help="pixels: 64 for digits, 224 for a folder, or a checkpoint's own")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning_rate", type=float, help="1e-4 for a checkpoint, 1e-3 for random weights")
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args()

    set_seed(0)
    train, validation = load_splits(args.data_dir)
    names = train.features["label"].names
    model, image_processor = load_model(args, names)

    def transform(batch: dict) -> dict:
        return image_processor(batch["image"], return_tensors="pt") | {"labels": torch.tensor(batch["label"])}

    trainer = Trainer(
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
        compute_metrics=lambda output: {"accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())},
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(args.output_dir)

    classifier = pipeline("image-classification", model=str(args.output_dir), top_k=1)
    shown = validation.shuffle(seed=0).select(range(min(24, len(validation))))
    predictions = [best for (best,) in classifier(list(shown["image"]))]
    truths = [names[label] for label in shown["label"]]
    picture = args.output_dir / "predictions.png"
    draw(picture, list(shown["image"]), truths, predictions, trainer.state.log_history, accuracy)
    right = sum(best["label"] == truth for best, truth in zip(predictions, truths, strict=True))
    print(f"validation accuracy {accuracy:.4f}; {right} of {len(truths)} right through the reloaded pipeline")
    print(f"model, image processor and {picture.name} are in {args.output_dir}")


if __name__ == "__main__":
    main()
