"""A small run of the classifiers' trainer on digits, in this process (`build`) or in others (`main`)."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import AutoModelForImageClassification, TrainingArguments, set_seed

from pvt_hf.data.augmentation import build_training_transform
from pvt_hf.data.classification import EvaluationImages, StreamedImages, TrainingImages, load_images
from pvt_hf.recipes import ImageNetRecipe
from pvt_hf.training import run_checkpoints
from pvt_hf.training.classification import ImageClassificationTrainer
from tests.support.preempted import train_until
from tests.support.small_models import small_config
from tests.support.training_processes import pause_after, write_result

PLAIN = {"mixup": 0.0, "cutmix": 0.0, "repeats": 1, "warmup_epochs": 0, "random_erasing": 0.0, "auto_augment": None}


def square(image):
    """For evaluation: digits fill their images."""
    image = image.resize((32, 32))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 32, 32, 3).permute(0, 3, 1, 2)
    return pixels / 255


class Processor:
    def __call__(self, image, return_tensors):
        return type("Features", (), {"pixel_values": square(image)})


@functools.cache
def load_split(split: str):
    """The bundled images, which are encoded for it."""
    return load_images(None, split)


def build(
    output_dir,
    *,
    version="v2",
    images=64,
    streaming=False,
    evaluation=13,
    model=None,
    recipe=None,
    trainer=None,
    **arguments,
):
    """The trainer of a run with 8 batches of 8 images in an epoch."""
    set_seed(0)
    options = {"drop_path_rate": 0.0, "num_labels": 10} | (model or {})
    network = AutoModelForImageClassification.from_config(small_config(version, **options))
    recipe = ImageNetRecipe(**(PLAIN | (recipe or {})))
    train, validation = (load_split(split) for split in ("train", "validation"))
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
    args, transform = TrainingArguments(output_dir=str(output_dir), **arguments), build_training_transform(recipe, 32)
    if streaming:
        share = {"rank": args.process_index, "world_size": args.world_size, "buffer_size": 9}
        stream = load_images(None, "train", streaming=True)
        rows = StreamedImages(stream, "label", 10, transform, images, seed=0, **share)
    else:
        rows = TrainingImages(train.select(range(images)), "label", 10, transform)
    return ImageClassificationTrainer(
        model=network,
        args=args,
        recipe=recipe,
        train_dataset=rows,
        eval_dataset=EvaluationImages(validation.select(range(evaluation)), "label", 10, Processor()),
        **(trainer or {}),
    )


SHARDED = {
    "fsdp_version": 2,
    "transformer_layer_cls_to_wrap": ["PvtV2BlockLayer"],
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "cpu_ram_efficient_loading": False,
}


def shard_on_cpus() -> None:
    """accelerate shards on accelerators only; torch's FSDP2 itself works on CPUs too."""
    start = PartialState.__init__

    def start_as_if_on_gpus(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start_as_if_on_gpus


@contextmanager
def count_checksums() -> Iterator[list[Path]]:
    """The files of run checkpoints of which checksums are computed while it lasts."""
    describe, paths = run_checkpoints._describe_file, []
    run_checkpoints._describe_file = lambda path: paths.append(path) or describe(path)
    try:
        yield paths
    finally:
        run_checkpoints._describe_file = describe


def main(output_dir: Path, settings: dict[str, Any]) -> None:
    """A run with its losses, metrics and seed in `result-{rank}.json` afterwards."""
    settings = dict(settings)
    resume, pause, end = (settings.pop(name, None) for name in ("resume", "pause_after", "end_at"))
    if kind := settings.pop("sharded", None):  # a state dict type
        shard_on_cpus()
        settings |= {"fsdp": True, "fsdp_config": SHARDED | {"state_dict_type": kind}}
    trainer = build(output_dir, **settings)
    mixed, seeds = trainer.mix, []
    # What this process draws for its first batch.
    trainer.mix = lambda *batch: (seeds.append(torch.initial_seed()), mixed(*batch))[1]
    pause_after(trainer, pause)
    if end is not None:
        return train_until(trainer, end, resume)
    with count_checksums() as checksums:
        trainer.train(resume)
    metrics = trainer.evaluate()
    trainer.save_model()
    write_result(trainer, output_dir, metrics=metrics, seed=next(iter(seeds), None), checksums=len(checksums))
    if trainer.is_world_process_zero() and trainer.ema is not None:
        torch.save(trainer.ema.module.state_dict(), output_dir / "ema.pt")
