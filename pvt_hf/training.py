"""`Trainer` with what training at scale needs: the official recipe, exact resume, checkpoints that are whole or not
there, averaged weights, and an end with a reason when the loss is not a number."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from .data import EpochSampler, collate, random_state_kept
from .metrics import classification_metrics, classification_statistics
from .recipes import ImageNetRecipe, images_per_step, parameter_groups, scheduled_learning_rate
from .reports import plot_curves, run_settings, training_card

logger = logging.get_logger(__name__)

_COMPLETE, _PARTIAL = "complete.json", "complete.json.partial"
_LAYOUT = "layout.json"
_EMA_WEIGHTS = "ema.safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or that is not whole. The message says which is the last good one."""


def incompleteness(checkpoint: str | Path) -> str | None:
    """Why a checkpoint is not whole, in words, or `None` if it is: every file has the size that it had in the end."""
    try:
        sizes = json.loads((Path(checkpoint) / _COMPLETE).read_text())
    except (OSError, ValueError):
        return "it was interrupted while it was written"
    for name, size in sizes.items():
        file = Path(checkpoint) / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or has another size"
    return None


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint of a run, if there is one. Those that are passed over are logged."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if (reason := incompleteness(folder)) is None:
            return str(folder)
        logger.warning(f"{folder} is not used: {reason}.")
    return None


def soft_target_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None):
    """Cross-entropy with class indices `(batch,)` or probabilities `(batch, num_labels)`, averaged over the images of
    the whole accumulated batch (`num_items_in_batch`) or of this one."""
    loss = F.cross_entropy(outputs["logits"], labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class _Epochs(TrainerCallback):
    """Tells the sampler or the stream which epoch begins, before it is read."""

    def __init__(self, trainer: "ImageClassificationTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        set_seed(args.seed + args.process_index)  # official; a resumed run then restores each process's own state

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.epochs.set_epoch(state.global_step // self.trainer.steps_per_epoch)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.ema is not None:
            self.trainer.ema.update(self.trainer.model)


class ImageClassificationTrainer(Trainer):
    """Trains a classifier with the official ImageNet recipe, on one process or many.

    Args:
        recipe: Augmentation of whole batches (mixup), repeats, and the learning-rate schedule.
        official_schedule: Whether the learning rate is the recipe's, instead of `args.lr_scheduler_type`.
        layer_decay: Factor of the learning rate from a block to the one before it.
        ema_decay: If given, an average of the weights is kept (timm's `ModelEmaV3`), saved with every checkpoint.
        channels_last: Whether model and images have that memory format.
        dataset_name, initial_weights: For the model card: where images and weights came from.
        train_dataset: [`~pvt_hf.data.TrainingImages`] or [`~pvt_hf.data.StreamedImages`].
        *args, **kwargs: As of [`~transformers.Trainer`].

    The loss, the optimiser's groups, the sampler and the metrics are set here.

    Raises:
        ValueError: If the batch size is odd, which timm's mixup cannot pair, or the recipe leaves no training.
        CheckpointError: If a checkpoint cannot be written.
        FloatingPointError: If a loss is not finite, with step, learning rate and images.
    """

    def __init__(
        self,
        *args,
        recipe: ImageNetRecipe,
        official_schedule: bool = True,
        layer_decay: float = 1.0,
        ema_decay: float | None = None,
        channels_last: bool = False,
        dataset_name: str | None = None,
        initial_weights: str | None = None,
        **kwargs,
    ):
        super().__init__(
            *args,
            data_collator=collate,
            compute_loss_func=soft_target_loss,
            preprocess_logits_for_metrics=classification_statistics,
            compute_metrics=classification_metrics,
            **kwargs,
        )
        if ema_decay is not None and self.args.fsdp:
            raise ValueError("`ema_decay` needs whole weights in every process, which FSDP does not have.")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process would train on {self.args.n_gpu} GPUs (`DataParallel`): start one process per GPU with "
                "`accelerate launch`, or choose a GPU with CUDA_VISIBLE_DEVICES."
            )
        if self.args.per_device_train_batch_size % 2 and (recipe.mixup or recipe.cutmix):
            raise ValueError(
                "`per_device_train_batch_size` must be even for mixup, which mixes an image with its opposite in the "
                f"batch; got {self.args.per_device_train_batch_size}."
            )
        if not 0 <= recipe.warmup_epochs < self.args.num_train_epochs:
            raise ValueError(
                f"`warmup_epochs` must be less than the {self.args.num_train_epochs:g} epochs (`num_train_epochs`), "
                f"got {recipe.warmup_epochs}."
            )
        self.args.remove_unused_columns = False
        self.official_schedule = official_schedule
        self.dataset_name, self.initial_weights = dataset_name, initial_weights
        self.recipe, self.layer_decay, self.ema_decay = recipe, layer_decay, ema_decay
        self.channels_last, self.ema, self.skipped = channels_last, None, 0
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.mixup = self._build_mixup()
        self.add_callback(_Epochs(self))

    def _build_mixup(self):
        from timm.data import Mixup

        return Mixup(
            mixup_alpha=self.recipe.mixup,
            cutmix_alpha=self.recipe.cutmix,
            switch_prob=self.recipe.mixup_switch_prob,
            label_smoothing=self.recipe.label_smoothing,
            num_classes=self.model.config.num_labels,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Each process reads its own share: nothing is left for accelerate to split."""
        dataset, args, options = self.train_dataset, self.args, {}
        if isinstance(dataset, torch.utils.data.IterableDataset):
            self.epochs = dataset
            dataset.batch_size = self._train_batch_size
        else:
            self.epochs = options["sampler"] = EpochSampler(
                len(dataset), args.seed, args.process_index, args.world_size, self.recipe.repeats
            )
        loader = DataLoader(
            dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            prefetch_factor=args.dataloader_prefetch_factor,
            drop_last=True,
            **options,
        )
        if not len(loader):
            raise ValueError(
                f"`per_device_train_batch_size` ({self._train_batch_size}) is larger than the {len(self.epochs)} "
                "images that each process has in an epoch."
            )
        self.steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
        return loader

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.optimizer is None:
            groups = parameter_groups(model, self.args.learning_rate, self.args.weight_decay, self.layer_decay)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(
                [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups], **options
            )
        if self.ema_decay is not None and self.ema is None:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(self.model, decay=self.ema_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> torch.optim.lr_scheduler.LRScheduler:
        if not self.official_schedule:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            recipe, peak = self.recipe, self.args.learning_rate
            epochs = math.ceil(num_training_steps / self.steps_per_epoch)

            def factor(step: int) -> float:
                epoch = step // self.steps_per_epoch
                lowest = recipe.warmup_learning_rate, recipe.min_learning_rate
                return scheduled_learning_rate(epoch, epochs, recipe.warmup_epochs, peak, *lowest) / peak

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def mix(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixed images and smoothed probabilities `(batch, num_labels)`; the last image of an odd batch stays alone."""
        from timm.data.mixup import mixup_target

        even = len(images) // 2 * 2 if self.mixup.mixup_alpha > 0 or self.mixup.cutmix_alpha > 0 else 0
        targets = mixup_target(labels, self.mixup.num_classes, smoothing=self.mixup.label_smoothing)
        if even:
            mixed, targets[:even] = self.mixup(images[:even].contiguous(), labels[:even])
            images = torch.cat((mixed, images[even:]))
        return images, targets

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        names, skipped = inputs.pop("names"), inputs.pop("skipped")
        self.skipped += skipped
        inputs = self._prepare_inputs(inputs)
        images, inputs["labels"] = self.mix(inputs["pixel_values"], inputs["labels"])
        inputs["pixel_values"] = images.contiguous(
            memory_format=torch.channels_last if self.channels_last else torch.contiguous_format
        )
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1} (process {self.args.process_index}), "
                f"with a learning rate of {self._get_learning_rate():.3g} and the images {', '.join(names)}. Training "
                f"stops; the last good checkpoint is {last_complete_checkpoint(self.args.output_dir)}."
            )
        return loss

    def _save_checkpoint(self, model, trial) -> None:
        """As in `Trainer`, and in the end a list of the files, without which it is not taken for a good checkpoint."""
        run_dir, args = self._get_output_dir(trial), self.args
        folder, limit = Path(run_dir) / f"checkpoint-{self.state.global_step}", args.save_total_limit
        args.save_total_limit = None  # older checkpoints go when this one is whole
        try:
            if args.should_save:
                (folder / _COMPLETE).unlink(missing_ok=True)
            super()._save_checkpoint(model, trial)
            if args.should_save and self.ema is not None:
                weights = {key: value.contiguous() for key, value in self.ema.module.state_dict().items()}
                save_file(weights, folder / _EMA_WEIGHTS)
            self.accelerator.wait_for_everyone()
            if args.should_save:
                (folder / _LAYOUT).write_text(json.dumps(self._layout()))
                _mark_complete(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            last = last_complete_checkpoint(run_dir)
            raise CheckpointError(f"{folder} could not be written: {error}. The last good one is {last}.") from error
        finally:
            args.save_total_limit = limit
        if args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(output_dir=run_dir, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in `Trainer`; `True` is the last whole checkpoint of `output_dir`, or the beginning if there is none.

        Raises:
            CheckpointError: If the given checkpoint is not whole.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            logger.warning(
                f"Training goes on from {resume_from_checkpoint or 'the beginning: no checkpoint is whole'}."
            )
        elif resume_from_checkpoint and (reason := incompleteness(resume_from_checkpoint)):
            raise CheckpointError(f"{resume_from_checkpoint} is not a whole checkpoint: {reason}.")
        if resume_from_checkpoint:
            saved = json.loads((Path(resume_from_checkpoint) / _LAYOUT).read_text())
            now = self._layout()
            if changed := [f"{key} is {now[key]}, not {saved[key]}" for key in now if saved[key] != now[key]]:
                raise CheckpointError(f"{resume_from_checkpoint} is of another run: {'; '.join(changed)}.")
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _layout(self) -> dict[str, int]:
        """What an exact resume needs to be as it was."""
        return {
            "images per step": images_per_step(self.args),
            "processes": self.args.world_size,
            "images of an epoch": len(self.train_dataset),
            "seed": self.args.seed,
        }

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As in `Trainer`; the random generators of training are not touched."""
        with random_state_kept():
            return super().evaluate(*args, **kwargs)

    def skipped_images(self) -> int:
        """How many damaged images this run left out, over all processes."""
        count = torch.tensor(self.skipped, device=self.args.device)
        return int(self.accelerator.reduce(count).item())

    def evaluate_average(self) -> dict[str, float]:
        """As `evaluate`, of the averaged weights (`ema_accuracy` ...), which it also saves, to `output_dir/ema`."""
        if self.ema is None:
            raise ValueError("There are no averaged weights: `ema_decay` was not set.")
        trained = {key: value.clone() for key, value in self.model.state_dict().items()}
        try:
            self.model.load_state_dict(self.ema.module.state_dict())
            metrics = self.evaluate(metric_key_prefix="ema")
            # An internal call, because others are pushed to the Hub as the model of the run.
            self.save_model(os.path.join(self.args.output_dir, "ema"), _internal_call=True)
        finally:
            self.model.load_state_dict(trained)
        return metrics

    def create_model_card(self, *args, **kwargs) -> None:
        """Curves and a card with the numbers of the run, in place of `Trainer`'s with its gaps to fill in."""
        if not self.is_world_process_zero():
            return
        output, log = Path(self.args.output_dir), self.state.log_history
        plot_curves(log, output / "curves.png")
        training_card(
            output.name,
            self.accelerator.unwrap_model(self.model).config,
            [entry for entry in log if "eval_accuracy" in entry],
            run_settings(self.recipe, self.args, self.official_schedule),
            self.dataset_name,
            self.initial_weights,
        ).save(output / "README.md")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.ema is not None:
            self.ema.module.load_state_dict(load_file(Path(checkpoint) / _EMA_WEIGHTS))


def _mark_complete(folder: Path) -> None:
    """Everything reaches the disk, and then the list of files with their sizes, at once."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files if path.name != _PARTIAL}
    partial = folder / _PARTIAL
    partial.write_text(json.dumps(sizes, indent=1))
    partial.replace(folder / _COMPLETE)
