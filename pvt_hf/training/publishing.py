"""`Trainer` that publishes what pvt_hf makes: code with the weights, and uploads whose failures are a line."""

import shutil
from pathlib import Path
from shlex import quote
from typing import Any

from ..models.pretrained import PretrainedMixin
from ..writing.hub import UploadError, explain_upload_error, list_code, register_code
from .report import TASK_AUTO_CLASSES
from .waits import QueueingTrainer


class PublishingTrainer(QueueingTrainer):
    """What every training here does with the Hub. A subclass says what it trains for: `task`, as the Hub calls it.

    Args:
        with_code: Whether the code of model and image processor is saved with them, so that they load where pvt_hf is
            not installed (default: not).
        *args: As of [`~transformers.Trainer`].
        **kwargs: As of [`~transformers.Trainer`].

    Raises:
        ValueError: For `with_code` with a model whose class is transformers' own.
        UploadError: If the repository cannot be made.
    """

    task: str

    def __init__(self, *args, with_code: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.code = self._list_code() if with_code else {}

    def _list_code(self) -> dict[str, type[Any]]:
        """The classes that are saved with the weights: of adapters, those of what is adapted."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if not isinstance(model, PretrainedMixin):
            raise ValueError(f"`with_code` needs a model of pvt_hf: a {type(model).__name__} is transformers' own.")
        return list_code(TASK_AUTO_CLASSES[self.task], model, self.processing_class)

    def init_hf_repo(self, *args, **kwargs) -> None:
        """As in `Trainer`. A Hub that refuses is an `UploadError`."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:
            reason, _ = explain_upload_error(error)
            name = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
            raise UploadError(f"The repository {name} could not be made: {reason}.") from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `Trainer`, with the code that the files of the checkpoint name."""
        if self.code and self.is_world_process_zero():
            for file in Path(checkpoint_folder).glob("*.py"):
                shutil.copy(file, self.args.output_dir)
        with register_code(self.code):
            super()._push_from_checkpoint(checkpoint_folder)

    def _upload(self) -> None:
        try:
            self.push_to_hub()
        except Exception as error:  # the run is over, and everything is here
            reason, _ = explain_upload_error(error)
            raise UploadError(
                f"The upload to {self.hub_model_id} failed: {reason}. Everything is in {self.args.output_dir}. To try "
                f"again: hf upload {self.hub_model_id} {quote(self.args.output_dir)}"
            ) from error
