"""`Trainer` whose checkpoints are complete or not there, and whose runs resume from them exactly."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import DefaultFlowCallback, TrainerControl
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from ..data.streams import ShardedStream
from ..untrusted import UntrustedFileError
from ..writing.files import atomic_file, explain_write_error, hidden_folder
from ..writing.hub import register_code
from ..writing.text import escape_control
from .callbacks import find_early_stop, list_states, restore_counts
from .changes import METRIC_SCHEDULES, find_changes
from .distributed import DistributedTrainer
from .elastic import STEPS_PER_EPOCH, compare_layouts, count_images, find_position, seed_of_process
from .machines import agree_on_checkpoint, ask_machines, is_lost_process, read_agreed_run
from .optimization import set_schedule
from .run_checkpoints import (
    CheckpointError,
    incompleteness,
    last_complete_checkpoint,
    mark_complete,
    mark_incomplete,
    replace_file,
)
from .streams import restore_stream, save_stream

logger = logging.get_logger(__name__)

_EMA_WEIGHTS = "ema.safetensors"


class ResumableTrainer(DistributedTrainer):
    """Writes checkpoints that are complete or not there, and resumes from them.

    Args:
        ema_decay: EMA decay of the weights (timm's `ModelEmaV3`), which every checkpoint has too; by default there
            is none.
        *args: As of [`~pvt_hf.training.distributed.DistributedTrainer`].
        **kwargs: As of [`~pvt_hf.training.distributed.DistributedTrainer`].

    Raises:
        CheckpointError: If a checkpoint cannot be written, or is of another run.
        FloatingPointError: If a loss is not finite, with step, learning rate and images.

    Attributes:
        steps_per_epoch: Which a subclass knows when it has a loader.
    """

    steps_per_epoch: int
    control: TrainerControl

    def __init__(self, *args, ema_decay: float | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.ema_decay, self.ema = ema_decay, None
        self.skipped, self.skipped_before, self._saved_step = 0, 0, -1
        # What the checkpoint says of the run that wrote it, and the steps that were taken beyond [`run_step`].
        self.former: dict[str, Any] = {}
        self.step_offset = 0
        self.run: dict[str, Any] = {}
        self.resumed_from: str | None = None
        self._unchecked: tuple[Callable[[], float], int, float, list[str]] | None = None

    def describe_run(self) -> dict[str, Any]:
        """What a run is, by names of arguments, as JSON has it: see [`~pvt_hf.training.changes.find_changes`]. Nothing,
        unless a subclass says so."""
        return {}

    def _check_loss(self) -> None:
        """Ends training if the last loss is not finite. An accelerator is asked a step later, so that it need not be
        waited for, but before anything is saved or evaluated."""
        if self._unchecked is None:
            return
        read_loss, step, learning_rate, names = self._unchecked
        self._unchecked = None
        if not math.isfinite(loss := read_loss()):
            raise FloatingPointError(
                f"The loss is {loss} at step {step} (process {self.args.process_index}), with a learning rate "
                f"of {learning_rate:.3g} and the images {escape_control(', '.join(names))}. Training stops; the last "
                f"good checkpoint is {last_complete_checkpoint(self.args.output_dir)}."
            )

    @contextmanager
    def _name_last_checkpoint(self, what: str | Path) -> Iterator[None]:
        """Makes of what fails in writing a `CheckpointError` that names the last good checkpoint."""
        try:
            yield
        except CheckpointError:
            raise
        except (OSError, RuntimeError, SafetensorError, UntrustedFileError) as error:  # a full disk: the first three
            if is_lost_process(error):
                raise
            reason, last = explain_write_error(error, what), last_complete_checkpoint(self.args.output_dir)
            rest = f"The last good checkpoint is {last}." if last else "No checkpoint is complete."
            raise CheckpointError(f"{what} could not be written: {reason}. {rest}") from error

    @contextmanager
    def write_file(self, name: str) -> Iterator[Path]:
        """A path to write to, whose content becomes a file of `output_dir` when it is complete.

        Args:
            name: Of the file.

        Raises:
            CheckpointError: If it cannot be written.
        """
        file = Path(self.args.output_dir) / name
        with self._name_last_checkpoint(file), atomic_file(file) as path:
            yield path

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As in `Trainer`, where a killed program leaves a part of a file under the name of the model."""
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        target = Path(output_dir or self.args.output_dir)
        with self._name_last_checkpoint(target), hidden_folder(target) as folder, register_code(self.code):
            super()._save(str(folder), state_dict)
            for file in (path for path in folder.rglob("*") if path.is_file()):
                place = target / file.relative_to(folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)

    def save_metrics(self, *args, **kwargs) -> None:
        """As in `Trainer`. A full disk is a `CheckpointError`."""
        with self._name_last_checkpoint(self.args.output_dir):
            super().save_metrics(*args, **kwargs)

    def _evaluate(self, trial, *args, skip_scheduler: bool = False, **kwargs) -> dict[str, float]:
        """As in `Trainer`, after the checkpoint that is due: an evaluation that fails costs no training. That of
        `eval_on_start`, which skips the schedule, is made where the run lacks it."""
        if skip_scheduler and self.resumed_from and self._is_evaluated(0, self.state.global_step):
            return {}
        self._check_loss()
        if self.control.should_save:
            self._save_checkpoint(self.model, trial)
        return super()._evaluate(trial, *args, skip_scheduler=skip_scheduler, **kwargs)

    def _add_metrics(self, folder: Path) -> None:
        """What the evaluation changed since the checkpoint of this step was written: the metrics, which is best, and
        what callbacks have counted."""
        self._find_best()
        self.state.stateful_callbacks = list_states(self._callbacks)
        if self.args.should_save:
            with self._name_last_checkpoint(folder):
                replace_file(folder, TRAINER_STATE_NAME, json.dumps(dataclasses.asdict(self.state), indent=2))

    def _save_checkpoint(self, model, trial) -> None:
        """As in `Trainer`, and in the end a list of the files, without which it is not taken for a good checkpoint."""
        run_dir, args = self._get_output_dir(trial), self.args
        folder, limit = Path(run_dir) / f"checkpoint-{self.state.global_step}", args.save_total_limit
        self._check_loss()
        # A schedule that follows the metrics has taken its step since.
        if self._saved_step == self.state.global_step and args.lr_scheduler_type not in METRIC_SCHEDULES:
            return self._add_metrics(folder)
        skipped, loss = self.skipped_images(), self.accelerator.reduce(self._tr_loss, "mean").item()
        # Older checkpoints go, and the Hub gets this one, when it is complete.
        args.save_total_limit, push, args.push_to_hub = None, args.push_to_hub, False
        try:
            with self._name_last_checkpoint(folder):
                if args.should_save:
                    mark_incomplete(folder)
                super()._save_checkpoint(model, trial)
                self.state.stateful_callbacks = list_states(self._callbacks)
                if args.should_save:  # where `Trainer` appends to what was saved before
                    self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
                if args.should_save and self.ema is not None:
                    weights = {key: value.contiguous() for key, value in self.ema.module.state_dict().items()}
                    save_file(weights, folder / _EMA_WEIGHTS)
                save_stream(self.train_dataset, folder, args.should_save)
                self.accelerator.wait_for_everyone()
                if args.should_save:
                    run = {"layout": self._layout() | {STEPS_PER_EPOCH: self.steps_per_epoch}, "run": self.run}
                    run |= {"unlogged loss": loss, "last logged step": self._globalstep_last_logged}
                    mark_complete(folder, run | {"skipped": skipped, "step offset": self.step_offset})
        except CheckpointError:
            shutil.rmtree(folder, ignore_errors=True)  # of no use, and the disk may be full
            raise
        finally:
            args.save_total_limit, args.push_to_hub = limit, push
        self._saved_step = self.state.global_step
        if push:
            self._push_from_checkpoint(str(folder))
        if args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(output_dir=run_dir, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def _find_best(self) -> None:
        """The best checkpoint is where this run has it, also if the folder was moved meanwhile."""
        best = Path(self._get_output_dir(None)) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _load_best_model(self) -> None:
        """As in `Trainer`, if it is as it was written."""
        best = self.state.best_model_checkpoint
        for _, host, reason in ask_machines(lambda: incompleteness(best)):
            if reason:
                raise CheckpointError(f"The best checkpoint, {best}, cannot be loaded on {host}: {reason}.")
        super()._load_best_model()

    def _begin(self) -> None:
        """Before the first step of this program, when everything is loaded that a resumed run has."""
        state, args = self.state, self.args
        # Those of this program, not of the one that wrote the checkpoint.
        state.compute_steps(args, state.max_steps - self.step_offset)
        if self.resumed_from is None:
            return
        if state.global_step > state.max_steps:
            raise CheckpointError(
                f"{self.resumed_from} has {state.global_step} steps, more than the {state.max_steps} of this run "
                "(`max_steps`, `num_train_epochs`)."
            )
        # The next loss that is logged is a mean since the last one, and that of this program in the end not.
        self._tr_loss += self.former["unlogged loss"]
        self._total_loss_scalar -= self.former["unlogged loss"]
        self._globalstep_last_logged = self.former["last logged step"]
        self._find_best()
        if args.load_best_model_at_end and state.best_global_step and state.best_model_checkpoint is None:
            best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            raise CheckpointError(f"The best checkpoint, {best}, is gone: `load_best_model_at_end` cannot load it.")
        if self._lacks_evaluation():
            self._determine_best_metric(self._evaluate(None, None), None)
            folder = Path(self._get_output_dir(None)) / f"checkpoint-{state.global_step}"
            is_own = folder.is_dir() and folder.samefile(self.resumed_from)
            if is_own and args.lr_scheduler_type not in METRIC_SCHEDULES:
                self._add_metrics(folder)
        if stopped := find_early_stop(self._callbacks):
            logger.warning(f"The run has ended at step {state.global_step}: {stopped}.")
            self.control.should_training_stop = True

    def _is_evaluated(self, *steps: int) -> bool:
        made = (entry for entry in self.state.log_history if any(key.startswith("eval_") for key in entry))
        return any(entry["step"] in steps for entry in made)

    def _lacks_evaluation(self) -> bool:
        """Whether the program that wrote the checkpoint was ended before the evaluation that was due at its step."""
        state, due, flow = self.state, TrainerControl(), DefaultFlowCallback()
        flow.on_step_end(self.args, state, due)
        if self.run_step % self.steps_per_epoch == 0 or state.global_step >= state.max_steps:
            flow.on_epoch_end(self.args, state, due)
        return due.should_evaluate and not self._is_evaluated(state.global_step)

    def _run_epoch(self, *args, **kwargs) -> None:
        """As in `Trainer`, which takes a step before it looks whether the run has ended."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True

    def _finalize_training(self, *args, **kwargs):
        """As in `Trainer`. The last checkpoint stays beside the best one: a run that has ended is finished again from
        it."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._find_best()  # which a machine may not have seen when it was written, and all of them are to load
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`, but for the mean loss of no step, which would be 0."""
        if "train_loss" not in logs or self.state.global_step > self._initial_global_step:
            super().log(logs, *args, **kwargs)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args,
        allow_batch_change: bool = False,
        **kwargs,
    ):
        """As in `Trainer`, also from scratch where there is nothing to resume from.

        Args:
            resume_from_checkpoint: A checkpoint, or `True` for the last complete one of `output_dir`.
            allow_batch_change: Whether a step may have another number of images than in the run that wrote the
                checkpoint (default: `False`, an error). Then the run is at the same epoch, at the step by which as many
                of its images have been seen; an image can come again where that is not a whole number of steps.
                Schedule and end of the run are those of a run with such steps from its beginning, and so are the
                learning rates.
            *args: As in `Trainer`.
            **kwargs: As in `Trainer`.

        Raises:
            CheckpointError: If the given checkpoint is not complete, of another run, or not what a run wrote.
        """
        if resume_from_checkpoint and self.is_deepspeed_enabled:
            raise CheckpointError("Runs of DeepSpeed are not resumed, because DeepSpeed unpickles its states.")
        self.run = self.describe_run()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = agree_on_checkpoint(self.args.output_dir, True)
            logger.warning(
                f"Training resumes from {resume_from_checkpoint}."
                if resume_from_checkpoint
                else "Training starts from scratch: no checkpoint is complete."
            )
        elif resume_from_checkpoint:
            agree_on_checkpoint(self.args.output_dir, resume_from_checkpoint)
        if resume_from_checkpoint:
            saved, now = read_agreed_run(resume_from_checkpoint, states=True), self._layout()
            is_sharded = isinstance(self.train_dataset, ShardedStream)  # it says itself what it can go on with
            changed = compare_layouts(
                saved["layout"], now, self._is_stream() and not is_sharded, None if is_sharded else allow_batch_change
            )
            refused, said = find_changes(saved["run"], self.run)
            if changed := [*changed, *refused]:
                raise CheckpointError(f"{resume_from_checkpoint} is of another run: {'; '.join(changed)}.")
            for change in said if self.is_world_process_zero() else ():
                logger.warning(f"As this run resumes, {change}")
            self.skipped_before, self.former = saved["skipped"], saved
            self.step_offset = saved["step offset"]
            restore_stream(self.train_dataset, Path(resume_from_checkpoint), self.args)
        self.resumed_from = resume_from_checkpoint or None
        result = super().train(self.resumed_from, *args, **kwargs)
        self._check_loss()
        return result

    def _layout(self) -> dict[str, Any]:
        """What an exact resume needs to be as it was."""
        args, dataset = self.args, self.train_dataset
        images = dataset.samples_per_epoch if isinstance(dataset, ShardedStream) else len(dataset)
        layout = {
            "images per batch": args.per_device_train_batch_size,
            "accumulated batches": args.gradient_accumulation_steps,
            "processes": args.world_size,
            "images of an epoch": images,
            "seed": args.seed,
            "seed of the data": args.data_seed,
            "EMA decay": self.ema_decay,
        }
        if self._is_stream() and not isinstance(dataset, ShardedStream):  # whose state says more
            layout["workers of the stream"] = args.dataloader_num_workers
        return layout

    def _is_stream(self) -> bool:
        return isinstance(self.train_dataset, torch.utils.data.IterableDataset)

    @property
    def run_step(self) -> int:
        """The steps of the run, if all had had as many images as they have now."""
        return self.state.global_step - self.step_offset

    def _has_other_steps(self) -> bool:
        """Whether a step has another number of images than in the run that wrote the checkpoint."""
        return bool(self.former) and count_images(self.former["layout"]) != count_images(self._layout())

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """As in `Trainer`, with the position in the run that is the checkpoint's in images."""
        super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
        if self._has_other_steps():
            images = count_images(self._layout())
            step = find_position(self.run_step, self.former["layout"], images, steps_per_epoch)
            logger.warning(
                f"A step has {images} images now: the run is at step {step} of {max_steps} such steps. The "
                f"{self.state.global_step} steps that were taken go on to be counted."
            )
            self.step_offset = self.state.global_step - step
        self.state.max_steps += self.step_offset
        epoch, step = divmod(self.run_step, steps_per_epoch)
        return epoch, 0 if self.args.ignore_data_skip else step * self.args.gradient_accumulation_steps

    @property
    def _callbacks(self) -> list[Any]:
        """With what `Trainer` saves as one of them."""
        return [*self.callback_handler.callbacks, self.control]

    def _load_callback_state(self) -> None:
        """As in `Trainer` where that is asked for. Else callbacks count on, with the settings that they have now."""
        control, saved = self.control, self.state.stateful_callbacks
        if self.args.restore_callback_states_from_checkpoint:
            super()._load_callback_state()
            self.control = control  # what was due at the checkpoint is done
        else:
            restore_counts(self._callbacks, saved)
        self.state.stateful_callbacks = list_states(self._callbacks)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As in `Trainer`. With another number of processes each has random numbers of its own anew."""
        if not self.former or self.former["layout"]["processes"] == self.args.world_size:
            return super()._load_rng_state(checkpoint)
        set_seed(seed_of_process(self.args.seed, self.state.global_step, self.args.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in `Trainer`, and then learning rates and weight decay are those of this program at the same step."""
        if checkpoint is None:
            return
        fresh, base_rates = self.optimizer.param_groups, getattr(self.lr_scheduler, "base_lrs", [])
        decays = [{key: group[key] for key in ("weight_decay",) if key in group} for group in fresh]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # of torch, in a line
            raise CheckpointError(f"The optimiser cannot have the state of {checkpoint}: {error}.") from error
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group.update(decay)
        if isinstance(self.lr_scheduler, LambdaLR):
            step = self.run_step if self._has_other_steps() else self.lr_scheduler.last_epoch
            set_schedule(self.lr_scheduler, base_rates, step)
        elif self._has_other_steps():
            raise CheckpointError(
                f"A schedule that is no function of the step ({type(self.lr_scheduler).__name__}) keeps its images per "
                "step."
            )
        if self.ema is not None:
            self.ema.module.load_state_dict(load_file(Path(checkpoint) / _EMA_WEIGHTS))

    def skipped_images(self) -> int:
        """How many corrupt images the run skipped, over all processes."""
        count = torch.tensor(self.skipped, device=self.args.device)
        return self.skipped_before + int(self.accelerator.reduce(count).item())
