"""Recipes of the site for other tools do what they say."""

import pytest
import torch

import pvt_hf
from tests.support.pages import ROOT, read_blocks
from tests.support.small_models import randomize, small_config

pytestmark = pytest.mark.process


def run_recipe(page, *packages):
    """What the blocks of the page define."""
    for package in packages:
        pytest.importorskip(package)
    namespace = {}
    for block in read_blocks(ROOT / "docs" / "recipes" / page, "python"):
        exec(block.text, namespace)
    return namespace


def test_timm_recipe():
    with torch.device("meta"):  # shapes are enough, and cost nothing
        recipe = run_recipe("smp.md", "segmentation_models_pytorch")
        assert recipe["model"](torch.randn(1, 3, 32, 64)).shape == (1, 10)
        assert recipe["unet"](torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)


def test_grad_cam_recipe():
    """For v1 and v2 its picture is the one of the paper's formula (arXiv 1610.02391, equations 1 and 2)."""
    recipe = run_recipe("grad-cam.md", "pytorch_grad_cam")
    from pytorch_grad_cam.utils.image import scale_cam_image

    for version in ("v1", "v2"):
        model = pvt_hf.PvtForImageClassification if version == "v1" else pvt_hf.PvtV2ForImageClassification
        model = randomize(model(small_config(version)), std=0.2).eval()
        pixels = torch.randn(2, 3, 64, 96)
        found = recipe["explain"](model, pixels, label=3)
        layer = dict(model.named_modules())[
            "pvt.encoder.block.3.0.layer_norm_1" if version == "v1" else "pvt_v2.encoder.layers.3.layer_norm"
        ]
        tokens = []
        hook = layer.register_forward_hook(lambda module, args, output, tokens=tokens: tokens.append(output))
        (gradient,) = torch.autograd.grad(model(pixels).logits[:, 3].sum(), tokens)
        hook.remove()
        patches, gradient = (value[:, -6:].unflatten(1, (2, 3)) for value in (tokens[0], gradient))
        weights = gradient.mean(dim=(1, 2), keepdim=True)  # (batch, 1, 1, channels)
        wanted = (weights * patches).sum(dim=3).relu().detach().numpy()
        assert wanted.max() > 0
        for _ in range(2):  # of each layer, and of their mean
            wanted = scale_cam_image(wanted, (96, 64))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
