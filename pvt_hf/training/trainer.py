"""`Trainer` with what training vision models at scale needs: exact resume, checkpoints that are complete or not there,
schedules by step, an EMA of the weights, and an end with a reason when the loss is not a number.

[`VisionTrainer`] is told what to train on, builds loader, optimiser and schedule, takes steps, evaluates, and finishes
with a report. Checkpoints are written and resumed from in `resumable`, and what is special about a task is in
`classification`, `dense_prediction`, `detection` and `segmentation` beside this file.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, set_seed

from ..data.images import keep_random_state
from ..data.samplers import EpochSampler
from ..writing.text import escape_control
from .changes import OWN_SCHEDULE, describe_run
from .optimization import SettingError
from .preemption import PreemptibleTrainer
from .report import LogHistory, RunFacts, plot_curves, run_settings, training_card
from .streams import build_loader
from .waits import start_reading

# From a step (counted from 0), the steps of an epoch and those of the run to the multiplier of every learning rate.
Schedule = Callable[[int, int, int], float]


class _Steps(TrainerCallback):
    """What has to happen between the steps."""

    def __init__(self, trainer: "VisionTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # As in the released code, each process its own. A resumed run then restores what each of them had.
        set_seed(args.seed + args.process_index)
        self.trainer._begin()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.epochs.set_epoch(self.trainer.run_step // self.trainer.steps_per_epoch)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.schedule is not None:
            # Trainer leaves the schedule where it is when fp16 skips a step; those of the recipes go by the step.
            while self.trainer.lr_scheduler.last_epoch < self.trainer.run_step:
                self.trainer.lr_scheduler.step()
        if self.trainer.ema is not None:
            self.trainer.ema.update(self.trainer.model)


class VisionTrainer(PreemptibleTrainer):
    """What every training here has in common, on one process or many.

    A subclass says what it trains for: `task` (as the Hub calls it), `metric_names` (the keys of the metrics with
    values in [0, 1] that curves and card show, and what they are called) and `pictures` (what the card shows).

    Args:
        recipe: Hyper-parameters, a dataclass, for the model card; a subclass may use it.
        dataset_name: For the model card: where the images came from, `None` for the bundled data. Of a path, the card
            has the last part only.
        dataset_title: For the model card: what it calls the data (default: their name on the Hub, or that last part).
        initial_weights: For the model card: where the weights came from, `None` for random ones. As `dataset_name`.
        license: For the model card: the Hub's identifier of a licence (default: none is chosen, and the card says so).
        settings: What else was chosen, for the model card. A run resumes with the same settings only.
        left_out: The corrupt images that were left out before training, for the summary at the end.
        schedule: From `(step, steps per epoch, steps of the run)` to the multiplier of every learning rate; by default
            the schedule is that of `args.lr_scheduler_type`.
        parameter_groups: From the model to the groups of the optimiser; by default those of `Trainer`.
        repeats: How often an image is drawn in a row (default: 1): see [`~pvt_hf.data.samplers.EpochSampler`].
        channels_last: Whether model and images have that memory format (default: not).
        train_dataset: A data set that is asked for `(index, seed, epoch, position)`, or an iterable one with
            `set_epoch` and `batch_size`. With `data_collator` it makes batches that also have `names`, the images, and
            `skipped`, how many are missing.
        *args: As of [`~pvt_hf.training.resumable.ResumableTrainer`].
        **kwargs: As of [`~pvt_hf.training.resumable.ResumableTrainer`].

    Raises:
        ValueError: If arguments contradict each other, or would be ignored.
        UploadError: If `finish` cannot push to the Hub, or the repository cannot be made in the beginning.
    """

    metric_names: dict[str, str]
    pictures: tuple[str, ...] = ("curves.png",)

    def __init__(
        self,
        *args,
        recipe: Any,
        dataset_name: str | None = None,
        dataset_title: str | None = None,
        initial_weights: str | None = None,
        license: str | None = None,
        settings: dict[str, Any] | None = None,
        left_out: Sequence[str] = (),
        schedule: Schedule | None = None,
        parameter_groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
        repeats: int = 1,
        channels_last: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.recipe, self.settings = recipe, settings or {}
        self.facts = RunFacts(
            name=Path(self.args.output_dir).resolve().name,
            task=self.task,
            dataset=dataset_name,
            dataset_title=dataset_title,
            initial_weights=initial_weights,
            license=license,
            has_code=bool(self.code),
        )
        self.schedule, self.parameter_groups, self.repeats = schedule, parameter_groups, repeats
        self.channels_last, self.left_out = channels_last, list(left_out)
        self._check_arguments()
        self.args.remove_unused_columns = False
        self.args.logging_nan_inf_filter = False  # it waits for the device in every step, and such a loss is an error
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.add_callback(_Steps(self))

    def _check_arguments(self) -> None:
        args = self.args
        if args.n_gpu > 1:
            raise ValueError(
                f"One process would train on {args.n_gpu} GPUs (`DataParallel`): start one process per GPU with "
                "`accelerate launch`, or choose a GPU with CUDA_VISIBLE_DEVICES."
            )
        if args.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size` would change the images per step in the middle of a run, and not its learning "
                "rates: set `per_device_train_batch_size`, with `gradient_accumulation_steps` for larger steps."
            )
        if self.schedule is not None and args.warmup_steps:
            raise ValueError(
                f"`warmup_steps` ({args.warmup_steps}) has no effect on the recipe's schedule; set the recipe's own "
                "warm-up, or `lr_scheduler_type`."
            )
        if args.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` has no effect here; the recipe has `label_smoothing`.")
        if args.dataloader_persistent_workers and isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            raise ValueError("`dataloader_persistent_workers` would repeat the first epoch of a stream.")
        if args.fsdp or self.is_fsdp_enabled:
            self._check_sharding()
            if self.ema_decay is not None:
                raise ValueError("`ema_decay` needs all weights in every process, which FSDP does not have.")

    def get_train_dataloader(self) -> DataLoader:
        """Each process reads its own share: nothing is left for accelerate to split."""
        dataset, args = self.train_dataset, self.args
        is_stream = isinstance(dataset, torch.utils.data.IterableDataset)
        self.epochs = dataset if is_stream else self.build_sampler()
        loader = build_loader(dataset, self.epochs, self.data_collator, self._train_batch_size, args)
        if not len(loader):
            raise SettingError(
                f"A step has {self._images_per_step()} images ({self._train_batch_size} of "
                f"`per_device_train_batch_size` x {args.gradient_accumulation_steps} accumulated x {args.world_size} "
                f"processes), more than the {len(self.train_dataset)} of an epoch."
            )
        self.steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
        return loader

    def build_sampler(self) -> torch.utils.data.Sampler:
        """The order of the images, with `set_epoch`."""
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        images, step = len(self.train_dataset), self._images_per_step()
        return EpochSampler(images, seed, args.process_index, args.world_size, self.repeats, step)

    def _images_per_step(self) -> int:
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.optimizer is None and self.parameter_groups is not None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            keys = ("params", "lr", "weight_decay")
            groups = [{key: group[key] for key in keys} for group in self.parameter_groups(model)]
            self.optimizer = optimizer_class(groups, **options)
        elif self.optimizer is None:
            super().create_optimizer(model)
        if self.ema_decay is not None and self.ema is None:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(self.model, decay=self.ema_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> torch.optim.lr_scheduler.LRScheduler:
        if self.schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: self.schedule(step, self.steps_per_epoch, num_training_steps)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def prepare_batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What happens to a batch on its device before the model gets it: nothing, unless a subclass says so."""
        return inputs

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        names, bookmark = inputs.pop("names"), inputs.pop("bookmark", None)
        self.skipped += inputs.pop("skipped")
        inputs = self.prepare_batch(self._prepare_inputs(inputs))
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        inputs["pixel_values"] = inputs["pixel_values"].contiguous(memory_format=memory_format)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._check_loss()
        self._unchecked = (start_reading(loss), self.state.global_step + 1, self._get_learning_rate(), names)
        if loss.device.type == "cpu":
            self._check_loss()
        if bookmark is not None:
            self.train_dataset.note(*bookmark)
        return loss

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in [`~pvt_hf.training.resumable.ResumableTrainer`], with a card that can be built in the end.

        Args:
            resume_from_checkpoint: A checkpoint, or `True` for the last complete one of `output_dir`.
            *args: As in `Trainer`.
            **kwargs: As in `Trainer`.
        """
        self._build_card([{"epoch": 0, "eval_images": 0} | {f"eval_{key}": 0.0 for key in self.metric_names}])
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As in `Trainer`; the random generators of training are not touched."""
        with keep_random_state():
            return super().evaluate(*args, **kwargs)

    def evaluate_ema(self) -> dict[str, float]:
        """As `evaluate`, of the EMA weights (`ema_accuracy` ...), which it also saves, to `output_dir/ema`."""
        if self.ema is None:
            raise ValueError("There are no EMA weights: `ema_decay` was not set.")
        trained = {key: value.clone() for key, value in self.model.state_dict().items()}
        try:
            self.model.load_state_dict(self.ema.module.state_dict())
            metrics = self.evaluate(metric_key_prefix="ema")
            # An internal call, because others are pushed to the Hub as the model of the run.
            self.save_model(os.path.join(self.args.output_dir, "ema"), _internal_call=True)
        finally:
            self.model.load_state_dict(trained)
        return metrics

    def finish(self) -> str:
        """The end of a training program, called by every process: saves the model, evaluates it (and its EMA weights),
        leaves `eval_results.json`, pictures, curves and card, and pushes everything to the Hub if `args` says so.

        Returns:
            What was reached, in words.
        """
        with self.end_together():
            return self._finish()

    def _finish(self) -> str:
        self.save_model(_internal_call=True)  # not pushed yet: the card needs the metrics
        ema: dict[str, float] = self.evaluate_ema() if self.ema is not None else {}
        metrics = ema | self.evaluate()  # whose predictions are the ones that are kept
        self.save_metrics("eval", metrics)
        self.draw_predictions()
        self.create_model_card()
        lines = []
        for prefix in ("eval", "ema") if self.ema is not None else ("eval",):
            found = ((escape_control(name), metrics.get(f"{prefix}_{key}")) for key, name in self.metric_names.items())
            shown = (f"no ground truth for {name}" if value is None else f"{name} {value:.4f}" for name, value in found)
            lines.append(f"{prefix}: {', '.join(shown)} on {metrics[f'{prefix}_images']} images")
        skipped = self.skipped_images()
        if self.args.push_to_hub:
            self._upload()
        if self.left_out:
            listed = "\n  ".join(self.left_out)
            lines.append(f"{len(self.left_out)} corrupt images were left out before training:\n  {listed}")
        lines.append(f"{skipped} corrupt images were skipped; everything is in {self.args.output_dir}")
        self.accelerator.end_training()
        return "\n".join(lines)

    def draw_predictions(self) -> None:
        """Writes the pictures of validation images that the card shows: none, unless a subclass says so."""

    def describe_run(self) -> dict[str, Any]:
        return describe_run(self)

    def describe_settings(self) -> dict[str, Any]:
        """What was chosen beside arguments and recipe; a resumed run has to have it too. Of paths the last part."""
        chosen = self.settings | {
            "initial weights": self.facts.initial_weights,
            "schedule": "lr_scheduler_type" if self.schedule is None else OWN_SCHEDULE,
            "channels_last": self.channels_last,
        }
        return {name: Path(value).name if isinstance(value, str) else value for name, value in chosen.items()}

    def create_model_card(self, *args, **kwargs) -> None:
        """Curves and a card with the numbers of the run, in place of `Trainer`'s with its gaps to fill in."""
        if not self.is_world_process_zero():
            return
        with self.write_file("curves.png") as path:
            plot_curves(self.state.log_history, path, self.metric_names)
        card = self._build_card(self.state.log_history)
        with self.write_file("README.md") as path:
            card.save(path)

    def _build_card(self, log_history: LogHistory) -> ModelCard:
        config, repository = self.accelerator.unwrap_model(self.model).config, self.hub_model_id
        settings = run_settings(self.recipe, self.args, config, self.state, self.schedule is not None) | self.settings
        pictures = [picture for picture in self.pictures if (Path(self.args.output_dir) / picture).exists()]
        name = repository.split("/")[-1] if repository else self.facts.name
        facts = replace(self.facts, name=name, repository=repository, settings=settings)
        return training_card(facts, config, log_history, self.metric_names, pictures)
