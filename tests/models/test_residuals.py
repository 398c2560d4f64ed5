"""How a CPU infers a block: both residual branches are added in place, as long as nobody watches or changes a part."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

from pvt_hf.models import residuals
from pvt_hf.models.layers import SpatialReductionAttention
from pvt_hf.models.modeling_pvt import PvtLayer
from pvt_hf.models.modeling_pvt_v2 import PvtV2BlockLayer
from tests.support.small_models import build_backbone, build_classifier, randomize, small_config

VERSIONS = pytest.mark.parametrize("version", ["v1", "v2", "v2_linear"])
STAGES = pytest.mark.parametrize("stage", [0, 1], ids=["one_head", "two_heads"])
HEIGHT, WIDTH = 16, 24


def build_block(version: str, stage: int, **fields: object) -> nn.Module:
    config = small_config(version, **({"attn_implementation": "sdpa"} | fields))
    block_class = PvtLayer if version == "v1" else PvtV2BlockLayer
    return randomize(block_class(config, stage, 0.0), std=0.3).double().eval()


def draw_states(block: nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, HEIGHT * WIDTH, block.layer_norm_1.normalized_shape[0], dtype=torch.double)


def compute_by_modules(block: nn.Module, states: torch.Tensor, **options: bool) -> torch.Tensor:
    with torch.enable_grad():
        result, _ = block(states, HEIGHT, WIDTH, **options)
    assert result.requires_grad
    return result.detach()


@pytest.fixture
def shortcuts(monkeypatch) -> list[str]:
    """Which of the two functions that call no output projection are called."""
    called: list[str] = []
    for name in ("_attend_one_head", "_add_heads"):
        function = getattr(residuals, name)
        wrapped = lambda *args, name=name, function=function: (called.append(name), function(*args))[1]  # noqa: E731
        monkeypatch.setattr(residuals, name, wrapped)
    return called


@VERSIONS
@STAGES
@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_inference_in_place_gives_what_the_modules_do(version, stage, qkv_bias, attention, shortcuts):
    block = build_block(version, stage, qkv_bias=qkv_bias, attn_implementation=attention)
    for states in (draw_states(block), draw_states(block).transpose(0, 1).contiguous().transpose(0, 1)):
        before = states.clone()
        actual, weights = block(states, HEIGHT, WIDTH)
        torch.testing.assert_close(actual, compute_by_modules(block, states), rtol=0, atol=1e-12)
        assert weights is None and torch.equal(states, before)
    assert shortcuts == ["_attend_one_head" if (stage, attention) == (0, "sdpa") else "_add_heads"] * 2


@torch.no_grad()
def test_probabilities_and_empty_batches_come_from_the_modules(shortcuts):
    block = build_block("v2", 0)
    states = draw_states(block)
    actual, weights = block(states, HEIGHT, WIDTH, output_attentions=True)
    torch.testing.assert_close(actual, block(states, HEIGHT, WIDTH)[0], rtol=0, atol=1e-12)
    assert weights.shape == (2, 1, HEIGHT * WIDTH, HEIGHT * WIDTH // 64)
    assert block(states[:0], HEIGHT, WIDTH)[0].shape == (0, *states.shape[1:])
    assert len(shortcuts) == 1


def find_projection(block: nn.Module) -> nn.Module:
    return block.attention.proj if isinstance(block, PvtV2BlockLayer) else block.attention.output.dense


def find_attention(block: nn.Module) -> SpatialReductionAttention:
    return next(part for part in block.attention.modules() if isinstance(part, SpatialReductionAttention))


def double_output(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: output * 2)


class Doubled(nn.Linear):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * 2


def replace_query(block: nn.Module) -> None:
    attention = find_attention(block)
    query = Doubled(*attention.query.weight.shape, dtype=torch.double)
    query.load_state_dict(attention.query.state_dict())
    attention.query = query


def double_attention(block: nn.Module) -> None:
    block.attention.register_forward_hook(lambda module, inputs, output: (output[0] * 2, output[1]))


CHANGES = {
    "hook of the query": lambda block: double_output(find_attention(block).query),
    "hook of the projection": lambda block: double_output(find_projection(block)),
    "hook of the attention": double_attention,
    "another class": replace_query,
    "parametrization": lambda block: nn.utils.parametrizations.weight_norm(find_projection(block)),
    "hook of the MLP": lambda block: double_output(block.mlp.dense1),
}


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_parts_that_are_watched_or_changed_are_called(version, change: Callable[[nn.Module], None], shortcuts):
    block = build_block(version, 0)
    states, changed = draw_states(block), deepcopy(block)
    change(changed)
    expected = compute_by_modules(changed, states)
    torch.testing.assert_close(changed(states, HEIGHT, WIDTH)[0], expected, rtol=0, atol=1e-12)
    assert not shortcuts
    is_same = torch.allclose(block(states, HEIGHT, WIDTH)[0], expected, rtol=0, atol=1e-9)
    assert is_same == (change is CHANGES["parametrization"])


@torch.no_grad()
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_dropout_that_somebody_left_on_drops(part):
    """As those do who estimate uncertainty from several results of one image."""
    block = build_block("v2", 0, hidden_dropout_prob=0.5)
    states = draw_states(block)
    for module in getattr(block, part).modules():
        module.train(isinstance(module, nn.Dropout))
    assert not torch.equal(block(states, HEIGHT, WIDTH)[0], block(states, HEIGHT, WIDTH)[0])


@torch.no_grad()
def test_hidden_states_of_blocks_are_not_overwritten_by_the_next():
    model, pixels = randomize(build_classifier("v1")).eval(), torch.randn(2, 3, 64, 96)
    actual = model(pixels, output_hidden_states=True).hidden_states
    with torch.enable_grad():
        expected = model(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(actual, tuple(states.detach() for states in expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", ["v1", "v2"])
@torch.no_grad()
def test_a_small_map_is_copied_instead_of_the_weights_of_its_convolution(version):
    model, copied = randomize(build_backbone(version)).eval(), set()

    def watch(name: str, convolution: nn.Conv2d, inputs: tuple[torch.Tensor]) -> None:
        (feature_map,) = inputs
        is_small = convolution.weight.nbytes >= 5 * feature_map.nbytes
        assert feature_map.is_contiguous(memory_format=torch.contiguous_format if is_small else torch.channels_last)
        copied.update([name] if is_small else [])

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            module.register_forward_pre_hook(lambda *args, name=name: watch(name, *args))
    pixels = torch.randn(1, 3, 64, 64)
    actual = model(pixels).feature_maps
    assert len(copied) == 2
    for feature_map, expected in zip(actual, model.train()(pixels).feature_maps, strict=True):
        torch.testing.assert_close(feature_map, expected, rtol=0, atol=1e-5)


@VERSIONS
@STAGES
@pytest.mark.process
@torch.no_grad()
def test_compiled_blocks_give_what_the_modules_do(version, stage):
    """In one program for all sizes."""
    torch.compiler.reset()
    block = build_block(version, stage)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for height, width in ((HEIGHT, WIDTH), (40, 64)):  # few keys, and more than channels
            states = torch.randn(2, height * width, block.layer_norm_1.normalized_shape[0], dtype=torch.double)
            with torch.enable_grad():
                expected = block(states, height, width)[0].detach()
            torch.testing.assert_close(compiled(states, height, width)[0], expected, rtol=0, atol=1e-12)
