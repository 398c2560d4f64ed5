"""The recipes of the detectors: numbers, schedule against mmcv's formulas, parameter groups name by name."""

import dataclasses
import re

import pytest
import torch
import transformers

import pvt_hf
from pvt_hf import recipes
from pvt_hf.conversion.architectures.atss import ATSS
from pvt_hf.conversion.architectures.cascade_mask_rcnn import CascadeMaskRCNN
from pvt_hf.conversion.architectures.detr import Detr
from pvt_hf.conversion.architectures.gfl import GFL
from pvt_hf.conversion.architectures.mask_rcnn import MaskRCNN
from pvt_hf.conversion.architectures.retinanet import RetinaNet
from pvt_hf.conversion.architectures.sparse_rcnn import SparseRCNN
from pvt_hf.training import optimization
from tests.support.small_models import STAGES, small_config

RECIPES = pytest.mark.parametrize("name", recipes.DETECTION_RECIPES)
ARCHITECTURES = {
    "retinanet": RetinaNet(),
    "atss": ATSS(),
    "gfl": GFL(),
    "mask_rcnn": MaskRCNN(),
    "cascade_mask_rcnn": CascadeMaskRCNN(),
    "sparse_rcnn": SparseRCNN(),
    "detr": Detr(),
}
FIRST_STAGE = {"mask_rcnn": 0, "cascade_mask_rcnn": 0, "sparse_rcnn": 0, "detr": 3}
# Beside those of all of them.
FIELDS = {
    "retinanet": {},
    "mask_rcnn": {"box_head_size": 8},
    "cascade_mask_rcnn": {"box_head_size": 8},
    "sparse_rcnn": {"num_heads": 2, "dynamic_channels": 2, "num_proposals": 3, "ffn_dim": 8},
}
WITH_CROPS = ("mask_rcnn_3x_ms", "cascade_mask_rcnn_3x_ms", "atss_3x_ms", "gfl_3x_ms", "sparse_rcnn_3x_ms")
SMALL = {"num_labels": 3, "neck_channels": 8}


def detector(architecture: str, version: str):
    config = small_config(version, out_features=STAGES[FIRST_STAGE.get(architecture, 1) :])
    if architecture == "detr":
        sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_labels": 3}
        return pvt_hf.build_detr(pvt_hf.build_detr_config(config, encoder_layers=1, decoder_layers=2, **sizes))
    config_class = ARCHITECTURES[architecture].config_class
    fields = SMALL | FIELDS.get(architecture, {"norm_groups": 4})
    return transformers.AutoModelForObjectDetection.from_config(config_class(backbone_config=config, **fields))


def test_recipes_are_the_released_configurations():
    """`detection/configs/` as the semantics list them: rate, images per step, decay, epochs, drops, warm-up, clip."""
    table = {
        "retinanet_1x": (1e-4, 16, 1e-4, True, 12, (8, 11), 500, 0.0),
        "retinanet_3x_ms": (1e-4, 16, 1e-4, False, 36, (27, 33), 500, 0.0),
        "mask_rcnn_1x": (2e-4, 16, 1e-4, True, 12, (8, 11), 500, 0.0),
        **dict.fromkeys(
            ("mask_rcnn_3x_ms", "atss_3x_ms", "gfl_3x_ms", "cascade_mask_rcnn_3x_ms"),
            (1e-4, 16, 0.05, False, 36, (27, 33), 500, 0.0),
        ),
        "detr_50ep": (1e-4, 16, 1e-4, True, 50, (33,), 0, 0.1),
        "sparse_rcnn_3x_ms": (2.5e-5, 16, 1e-4, True, 36, (27, 33), 500, 1.0),
    }
    fields = ("learning_rate", "reference_batch_size", "weight_decay", "decays_norms", "epochs", "decay_epochs")
    fields += ("warmup_iterations", "max_grad_norm")
    for name, numbers in table.items():
        recipe = recipes.detection_recipe(name, "pvt_small")
        assert tuple(getattr(recipe, field) for field in fields) == numbers, name
        assert recipe.backbone_multiplier == (0.1 if name == "detr_50ep" else 1) and recipe.drop_path_rate == 0.1
        assert max(recipe.shortest_edges) == 800 and recipe.longest_edge == 1333
        has_crops = name in WITH_CROPS
        assert list(recipe.crop_shortest_edges) == ([400, 500, 600] if has_crops else [])
    shortest_edges = {name: list(recipe.shortest_edges) for name, recipe in recipes.DETECTION_RECIPES.items()}
    assert shortest_edges["retinanet_1x"] == shortest_edges["mask_rcnn_1x"] == [800]
    assert shortest_edges["retinanet_3x_ms"] == list(range(640, 801))
    for name in WITH_CROPS:
        assert shortest_edges[name] == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert shortest_edges["detr_50ep"] == [640, 672, 704, 736, 768, 800]
    with pytest.raises(ValueError, match="`name` must be one of retinanet_1x, .*, got 'yolo'"):
        recipes.detection_recipe("yolo")


@pytest.mark.parametrize("variant", pvt_hf.VARIANTS)
def test_largest_variants_have_smaller_batches(variant):
    """One image per GPU at a 1.4 times lower rate where the configuration says so; v1's deep ones drop no paths."""
    rates = {}
    for name in ("retinanet_1x", "mask_rcnn_1x"):
        recipe = recipes.detection_recipe(name, variant)
        rates[name] = (recipe.learning_rate, recipe.reference_batch_size)
        assert recipe.drop_path_rate == (0.0 if variant in ("pvt_medium", "pvt_large") else 0.1)
    deep = variant in ("pvt_v2_b4", "pvt_v2_b5")
    assert rates["retinanet_1x"] == ((pytest.approx(1e-4 / 1.4), 8) if deep else (1e-4, 16))
    deep |= variant == "pvt_large"
    assert rates["mask_rcnn_1x"] == ((pytest.approx(2e-4 / 1.4), 8) if deep else (2e-4, 16))
    sparse = recipes.detection_recipe("sparse_rcnn_3x_ms", variant)
    wanted = (pytest.approx(2.5e-5 / 1.4), 8) if variant == "pvt_v2_b2" else (2.5e-5, 16)
    assert (sparse.learning_rate, sparse.reference_batch_size) == wanted


def mmcv_rates(recipe, base: float, steps_per_epoch: int):
    """`StepLrUpdaterHook(step=..., gamma=0.1, warmup="linear", warmup_iters, warmup_ratio)` of mmcv 1.3, by epochs."""
    for iteration in range(recipe.epochs * steps_per_epoch):
        epoch, exponent = iteration // steps_per_epoch, len(recipe.decay_epochs)
        for index, boundary in enumerate(recipe.decay_epochs):
            if epoch < boundary:
                exponent = index
                break
        regular = base * 0.1**exponent
        if recipe.warmup_iterations and iteration < recipe.warmup_iterations:
            k = (1 - iteration / recipe.warmup_iterations) * (1 - recipe.warmup_ratio)
            yield regular * (1 - k)
        else:
            yield regular


@RECIPES
@pytest.mark.parametrize("steps_per_epoch", [43, 61, 300])
def test_schedule_is_mmcvs_at_every_step(name, steps_per_epoch):
    """With 43 steps the warm-up of 500 is not over before the last decays (1x)."""
    recipe = recipes.DETECTION_RECIPES[name]
    steps = recipe.epochs * steps_per_epoch
    ours = [1e-4 * optimization.step_multiplier(recipe, step, steps_per_epoch, steps) for step in range(steps)]
    assert ours == pytest.approx(list(mmcv_rates(recipe, 1e-4, steps_per_epoch)), rel=1e-12)


def test_short_runs_decay_after_the_same_parts():
    """They decay after the same parts of the run, and need a short warm-up."""
    recipe = dataclasses.replace(recipes.DETECTION_RECIPES["retinanet_1x"], warmup_iterations=10)
    multipliers = [optimization.step_multiplier(recipe, step, 20, 240) for step in range(240)]
    assert [multipliers[step] for step in (10, 159, 160, 219, 220, 239)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    with pytest.raises(ValueError, match="`warmup_iterations` must be less than the 240 steps of the run.*, got 500"):
        optimization.step_multiplier(recipes.DETECTION_RECIPES["retinanet_1x"], 0, 20, 240)


@RECIPES
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_parameter_groups_are_mmcvs_by_released_name(name, version):
    """mmcv's `paramwise_cfg` looks for `norm` and `backbone` in the released names; biases are as all others."""
    recipe = recipes.DETECTION_RECIPES[name]
    model = detector(recipe.architecture, version)
    groups = optimization.detection_parameter_groups(model, recipe, 1e-4, 0.05)
    settings = {}
    for group in groups:
        settings |= dict.fromkeys(group["names"], (group["lr"], group["weight_decay"]))
    tensors = dict(model.named_parameters())
    names = list(tensors)
    assert settings.keys() == tensors.keys() and sum(len(group["params"]) for group in groups) == len(names)
    # Every tensor holds the position of its name, so that released tensors made of several keep them all.
    marked = {key: torch.full_like(tensor, position) for position, (key, tensor) in enumerate(tensors.items())}
    official = ARCHITECTURES[recipe.architecture].to_official(marked)
    official.pop("bbox_head.integral.project", None)  # GFL's, which is no parameter
    seen = set()
    for key, tensor in official.items():
        positions = tensor.unique().int().tolist()
        seen.update(positions)
        wanted_rate = 1e-5 if recipe.architecture == "detr" and key.startswith("backbone.") else 1e-4
        wanted_decay = 0 if name.endswith("3x_ms") and name != "sparse_rcnn_3x_ms" and "norm" in key else 0.05
        for position in positions:
            assert settings[names[position]] == (pytest.approx(wanted_rate), wanted_decay), key
    assert seen == set(range(len(names)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_frozen_parameters_are_left_out(architecture):
    """Those of the backbone's first stages; DETR's own encoder has layers too."""
    model = detector(architecture, "v2")
    frozen = set(optimization.freeze_stages(model, 2))
    stages = {re.search(r"backbone.*encoder\.layers\.(\d)", name)[1] for name in frozen}
    assert stages == {"0", "1"} and all("backbone" in name for name in frozen)
    recipe = recipes.DETECTION_RECIPES["retinanet_1x"]
    names = {name for group in optimization.detection_parameter_groups(model, recipe, 1, 1) for name in group["names"]}
    assert names == {name for name, _ in model.named_parameters()} - frozen
