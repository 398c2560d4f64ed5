"""`Trainer` whose checkpoints are complete or not there, and whose runs resume from them exactly."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from ..data.streams import ShardedStream
from ..writing.files import atomic_file, explain_write_error, hidden_folder
from ..writing.hub import register_code
from ..writing.text import escape_control
from .publishing import PublishingTrainer
from .run_checkpoints import (
    CheckpointError,
    check_states,
    last_complete_checkpoint,
    mark_complete,
    mark_incomplete,
    read_run,
)
from .streams import restore_stream, save_stream

logger = logging.get_logger(__name__)

_EMA_WEIGHTS = "ema.safetensors"
_METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


class ResumableTrainer(PublishingTrainer):
    """Writes checkpoints that are complete or not there, and resumes from them.

    Args:
        ema_decay: EMA decay of the weights (timm's `ModelEmaV3`), which every checkpoint has too; by default there
            is none.
        *args: As of [`~pvt_hf.training.publishing.PublishingTrainer`].
        **kwargs: As of [`~pvt_hf.training.publishing.PublishingTrainer`].

    Raises:
        CheckpointError: If a checkpoint cannot be written, or is of another run.
        FloatingPointError: If a loss is not finite, with step, learning rate and images.
    """

    def __init__(self, *args, ema_decay: float | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.ema_decay, self.ema = ema_decay, None
        self.skipped, self.skipped_before, self._saved_step = 0, 0, -1
        self._unchecked: tuple[torch.Tensor, int, float, list[str]] | None = None

    def _check_loss(self) -> None:
        """Ends training if the last loss is not finite. An accelerator is asked a step later, so that it need not be
        waited for, but before anything is saved or evaluated."""
        if self._unchecked is None:
            return
        loss, step, learning_rate, names = self._unchecked
        self._unchecked = None
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {step} (process {self.args.process_index}), with a learning rate "
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
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of them: torch's is the second
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

    def _evaluate(self, trial, *args, **kwargs) -> dict[str, float]:
        """As in `Trainer`, after the checkpoint that is due: an evaluation that fails costs no training."""
        self._check_loss()
        if self.control.should_save:
            self._save_checkpoint(self.model, trial)
        return super()._evaluate(trial, *args, **kwargs)

    def _add_metrics(self, folder: Path) -> None:
        """What the evaluation changed since the checkpoint of this step was written: the metrics, and which is best."""
        best = folder.parent / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and best.is_dir():
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            run, state = read_run(folder), folder / f"{TRAINER_STATE_NAME}.partial"
            with self._name_last_checkpoint(folder):
                self.state.save_to_json(str(state))
                mark_incomplete(folder)
                state.replace(folder / TRAINER_STATE_NAME)
                mark_complete(folder, run)

    def _save_checkpoint(self, model, trial) -> None:
        """As in `Trainer`, and in the end a list of the files, without which it is not taken for a good checkpoint."""
        run_dir, args = self._get_output_dir(trial), self.args
        folder, limit = Path(run_dir) / f"checkpoint-{self.state.global_step}", args.save_total_limit
        self._check_loss()
        # A schedule that follows the metrics has taken its step since.
        if self._saved_step == self.state.global_step and args.lr_scheduler_type not in _METRIC_SCHEDULES:
            return self._add_metrics(folder)
        skipped = self.skipped_images()
        # Older checkpoints go, and the Hub gets this one, when it is complete.
        args.save_total_limit, push, args.push_to_hub = None, args.push_to_hub, False
        try:
            with self._name_last_checkpoint(folder):
                if args.should_save:
                    mark_incomplete(folder)
                super()._save_checkpoint(model, trial)
                if args.should_save and self.ema is not None:
                    weights = {key: value.contiguous() for key, value in self.ema.module.state_dict().items()}
                    save_file(weights, folder / _EMA_WEIGHTS)
                save_stream(self.train_dataset, folder, args.should_save)
                self.accelerator.wait_for_everyone()
                if args.should_save:
                    mark_complete(folder, {"layout": self._layout(), "skipped": skipped})
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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in `Trainer`, also from scratch where there is nothing to resume from.

        Args:
            resume_from_checkpoint: A checkpoint, or `True` for the last complete one of `output_dir`.
            *args: As in `Trainer`.
            **kwargs: As in `Trainer`.

        Raises:
            CheckpointError: If the given checkpoint is not complete, of another run, or not what a run wrote.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            logger.warning(
                f"Training resumes from {resume_from_checkpoint}."
                if resume_from_checkpoint
                else "Training starts from scratch: no checkpoint is complete."
            )
        if resume_from_checkpoint:
            if self.is_deepspeed_enabled:
                raise CheckpointError(f"{resume_from_checkpoint} is not resumed from: DeepSpeed unpickles its states.")
            saved, now = read_run(resume_from_checkpoint), self._layout()
            check_states(resume_from_checkpoint)
            layout = saved["layout"]
            if changed := [f"{key} is {now[key]}, not {layout.get(key)}" for key in now if layout.get(key) != now[key]]:
                raise CheckpointError(f"{resume_from_checkpoint} is of another run: {'; '.join(changed)}.")
            self.skipped_before = saved["skipped"]
            restore_stream(self.train_dataset, Path(resume_from_checkpoint), self.args)
        result = super().train(resume_from_checkpoint or None, *args, **kwargs)
        self._check_loss()
        return result

    def _layout(self) -> dict[str, Any]:
        """What an exact resume needs to be as it was."""
        args = self.args
        layout = {
            "images per batch": args.per_device_train_batch_size,
            "accumulated batches": args.gradient_accumulation_steps,
            "processes": args.world_size,
            "images of an epoch": len(self.train_dataset),
            "seed": args.seed,
            "seed of the data": args.data_seed,
            "EMA decay": self.ema_decay,
        }
        is_stream = isinstance(self.train_dataset, torch.utils.data.IterableDataset)
        if is_stream and not isinstance(self.train_dataset, ShardedStream):  # of which `restore_stream` knows more
            layout["workers of the stream"] = args.dataloader_num_workers
        return layout

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.ema is not None:
            self.ema.module.load_state_dict(load_file(Path(checkpoint) / _EMA_WEIGHTS))

    def skipped_images(self) -> int:
        """How many corrupt images the run skipped, over all processes."""
        count = torch.tensor(self.skipped, device=self.args.device)
        return self.skipped_before + int(self.accelerator.reduce(count).item())
