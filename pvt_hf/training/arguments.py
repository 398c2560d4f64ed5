"""The arguments of the training programs as dataclasses: shared ones, and what each task adds to them.

`None` means that the recipe decides, or that the option is not used; the help text says which.
"""

import json
import os
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments
from transformers.utils import logging, strtobool

from ..data.box_formats import BBOX_FORMATS
from ..recipes import DETECTION_RECIPES, SEGMENTATION_RECIPES, DetectionRecipe, ImageNetRecipe, SegmentationRecipe
from ..variants import VARIANTS
from ..writing.files import why_unwritable
from .machines import ask_machines, find_missing_processes, start_cpu_group
from .optimization import images_per_step
from .report import check_license
from .run_checkpoints import last_complete_checkpoint

logger = logging.get_logger(__name__)

Recipe = TypeVar("Recipe", ImageNetRecipe, DetectionRecipe, SegmentationRecipe)


def option(default: Any, help: str, **parser_options: Any) -> Any:
    """A field of a dataclass of arguments.

    Args:
        default: Its value where nobody gives one.
        help: What it does, its unit, and its default.
        **parser_options: Of `argparse`, for example `choices`.
    """
    return field(default=default, metadata={"help": help} | parser_options)


def check_together(arguments: Any, *names: str) -> None:
    """Raises a `ValueError` if only some of these arguments are given."""
    if len({getattr(arguments, name) is None for name in names}) > 1:
        *first, last = (f"--{name}" for name in names)
        raise ValueError(f"{', '.join(first)} and {last} go together")


def check_max_detections(value: int | None) -> None:
    """Raises a `ValueError` for less than COCO's numbers need."""
    if value is not None and value < 10:
        raise ValueError(f"--max_detections must be at least 10, got {value}")


def check_folders(arguments: Any, *kinds: str) -> None:
    """Raises a `ValueError` unless what belongs together is given of the training set and of the validation set, or of
    the training set alone where `train_val_split` makes the other.

    Args:
        arguments: With the fields `train_{kind}` and `eval_{kind}`.
        *kinds: What a set is made of.
    """
    train, validation = ([f"{split}_{kind}" for kind in kinds] for split in ("train", "eval"))
    if arguments.train_val_split is None:
        check_together(arguments, *train, *validation)
    elif any(getattr(arguments, name) for name in validation):
        given = " and ".join(f"--{name}" for name in validation)
        raise ValueError(f"--train_val_split makes the validation set: leave {given} out")
    check_together(arguments, *train)


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str | None = option(
        None, "checkpoint of this task to fine-tune: a folder, or a repository of the Hub (default: none)"
    )
    variant: str | None = option(
        None,
        "architecture of the PVT (default: that of the checkpoint; without one, pvt_v2_b0 from random weights)",
        choices=list(VARIANTS),
    )
    freeze_stages: int = option(0, "how many stages of the backbone are not trained, from the image on (default: 0)")
    channels_last: bool = option(False, "store images and weights with the channels last (default: false)")


@dataclass
class ClassificationModelArguments(ModelArguments):
    """What is trained to classify images."""

    image_size: int = option(224, "height and width of the images, in pixels (default: 224, the papers')")
    lora_rank: int | None = option(
        None, "train LoRA adapters of this rank on query, key and value instead of the model (default: none)"
    )

    def __post_init__(self) -> None:
        if self.lora_rank and not self.model_name_or_path:
            raise ValueError("--lora_rank adapts a trained model: pass --model_name_or_path")


@dataclass
class DetectionModelArguments(ModelArguments):
    """What is trained to detect objects."""

    backbone_checkpoint: str | None = option(
        None, "classifier, detector or segmenter from whose weights the backbone starts (default: random weights)"
    )

    config_overrides: dict | str | None = option(
        None, "JSON of fields of the detector's configuration, as '{\"neck_channels\": 64}' (default: none)"
    )
    max_detections: int | None = option(
        None, "most detections in an image, made and measured, at least 10 (default: the checkpoint's, or 100)"
    )

    def __post_init__(self) -> None:
        check_max_detections(self.max_detections)
        if isinstance(self.config_overrides, str):
            self.config_overrides = json.loads(self.config_overrides)


WINDOW = "segment in windows of this many pixels of the network's input (default: the whole image)"
STRIDE = "pixels from one window to the next (default: none; it goes with --window)"
TTA_SCALES = (
    "test-time augmentation: predict at these scales too (default: none; mmsegmentation's: 0.5 0.75 1.25 1.5 1.75)"
)
TTA_FLIP = "test-time augmentation: predict mirrored images too, and average (default: false)"


ALLOW_MISSING_CLASSES = (
    "train though some classes have nothing to train on, and let the data lack some (default: false, an error)"
)


@dataclass
class DataArguments:
    """What it is trained on."""

    dataset_name: str | None = option(None, "data set of the Hub (default: the bundled data)")
    dataset_config_name: str | None = option(None, "configuration of the data set (default: its own)")
    train_split: str = option("train", "split to train on (default: train)")
    eval_split: str = option("validation", "split to evaluate on (default: validation)")
    train_val_split: float | None = option(
        None, "part of the training split that becomes the validation set, as 0.1 (default: none)"
    )
    class_names: str | None = option(
        None,
        "JSON, YAML, CSV or text file of class names in the order of the labels (default: as the data say, of maps as "
        "the checkpoint says)",
    )
    skip_corrupt: bool = option(
        False, "leave out images that cannot be decoded, of both splits, and list them (default: false, an error)"
    )

    def __post_init__(self) -> None:
        if self.train_val_split is not None and not 0 < self.train_val_split < 1:
            raise ValueError(f"--train_val_split must be between 0 and 1, got {self.train_val_split}")


@dataclass
class ClassificationDataArguments(DataArguments):
    """Images with class labels to train on."""

    dataset_name: str | None = option(
        None,
        "data set of the Hub, folder of images per class, or pattern of parquet files or WebDataset shards "
        "(default: the bundled digits)",
    )
    eval_dataset_name: str | None = option(
        None, "as --dataset_name, for evaluation; a pattern of files needs it (default: --dataset_name)"
    )

    image_column: str | None = option(None, "column of images (default: the only one)")
    label_column: str | None = option(None, "column of labels or of names (default: the only one of class labels)")
    num_labels: int | None = option(
        None, "number of classes, for streamed labels without names (default: that of --class_names)"
    )
    streaming: bool = option(False, "read images when they are needed (default: false)")
    samples_per_epoch: int | None = option(
        None, "images in an epoch of a stream (default: its length, where the stream knows it)"
    )
    shuffle_buffer: int = option(10_000, "images of a stream that each process shuffles (default: 10000)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_val_split and self.streaming:
            raise ValueError("--train_val_split needs all the images: leave --streaming out")
        if self.shuffle_buffer < 1:
            raise ValueError(f"--shuffle_buffer must be at least 1, got {self.shuffle_buffer}")
        if (self.dataset_name or "").endswith((".parquet", ".tar")) and not self.eval_dataset_name:
            raise ValueError("--dataset_name is a pattern of files: pass --eval_dataset_name with those for evaluation")


@dataclass
class DetectionDataArguments(DataArguments):
    """Images with objects to train on: COCO json with a folder of images, a folder of YOLO, Pascal VOC or Roboflow,
    or a data set with `objects`."""

    dataset_name: str | None = option(
        None,
        "data set of the Hub, or folder with the splits of YOLO (data.yaml), Pascal VOC or Roboflow (default: digit "
        "scenes)",
    )

    train_annotations: str | None = option(None, "COCO json of the training set (default: none)")
    train_images: str | None = option(None, "folder of its images (default: none)")
    eval_annotations: str | None = option(None, "COCO json of the validation set (default: none)")
    eval_images: str | None = option(None, "folder of its images (default: none)")

    bbox_format: str = option(
        "coco",
        "boxes of COCO json and of the Hub: coco (x, y, width, height) or voc (two corners) in pixels; relative to the "
        "image yolo (centre, width, height) or albumentations (two corners) (default: coco)",
        choices=list(BBOX_FORMATS),
    )
    image_column: str | None = option(None, "column of images (default: the only one)")
    objects_column: str = option("objects", "column of objects (default: objects)")
    allow_missing_classes: bool = option(False, ALLOW_MISSING_CLASSES)
    skip_without_mask: bool = option(
        False, "for Mask R-CNN: leave out annotations without a mask (default: false, they train their box only)"
    )
    num_scenes: int = option(1000, "digit scenes that are drawn for training, where no data are given (default: 1000)")
    keep_empty: bool = option(False, "train on images without objects too (default: false)")
    allow_outside: bool = option(
        False, "let COCO json name files outside of the folder of its images (default: false, an error)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folders(self, "annotations", "images")


REDUCE_LABELS = "label 0 is no class, and the others count from 0 (default: false)"
BINARY_MASKS = "maps are masks of 0 and 255, also JPEG: from 128 on it is the second of two classes (default: false)"
PALETTE = (
    "maps are of colours: JSON file of a list of colours in the order of the classes, of an object from class names to "
    "colours, or from colours to classes, where a colour is [128, 64, 0], '128,64,0' or '#804000'; or CSV file of the "
    "columns name, r, g, b (default: none)"
)


@dataclass
class RecipeArguments:
    """How it is trained, beside the fields of `TrainingArguments`: what replaces fields of the recipe."""

    smoke: bool = option(False, "everything on bundled data in under a minute (default: false)")
    ema_decay: float | None = option(None, "EMA decay of the weights, for example 0.9999 (default: no EMA)")
    drop_path_rate: float | None = option(None, "stochastic depth of the last block (default: the recipe's)")


@dataclass
class ClassificationRecipeArguments(RecipeArguments):
    """What replaces fields of an [`~pvt_hf.recipes.ImageNetRecipe`]."""

    warmup_epochs: int | None = option(None, "epochs of the linear warm-up (default: 5, the released code's)")
    repeats: int | None = option(None, "how often an image is drawn in an epoch (default: 3, the released code's)")
    mixup: float | None = option(None, "Mixup alpha, 0 for none (default: 0.8, the released code's)")
    cutmix: float | None = option(None, "CutMix alpha, 0 for none (default: 1.0, the released code's)")
    label_smoothing: float | None = option(
        None, "smoothing of the class probabilities (default: 0.1, the released code's)"
    )
    random_erasing: float | None = option(
        None, "probability of erasing a rectangle (default: 0.25, the released code's)"
    )
    layer_decay: float = option(1.0, "learning-rate multiplier from a block to the one before it (default: 1.0)")


@dataclass
class DetectionRecipeArguments(RecipeArguments):
    """Which [`~pvt_hf.recipes.DetectionRecipe`], and what replaces its fields."""

    recipe: str = option("retinanet_1x", "the recipe (default: retinanet_1x)", choices=list(DETECTION_RECIPES))
    demo: bool = option(False, "a small detector that learns the digit scenes in minutes (default: false)")
    shortest_edges: list[int] | None = option(
        None, "pixels of the shortest edge; each image gets one of them by chance (default: the recipe's)"
    )
    longest_edge: int | None = option(None, "largest longest edge, in pixels (default: 1333, the papers')")
    warmup_iterations: int | None = option(None, "steps of the linear warm-up (default: the recipe's)")
    flip: float | None = option(None, "probability of a horizontal flip (default: 0.5, the released code's)")


@dataclass
class EvaluationArguments:
    """What is measured, and on which images."""

    model_name_or_path: list[str] | None = option(
        None, "checkpoints of any task: folders, or repositories of the Hub (default: none; see --variant)"
    )
    variant: str | None = option(
        None, "classifier in --checkpoint_root to measure instead (default: none)", choices=["all", *VARIANTS]
    )
    checkpoint_root: str = option("converted", "the folder that `pvt-hf convert --all` wrote (default: converted)")
    recipe: str | None = option(
        None,
        "the recipe of the papers' numbers to compare with (default: the 1x schedules of detectors)",
        choices=["imagenet", *DETECTION_RECIPES, *SEGMENTATION_RECIPES],
    )
    dataset_name: str | None = option(
        None,
        "data set of the Hub; for classifiers also a folder or a pattern of files, for detectors a folder of YOLO, "
        "Pascal VOC or Roboflow (default: the bundled data)",
    )
    dataset_config_name: str | None = option(None, "configuration of the data set (default: its own)")
    eval_split: str = option("validation", "split of the data set (default: validation)")
    label_column: str | None = option(None, "of classifiers: column of labels (default: the only one of class labels)")

    map_column: str | None = option(
        None, "of segmenters: column of label maps (default: the only image column beside `image`)"
    )
    image_column: str | None = option(
        None, "column of images (default: the only one; of segmenters image, or else pixel_values)"
    )
    objects_column: str = option("objects", "of detectors: column of objects (default: objects)")
    bbox_format: str = option(
        "coco",
        "of detectors: format of the boxes, as in `pvt-hf train-detection` (default: coco)",
        choices=list(BBOX_FORMATS),
    )
    class_names: str | None = option(
        None,
        "JSON, YAML, CSV or text file of the names of the data's classes in the order of their labels, to compare "
        "with the model's (default: as the data say)",
    )
    max_detections: int | None = option(
        None, "of detectors: most detections in an image, made and measured (default: the checkpoint's, or 100)"
    )
    skip_corrupt: bool = option(
        False, "leave out images that cannot be decoded, and list them (default: false, an error)"
    )
    images: str | None = option(None, "of detectors and segmenters: folder of images (default: none)")
    annotations: str | None = option(None, "of detectors: COCO json of --images (default: none)")
    maps: str | None = option(None, "of segmenters: folder of the label maps of --images (default: none)")
    reduce_labels: bool | None = option(
        None, "of segmenters: label 0 is no class, as in training (default: as the checkpoint)", nargs="?", const=True
    )
    binary_masks: bool = option(False, f"of segmenters: {BINARY_MASKS}")
    palette: str | None = option(None, f"of segmenters: {PALETTE}")
    window: int | None = option(None, f"of segmenters: {WINDOW}")
    stride: int | None = option(None, f"of segmenters: {STRIDE}")
    tta_scales: list[float] | None = option(None, f"of segmenters and classifiers: {TTA_SCALES}")
    tta_flip: bool = option(False, f"of segmenters and classifiers: {TTA_FLIP}")
    allow_outside: bool = option(
        False, "let COCO json name files outside of the folder of its images (default: false, an error)"
    )
    max_eval_samples: int | None = option(None, "measure on so many images, the first ones (default: on all)")
    per_device_eval_batch_size: int | None = option(None, "images per batch (default: 64 for classifiers, else 1)")
    dataloader_num_workers: int = option(4, "processes that read images, for each device (default: 4)")
    bf16: bool = option(False, "bfloat16 mixed precision (default: false)")
    output_dir: str = option("runs/evaluation", "folder of `results.json` (default: runs/evaluation)")
    seed: int = option(0, "seed of the bundled scenes (default: 0)")
    smoke: bool = option(False, "measure on 16 images, without workers (default: false)")

    def __post_init__(self) -> None:
        check_max_detections(self.max_detections)
        if (self.variant is None) == (self.model_name_or_path is None):
            raise ValueError("pass either --variant or --model_name_or_path")
        if bool(self.annotations or self.maps) != bool(self.images):
            raise ValueError("--images goes with --annotations (detectors) or --maps (segmenters)")
        check_together(self, "window", "stride")


@dataclass
class TrainingOptions(TrainingArguments):
    """The fields of [`~transformers.TrainingArguments`], which [`build_training_arguments`] makes of them when the
    recipe is known; what is `None` the recipe decides."""

    num_train_epochs: float | None = option(None, "epochs of the run (default: the recipe's)")
    max_steps: int | None = option(None, "steps of the run, instead of epochs (default: the recipe's)")
    learning_rate: float | None = option(
        None, "peak learning rate (default: the recipe's, in proportion to the images per step)"
    )
    lr_scheduler_type: str | None = option(None, "learning-rate schedule of transformers (default: the recipe's own)")
    weight_decay: float | None = option(None, "weight decay (default: the recipe's)")
    eval_steps: float | None = option(
        None,
        "steps from one evaluation to the next (default: those of --logging_steps; of segmenters a tenth of the run)",
    )
    save_steps: float | None = option(
        None, "steps from one checkpoint to the next (default: 500; of segmenters a tenth of the run)"
    )
    max_grad_norm: float | None = option(None, "norm that gradients are clipped to, 0 for none (default: the recipe's)")
    fp16: bool | None = option(
        None, "float16 mixed precision (default: the recipe's, where there is a GPU)", nargs="?", const=True
    )
    resume_from_checkpoint: str | None = option(
        None,
        "`true` to resume from the last complete checkpoint of --output_dir if there is one, or a checkpoint "
        "(default: none)",
    )
    allow_batch_change: bool = option(
        False,
        "resume though a step has another number of images than before: in the same epoch, by the images seen, of "
        "which less than a step come again; learning rate, schedule, --max_steps and steps of an epoch are those of a "
        "run with such steps from its beginning (default: false, an error)",
    )
    dataset_title: str | None = option(
        None, "what the model card calls the data (default: their name on the Hub, or the last part of their path)"
    )
    license: str | None = option(
        None, "licence of the weights in the model card, as the Hub writes it: apache-2.0 (default: none is chosen)"
    )
    with_code: bool = option(
        False, "save the code with the model, for trust_remote_code=True where pvt_hf is not installed (default: false)"
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available,
        metadata={"help": "copy batches by way of pinned memory (default: true where there is a GPU)"},
    )

    def __post_init__(self) -> None:
        """Only what needs no recipe, which is not known yet."""
        check_license(self.license)


CLASSIFICATION = (
    ClassificationModelArguments,
    ClassificationDataArguments,
    ClassificationRecipeArguments,
    TrainingOptions,
)
DETECTION = (DetectionModelArguments, DetectionDataArguments, DetectionRecipeArguments, TrainingOptions)


def override_recipe(recipe: Recipe, arguments: RecipeArguments) -> Recipe:
    """The recipe with those fields that the arguments give.

    Args:
        recipe: A dataclass of [`~pvt_hf.recipes`].
        arguments: Where `None` leaves a field of the recipe as it is.
    """
    given = {entry.name: getattr(arguments, entry.name, None) for entry in fields(recipe)}
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def build_training_arguments(options: TrainingOptions, recipe: Any, **recipe_values: Any) -> TrainingArguments:
    """The `TrainingArguments` of a run: what the options leave open is as in the recipe.

    Args:
        options: As a command parsed them.
        recipe: One of [`~pvt_hf.recipes`]: weight decay, clipping, and the learning rate for its number of images per
            step, with which the real one grows.
        **recipe_values: Of the recipe for other fields, for example `num_train_epochs=12`. Its `fp16` holds where there
            is a GPU and the user chose no other precision, here or for accelerate.

    Raises:
        SystemExit: If `output_dir` cannot be written, or has checkpoints and `resume_from_checkpoint` does not say what
            to do with them; or if DeepSpeed is asked for and missing, or with `resume_from_checkpoint`.
    """
    given = {entry.name: getattr(options, entry.name) for entry in fields(TrainingArguments) if entry.init}
    given = {name: value for name, value in given.items() if value is not None}
    elsewhere = options.bf16 or options.use_cpu or "ACCELERATE_MIXED_PRECISION" in os.environ
    recipe_values |= {"fp16": recipe_values.get("fp16", False) and torch.cuda.is_available() and not elsewhere}
    recipe_values |= {"weight_decay": recipe.weight_decay, "max_grad_norm": recipe.max_grad_norm}
    if options.output_dir and (reason := why_unwritable(options.output_dir)):
        raise SystemExit(f"--output_dir {options.output_dir} cannot be written: {reason}")
    _check_deepspeed(options)
    if options.bf16 and not torch.accelerator.is_available():
        given["use_cpu"] = True  # which `TrainingArguments` wants to hear, although there is nothing else
    if given.get("use_cpu") or strtobool(os.environ.get("ACCELERATE_USE_CPU", "false")):
        start_cpu_group(options.ddp_backend, options.ddp_timeout)
    args = TrainingArguments(**recipe_values | given)
    if args.world_size == 1 and (missing := find_missing_processes(os.environ)):
        logger.warning(missing)
    if args.hub_token:  # `Trainer` would write it to training_args.bin, which is uploaded
        os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None
    if str(args.resume_from_checkpoint).lower() in ("true", "false"):
        args.resume_from_checkpoint = args.resume_from_checkpoint.lower() == "true"
    has_checkpoints = ask_machines(lambda: last_complete_checkpoint(args.output_dir))
    if not args.resume_from_checkpoint and any(answer.value for answer in has_checkpoints):
        raise SystemExit(f"{args.output_dir} has checkpoints: --resume_from_checkpoint true resumes from them")
    if options.learning_rate is None:
        args.learning_rate = recipe.learning_rate * images_per_step(args) / recipe.reference_batch_size
    return args


def _check_deepspeed(options: TrainingOptions) -> None:
    if not (options.deepspeed or strtobool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false"))):
        return
    if str(options.resume_from_checkpoint).lower() not in ("none", "false"):
        raise SystemExit(
            f"--resume_from_checkpoint {options.resume_from_checkpoint}: runs of DeepSpeed are not resumed, because "
            "DeepSpeed unpickles its states. FSDP shards a run that can be resumed"
        )
    if find_spec("deepspeed") is None:
        raise SystemExit("DeepSpeed is asked for, and is missing; install it with: pip install deepspeed")
