"""How many operators a block starts: with few images a GPU waits for these, not for what they compute."""

from collections import Counter

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pvt_hf.models.layers import cast_together
from tests.support.small_models import SMALL_V2, build_classifier, randomize
from tests.support.waits import OnDevice

VIEWS = {
    "_unsafe_view",
    "alias",
    "detach",
    "expand",
    "permute",
    "select",
    "slice",
    "split",
    "t",
    "transpose",
    "unbind",
    "view",
}
BLOCKS = [
    ("v1", 0),
    ("v1", 3),
    ("v2", 0),
    ("v2", 3),
    ("v2_linear", 0),
]
SIZE, CHANNELS = (16, 16), SMALL_V2["hidden_sizes"]


class Count(TorchDispatchMode):
    """Counts what is more than a view, and keeps what is copied to another type."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()
        self.cast: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.found.update([name] if name not in VIEWS else [])
        self.cast += [args[0]] if name == "_to_copy" else []
        return func(*args, **(kwargs or {}))


def build_block(version: str, stage: int) -> nn.Module:
    encoder = randomize(build_classifier(version)).train().base_model.encoder
    return encoder.block[stage][0] if version == "v1" else encoder.layers[stage].blocks[0]


def run(block: nn.Module, stage: int, *size: object) -> tuple[torch.Tensor, Count, Count]:
    """Forwards and backwards under autocast, in training mode: as a GPU computes, without chunks."""
    hidden_states = torch.randn(
        2, SIZE[0] * SIZE[1], CHANNELS[stage], generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    with Count() as forward, torch.autocast("cpu", torch.bfloat16):
        output = block(hidden_states, *size)
    output = output[0] if isinstance(output, tuple) else output
    with Count() as backward:
        output.sum().backward()
    return output, forward, backward


@pytest.mark.parametrize(("version", "stage"), BLOCKS[2:])
def test_a_block_starts_no_more_than_timms(version, stage):
    fields = {"depths": SMALL_V2["depths"], "embed_dims": CHANNELS, "num_heads": SMALL_V2["num_attention_heads"]}
    peer = timm.create_model("pvt_v2_b0", **fields, mlp_ratios=SMALL_V2["mlp_ratios"], linear=version == "v2_linear")
    _, *counts = run(build_block(version, stage), stage, *SIZE)
    _, *peers = run(peer.train().stages[stage].blocks[0], stage, SIZE)
    for count, of_peer in zip(counts, peers, strict=True):
        assert count.found.total() <= of_peer.found.total(), (count.found, of_peer.found)


@pytest.mark.parametrize(("version", "stage"), BLOCKS)
def test_autocast_casts_a_tensor_once(version, stage):
    _, forward, _ = run(build_block(version, stage), stage, *SIZE)
    times = Counter(tensor.data_ptr() for tensor in forward.cast)
    assert times and set(times.values()) == {1}


@pytest.mark.parametrize(("version", "stage"), BLOCKS)
def test_keys_and_values_are_one_product_unless_somebody_watches(version, stage):
    """With the same result; a hook on one of them sees what that makes of its input."""
    block = build_block(version, stage)
    output, stacked, _ = run(block, stage, *SIZE)
    expected = {name: parameter.grad.clone() for name, parameter in block.named_parameters()}
    block.zero_grad()
    seen: list[torch.Tensor] = []
    attention = block.attention.self if version == "v1" else block.attention
    attention.value.register_forward_hook(lambda module, inputs, output: seen.append(output))
    watched, apart, _ = run(block, stage, *SIZE)
    assert len(seen) == 1 and seen[0].shape[-1] == CHANNELS[stage]
    assert apart.found["addmm"] - stacked.found["addmm"] == (2 if attention.key.in_features == 32 else 1)
    torch.testing.assert_close(watched, output, rtol=2e-2, atol=2e-2)
    for name, parameter in block.named_parameters():
        if not name.endswith("key.bias"):  # whose gradient is zero but for rounding
            largest = expected[name].abs().max().item()
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0.1 * largest, msg=name)
            assert largest > 0, name


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.bfloat16], ids=["float64", "bfloat16"])
def test_weights_that_autocast_leaves_alone_are_not_copied(change):
    """Its type is theirs, or it does not cast theirs."""
    block = change(build_block("v2", 0)).eval()
    with torch.no_grad(), Count() as count, torch.autocast("cpu", torch.bfloat16):
        block.attention(torch.randn(2, 256, CHANNELS[0], dtype=block.attention.key.weight.dtype), *SIZE)
    assert not count.found["cat"]


class Adapted(nn.Linear):
    """Another class of layers: an adapter, or a quantised one."""


def offload(layer: nn.Module) -> None:
    layer.forward = layer.forward


CHANGES = [
    lambda layer: layer.register_forward_hook(print),
    lambda layer: layer.register_forward_pre_hook(print),
    lambda layer: layer.register_full_backward_hook(print),
    lambda layer: layer.register_full_backward_pre_hook(print),
    lambda layer: setattr(layer, "__class__", Adapted),
    lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().as_subclass(OnDevice))),
    offload,
]


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_are_not_as_they_were_built_are_called(change):
    states = torch.ones(1, 1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        for changed in range(3):
            layers = [nn.Linear(4, 4) for _ in range(3)]
            groups = [layers[:1], layers[1:]]
            assert [weight.shape for weight, _ in cast_together(states, groups)] == [(4, 4), (8, 4)]
            change(layers[changed])
            assert cast_together(states, groups) is None
