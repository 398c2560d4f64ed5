"""How a CPU trains the MLPs of PVT v1 and v2 where their hidden states are too large to be stored: in chunks that fit
its cache, whose hidden states the backward pass computes once more.

That is faster than to store them: the first write to a page of memory costs more than to compute what it holds.
Compiled code has such an MLP as an operator, and its backward pass as another.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.modules.module import _has_any_global_hook

from .chunks import NO_LAYERS, Layers, fit_caches, list_layers, multiply
from .conv_gradients import differentiate_depthwise_conv
from .layers import computes_on_cpu, map_to_tokens, tokens_to_map

aten = torch.ops.aten
# Of the operators: the options are sizes and the like.
_ARGUMENTS = "Tensor hidden_states, SymInt[] options, Tensor[] weights"


def recompute_hidden_states(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator of the `forward` of an MLP, whose hidden states are several times as large as its input.

    Where a CPU computes it with gradients, hidden states of a batch that take more than `stored_bytes` are recomputed
    in the backward pass, in chunks that take `chunk_bytes` for each thread, if the MLP is as it was built and nobody
    watches its parts. Compiled code recomputes from the half of that on, and where it does not know the size.

    Args:
        forward: A method `(hidden_states, *size)`, from hidden states `(batch, tokens, channels)` and, if there is a
            convolution, the height and width of the map. Its module has `stored_bytes`, `chunk_bytes` and
            `intermediate_size`, the channels of the hidden states.

    Returns:
        A method with the same arguments and results.
    """

    @wraps(forward)
    def forward_or_recompute(self: nn.Module, hidden_states: torch.Tensor, *size: int) -> torch.Tensor:
        types, weights = _find_weights(self, hidden_states)
        if (run := _FUNCTIONS.get(types)) is None:
            return forward(self, hidden_states, *size)
        has_relu = [int(isinstance(self.relu, nn.ReLU))] if size else []  # (an operator's list has one type)
        return run[torch.compiler.is_compiling()](hidden_states, [*size, self.chunk_bytes, *has_relu], weights)

    return forward_or_recompute


def _find_weights(mlp: nn.Module, hidden_states: torch.Tensor) -> Layers:
    """The layers of an MLP whose hidden states are to be recomputed; or none."""
    if not computes_on_cpu(hidden_states) or not torch.is_grad_enabled():
        return NO_LAYERS
    if (mlp.training and mlp.dropout.p > 0) or hidden_states.dtype.itemsize < 4:
        return NO_LAYERS  # (sums over chunks in less precision would be others)
    num_bytes = hidden_states[..., 0].numel() * mlp.intermediate_size * hidden_states.element_size()
    if torch.compiler.is_compiling():
        is_small = statically_known_true(num_bytes <= mlp.stored_bytes // 2)
        return NO_LAYERS if is_small else list_layers([mlp], hidden_states.dtype)
    if num_bytes <= mlp.stored_bytes or _has_any_global_hook():
        return NO_LAYERS
    types, weights = list_layers([mlp], hidden_states.dtype)
    tensors = [hidden_states, *weights]
    has_tangents = any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    needs_gradients = any(tensor.requires_grad for tensor in tensors)
    return (types, weights) if needs_gradients and not has_tangents else NO_LAYERS


def _make_functions(
    name: str,
    compute: Callable[..., torch.Tensor],
    compute_plainly: Callable[..., torch.Tensor],
    differentiate: Callable[..., list[torch.Tensor]],
) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """What computes an MLP and stores just its inputs, of hidden states, a list of options and a list of weights: eager
    and compiled.

    Args:
        name: Of the operator.
        compute: The MLP, of its hidden states, its options (sizes and the like) and its weights.
        compute_plainly: The same in operators that autograd knows, for gradients of gradients.
        differentiate: From the gradient of the result, the hidden states, the options, the weights and whether these
            are frozen, to the gradients of the hidden states and of the weights.
    """

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> torch.Tensor:
            return compute(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            ctx.save_for_backward(*(value for value in inputs if isinstance(value, torch.Tensor)))
            ctx.options = [value for value in inputs if not isinstance(value, torch.Tensor)]

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            inputs = hidden_states, *weights = ctx.saved_tensors
            if torch.is_grad_enabled():
                result = compute_plainly(hidden_states, *ctx.options, *weights)
                wanted = [value for value in inputs if value.requires_grad]
                found = iter(torch.autograd.grad(result, wanted, gradient, create_graph=True))
                gradients = [next(found) if value.requires_grad else None for value in inputs]
            else:
                is_frozen = not any(ctx.needs_input_grad[-len(weights) :])
                gradients = differentiate(gradient, hidden_states, *ctx.options, weights, is_frozen)
            return gradients[0], *[None] * len(ctx.options), *(gradients[1:] or [None] * len(weights))

    def run(hidden_states: torch.Tensor, options: list[int], weights: list[torch.Tensor]) -> torch.Tensor:
        return Recomputed.apply(hidden_states, *options, *weights)

    return run, _make_operator(name, compute, differentiate)


def _make_operator(
    name: str, compute: Callable[..., torch.Tensor], differentiate: Callable[..., list[torch.Tensor]]
) -> Callable[..., torch.Tensor]:
    """An operator, and another one that is its backward pass, of the functions that `_make_functions` gets."""

    @partial(torch.library.custom_op, f"pvt_hf::{name}", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
    def run(hidden_states, options, weights):
        return compute(hidden_states, *options, *weights)

    @partial(
        torch.library.custom_op,
        f"pvt_hf::{name}_backward",
        mutates_args=(),
        schema=f"(Tensor gradient, {_ARGUMENTS}, bool is_frozen) -> Tensor[]",
    )
    def run_backward(gradient, hidden_states, options, weights, is_frozen):
        return differentiate(gradient, hidden_states, *options, weights, is_frozen)

    @run.register_fake
    def allocate(hidden_states, options, weights):
        return hidden_states.new_empty(hidden_states.shape)

    @run_backward.register_fake
    def allocate_gradients(gradient, hidden_states, options, weights, is_frozen):
        return [tensor.new_empty(tensor.shape) for tensor in (hidden_states, *([] if is_frozen else weights))]

    def setup_context(ctx, inputs, output):
        hidden_states, ctx.options, weights = inputs
        ctx.save_for_backward(hidden_states, *weights)

    def backward(ctx, gradient):
        hidden_states, *weights = ctx.saved_tensors
        is_frozen = not any(ctx.needs_input_grad[2])
        gradients = run_backward(gradient, hidden_states, ctx.options, weights, is_frozen)
        return gradients[0], None, gradients[1:] or [None] * len(weights)

    run.register_autograd(backward, setup_context=setup_context)
    return run


def _compute_mlp(hidden_states: torch.Tensor, chunk_bytes: int, *weights: torch.Tensor) -> torch.Tensor:
    """The MLP of PVT v1, from hidden states (batch, tokens, channels)."""
    weight1, bias1, weight2, bias2 = weights
    result = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    for states, result_chunk in _iter_tokens(fit_caches(chunk_bytes, weight1[:, 0].nbytes), hidden_states, result):
        expanded = multiply(states, weight1, bias1)  # (tokens, hidden channels)
        torch.mm(F.gelu(expanded, out=expanded), weight2.t(), out=result_chunk).add_(bias2)
    return result


def _compute_conv_mlp(
    hidden_states: torch.Tensor, height: int, width: int, chunk_bytes: int, has_relu: bool, *weights: torch.Tensor
) -> torch.Tensor:
    """The MLP of PVT v2, from hidden states (batch, height * width, channels)."""
    *_, weight2, bias2 = weights
    result = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    maps = [tensor.contiguous().unflatten(1, (height, width)) for tensor in (hidden_states, result)]
    num_rows = fit_caches(chunk_bytes, width * weights[0][:, 0].nbytes)
    for images, around, rows in _iter_pieces(len(result), height, num_rows):
        states, result_piece = (feature_map[images, around] for feature_map in maps)
        _, convolved = _expand(states, rows, has_relu, *weights[:4])
        F.gelu(convolved, out=convolved)
        torch.mm(convolved.flatten(0, 2), weight2.t(), out=result_piece[:, rows].flatten(0, 2)).add_(bias2)
    return result


def _compute_mlp_plainly(hidden_states: torch.Tensor, _: int, *weights: torch.Tensor) -> torch.Tensor:
    weight1, bias1, weight2, bias2 = weights
    return F.linear(F.gelu(F.linear(hidden_states, weight1, bias1)), weight2, bias2)


def _compute_conv_mlp_plainly(
    hidden_states: torch.Tensor, height: int, width: int, _: int, has_relu: bool, *weights: torch.Tensor
) -> torch.Tensor:
    weight1, bias1, conv_weight, conv_bias, weight2, bias2 = weights
    hidden_states = F.linear(hidden_states, weight1, bias1)
    feature_map = tokens_to_map(hidden_states.relu() if has_relu else hidden_states, height, width)
    feature_map = F.conv2d(feature_map, conv_weight, conv_bias, padding=1, groups=len(conv_weight))
    return F.linear(F.gelu(map_to_tokens(feature_map)), weight2, bias2)


def _differentiate_mlp(
    gradient: torch.Tensor,
    hidden_states: torch.Tensor,
    chunk_bytes: int,
    weights: Sequence[torch.Tensor],
    is_frozen: bool,
) -> list[torch.Tensor]:
    """The gradients of the MLP of PVT v1.

    Args:
        gradient: Of its result: (..., channels).
        hidden_states: Its input: (..., channels).
        chunk_bytes: What the hidden states of a chunk take for each thread.
        weights: The weights and biases of its two linear layers.
        is_frozen: Whether the gradient of the input is all that is wanted.

    Returns:
        Those of the input and, unless they are frozen, of the weights.
    """
    result = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    weight1, bias1, weight2, _ = weights
    sums: list[torch.Tensor] = []
    num_tokens = fit_caches(chunk_bytes, weight1[:, 0].nbytes)
    for gradient2, states, result_chunk in _iter_tokens(num_tokens, gradient, hidden_states, result):
        expanded = multiply(states, weight1, bias1)  # (tokens, hidden channels)
        gradient1 = gradient2 @ weight2
        weight2_gradient = [] if is_frozen else [_sum_products(gradient2, F.gelu(expanded))]
        aten.gelu_backward.grad_input(gradient1, expanded, grad_input=gradient1)
        torch.mm(gradient1, weight1, out=result_chunk)
        if not is_frozen:
            _add(sums, [_sum_products(gradient1, states), gradient1.sum(0), *weight2_gradient])
    return [result] if is_frozen else [result, *(total.contiguous() for total in sums), gradient.flatten(0, -2).sum(0)]


def _differentiate_conv_mlp(
    gradient: torch.Tensor,
    hidden_states: torch.Tensor,
    height: int,
    width: int,
    chunk_bytes: int,
    has_relu: bool,
    weights: Sequence[torch.Tensor],
    is_frozen: bool,
) -> list[torch.Tensor]:
    """The gradients of the MLP of PVT v2.

    Args:
        gradient: Of its result: (batch, height * width, channels).
        hidden_states: Its input: (batch, height * width, channels).
        height: Of the map.
        width: Of the map.
        chunk_bytes: What the hidden states of a chunk take for each thread.
        has_relu: Whether a ReLU precedes the convolution.
        weights: The weights and biases of its linear layer, convolution and linear layer.
        is_frozen: Whether the gradient of the input is all that is wanted.

    Returns:
        Those of the input and, unless they are frozen, of the weights.
    """
    result = torch.zeros_like(hidden_states, memory_format=torch.contiguous_format)
    maps = [tensor.contiguous().unflatten(1, (height, width)) for tensor in (gradient, hidden_states, result)]
    num_rows = fit_caches(chunk_bytes, width * weights[0][:, 0].nbytes)
    # A row costs less in a piece of more rows: what fits the cache is a half of the hidden channels of the piece, if it
    # is not all of the batch.
    num_parts = 1 if num_rows >= len(gradient) * height else 2
    num_rows *= num_parts
    dims = (0, 0, 0, 0, 1)
    halves = list(zip(*(weight.chunk(num_parts, dim) for weight, dim in zip(weights, dims, strict=False)), strict=True))
    sums: list[list[torch.Tensor]] = [[] for _ in halves]
    for images, around, rows in _iter_pieces(len(gradient), height, num_rows):
        gradient2, states, result_piece = (feature_map[images, around] for feature_map in maps)
        for half, total in zip(halves, sums, strict=True):
            gradient1, *parts = _differentiate_rows(gradient2[:, rows], states, rows, has_relu, half, is_frozen)
            result_piece.flatten(0, 2).addmm_(gradient1.flatten(0, 2), half[0])
            _add(total, parts)
    gradients = [torch.cat(parts, dim) for parts, dim in zip(zip(*sums, strict=True), dims, strict=False)]
    return [result] if is_frozen else [result, *gradients, gradient.sum((0, 1))]


def _iter_tokens(num_tokens: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """`num_tokens` tokens at a time of tensors (batch, tokens, channels)."""
    return zip(*(tensor.flatten(0, 1).split(max(1, num_tokens)) for tensor in tensors), strict=True)


def _iter_pieces(batch: int, height: int, num_rows: int) -> Iterator[tuple[slice, slice, slice]]:
    """Images, their rows with one above and below where there is one, and in those the rows that are meant: `num_rows`
    rows, of several images where they fit completely, or else of one."""
    num_rows = max(1, num_rows)
    num_images = max(1, num_rows // height)
    for image in range(0, batch, num_images):
        for row in range(0, height, num_rows):
            above, end = max(0, row - 1), min(height, row + num_rows)
            yield slice(image, image + num_images), slice(above, end + 1), slice(row - above, end - above)


def _differentiate_rows(
    gradient2: torch.Tensor,
    states: torch.Tensor,
    rows: slice,
    has_relu: bool,
    weights: Sequence[torch.Tensor],
    is_frozen: bool,
) -> list[torch.Tensor]:
    """From the gradient of these rows, and the hidden states of them and those around them, (images, rows, width,
    channels): the gradients of the expanded states and of the weights."""
    _, _, conv_weight, _, weight2 = weights
    expanded, convolved = _expand(states, rows, has_relu, *weights[:4])
    weight2_gradient = [] if is_frozen else [_sum_products(gradient2, F.gelu(convolved))]

    gradient1 = torch.empty_like(expanded)
    gradient1[:, : rows.start] = 0
    gradient1[:, rows.stop :] = 0
    part = gradient1[:, rows]
    torch.mm(gradient2.flatten(0, 2), weight2, out=part.flatten(0, 2))
    aten.gelu_backward.grad_input(part, convolved, grad_input=part)
    gradient1, *conv_gradients = differentiate_depthwise_conv(
        gradient1.permute(0, 3, 1, 2), expanded.permute(0, 3, 1, 2), conv_weight, is_frozen
    )
    gradient1 = gradient1.permute(0, 2, 3, 1)
    if has_relu:
        aten.threshold_backward.grad_input(gradient1, expanded, 0, grad_input=gradient1)
    if is_frozen:
        return [gradient1]
    gradients = [_sum_products(gradient1, states), gradient1.sum((0, 1, 2)), *conv_gradients]
    return [gradient1, *gradients, *weight2_gradient]


def _expand(
    states: torch.Tensor,
    rows: slice,
    has_relu: bool,
    weight: torch.Tensor,
    bias: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """From hidden states (images, rows and those around them, width, channels): the hidden channels before the
    convolution, and of the rows alone after it."""
    expanded = multiply(states, weight, bias)
    feature_map = (expanded.relu_() if has_relu else expanded).permute(0, 3, 1, 2)
    convolved = F.conv2d(feature_map, conv_weight, conv_bias, padding=1, groups=len(conv_weight))
    return expanded, convolved.permute(0, 2, 3, 1)[:, rows]


def _sum_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(..., left channels) and (..., right channels) -> (left channels, right channels)"""
    left, right = left.flatten(0, -2), right.flatten(0, -2)
    # (It is faster with the fewer channels first.)
    return left.t() @ right if left.shape[1] < right.shape[1] else (right.t() @ left).t()


def _add(sums: list[torch.Tensor], parts: Sequence[torch.Tensor]) -> None:
    """Adds the gradients of a chunk to those of the chunks before it, if there are any."""
    if not sums:
        sums += parts
        return
    for total, part in zip(sums, parts, strict=True):
        total += part


# By the classes of the layers of an MLP: what computes it, eager and compiled.
_FUNCTIONS = {
    (nn.Linear, nn.Linear): _make_functions("mlp", _compute_mlp, _compute_mlp_plainly, _differentiate_mlp),
    (nn.Linear, nn.Conv2d, nn.Linear): _make_functions(
        "conv_mlp", _compute_conv_mlp, _compute_conv_mlp_plainly, _differentiate_conv_mlp
    ),
}

__all__ = ["recompute_hidden_states"]
