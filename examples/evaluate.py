"""Measures checkpoints and prints a table: the paper's top-1, the measured one, and the difference.

    python conversion/convert.py --all converted
    accelerate launch examples/evaluate.py --variant all --checkpoint_root converted --dataset_name imagenet-1k
    python examples/evaluate.py --model_name_or_path runs/classification --dataset_name my_images --split test

The images are prepared by the checkpoint's own image processor (the papers': shorter edge 256, bicubic, crop 224),
and counted as in the official code. Several processes count every image once.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from pvt_hf import VARIANTS
from pvt_hf.data import EvaluationImages, collate, label_names, load_images
from pvt_hf.metrics import classification_metrics, classification_statistics


def evaluate(checkpoint: str, data, options: argparse.Namespace) -> dict[str, float]:
    """Top-1 and top-5 accuracy, in percent, and the number of images."""
    column, names = label_names(data, options.label_column)
    model = AutoModelForImageClassification.from_pretrained(checkpoint, dtype=torch.float32)
    if model.config.num_labels != len(names):
        raise SystemExit(
            f"{checkpoint} has {model.config.num_labels} classes and the data {len(names)}: {names[:5]} ..."
        )
    image_processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")  # exactly as torchvision on PIL
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output_dir,
            per_device_eval_batch_size=options.batch_size,
            dataloader_num_workers=options.num_workers,
            remove_unused_columns=False,
            bf16=options.bf16,
        ),
        data_collator=collate,
        preprocess_logits_for_metrics=classification_statistics,
        compute_metrics=classification_metrics,
    )
    metrics = trainer.evaluate(EvaluationImages(data, column, len(names), image_processor))
    percent = {"top1": 100 * metrics["eval_accuracy"], "top5": 100 * metrics["eval_top5_accuracy"]}
    return percent | {"images": metrics["eval_images"], "is_main": trainer.is_world_process_zero()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--variant", choices=["all", *VARIANTS])
    source.add_argument("--model_name_or_path", help="one checkpoint on the Hub or in a folder")
    parser.add_argument("--checkpoint_root", default="converted", type=Path, help="folder of `convert.py --all`")
    parser.add_argument("--dataset_name", help="on the Hub, a folder of images per class, parquet files; else digits")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--label_column")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output_dir", default="runs/evaluation", type=Path)
    parser.add_argument("--num_images", type=int, help="measure on the first ones only")
    options = parser.parse_args()

    if options.model_name_or_path:
        checkpoints = {options.model_name_or_path: None}
    else:
        names = list(VARIANTS) if options.variant == "all" else [options.variant]
        checkpoints = {str(options.checkpoint_root / name): VARIANTS[name].paper_top1 for name in names}
        if missing := [path for path in checkpoints if not Path(path).is_dir()]:
            raise SystemExit(
                f"Not there: {', '.join(missing)}. `python conversion/convert.py --all converted` makes them."
            )
    data = load_images(options.dataset_name, options.split, options.dataset_config_name)
    if options.num_images:
        data = data.select(range(min(options.num_images, len(data))))
    lines = ["| checkpoint | paper top-1 | measured top-1 | difference | top-5 | images |", "|--|--|--|--|--|--|"]
    results = {}
    for path, paper in checkpoints.items():
        measured = results[path] = evaluate(path, data, options)
        difference = (
            f"{paper} | {measured['top1']:.2f} | {measured['top1'] - paper:+.2f}"
            if paper
            else f"| {measured['top1']:.2f} |"
        )
        lines.append(f"| {path} | {difference} | {measured['top5']:.2f} | {measured['images']} |")
        if is_main := measured.pop("is_main"):  # after each checkpoint: all of them take hours
            options.output_dir.mkdir(parents=True, exist_ok=True)
            partial = options.output_dir / "results.json.partial"
            partial.write_text(json.dumps(results, indent=2))
            partial.replace(options.output_dir / "results.json")
    if is_main:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
