"""A small run of the trainer on digits, in this process or in others: `python classification_run.py DIR SETTINGS`."""

import json
import os
import sys
import time

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import AutoModelForImageClassification, TrainingArguments, set_seed

from pvt_hf.data.augmentation import build_training_transform
from pvt_hf.data.classification import EvaluationImages, TrainingImages, load_images
from pvt_hf.recipes import ImageNetRecipe
from pvt_hf.training.classification import ImageClassificationTrainer
from tests.support.small_models import small_config

PLAIN = {"mixup": 0.0, "cutmix": 0.0, "repeats": 1, "warmup_epochs": 0, "random_erasing": 0.0, "auto_augment": None}


def square(image):
    """For evaluation: digits fill their images."""
    image = image.resize((32, 32))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 32, 32, 3).permute(0, 3, 1, 2)
    return pixels / 255


class Processor:
    def __call__(self, image, return_tensors):
        return type("Features", (), {"pixel_values": square(image)})


def build(output_dir, *, version="v2", images=64, evaluation=13, model=None, recipe=None, trainer=None, **arguments):
    """The trainer of a run with 8 batches of 8 images in an epoch."""
    set_seed(0)
    options = {"drop_path_rate": 0.0, "num_labels": 10} | (model or {})
    network = AutoModelForImageClassification.from_config(small_config(version, **options))
    recipe = ImageNetRecipe(**(PLAIN | (recipe or {})))
    train, validation = (load_images(None, split) for split in ("train", "validation"))
    arguments = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    } | arguments
    return ImageClassificationTrainer(
        model=network,
        args=TrainingArguments(output_dir=str(output_dir), **arguments),
        recipe=recipe,
        train_dataset=TrainingImages(train.select(range(images)), "label", 10, build_training_transform(recipe, 32)),
        eval_dataset=EvaluationImages(validation.select(range(evaluation)), "label", 10, Processor()),
        **(trainer or {}),
    )


SHARDED = {
    "fsdp": True,
    "fsdp_config": {
        "fsdp_version": 2,
        "transformer_layer_cls_to_wrap": ["PvtV2BlockLayer"],
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,
    },
}


def shard_on_cpus() -> None:
    """accelerate shards on accelerators only; torch's FSDP2 itself works on CPUs too."""
    start = PartialState.__init__

    def start_as_if_on_gpus(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start_as_if_on_gpus


def main(output_dir: str, settings: dict) -> None:
    """A run whose losses and metrics are in `result.json` afterwards."""
    settings = dict(settings)
    resume, slow = settings.pop("resume", None), settings.pop("slow", 0)
    if settings.pop("sharded", False):
        shard_on_cpus()
        settings |= SHARDED
    trainer = build(output_dir, **settings)
    mixed = trainer.mix
    # What this process draws for its first batch.
    trainer.mix = lambda *batch: (draws.append(torch.initial_seed()), mixed(*batch))[1]
    draws = []
    step = trainer.training_step
    if slow:  # so that there is time to be killed
        trainer.training_step = lambda *args: (time.sleep(slow), step(*args))[1]
    trainer.train(resume)
    metrics = trainer.evaluate()
    trainer.save_model()
    with open(os.path.join(output_dir, f"seed-{trainer.args.process_index}.json"), "w") as file:
        json.dump(draws[0], file)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        with open(os.path.join(output_dir, "result.json"), "w") as file:
            json.dump({"losses": losses, "metrics": metrics}, file)
        if trainer.ema is not None:
            torch.save(trainer.ema.module.state_dict(), os.path.join(output_dir, "ema.pt"))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], json.loads(sys.argv[2]))
