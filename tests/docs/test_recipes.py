"""What the recipes compute is right: the other tests of the pages only see that their code runs."""

import pytest
import torch
from torch.nn.functional import interpolate

import pvt_hf
from tests.support.pages import ROOT, read_blocks
from tests.support.small_models import randomize, small_config

pytestmark = pytest.mark.process

CLASSIFIERS = {
    "v1": pvt_hf.PvtForImageClassification,
    "v2": pvt_hf.PvtV2ForImageClassification,
    "v2_linear": pvt_hf.PvtV2ForImageClassification,
}


def run_recipe(page: str, *packages: str) -> dict:
    """What the first block of a page defines."""
    for package in packages:
        pytest.importorskip(package)
    namespace = {}
    exec(read_blocks(ROOT / "docs" / "recipes" / page, "python")[0].text, namespace)
    return namespace


def build_classifier(version: str) -> torch.nn.Module:
    return randomize(CLASSIFIERS[version](small_config(version)), std=0.2).eval()


def test_grad_cam():
    """For v1 and v2 its picture is the one of the paper's formula (arXiv 1610.02391, equations 1 and 2)."""
    recipe = run_recipe("grad-cam.md", "pytorch_grad_cam")
    from pytorch_grad_cam.utils.image import scale_cam_image

    for version, name in (("v1", "pvt.encoder.block.3.0.layer_norm_1"), ("v2", "pvt_v2.encoder.layers.3.layer_norm")):
        model, pixels, tokens = build_classifier(version), torch.randn(2, 3, 64, 96), []
        found = recipe["explain"](model, pixels, label=3)
        hook = model.get_submodule(name).register_forward_hook(lambda *call, tokens=tokens: tokens.append(call[-1]))
        (gradient,) = torch.autograd.grad(model(pixels).logits[:, 3].sum(), tokens)
        hook.remove()
        patches, gradient = (value[:, -6:].unflatten(1, (2, 3)) for value in (tokens[0], gradient))
        weights = gradient.mean(dim=(1, 2), keepdim=True)  # (batch, 1, 1, channels)
        wanted = (weights * patches).sum(dim=3).relu().detach().numpy()
        assert wanted.max() > 0
        for _ in range(2):  # of each layer, and of their mean
            wanted = scale_cam_image(wanted, (96, 64))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


# Block, point (x, y), and by hand: the module of its attention, its heads, the row of the query, the grid of the keys.
PLACES = {
    "v1": [
        (0, (50, 21), "pvt.encoder.block.0.0.attention.self", 1, 5 * 24 + 12, (2, 3)),
        (4, None, "pvt.encoder.block.3.0.attention.self", 4, 0, (2, 3)),
        (-1, (70, 40), "pvt.encoder.block.3.0.attention.self", 4, 1 + 3 + 2, (2, 3)),
    ],
    "v2": [(2, (95, 63), "pvt_v2.encoder.layers.1.blocks.1.attention", 2, 7 * 12 + 11, (2, 3))],
    "v2_linear": [(3, (0, 32), "pvt_v2.encoder.layers.2.blocks.0.attention", 3, 2 * 6, (7, 7))],
}


@pytest.fixture(scope="module")
def attention_map():
    return run_recipe("attention-maps.md")["attention_map"]


@pytest.mark.parametrize("version", PLACES)
@torch.no_grad()
def test_attention_map(version, attention_map):
    """Each is that of the query and the keys which the block projects, on the grid that the keys are of."""
    model, pixels = build_classifier(version), torch.randn(1, 3, 64, 96)
    for block, point, name, heads, row, grid in PLACES[version]:
        projected = {}
        hooks = [
            model.get_submodule(f"{name}.{part}").register_forward_hook(
                lambda *call, part=part, projected=projected: projected.update({part: call[-1][0]})
            )
            for part in ("query", "key")
        ]
        found = attention_map(model, pixels, block, point)
        for hook in hooks:
            hook.remove()
        query, key = (projected[part].unflatten(1, (heads, -1)).transpose(0, 1) for part in ("query", "key"))
        scores = query[:, row, None] @ key.mT / key.shape[-1] ** 0.5  # (heads, 1, keys)
        weights = scores.softmax(dim=-1).mean(dim=0)[:, -grid[0] * grid[1] :]  # without the CLS token
        wanted = interpolate(weights.reshape(1, 1, *grid), size=(64, 96), mode="bilinear")[0, 0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert wanted.std() > 0


def test_attention_map_without_a_cls_token_wants_a_point(attention_map):
    for version, block in (("v1", 3), ("v2", -1)):
        with pytest.raises(ValueError, match="pass a `point`"):
            attention_map(build_classifier(version), torch.randn(1, 3, 64, 96), block)
