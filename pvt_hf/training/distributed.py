"""`Trainer` on several machines, and with FSDP: who writes what, and what each process reads."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import FSDP_MODEL_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .machines import check_same_run, gather, shares_folder
from .optimization import SettingError
from .publishing import PublishingTrainer
from .run_checkpoints import CheckpointError
from .sharded import gather_weights, is_sharded, load_model_shards, load_optimizer_shards, save_shards

logger = logging.get_logger(__name__)

_SHARDED = "SHARDED_STATE_DICT"
# State dict types and versions of FSDP with which a run can be saved.
_KINDS = (("FULL_STATE_DICT", 1), ("FULL_STATE_DICT", 2), (_SHARDED, 2))


class DistributedTrainer(PublishingTrainer):
    """Trains on several machines, whose main process writes everything, or of each the first with
    `args.save_on_each_node`.

    With FSDP, checkpoints have whole weights, or shards of `SHARDED_STATE_DICT`, which any number of processes reads.

    Args:
        *args: As of [`~pvt_hf.training.publishing.PublishingTrainer`].
        **kwargs: As of [`~pvt_hf.training.publishing.PublishingTrainer`].

    Raises:
        ValueError: For settings of FSDP that cannot be used.
        SettingError: If the processes are of different runs, or the folder cannot be what the settings need.
    """

    def _check_sharding(self) -> None:
        if not self.is_fsdp_enabled:
            raise ValueError(
                "`fsdp` is set, but accelerate does not shard here (it does not on CPUs, and needs several processes)."
            )
        plugin = self.accelerator.state.fsdp_plugin
        kind, version = plugin.state_dict_type.name, plugin.fsdp_version
        if (kind, version) not in _KINDS:
            raise ValueError(
                f"The state dict type {kind} of FSDP {version} is none that a run is saved as: choose FULL_STATE_DICT, "
                "or SHARDED_STATE_DICT with FSDP 2 (`fsdp_config` or `accelerate config`)."
            )

    @property
    def writes_shards(self) -> bool:
        """Whether run checkpoints have shards of the weights."""
        return self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.state_dict_type.name == _SHARDED

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in `Trainer`, if all processes are of one run, and read what they can.

        Args:
            resume_from_checkpoint: A checkpoint.
            *args: As in `Trainer`.
            **kwargs: As in `Trainer`.

        Raises:
            SettingError: If they are not, or the folder cannot be what the settings need.
            CheckpointError: If a checkpoint is not what this run reads.
        """
        check_same_run(self._layout())
        self._check_folder()
        if resume_from_checkpoint:
            self._check_kind(str(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_kind(self, checkpoint: str) -> None:
        """Shards are read by every run, what else FSDP wrote or did not by such a run only."""
        by_fsdp = (Path(checkpoint) / f"{FSDP_MODEL_NAME}.bin").is_file()
        if is_sharded(checkpoint) or (by_fsdp == self.is_fsdp_enabled and not self.writes_shards):
            return
        how = "with FSDP and FULL_STATE_DICT" if by_fsdp else "without FSDP"
        raise CheckpointError(f"{checkpoint} was written {how}, and can be resumed from so only.")

    def _layout(self) -> dict[str, Any]:
        """What is the same in all processes of a run."""
        return {}

    def _check_folder(self) -> None:
        args = self.args
        machines = gather(args.local_process_index).count(0)
        if args.world_size == 1 or shares_folder(args.output_dir):
            if args.save_on_each_node and machines > 1:
                raise SettingError(
                    f"`save_on_each_node`: all machines see the same {args.output_dir}, where they would write "
                    "the same files."
                )
            return
        if self.writes_shards:
            raise SettingError(f"{_SHARDED} needs an output folder that all see: {args.output_dir} is none.")
        if not args.save_on_each_node:
            if args.load_best_model_at_end:
                raise SettingError(
                    f"`load_best_model_at_end`: not every machine sees the checkpoints in {args.output_dir}: let them "
                    "share it, or set `save_on_each_node`."
                )
            logger.warning(
                f"The machines do not share {args.output_dir}: only that of the main process gets checkpoints, and a "
                "resume needs one on each (share it, copy it, or --save_on_each_node true)."
            )

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`, and with shards the whole weights too, but for run checkpoints."""
        folder = None if output_dir is None else str(output_dir)
        super().save_model(folder, _internal_call=True)
        if self.writes_shards and not Path(folder or "").name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            self._save(folder, state_dict=gather_weights(self.model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As in `Trainer`, and with `save_on_each_node` the weights too: `save_pretrained` writes them in the main
        process of the job only, whatever it is told."""
        if not self.args.save_on_each_node:
            return super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.should_save_on_this_rank = lambda is_main_process: is_main_process
        try:
            super()._save(output_dir, state_dict)
        finally:
            del model.should_save_on_this_rank

    def _save_rng_state(self, output_dir: str) -> None:
        """As in `Trainer`, where each process would write its own, on machines whose folders are not saved to."""
        with tempfile.TemporaryDirectory() as folder:
            super()._save_rng_state(folder)
            own = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        states = gather(own)
        if self.args.should_save:
            for name, content in (item for state in states for item in state.items()):
                (Path(output_dir) / name).write_bytes(content)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.writes_shards:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_shards(output_dir, self.model, self.optimizer, self.args.should_save)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if not is_sharded(resume_from_checkpoint):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_model_shards(resume_from_checkpoint, self.model if model is None else model)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if not is_sharded(best):
            return super()._load_best_model()
        load_model_shards(best, self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(checkpoint):
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer_shards(checkpoint, self.model, self.optimizer)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
