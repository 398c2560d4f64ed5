"""What several commands do alike: the variant of a checkpoint, a backbone's weights, the bundled scenes, the end."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import PreTrainedConfig, TrainingArguments

from ..data.classification import load_images
from ..data.detection import read_detection_dataset
from ..data.detection_folders import find_layout, read_detection_folder
from ..data.detection_records import DetectionData
from ..data.digits import write_scenes
from ..data.images import ImageError
from ..models.backbone import get_backbone_config, load_pretrained_backbone
from ..prediction.loading import ModelError, read_saved_config
from ..training.arguments import DetectionDataArguments, EvaluationArguments, TrainingOptions
from ..training.changes import describe_arguments, find_changes
from ..training.machines import agree_on_checkpoint, explain_lost_process, is_lost_process, read_agreed_run
from ..training.optimization import SettingError
from ..training.preemption import PREEMPTED
from ..training.run_checkpoints import CheckpointError
from ..training.trainer import VisionTrainer
from ..variants import build_config, find_variant
from ..writing.hub import UploadError
from ..writing.signals import SIGNALS, Ended, EndSignals
from ..writing.text import escape_lines
from .ending import print_error

DEFAULT_VARIANT = "pvt_v2_b0"


def read_config(checkpoint: str) -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        SystemExit: If there is none, with what transformers says about it.
    """
    try:
        return read_saved_config(checkpoint)
    except ModelError as error:
        raise SystemExit(str(error)) from error


def read_backbone_config(checkpoint: str | None, variant: str | None) -> tuple[PreTrainedConfig, str | None]:
    """What a model's backbone is.

    Args:
        checkpoint: From which it comes: of any task, or `None` for random weights.
        variant: What it has to be; `None` for whatever the checkpoint is, and for `pvt_v2_b0` without one.

    Returns:
        Its configuration (of a classifier, the classifier's), and the name of its variant if it is one.

    Raises:
        SystemExit: If the checkpoint is of another variant.
    """
    if checkpoint is None:
        variant = variant or DEFAULT_VARIANT
        return build_config(variant), variant
    config = get_backbone_config(read_config(checkpoint))
    found = getattr(find_variant(config), "name", None)
    if variant not in (None, found):
        raise SystemExit(f"{checkpoint} is not a {variant}")
    return config, found


def check_code(options: TrainingOptions, model_type: str) -> None:
    """Raises a `SystemExit` if the code of a model is to be saved that is transformers' own."""
    if options.with_code and model_type not in ("pvt", "pvt_v2") and not model_type.startswith("pvt_hf_"):
        raise SystemExit(
            f"--with_code cannot be used for a model of type {model_type}: its class is transformers' own, which finds "
            "the backbone's by an installed pvt_hf"
        )


def check_resume(args: TrainingArguments, recipe: Any = None) -> None:
    """Raises a `CheckpointError` if the run is resumed with arguments that must not change: before the data are looked
    at, which may take long.

    Args:
        args: Of the run.
        recipe: Of the run (default: none, it depends on the data).
    """
    if checkpoint := agree_on_checkpoint(args.output_dir, args.resume_from_checkpoint):
        saved, now = read_agreed_run(checkpoint)["run"], describe_arguments(args, recipe)
        refused, _ = find_changes({name: value for name, value in saved.items() if name in now}, now)
        if refused:
            raise CheckpointError(f"{checkpoint} is of another run: {'; '.join(refused)}.")


def load_backbone(model: nn.Module, checkpoint: str | None) -> None:
    """Fills a model's backbone from a checkpoint, if there is one, and says so."""
    if checkpoint is not None:
        count = load_pretrained_backbone(model, checkpoint)
        if PartialState().is_main_process:
            print(f"all {count} tensors of the backbone are from {checkpoint}")


def draw_scenes(args: TrainingArguments, num_scenes: int) -> Path:
    """The folder of the bundled digit scenes, beside `output_dir`, for other runs too."""
    folder = Path(args.output_dir).parent / f"scenes-{num_scenes}"
    with args.main_process_first(desc="drawing scenes"):
        return write_scenes(folder, num_scenes, validation=max(8, num_scenes // 5))


@contextmanager
def exit_on_bad_data() -> Iterator[None]:
    """What is wrong with the data ends the program with a message instead of a traceback."""
    try:
        yield
    except (ImageError, ValueError) as error:
        raise SystemExit(_read_message(error)) from error


@contextmanager
def exit_on_bad_run() -> Iterator[None]:
    """Settings that do not fit, images that turn out to be corrupt, checkpoints that cannot be read or written, and
    uploads that fail end the program in the same way; Ctrl-C, and signals before and after what can be resumed, in a
    line; and so does a job that has lost one of its processes. Any other error is not the user's, and has a
    traceback."""
    try:
        # One of several processes would leave the others alone: before training a signal is noted, for the first step.
        with EndSignals(*SIGNALS, postpone=int(os.environ.get("WORLD_SIZE", 1)) > 1):
            yield
    except (KeyboardInterrupt, Ended) as reason:
        print_error("interrupted; the same command with --resume_from_checkpoint true continues")
        raise SystemExit(PREEMPTED if isinstance(reason, Ended) else 128 + signal.SIGINT) from reason
    except (CheckpointError, SettingError, UploadError) as error:
        raise SystemExit(escape_lines(str(error))) from error
    except ImageError as error:
        message = _read_message(error)
        raise SystemExit(f"{message}\n--skip_corrupt leaves out images that cannot be decoded") from error
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise SystemExit(escape_lines(explain_lost_process(error))) from None  # its traceback is the same anywhere


def _read_message(error: Exception) -> str:
    """Of an error from a loader's process it is the last line of a traceback."""
    message = str(error)
    if message.startswith("Caught "):
        message = message.strip().split("\n")[-1].split(": ", 1)[-1]
    return escape_lines(message)


def read_detection_split(
    options: DetectionDataArguments | EvaluationArguments, split: str, label_names: list[str] | None, workers: int
) -> DetectionData:
    """A split of `--dataset_name`: of a folder as YOLO, Pascal VOC or Roboflow lay it out, or of a data set of the Hub.

    Args:
        options: With the name, and how the data are written.
        split: Its name.
        label_names: Names of the classes, where the data do not say them.
        workers: Processes that look at files.
    """
    name = str(options.dataset_name)
    if layout := find_layout(name):
        if options.bbox_format != "coco":
            raise ValueError(f"--bbox_format: {name} has the layout {layout}, which says what its boxes are.")
        return read_detection_folder(
            name, split, label_names, options.skip_corrupt, options.allow_outside, workers=workers
        )
    rows = load_images(name, split, options.dataset_config_name, image_column=options.image_column)
    return read_detection_dataset(
        rows, label_names, options.objects_column, options.bbox_format, options.skip_corrupt, workers
    )


def finish(trainer: VisionTrainer) -> int:
    """Evaluates and saves what was trained, and prints what was reached.

    Returns:
        The exit status, 0.
    """
    summary = trainer.finish()
    if trainer.is_world_process_zero():
        print(escape_lines(summary))
    return 0
