"""How the MLPs of both versions use memory: in which layout gradients come, and what is overwritten."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from pvt_hf.models.layers import activate
from pvt_hf.models.modeling_pvt_v2 import PvtV2DepthWiseConv


@pytest.mark.parametrize("rows", [slice(None), slice(1, 3)], ids=str)
def test_gradients_of_some_rows_are_channels_last(rows):
    """In another layout they would be copied, twice, before the backward pass of the convolution."""
    conv, layouts = PvtV2DepthWiseConv(8), []

    def watch(module, inputs, output):
        output.register_hook(lambda gradient: layouts.append(gradient.is_contiguous(memory_format=torch.channels_last)))

    conv.dwconv.register_forward_hook(watch)
    tokens = torch.randn(2, 4 * 5, 8, requires_grad=True)
    output = conv(tokens, 4, 5, rows)
    assert output.shape == (2, len(range(4)[rows]) * 5, 8)
    torch.testing.assert_close(output, conv(tokens, 4, 5).unflatten(1, (4, 5))[:, rows].flatten(1, 2))
    output.square().sum().backward()
    assert layouts and all(layouts)


class Mlp(nn.Module):
    def __init__(self, activation: str = "gelu"):
        super().__init__()
        self.dense1, self.intermediate_act_fn = nn.Linear(3, 5), ACT2FN[activation]

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states = self.dense1(states)
        return hidden_states, activate(self, hidden_states)


def test_gelu_overwrites_what_nobody_needs():
    mlp, states = Mlp(), torch.randn(7, 3)
    expected = nn.functional.gelu(mlp.dense1(states))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            before, after = mlp(states)
            assert before is after or before.data_ptr() == after.data_ptr()
            assert torch.equal(after, expected)


@pytest.mark.parametrize("needed", ["for the gradient", "by a hook", "by a hook of the activation", "by a compiler"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_python", "relu"])
def test_no_activation_overwrites_what_is_needed(activation, needed, monkeypatch):
    mlp, states, seen = Mlp(activation), torch.randn(7, 3), []
    if needed == "by a hook":
        mlp.dense1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    if needed == "by a hook of the activation":
        mlp.intermediate_act_fn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    if needed == "by a compiler":
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    with torch.set_grad_enabled(needed == "for the gradient"):
        before, after = mlp(states)
    assert torch.equal(before, mlp.dense1(states)) and torch.equal(after, mlp.intermediate_act_fn(before))
    assert all(torch.equal(values, before) for values in seen)
