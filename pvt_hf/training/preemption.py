"""Runs that a scheduler, a spot machine or a user ends, by SIGTERM or SIGUSR1: with a complete checkpoint at the next
step, in all processes at the same one, and an exit code that says so."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.utils import logging

from ..writing.signals import SIGNALS, EndSignals
from .optimization import SettingError
from .resumable import ResumableTrainer
from .run_checkpoints import last_complete_checkpoint
from .streams import start_worker
from .waits import start_reading

logger = logging.get_logger(__name__)

PREEMPTED = 75  # the EX_TEMPFAIL of sysexits.h: "the user is invited to retry"


class Preempted(SystemExit):
    """A run was asked to end, and resumes from its last checkpoint. If nobody catches it, the exit code is 75."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class _EndTogether(TrainerCallback):
    """Asks between steps, and between the batches of an evaluation, whether the run shall end.

    The last step of an epoch or of the run is not over before what `Trainer` does at its end.
    """

    def __init__(self, trainer: "PreemptibleTrainer"):
        self.trainer = trainer
        self._is_epoch_over = False

    def on_step_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if state.global_step == trainer._initial_global_step and trainer.shall_end(wait=True):  # nothing to be saved
            raise Preempted

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.shall_end() and not self._is_last_step(state, control):
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        self._is_epoch_over = True
        if self.trainer.is_ending:
            control.should_save = True

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._is_epoch_over = False

    def on_save(self, args, state, control, **kwargs):
        if self.trainer.shall_end() and (self._is_epoch_over or not self._is_last_step(state, control)):
            raise Preempted

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.trainer.is_preemptible and self.trainer.shall_end():
            raise Preempted

    def _is_last_step(self, state, control) -> bool:
        return control.should_training_stop or self.trainer.run_step % self.trainer.steps_per_epoch == 0


class PreemptibleTrainer(ResumableTrainer):
    """Ends `train` and `finish` when SIGTERM or SIGUSR1 asks one of its processes to.

    A signal for which the program has a handler of its own is left to that.

    Attributes:
        is_ending: Whether all processes know that the run ends.
        is_preemptible: Whether it is in what can be ended.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.enable_jit_checkpoint:
            raise SettingError("`enable_jit_checkpoint` is not needed: SIGTERM ends a run with a checkpoint as it is.")
        self.signals = EndSignals(*SIGNALS, postpone=True)
        self.is_ending = self.is_preemptible = False
        self._answer: Callable[[], float] | None = None
        self._initial_global_step, self._finished = 0, None  # the model, when `train` is over
        self.add_callback(_EndTogether(self))

    def shall_end(self, wait: bool = False) -> bool:
        """Whether a process was asked to end. Called by all of them, in which it is the same.

        Args:
            wait: Whether to wait for an accelerator; it is asked one call later by default (`False`), when it has the
                answer.
        """
        received = self.signals.received is not None
        if self.args.world_size == 1:
            return self._note_end(received)
        flag = torch.full((), float(received), device=self.args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        former, self._answer = self._answer, start_reading(flag)
        answer = self._answer if wait or flag.device.type == "cpu" else former
        return self._note_end(answer is not None and answer() > 0)

    def _note_end(self, is_asked: bool) -> bool:
        self.is_ending |= is_asked
        if self.is_ending and self.args.save_only_model:  # the last checkpoint is to be resumed from
            self.args.save_only_model, self._saved_step = False, -1
        return self.is_ending

    @contextmanager
    def end_together(self) -> Iterator[None]:
        """While it lasts, a signal ends the run where all processes can: with [`Preempted`], after a checkpoint of the
        last step."""
        self.is_preemptible, self.is_ending = True, False
        save_only_model = self.args.save_only_model
        with self.signals:  # also while the checkpoint is written
            try:
                yield
            except Preempted:
                self._save_last_step()
                raise
            finally:
                self.is_preemptible, self.args.save_only_model = False, save_only_model

    def _save_last_step(self) -> None:
        """Unless it is saved, or the model has become another one since."""
        step, args = self.state.global_step, self.args
        is_same = self._finished is None or (self.model is self._finished and not args.load_best_model_at_end)
        if is_same and step not in (self._initial_global_step, self._saved_step):
            self._save_checkpoint(self.model, None)
        if self._finished is None:
            self.callback_handler.on_train_end(args, self.state, self.control)  # so that others write what they have
        if self.is_world_process_zero():
            is_saved = self._saved_step == step
            last = f"checkpoint-{step}" if is_saved else last_complete_checkpoint(args.output_dir)
            logger.warning(
                f"The run was asked to end, and does after step {step} of {self.state.max_steps}. "
                f"{f'{last} is complete' if last else 'There is no checkpoint yet'}; the same command with "
                f"`--resume_from_checkpoint true` continues. The exit code is {PREEMPTED}."
            )

    def train(self, *args, **kwargs):
        """As in `Trainer`, and ended by SIGTERM and SIGUSR1."""
        self._finished = None
        with self.end_together():
            result = super().train(*args, **kwargs)
            self._finished = self.model
            if self.shall_end(wait=True):
                raise Preempted
            return result

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As in `Trainer`. What a signal leaves out, the resumed run does first."""
        if self.is_preemptible and self.shall_end():
            raise Preempted
        return super().evaluate(*args, **kwargs)

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        """As in `Trainer`; a signal for all processes does not end the loader's."""
        loader = super().get_eval_dataloader(*args, **kwargs)
        loader.worker_init_fn = start_worker
        return loader
