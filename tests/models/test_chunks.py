"""How the ends of the blocks of both versions use memory: in which layout gradients come, what is computed in chunks,
what compiled code has as one operator. (That models with chunks give the papers' numbers: `test_parity.py`.)"""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import pvt_hf
from pvt_hf.models import chunks
from pvt_hf.models.modeling_pvt import PvtLayer
from pvt_hf.models.modeling_pvt_v2 import PvtV2BlockLayer, PvtV2DepthWiseConv
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


def build_block(version: str, **fields: object) -> nn.Module:
    block_class = PvtLayer if version == "v1" else PvtV2BlockLayer
    block = randomize(block_class(small_config(version, **fields), 0, 0.0)).eval()
    block.mlp.chunk_bytes = 2**11
    return block


def draw_arguments(version: str, batch: int, height: int, width: int, **options: object) -> list:
    """Of `add_branches`, for maps of 8 channels."""
    maps = [torch.randn(batch, height * width, 8, **options) for _ in range(2)]
    return maps + [height, width] * (version != "v1")


VERSIONS = pytest.mark.parametrize("version", ["v1", "v2", "v2_linear"])


@VERSIONS
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 7, 8, 14, 16, 100])
def test_chunks_of_any_size_give_the_same(version, rows):
    """Of some rows and of several images, with more or fewer of them in the last."""
    block = build_block(version).double()
    width, size = 3, block.mlp.intermediate_size * 8
    block.mlp.chunk_bytes = rows * width * size + 1
    for batch, height in ((1, 1), (1, 7), (3, 7), (5, 8)):
        arguments = draw_arguments(version, batch, height, width, dtype=torch.double)
        before = [tensor.clone() for tensor in arguments[:2]]
        expected = block.train().add_branches(*arguments).detach()  # by its modules
        with torch.no_grad():
            actual = block.eval().add_branches(*arguments)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        assert all(torch.equal(*pair) for pair in zip(arguments[:2], before, strict=True))


@VERSIONS
@torch.no_grad()
def test_an_empty_batch_stays_one(version):
    assert build_block(version).add_branches(*draw_arguments(version, 0, 4, 6)).shape == (0, 24, 8)


@VERSIONS
@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_hidden_states_take_the_bytes_of_a_chunk(version, threads, monkeypatch):
    """Where a CPU infers, for each thread: those of the last layer's input, of a map that is eight times as large."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    block, found = build_block(version), []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            found.extend([args[0].nbytes] if function is torch.nn.functional.gelu else [])
            return function(*args, **(kwargs or {}))

    arguments = draw_arguments(version, 2, 16, 8)
    block.mlp.chunk_bytes = 2 * 128 * block.mlp.intermediate_size * 4 // 8
    with Watch():
        block.add_branches(*arguments)
    assert found == [block.mlp.chunk_bytes * threads] * (8 // threads)


def count_operators(block: nn.Module, version: str, monkeypatch) -> int:
    """How many of its two ways of being computed as a whole a block takes."""
    runs = []
    for types, ways in chunks._BRANCHES.items():
        wrapped = [lambda *args, run=run: (runs.append(run), run(*args))[1] for run in ways]
        monkeypatch.setitem(chunks._BRANCHES, types, wrapped)
    block.add_branches(*draw_arguments(version, 2, 4, 6))
    return len(runs)


@VERSIONS
def test_blocks_as_they_were_built_are_computed_as_a_whole_in_inference_alone(version, monkeypatch):
    block = build_block(version)
    with torch.no_grad():
        assert count_operators(block, version, monkeypatch) == 1
    assert count_operators(block, version, monkeypatch) == 0


def compile_block(version: str) -> tuple[nn.Module, Callable[..., torch.Tensor], Graphs]:
    """The end of a block of a small model, compiled, and its programs."""
    torch.compiler.reset()
    block, graphs = build_block(version), Graphs()
    return block, torch.compile(block.add_branches, fullgraph=True, backend=graphs), graphs


@pytest.mark.parametrize(
    ("version", "operator"), [("v1", "add_mlp"), ("v2", "add_conv_mlp"), ("v2_linear", "add_conv_mlp")]
)
@torch.no_grad()
def test_compiled_inference_has_the_end_of_a_block_as_one_operator(version, operator):
    """For every batch and size that the program takes."""
    block, compiled, graphs = compile_block(version)
    for size in ((2, 4, 6), (3, 5, 7), (5, 9, 2)):
        arguments = draw_arguments(version, *size)
        with torch.enable_grad():
            expected = block.add_branches(*arguments)  # by its modules
        assert expected.requires_grad
        torch.testing.assert_close(block.add_branches(*arguments), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(compiled(*arguments), expected, rtol=0, atol=1e-6)
    assert graphs.operators == [[f"pvt_hf.{operator}.default"]] * 2  # the second is for all sizes


def add_parametrization(block: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(block.mlp.dense1)


def add_hook(block: nn.Module) -> None:
    block.mlp.dense1.register_forward_hook(lambda module, inputs, output: output * 2)


def add_hook_of_norm(block: nn.Module) -> None:
    block.layer_norm_2.register_forward_pre_hook(lambda module, inputs: (inputs[0].square(),))


def add_hook_of_stochastic_depth(block: nn.Module) -> None:
    block.drop_path.register_forward_hook(lambda module, inputs, output: output * 2)


def use_relu(block: nn.Module) -> None:
    block.mlp.intermediate_act_fn = nn.ReLU()


def use_autocast(block: nn.Module) -> None:
    block.mlp.forward = torch.autocast("cpu", torch.bfloat16)(block.mlp.forward)


CHANGES = [add_parametrization, add_hook, add_hook_of_norm, add_hook_of_stochastic_depth, use_relu, use_autocast]


@pytest.mark.parametrize("change", [*CHANGES, nn.Module.train])
@torch.no_grad()
def test_a_compiler_sees_what_is_not_as_it_was_built(change):
    block, compiled, graphs = compile_block("v1")
    arguments = draw_arguments("v1", 2, 4, 6)
    before = block.add_branches(*arguments)
    change(block)
    after = block.add_branches(*arguments)
    torch.testing.assert_close(compiled(*arguments), after, rtol=0, atol=1e-6)
    assert graphs.operators == [[]]
    changes_nothing = change in (add_parametrization, nn.Module.train)
    assert torch.allclose(before, after, rtol=0, atol=1e-6) == changes_nothing


def test_a_compiler_sees_what_has_gradients():
    """But for what has an operator with gradients of its own."""
    block, compiled, graphs = compile_block("v2")
    block.mlp.stored_bytes = 0
    compiled(*draw_arguments("v2", 2, 4, 6)).sum().backward()
    assert graphs.operators == [["pvt_hf.conv_mlp.default"]] and block.mlp.dense1.weight.grad.any()


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v2", "v2_linear"])
@torch.no_grad()
def test_compiled_models_have_the_end_of_each_block_as_one_operator(version):
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
    norm = [torch.randn(4, dtype=dtype) for _ in range(2)]
    linear = [torch.randn(size, dtype=dtype) for size in ((16, 4), (16,), (4, 16), (4,))]
    conv = [torch.randn(size, dtype=dtype) for size in ((16, 1, 3, 3), (16,))]
    states, tests = [torch.randn(2, 5 * 6, 4, dtype=dtype) for _ in range(2)], ("test_schema", "test_faketensor")
    torch.library.opcheck(chunks._add_mlp_as_operator, (*states, 100, 1e-6, *norm, *linear), test_utils=tests)
    arguments = (*states, 5, 6, 1000, 1e-6, True, *norm, *linear[:2], *conv, *linear[2:])
    torch.library.opcheck(chunks._add_conv_mlp_as_operator, arguments, test_utils=tests)
