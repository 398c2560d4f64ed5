"""What the command lines of all training programs share: the fields of `TrainingArguments`, and the official values."""

import argparse
import os
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from .optimization import images_per_step
from .run_checkpoints import last_complete_checkpoint

# Of all programs, where `TrainingArguments` has others. What is None is decided by the recipe.
_DEFAULTS = {
    "learning_rate": None,
    "weight_decay": None,
    "max_grad_norm": None,
    "lr_scheduler_type": None,
    "fp16": None,
    "seed": 0,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 50,
}


def training_parser(description: str, **defaults: Any) -> HfArgumentParser:
    """A parser of all fields of `TrainingArguments` and of what every training program has beside them.

    Args:
        description: The text above the list of arguments, as it is.
        **defaults: Of the program, for example `output_dir`.
    """
    parser = HfArgumentParser(
        TrainingArguments,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="everything on bundled data in under a minute")
    parser.add_argument("--model_name_or_path", help="a checkpoint of this task to fine-tune")
    parser.add_argument("--dataset_name")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--eval_split", default="validation")
    parser.add_argument("--skip_corrupt", action="store_true", help="leave corrupt images out and count them")
    parser.add_argument("--ema_decay", type=float, help="average the weights, for example 0.9999; officially not")
    parser.add_argument("--freeze_stages", type=int, default=0, help="of the backbone, from the image on")
    parser.add_argument("--channels_last", action="store_true")
    parser.set_defaults(**_DEFAULTS, dataloader_pin_memory=torch.cuda.is_available())
    parser.set_defaults(**defaults)
    return parser


def parse(parser: HfArgumentParser, smoke: dict[str, Any]) -> argparse.Namespace:
    """The command line; with `--smoke` the defaults are those of `smoke`."""
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(**smoke)
    return parser.parse_args()


def training_arguments(options: argparse.Namespace, recipe: Any, **official: Any) -> TrainingArguments:
    """The `TrainingArguments` among the options. What the command line left open is as in the recipe.

    Args:
        options: From [`parse`].
        recipe: One of [`~pvt_hf.recipes`]: weight decay, clipping, and the learning rate for its number of images per
            step, with which the real one grows.
        **official: Values for other fields that are `None`, for example `num_train_epochs=12`. An official `fp16` holds
            where there is a GPU and the user chose no other precision, here or for accelerate.

    Raises:
        SystemExit: If `output_dir` has checkpoints, and `resume_from_checkpoint` does not say what to do with them.
    """
    fields = TrainingArguments.__dataclass_fields__
    given = {key: value for key, value in vars(options).items() if key in fields and value is not None}
    elsewhere = options.bf16 or options.use_cpu or "ACCELERATE_MIXED_PRECISION" in os.environ
    official |= {"fp16": official.get("fp16", False) and torch.cuda.is_available() and not elsewhere}
    official |= {"weight_decay": recipe.weight_decay, "max_grad_norm": recipe.max_grad_norm}
    args = TrainingArguments(**official | given)
    if str(args.resume_from_checkpoint).lower() in ("true", "false"):
        args.resume_from_checkpoint = args.resume_from_checkpoint.lower() == "true"
    if not args.resume_from_checkpoint and last_complete_checkpoint(args.output_dir):
        raise SystemExit(f"{args.output_dir} has checkpoints: --resume_from_checkpoint true goes on from them")
    if options.learning_rate is None:
        args.learning_rate = recipe.learning_rate * images_per_step(args) / recipe.reference_batch_size
    return args
