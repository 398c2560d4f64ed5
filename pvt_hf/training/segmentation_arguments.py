"""The arguments of the program that trains segmenters, beside those that all programs share."""

import math
from dataclasses import dataclass

from ..recipes import SEGMENTATION_RECIPES
from .arguments import (
    ALLOW_MISSING_CLASSES,
    BINARY_MASKS,
    PALETTE,
    REDUCE_LABELS,
    STRIDE,
    WINDOW,
    DataArguments,
    ModelArguments,
    RecipeArguments,
    TrainingOptions,
    check_folders,
    check_together,
    option,
)
from .segmentation_losses import SEGMENTATION_LOSSES


@dataclass
class SegmentationModelArguments(ModelArguments):
    """What is trained to segment images."""

    backbone_checkpoint: str | None = option(
        None, "classifier, detector or segmenter from whose weights the backbone starts (default: random weights)"
    )
    head: str | None = option(
        None, "head of a new model (default: semantic_fpn, the paper's)", choices=["semantic_fpn", "upernet"]
    )
    neck_channels: int | None = option(
        None, "channels of the FPN of a new Semantic FPN; UperNet has none of its own (default: 256, the paper's)"
    )
    head_channels: int | None = option(
        None, "channels of a new head (default: 128 of Semantic FPN, the paper's, and 512 of UperNet)"
    )
    window: int | None = option(None, WINDOW)
    stride: int | None = option(None, STRIDE)

    def __post_init__(self) -> None:
        check_together(self, "window", "stride")
        if self.head and self.model_name_or_path:
            raise ValueError("--model_name_or_path has a head: --head is for a new model, with --backbone_checkpoint")


@dataclass
class SegmentationDataArguments(DataArguments):
    """Images with label maps to train on: two folders for each split, or a data set with two columns of images."""

    train_images: str | None = option(None, "folder of the images of the training set (default: none)")
    train_maps: str | None = option(None, "folder of its label maps, PNG, TIFF or BMP (default: none)")
    eval_images: str | None = option(None, "folder of the images of the validation set (default: none)")
    eval_maps: str | None = option(None, "folder of its label maps, PNG, TIFF or BMP (default: none)")
    map_column: str | None = option(None, "column of label maps (default: the only other column of images)")
    image_column: str | None = option(None, "column of images (default: image, or else pixel_values)")
    reduce_labels: bool = option(False, REDUCE_LABELS)
    binary_masks: bool = option(False, BINARY_MASKS)
    palette: str | None = option(None, PALETTE)
    allow_missing_classes: bool = option(False, ALLOW_MISSING_CLASSES)
    num_scenes: int = option(1000, "digit scenes that are drawn for training, where no data are given (default: 1000)")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folders(self, "images", "maps")


@dataclass
class SegmentationRecipeArguments(RecipeArguments):
    """Which [`~pvt_hf.recipes.SegmentationRecipe`], and what replaces its fields."""

    recipe: str | None = option(
        None,
        "the recipe: the paper's, or one whose length and sizes are fitted to the data (default: small_data for own "
        "data, else semantic_fpn_40k)",
        choices=list(SEGMENTATION_RECIPES),
    )
    demo: bool = option(False, "a small segmenter that learns the digit scenes in minutes (default: false)")
    loss: str | None = option(
        None, "the loss (default: the model's own, a cross-entropy)", choices=list(SEGMENTATION_LOSSES)
    )
    class_weights: list[str] | None = option(
        None,
        "weight of each class in the cross-entropy, or `auto` for the same part for each class of the training set's "
        "pixels (default: none)",
    )
    shortest_edge: int | None = option(None, "shortest edge at the scale 1, in pixels (default: the recipe's)")
    longest_edge: int | None = option(None, "largest longest edge at the scale 1, in pixels (default: the recipe's)")
    crop_size: int | None = option(None, "height and width of the crops, in pixels (default: the recipe's)")
    scales: list[float] | None = option(None, "lowest and highest random scale (default: the recipe's)")
    max_share: float | None = option(None, "largest part of a crop that one class may have (default: the recipe's)")
    flip: float | None = option(None, "probability of a horizontal flip (default: 0.5, the released code's)")
    distortion: bool | None = option(
        None, "photometric distortion (default: true, the released code's)", nargs="?", const=True
    )

    def __post_init__(self) -> None:
        if self.scales is not None and len(self.scales) != 2:
            raise ValueError(f"--scales must be two numbers, the lowest and the highest, got {self.scales}")
        if self.class_weights and self.loss == "dice":
            raise ValueError("--class_weights are of the cross-entropy, which --loss dice does not have")
        if self.class_weights not in (None, ["auto"]) and not all(map(_is_weight, self.class_weights)):
            raise ValueError(f"--class_weights must be `auto` or positive numbers, got {' '.join(self.class_weights)}")


def _is_weight(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


SEGMENTATION = (SegmentationModelArguments, SegmentationDataArguments, SegmentationRecipeArguments, TrainingOptions)
