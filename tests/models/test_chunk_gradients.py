"""MLPs whose hidden states a CPU recomputes in the backward pass, in chunks."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

from pvt_hf.models.modeling_pvt import PvtFFN
from pvt_hf.models.modeling_pvt_v2 import PvtV2ConvFeedForwardNetwork
from tests.support.small_models import randomize, small_config

VERSIONS = ["v1", "v2", "v2_linear"]
HEIGHT, WIDTH = 5, 4


def build(version: str, **fields: object) -> nn.Module:
    """An MLP of 6 channels and 24 hidden channels in float64 that recomputes every map, one row at a time."""
    mlp_class = PvtFFN if version == "v1" else PvtV2ConvFeedForwardNetwork
    mlp = randomize(mlp_class(small_config(version, **fields), 6, 24), std=0.5).double()
    mlp.stored_bytes, mlp.chunk_bytes = 0, WIDTH * 24 * 8
    return mlp


def run(mlp: nn.Module, states: torch.Tensor) -> torch.Tensor:
    return mlp(states) if isinstance(mlp, PvtFFN) else mlp(states, HEIGHT, WIDTH)


def draw(batch: int = 3, **options: object) -> torch.Tensor:
    return torch.randn(batch, HEIGHT * WIDTH, 6, **{"dtype": torch.double, "requires_grad": True, **options})


def is_recomputed(output: torch.Tensor) -> bool:
    return output.grad_fn is not None and output.grad_fn.name() == "RecomputedBackward"


def differentiate(mlp: nn.Module, states: torch.Tensor, is_expected: bool = True) -> list[torch.Tensor]:
    """The result, and the gradients of the input and of what is trained."""
    output = run(mlp, states)
    assert is_recomputed(output) == is_expected
    inputs = [tensor for tensor in (states, *mlp.parameters()) if tensor.requires_grad]
    weights = torch.arange(output.numel(), dtype=output.dtype).sin().view(output.shape)
    return [output, *torch.autograd.grad(output, inputs, weights)]


def store(mlp: nn.Module) -> nn.Module:
    mlp.stored_bytes = 2**40
    return mlp


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 5, 10, 100])
@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_recomputed_equals_what_is_stored(version, num_rows):
    """In pieces of less than a row, of rows, of one image and of several; the last of them may have fewer."""
    mlp, states = build(version), draw()
    mlp.chunk_bytes = max(1, mlp.chunk_bytes * num_rows)
    assert_equal(differentiate(mlp, states), differentiate(store(mlp), states, is_expected=False))


@pytest.mark.parametrize("version", VERSIONS)
def test_inputs_and_gradients_of_other_layouts(version):
    mlp, states = build(version), draw().transpose(0, 1).contiguous().transpose(0, 1)
    assert not states.is_contiguous()

    def differentiate_mean() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(run(mlp, states).mean(), [states, *mlp.parameters()])  # (its gradient is expanded)

    recomputed = differentiate_mean()
    store(mlp)
    for a, b in zip(recomputed, differentiate_mean(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("trained", ["nothing", "dense1.bias"])
def test_frozen_weights_have_no_gradients(version, trained):
    mlp, states = build(version), draw()
    for name, parameter in mlp.named_parameters():
        parameter.requires_grad_(name == trained)
    assert_equal(differentiate(mlp, states), differentiate(store(mlp), states, is_expected=False))


@pytest.mark.parametrize("version", VERSIONS)
def test_weights_of_an_input_without_gradients(version):
    mlp, states = build(version), draw(requires_grad=False)
    assert_equal(differentiate(mlp, states), differentiate(store(mlp), states, is_expected=False))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("is_frozen", [False, True])
def test_gradients_have_gradients(version, is_frozen):
    """As a penalty on them needs."""
    mlp, states = build(version).requires_grad_(not is_frozen), draw(batch=1)
    trained = [states, *(parameter for parameter in mlp.parameters() if not is_frozen)]

    def differentiate_penalty() -> list[torch.Tensor]:
        (gradient,) = torch.autograd.grad(run(mlp, states).square().sum(), states, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), trained))

    recomputed = differentiate_penalty()
    assert_equal(recomputed, [expected.contiguous() for expected in (store(mlp), differentiate_penalty())[1]])


@pytest.mark.parametrize("version", VERSIONS)
def test_only_inputs_are_stored(version):
    mlp, states, stored = build(version), draw(), []

    def store_tensor(tensor: torch.Tensor) -> torch.Tensor:
        stored.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(store_tensor, lambda tensor: tensor):
        run(mlp, states)
    assert {tensor.data_ptr() for tensor in stored} == {t.data_ptr() for t in (states, *mlp.parameters())}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_in_a_block_that_is_recomputed_too(version, use_reentrant):
    mlp, states = build(version).train(), draw()
    expected = differentiate(mlp, states)
    output = checkpoint(lambda states: run(mlp, states), states, use_reentrant=use_reentrant)
    output.backward(torch.arange(output.numel(), dtype=output.dtype).sin().view(output.shape))
    assert_equal([output, states.grad, *(parameter.grad for parameter in mlp.parameters())], expected)


@pytest.mark.parametrize(("version", "batch"), [("v1", 1), ("v2", 1), ("v2", 3)])
def test_hidden_states_of_a_batch_are_stored_up_to_a_size(version, batch):
    mlp, states = build(version), draw(batch)
    mlp.stored_bytes = batch * HEIGHT * WIDTH * 24 * 8
    assert not is_recomputed(run(mlp, states))
    mlp.stored_bytes -= 1
    assert is_recomputed(run(mlp, states))
    assert run(mlp, states[:0]).shape == (0, HEIGHT * WIDTH, 6)


def add_parametrization(mlp: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(mlp.dense1)


def add_forward_hook(mlp: nn.Module) -> None:
    mlp.dense1.register_forward_hook(lambda *_: None)


def add_backward_hook(mlp: nn.Module) -> None:
    mlp.intermediate_act_fn.register_full_backward_hook(lambda *_: None)


def use_relu(mlp: nn.Module) -> None:
    mlp.intermediate_act_fn = nn.ReLU()


def use_autocast(mlp: nn.Module) -> None:
    mlp.forward = torch.autocast("cpu", torch.bfloat16)(mlp.forward)


def use_dropout(mlp: nn.Module) -> None:
    mlp.train().dropout.p = 0.5


def use_bfloat16(mlp: nn.Module) -> None:
    mlp.bfloat16()


def use_no_gradients(mlp: nn.Module) -> None:
    mlp.forward = torch.no_grad()(mlp.forward)


CHANGES = [add_parametrization, add_forward_hook, add_backward_hook, use_relu, use_autocast, use_dropout]


@pytest.mark.parametrize("change", [*CHANGES, use_bfloat16, use_no_gradients])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_modules_are_called_unless_they_are_as_built(version, change):
    mlp, states = build(version), draw()
    assert is_recomputed(run(mlp, states))
    change(mlp)
    assert not is_recomputed(run(mlp, states.to(mlp.dense2.weight.dtype)))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_hooks_of_all_modules_see_the_parts(version):
    mlp, seen = build(version), set()
    handle = register_module_forward_hook(lambda module, inputs, output: seen.add(module))
    try:
        run(mlp, draw())
    finally:
        handle.remove()
    assert {mlp.dense1, mlp.dense2} <= seen


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_gradients_of_each_image(version):
    mlp, states = build(version), draw(requires_grad=False)
    weights = dict(mlp.named_parameters())

    def compute(weights: dict[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        size = () if version == "v1" else (HEIGHT, WIDTH)
        return torch.func.functional_call(mlp, weights, (states[None], *size)).sum()

    per_image = torch.func.vmap(torch.func.grad(compute), in_dims=(None, 0))(weights, states)
    run(mlp, states).sum().backward()
    for name, parameter in weights.items():
        torch.testing.assert_close(per_image[name].sum(0), parameter.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_tangents_go_through_the_modules(version):
    mlp, states, tangent = build(version), draw(requires_grad=False), draw(requires_grad=False)
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(run(mlp, forward_ad.make_dual(states, tangent))).tangent
    expected = (run(mlp, states + 1e-5 * tangent) - run(mlp, states - 1e-5 * tangent)) / 2e-5
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


class Programs:
    """A compiler that keeps the operators of ours in the programs that it gets, and runs these as they are."""

    def __init__(self):
        self.operators: list[str] = []
        self.compile = aot_autograd(fw_compiler=self.keep, bw_compiler=self.keep)

    def keep(self, graph: torch.fx.GraphModule, inputs: list):
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        self.operators += [target for target in targets if target.startswith("pvt_hf")]
        return make_boxed_func(graph.forward)


def compile_mlp(mlp: nn.Module, dynamic: bool = True) -> tuple[nn.Module, Programs]:
    """The same with the same weights, compiled for all sizes or for one."""
    torch.compiler.reset()
    programs, compiled = Programs(), copy.deepcopy(mlp)
    compiled.compile(fullgraph=True, dynamic=dynamic, backend=programs.compile)
    return compiled, programs


@pytest.mark.parametrize(("version", "trained"), [("v1", ""), ("v2", "nothing"), ("v2_linear", "")])
def test_compiled_code_recomputes_maps_of_all_sizes_that_it_does_not_know(version, trained):
    """In one program for all of them."""
    mlp = store(build(version))
    for name, parameter in mlp.named_parameters():
        parameter.requires_grad_(trained in ("", name))
    compiled, programs = compile_mlp(mlp)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 2):
            states = draw(batch)
            expected = differentiate(mlp, states, is_expected=False)
            assert_equal(differentiate(compiled, states, is_expected=False), expected)
    name = "mlp" if version == "v1" else "conv_mlp"
    assert programs.operators == [f"pvt_hf.{name}.default", f"pvt_hf.{name}_backward.default"]


@pytest.mark.parametrize("is_frozen", [False, True])
def test_compiled_code_stores_small_maps(is_frozen):
    """The gradients of their convolution are an operator too."""
    mlp, states = store(build("v2")).requires_grad_(not is_frozen), draw()
    mlp.stored_bytes = 2 * states.shape[0] * HEIGHT * WIDTH * 24 * 8
    compiled, programs = compile_mlp(mlp, dynamic=False)
    assert_equal(differentiate(compiled, states, False), differentiate(mlp, states, is_expected=False))
    assert programs.operators == ["pvt_hf.convolve.default", "pvt_hf.convolve_backward.default"]
    mlp.stored_bytes -= 2
    compiled, programs = compile_mlp(mlp, dynamic=False)
    run(compiled, states)
    assert "pvt_hf.conv_mlp.default" in programs.operators


@pytest.mark.parametrize("change", [use_relu, use_autocast])
def test_a_compiler_gets_the_modules_unless_they_are_as_built(change):
    torch.compiler.reset()
    mlp, graphs = build("v2"), []
    change(mlp)
    mlp.compile(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    run(mlp, draw())
    assert len(graphs) == 1 and "linear" in graphs[0].code and "pvt_hf.conv_mlp" not in graphs[0].code


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_operators_are_what_they_say(version):
    mlp, states = build(version), draw()
    name = "mlp" if version == "v1" else "conv_mlp"
    options = [mlp.chunk_bytes] if version == "v1" else [HEIGHT, WIDTH, mlp.chunk_bytes, 0]
    weights = [parameter.detach().requires_grad_() for parameter in mlp.parameters()]
    torch.library.opcheck(getattr(torch.ops.pvt_hf, name), (states, options, weights))
    tensors = [torch.randn_like(states), states.detach(), options, [weight.detach() for weight in weights]]
    for is_frozen in (False, True):
        torch.library.opcheck(getattr(torch.ops.pvt_hf, f"{name}_backward"), (*tensors, is_frozen))


def test_the_convolution_is_what_it_says():
    states = torch.randn(2, HEIGHT * WIDTH, 8, requires_grad=True)
    size, weight, bias = (HEIGHT, WIDTH), *(torch.randn(8, *rest, requires_grad=True) for rest in ((1, 3, 3), ()))
    torch.library.opcheck(torch.ops.pvt_hf.convolve, (states, *size, weight, bias))
    arguments = [tensor.detach() for tensor in (torch.randn_like(states), states)]
    for is_frozen in (False, True):
        torch.library.opcheck(torch.ops.pvt_hf.convolve_backward, (*arguments, *size, weight.detach(), is_frozen))
