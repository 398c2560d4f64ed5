"""The ImageNet recipe: its numbers per variant, its schedule against timm's, its parameter groups name by name."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from transformers import AutoModelForImageClassification

import pvt_hf
from pvt_hf import recipes
from pvt_hf.conversion import rename
from pvt_hf.training import optimization
from tests.support.small_models import small_config

VERSIONS = pytest.mark.parametrize("version", ["v1", "v2", "v2_linear"])


@pytest.mark.parametrize("name", pvt_hf.VARIANTS)
def test_deep_variants_have_stochastic_depth_and_clipping(name):
    """`classification/configs/`: the deep variants have more stochastic depth and clipped gradients."""
    recipe = recipes.imagenet_recipe(name)
    deep = name in ("pvt_medium", "pvt_large", "pvt_v2_b3", "pvt_v2_b4", "pvt_v2_b5")
    assert (recipe.drop_path_rate, recipe.max_grad_norm) == ((0.3, 1.0) if deep else (0.1, 0.0))
    assert (recipe.epochs, recipe.learning_rate, recipe.weight_decay, recipe.repeats) == (300, 5e-4, 0.05, 3)


@pytest.mark.parametrize(("epochs", "warmup"), [(300, 5), (30, 0), (12, 3)])
def test_schedule_is_that_of_the_released_loop(epochs, warmup):
    """timm's scheduler, stepped as `classification/main.py` does: after each epoch, with that epoch's number."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=epochs, lr_min=1e-5, warmup_t=warmup, warmup_lr_init=1e-6, cycle_limit=1, t_in_epochs=True
    )
    for epoch in range(epochs):
        ours = optimization.scheduled_learning_rate(epoch, epochs, warmup, 1e-3, 1e-6, 1e-5)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), epoch
        scheduler.step(epoch)


@VERSIONS
def test_weight_decay_is_timms_by_released_name(version):
    """timm's rule on the released names: one-dimensional tensors and `cls_token` are not decayed."""
    model = AutoModelForImageClassification.from_config(small_config(version))
    groups = optimization.parameter_groups(model, 1e-3, 0.05)
    assert len(groups) == 2 and all(group["lr"] == 1e-3 for group in groups)
    decayed, kept = (next(g for g in groups if bool(g["weight_decay"]) is wanted) for wanted in (True, False))
    official = rename.to_official(dict(model.named_parameters()))
    expected = {name for name, tensor in official.items() if tensor.ndim > 1 and name != "cls_token"}
    actual = rename.to_official({name: model.get_parameter(name) for name in decayed["names"]})
    assert actual.keys() == expected and decayed["weight_decay"] == 0.05
    assert len(decayed["names"]) + len(kept["names"]) == len(list(model.parameters()))
    if version == "v1":
        assert "pos_embed1" in actual and "pvt.encoder.patch_embeddings.3.cls_token" in kept["names"]


@VERSIONS
def test_rate_falls_from_block_to_block(version):
    """The rate falls by the factor from block to block, and a stage's embedding goes with the block before it."""
    config = small_config(version, depths=[2, 1, 3, 1])
    model = AutoModelForImageClassification.from_config(config)
    rates = {}
    for group in optimization.parameter_groups(model, 1.0, 0.05, layer_decay=0.5):
        rates |= dict.fromkeys(group["names"], group["lr"])
    assert len(rates) == len(list(model.parameters()))
    head = sum(config.depths) + 1
    official = rename.to_official({name: torch.full_like(p, rates[name]) for name, p in model.named_parameters()})
    before = {1: 0, 2: 2, 3: 3, 4: 6}
    for name, rate in official.items():
        stage = int(name[len("block")]) if name.startswith("block") else None
        if stage:
            depth = before[stage] + int(name.split(".")[1]) + 1
        elif name.startswith(("patch_embed", "pos_embed")):
            depth = before[int(name.split("embed")[1][0])]
        elif name.startswith("norm") and name[4].isdigit():
            depth = before[int(name[4])] + config.depths[int(name[4]) - 1]
        else:
            depth = 6 if name == "cls_token" else head
        assert (rate == 0.5 ** (head - depth)).all(), name
    with pytest.raises(ValueError, match="`layer_decay` must be above 0 and at most 1, got 0"):
        optimization.parameter_groups(model, 1.0, 0.05, layer_decay=0)


@VERSIONS
def test_frozen_stages_get_no_gradient(version):
    model = AutoModelForImageClassification.from_config(small_config(version))
    frozen = set(optimization.freeze_stages(model, 2))
    official = rename.to_official({n: torch.full_like(p, n in frozen) for n, p in model.named_parameters()})
    for name, value in official.items():
        stage = next((int(part[-1]) for part in [name.split(".")[0]] if part[-1].isdigit()), 9)
        assert value.bool().all() == (stage <= 2), name
    assert {name for group in optimization.parameter_groups(model, 1, 0) for name in group["names"]}.isdisjoint(frozen)
    model(torch.randn(1, 3, 64, 64), labels=torch.tensor([0])).loss.backward()
    assert all((parameter.grad is None) == (name in frozen) for name, parameter in model.named_parameters())
    with pytest.raises(ValueError, match="`stages` must be between 0 and 4, got 5"):
        optimization.freeze_stages(model, 5)
