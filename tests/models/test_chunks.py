"""How the MLPs of both versions use memory: in which layout gradients come, what is overwritten, what compiled code has
as one operator. (That chunks give the same numbers: `test_parity.py`.)"""

import pytest
import torch
from torch import nn

import pvt_hf
from pvt_hf.models import chunks
from pvt_hf.models.modeling_pvt import PvtFFN
from pvt_hf.models.modeling_pvt_v2 import PvtV2ConvFeedForwardNetwork, PvtV2DepthWiseConv
from tests.support.small_models import randomize, small_config


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


class Graphs:
    """A compiler that keeps what it gets, and runs it as it is."""

    def __init__(self):
        self.operators: list[list[str]] = []  # of each program that was compiled

    def __call__(self, graph: torch.fx.GraphModule, inputs: list):
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        self.operators.append([target for target in targets if target.startswith("pvt_hf")])
        return graph.forward


def compile_mlp(version: str) -> tuple[nn.Module, nn.Module, Graphs]:
    """One of a small model, the same compiled, and its programs."""
    torch.compiler.reset()
    mlp_class = PvtFFN if version == "v1" else PvtV2ConvFeedForwardNetwork
    mlp, graphs = randomize(mlp_class(small_config(version), 8, 32)).eval(), Graphs()
    mlp.chunk_bytes = 2**11
    return mlp, torch.compile(mlp, fullgraph=True, backend=graphs), graphs


@pytest.mark.parametrize(("version", "operator"), [("v1", "mlp"), ("v2", "conv_mlp"), ("v2_linear", "conv_mlp")])
@torch.no_grad()
def test_compiled_inference_has_an_mlp_as_one_operator(version, operator):
    """For every batch and size that the program takes."""
    mlp, compiled, graphs = compile_mlp(version)
    for batch, height, width in ((2, 4, 6), (3, 5, 7), (5, 9, 2)):
        arguments = (torch.randn(batch, height * width, 8), height, width)[: 1 if version == "v1" else 3]
        with torch.enable_grad():
            expected = mlp(*arguments)  # by its modules
        assert expected.requires_grad
        torch.testing.assert_close(mlp(*arguments), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(compiled(*arguments), expected, rtol=0, atol=1e-6)
    assert graphs.operators == [[f"pvt_hf.{operator}.default"]] * 2  # the second is for all sizes


def add_parametrization(mlp: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(mlp.dense1)


def add_hook(mlp: nn.Module) -> None:
    mlp.dense1.register_forward_hook(lambda module, inputs, output: output * 2)


def use_relu(mlp: nn.Module) -> None:
    mlp.intermediate_act_fn = nn.ReLU()


def use_autocast(mlp: nn.Module) -> None:
    mlp.forward = torch.autocast("cpu", torch.bfloat16)(mlp.forward)


@pytest.mark.parametrize("change", [add_parametrization, add_hook, use_relu, use_autocast, nn.Module.train])
@torch.no_grad()
def test_a_compiler_sees_what_is_not_as_it_was_built(change):
    mlp, compiled, graphs = compile_mlp("v1")
    change(mlp)
    states = torch.randn(2, 24, 8)
    torch.testing.assert_close(compiled(states), mlp(states), rtol=0, atol=1e-6)
    assert graphs.operators == [[]]


def test_a_compiler_sees_what_has_gradients():
    mlp, compiled, graphs = compile_mlp("v2")
    compiled(torch.randn(2, 24, 8), 4, 6).sum().backward()
    assert graphs.operators == [[]] and mlp.dense1.weight.grad.any()


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v2", "v2_linear"])
@torch.no_grad()
def test_compiled_models_have_each_mlp_as_one_operator(version):
    torch.compiler.reset()
    model_class = pvt_hf.PvtForImageClassification if version == "v1" else pvt_hf.PvtV2ForImageClassification
    model, graphs = randomize(model_class(small_config(version))).eval(), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=True)
    for size in ((2, 3, 64, 96), (3, 3, 96, 160), (5, 3, 128, 64)):
        pixels = torch.randn(size)
        torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits, rtol=0, atol=1e-5)
    assert graphs.operators and {len(operators) for operators in graphs.operators} == {5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_what_they_say(dtype):
    linear = [torch.randn(size, dtype=dtype) for size in ((16, 4), (16,), (4, 16), (4,))]
    conv = [torch.randn(size, dtype=dtype) for size in ((16, 1, 3, 3), (16,))]
    states, tests = torch.randn(2, 5 * 6, 4, dtype=dtype), ("test_schema", "test_faketensor")
    torch.library.opcheck(chunks._mlp_as_operator, (states, 100, *linear), test_utils=tests)
    arguments = (states, 5, 6, 1000, True, *linear[:2], *conv, *linear[2:])
    torch.library.opcheck(chunks._conv_mlp_as_operator, arguments, test_utils=tests)
