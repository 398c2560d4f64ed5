"""The 3 x 3 convolutions of necks and heads: Winograd's algorithm gives the same, and where it is used."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from pvt_hf.models import winograd
from pvt_hf.models.winograd import Conv3x3, convolve
from tests.support.dense_models import build_dense_model, dense_inputs
from tests.support.waits import OnDevice

MODELS = [
    "retinanet",
    "atss",
    "gfl",
    "mask_rcnn",
    "faster_rcnn",
    "cascade_mask_rcnn",
    "sparse_rcnn",
    "semantic_fpn",
]


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of maps that the algorithm gets from now on."""
    calls: list[torch.Size] = []
    monkeypatch.setattr(
        winograd, "convolve", lambda states, *rest: calls.append(states.shape) or convolve(states, *rest)
    )
    return calls


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 9, 14), (1, 3, 4, 8), (3, 2, 1, 1), (5, 4, 7, 3), (1, 7, 40, 5)])
def test_results_are_those_of_the_convolution(shape, has_bias):
    """For sides that tiles do not divide, and chunks of one row of them, of some rows, and of some images."""
    feature_map, weight, bias = draw(*shape), draw(6, shape[1], 3, 3), draw(6) if has_bias else None
    expected = F.conv2d(feature_map, weight, bias, padding=1)
    for layout in (torch.contiguous_format, torch.channels_last):
        for chunk_bytes in (1, 10_000, 40_000, 2**30):
            found = convolve(feature_map.contiguous(memory_format=layout), weight, bias, chunk_bytes, 0)
            assert_close(found, expected, rtol=0, atol=1e-12)
            assert found.is_contiguous(memory_format=torch.channels_last)


def test_float32_is_almost_as_exact_as_the_convolution():
    """With the usual points of interpolation the error would be several times as large."""
    feature_map, weight = draw(1, 256, 32, 32).relu(), draw(32, 256, 3, 3) / 48
    exact = F.conv2d(feature_map, weight, padding=1)
    found = convolve(feature_map.float(), weight.float(), None, 2**20, 0)
    error = (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-8 < error < 2e-6


@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_same(name, monkeypatch):
    model = build_dense_model(name).double()
    inputs = dense_inputs(model, 2, 64, 96)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    expected = model(**inputs)  # with gradients, and so by convolutions
    calls = watch(monkeypatch)
    for attribute in ("min_tiles", "min_channels"):
        monkeypatch.setattr(Conv3x3, attribute, 0)
    with torch.no_grad():
        found = model(**inputs)
    assert len(calls) >= sum(isinstance(module, Conv3x3) for module in model.modules()) > 3
    for field in ("logits", "pred_boxes", "pred_masks", "centerness"):
        if field in expected:
            assert_close(found[field], expected[field], rtol=0, atol=1e-10, msg=field)


class Adapted(nn.Parameter):
    """Another class of weights: a quantised one."""


def change_weight(conv: Conv3x3) -> None:
    conv.weight = Adapted(conv.weight.detach())


def cast_bias(conv: Conv3x3) -> None:
    conv.bias = nn.Parameter(conv.bias.detach().double())


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: setattr(conv, "min_channels", 129),
        lambda conv: conv.bfloat16(),
        change_weight,
        lambda conv: setattr(conv, "weight", nn.Parameter(conv.weight.detach().as_subclass(OnDevice))),
        lambda conv: torch.nn.utils.parametrizations.weight_norm(conv),
    ],
)
def test_other_weights_are_convolved(change, monkeypatch):
    calls = watch(monkeypatch)
    conv = Conv3x3(128, 128).eval()
    with torch.no_grad():
        conv(torch.zeros(1, 128, 32, 32))
    assert len(calls) == 1
    change(conv)
    with torch.no_grad():
        conv(torch.zeros(1, 128, 32, 32, dtype=conv.weight.dtype))
    assert len(calls) == 1


def test_who_differentiates_casts_or_exports_gets_the_convolution(monkeypatch):
    calls = watch(monkeypatch)
    conv, states = Conv3x3(128, 128).eval(), torch.zeros(1, 128, 32, 32)
    conv(states)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            conv(states)
        torch.func.vmap(conv)(states[None])
        torch.jit.trace(conv, states, check_trace=False)
        program = torch.export.export(conv, (states,))
        conv.to("meta")(states.to("meta"))
    assert not calls and "conv3x3" not in str(program)


def test_small_maps_are_convolved():
    """In compiled code too, whose operator decides by the size that it gets."""
    conv, states = Conv3x3(128, 128).eval(), torch.randn(1, 128, 28, 32)
    with torch.no_grad():
        expected = F.conv2d(states, conv.weight, conv.bias, padding=1)
        assert torch.equal(conv(states), expected)  # 56 tiles
        found = conv(torch.cat((states, states), dim=3))
        assert not torch.equal(found[..., :28], expected[..., :28])
        assert_close(found[..., :28], expected[..., :28], rtol=0, atol=1e-4)


def test_compiled_code_has_one_operator_for_all_sizes():
    torch.compiler.reset()
    conv = Conv3x3(128, 128).eval()
    compiled = torch.compile(conv, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((2, 128, 8, 9), (3, 128, 33, 40), (4, 128, 24, 64)):
            states = torch.randn(size)
            assert torch.equal(compiled(states), conv(states))


def test_the_operator_keeps_its_word():
    arguments = draw(1, 3, 9, 6), draw(2, 3, 3, 3), draw(2)
    torch.library.opcheck(convolve, (*arguments, 1000, 0))
    with FlopCounterMode(display=False) as counted:
        convolve(*arguments, 1000, 0)
    with FlopCounterMode(display=False) as expected:
        F.conv2d(*arguments, padding=1)
    assert counted.get_total_flops() == expected.get_total_flops() == 2 * 9 * 3 * 2 * 9 * 6
