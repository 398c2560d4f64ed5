"""The registry of the papers' training recipes: their hyper-parameters, task by task.

What they make the optimiser do is in [`~pvt_hf.training.optimization`].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

from .variants import get_variant


@dataclass(frozen=True)
class ImageNetRecipe:
    """How the papers train a variant on ImageNet-1k (v1 section 5.1, v2 section 4.1); what they leave open is as in the
    released code (`classification/main.py`).

    Attributes:
        epochs: Length of the run.
        warmup_epochs: Length of the linear warm-up.
        learning_rate: Peak learning rate for `reference_batch_size` images per step; it grows with the batch.
        reference_batch_size: Images per step.
        warmup_learning_rate: Where the warm-up starts, whatever the batch.
        min_learning_rate: Where the cosine ends, whatever the batch.
        weight_decay: Of AdamW, for tensors of two and more dimensions without the CLS token.
        max_grad_norm: Norm that gradients are clipped to; 0 for no clipping.
        drop_path_rate: Stochastic depth of the last block.
        label_smoothing: What the true class gives up to all of them, in [0, 1).
        mixup: Mixup alpha; 0 for no Mixup.
        cutmix: CutMix alpha; 0 for no CutMix.
        mixup_switch_prob: Probability of CutMix instead of Mixup for a batch.
        auto_augment: RandAugment in timm's notation, or `None`.
        color_jitter: Strength of the colour jitter; timm leaves it out where there is `auto_augment`.
        random_erasing: Probability that a rectangle is replaced by noise, pixel by pixel.
        repeats: How often an image is drawn, with different augmentations, in an epoch that sees a third of the images.
    """

    epochs: int = 300
    warmup_epochs: int = 5
    learning_rate: float = 5e-4
    reference_batch_size: int = 512
    warmup_learning_rate: float = 1e-6
    min_learning_rate: float = 1e-5
    weight_decay: float = 0.05
    max_grad_norm: float = 0.0
    drop_path_rate: float = 0.1
    label_smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_switch_prob: float = 0.5
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    random_erasing: float = 0.25
    repeats: int = 3


def imagenet_recipe(variant: str) -> ImageNetRecipe:
    """The recipe of a variant. The deep ones (M, L, B3, B4, B5) have more stochastic depth, and clipped gradients.

    Args:
        variant: For example `"pvt_v2_b2"`.

    Raises:
        ValueError: If there is no such variant.
    """
    rate = get_variant(variant).drop_path_rate
    return ImageNetRecipe(drop_path_rate=rate, max_grad_norm=1.0 if rate > 0.1 else 0.0)


@dataclass(frozen=True)
class DetectionRecipe:
    """How the papers train a detector on COCO (v1 section 5.2, v2 section 4.2); what they leave open is as in the
    released configurations (`detection/configs/`).

    Attributes:
        architecture: What the `model_type` is, without `pvt_hf_`: `"retinanet"`, `"sparse_rcnn"`, `"detr"` and so on.
        epochs: Length of the run.
        decay_epochs: After each of them the learning rate is a tenth of what it was. In a run of another length it
            happens after the same parts of the run.
        learning_rate: For `reference_batch_size` images per step; it grows with the batch.
        reference_batch_size: Images per step.
        backbone_multiplier: Learning-rate multiplier of the backbone.
        warmup_iterations: Steps of the linear warm-up.
        warmup_ratio: Learning-rate multiplier at the start of the warm-up.
        weight_decay: Of AdamW.
        decays_norms: Whether parameters with `norm` in their names are decayed. All others are, biases too.
        max_grad_norm: Norm that gradients are clipped to; 0 for no clipping.
        drop_path_rate: Stochastic depth of the backbone's last block.
        shortest_edges: Pixels of the shortest edge; each image gets one of them by chance.
        longest_edge: Largest longest edge, in pixels.
        crop_shortest_edges: Pixels of the shortest edge of what half of the images are cropped from; none for no crops.
        flip: Probability of a horizontal flip.
    """

    architecture: str
    epochs: int = 12
    decay_epochs: tuple[int, ...] = (8, 11)
    learning_rate: float = 1e-4
    reference_batch_size: int = 16
    backbone_multiplier: float = 1.0
    warmup_iterations: int = 500
    warmup_ratio: float = 0.001
    weight_decay: float = 1e-4
    decays_norms: bool = True
    max_grad_norm: float = 0.0
    drop_path_rate: float = 0.1
    shortest_edges: Sequence[int] = (800,)
    longest_edge: int = 1333
    crop_shortest_edges: Sequence[int] = ()
    flip: float = 0.5


_LONG: dict[str, Any] = {"epochs": 36, "decay_epochs": (27, 33), "decays_norms": False}
# Of the detectors that only PVT v2 was trained with, and of Mask R-CNN.
_LONG_WITH_CROPS: dict[str, Any] = _LONG | {
    "weight_decay": 0.05,
    "shortest_edges": range(480, 801, 32),
    "crop_shortest_edges": (400, 500, 600),
}
# RetinaNet's 3x run is in the paper only (v1 section 5.2); its norms are treated as in the 3x configuration there is.
DETECTION_RECIPES = {
    "retinanet_1x": DetectionRecipe("retinanet"),
    "retinanet_3x_ms": DetectionRecipe("retinanet", shortest_edges=range(640, 801), **_LONG),
    "mask_rcnn_1x": DetectionRecipe("mask_rcnn", learning_rate=2e-4),
    "mask_rcnn_3x_ms": DetectionRecipe("mask_rcnn", **_LONG_WITH_CROPS),
    "atss_3x_ms": DetectionRecipe("atss", **_LONG_WITH_CROPS),
    "gfl_3x_ms": DetectionRecipe("gfl", **_LONG_WITH_CROPS),
    "detr_50ep": DetectionRecipe(
        "detr",
        epochs=50,
        decay_epochs=(33,),
        backbone_multiplier=0.1,
        warmup_iterations=0,
        max_grad_norm=0.1,
        shortest_edges=range(640, 801, 32),
    ),
    "cascade_mask_rcnn_3x_ms": DetectionRecipe("cascade_mask_rcnn", **_LONG_WITH_CROPS),
    "sparse_rcnn_3x_ms": DetectionRecipe(
        "sparse_rcnn",
        learning_rate=2.5e-5,
        max_grad_norm=1.0,
        **_LONG_WITH_CROPS | {"weight_decay": 1e-4, "decays_norms": True},
    ),
}
# What was trained with 8 images per step, one per GPU, at a 1.4 times lower rate.
_BATCHES_OF_EIGHT = {
    "retinanet_1x": ("pvt_v2_b4", "pvt_v2_b5"),
    "mask_rcnn_1x": ("pvt_large", "pvt_v2_b4", "pvt_v2_b5"),
    "sparse_rcnn_3x_ms": ("pvt_v2_b2",),
}


def detection_recipe(name: str, variant: str | None = None) -> DetectionRecipe:
    """One of `DETECTION_RECIPES` for a variant: the largest have smaller batches, v1's deep ones no stochastic depth.

    Args:
        name: For example `"retinanet_1x"`.
        variant: Of the backbone; `None` for another architecture than the papers'.

    Raises:
        ValueError: If there is no such recipe.
    """
    if name not in DETECTION_RECIPES:
        raise ValueError(f"`name` must be one of {', '.join(DETECTION_RECIPES)}, got {name!r}.")
    recipe = DETECTION_RECIPES[name]
    if variant in _BATCHES_OF_EIGHT.get(name, ()):
        recipe = replace(recipe, learning_rate=recipe.learning_rate / 1.4, reference_batch_size=8)
    return replace(recipe, drop_path_rate=0.0) if variant in ("pvt_medium", "pvt_large") else recipe


@dataclass(frozen=True)
class SegmentationRecipe:
    """How the papers train Semantic FPN on ADE20K (v1 section 5.3), with the numbers of the released configurations
    (`segmentation/configs/sem_fpn/PVT`), which differ from the paper's: more images per step for half as many steps.

    Attributes:
        steps: Length of the run; with `epochs` the least.
        epochs: Passes over the training set, to which [`fit_segmentation_recipe`] then fits length and sizes; `None`
            where the recipe is what it is for any data.
        learning_rate: At the first step, for `reference_batch_size` images per step; it grows with the batch.
        reference_batch_size: Images per step.
        power: The rate falls to 0 as this power of what is left of the run, from step to step and without a warm-up.
        weight_decay: Of AdamW, for every parameter: biases, norms and position embeddings too.
        max_grad_norm: Norm that gradients are clipped to; 0 for no clipping.
        drop_path_rate: Stochastic depth of the backbone's last block, the same for every variant.
        loss_normalization: `"all"` or `"valid"`, see [`~pvt_hf.models.configuration_semantic_fpn.SemanticFPNConfig`].
        shortest_edge: Shortest edge at the scale 1, in pixels, also in evaluation.
        longest_edge: Largest longest edge at the scale 1, in pixels, also in evaluation.
        crop_size: Height and width of the crops, in pixels.
        scales: Lowest and highest random scale.
        max_share: Largest part of a crop that one class may have.
        flip: Probability of a horizontal flip.
        distortion: Whether brightness, contrast, saturation and hue change.
    """

    steps: int = 40_000
    epochs: int | None = None
    learning_rate: float = 2e-4
    reference_batch_size: int = 32
    power: float = 0.9
    weight_decay: float = 1e-4
    max_grad_norm: float = 0.0
    drop_path_rate: float = 0.1
    loss_normalization: Literal["all", "valid"] = "all"
    shortest_edge: int = 512
    longest_edge: int = 2048
    crop_size: int = 512
    scales: tuple[float, float] = (0.5, 2.0)
    max_share: float = 0.75
    flip: float = 0.5
    distortion: bool = True


SEGMENTATION_RECIPES = {
    "semantic_fpn_40k": SegmentationRecipe(),
    # Nobody's paper: what people who fine-tune PVT on some hundred medical images have in common (Polyp-PVT, EMCAD).
    "small_data": SegmentationRecipe(
        steps=1000,
        epochs=50,
        learning_rate=1e-4,
        reference_batch_size=8,
        max_grad_norm=1.0,
        loss_normalization="valid",
        scales=(0.75, 1.25),
        max_share=1.0,
    ),
}
_MAX_STEPS, _MIN_SIDE, _MAX_SIDE, _SIDE_DIVISOR = 40_000, 64, 512, 32


def fit_segmentation_recipe(
    recipe: SegmentationRecipe, sizes: Sequence[tuple[int, int]], images_per_step: int
) -> SegmentationRecipe:
    """A recipe with `epochs` for a training set: its length, and sides that are those of the images to the next
    multiple of 32, but 64 to 512 pixels. Any other recipe as it is.

    Args:
        recipe: To be fitted.
        sizes: (height, width) of the training images in pixels.
        images_per_step: Of the run.
    """
    if recipe.epochs is None:
        return recipe
    steps = -(-recipe.epochs * len(sizes) // images_per_step)
    side = round(median(map(min, sizes)) / _SIDE_DIVISOR) * _SIDE_DIVISOR
    side = min(max(side, _MIN_SIDE), _MAX_SIDE)
    return replace(
        recipe,
        steps=min(max(steps, recipe.steps), _MAX_STEPS),
        shortest_edge=side,
        longest_edge=4 * side,  # as 2048 to 512
        crop_size=side,
    )
