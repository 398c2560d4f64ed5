"""The depth-wise convolution of PVT v2 in compiled training on a CPU: an operator whose backward pass is another one.

A compiler finds no order in the strides of its weights, which have one input channel, and would turn the maps of the
backward pass into the layout in which it is slowest, and back.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .layers import computes_on_cpu, is_unwatched, map_to_tokens, tokens_to_map


def keep_layout(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator of the `forward` of a module with a depth-wise 3 x 3 convolution `dwconv` and nothing else.

    Args:
        forward: A method `(hidden_states, height, width, rows)`, from tokens `(batch, height * width, channels)` to
            those rows of the convolved map as tokens, or to all where `rows` is None.

    Returns:
        A method with the same arguments and results.
    """

    @wraps(forward)
    def forward_in_layout(
        self: nn.Module, hidden_states: torch.Tensor, height: int, width: int, rows: slice | None = None
    ) -> torch.Tensor:
        if rows is None and _trains_compiled(self.dwconv, hidden_states):
            return _convolve(hidden_states, height, width, self.dwconv.weight, self.dwconv.bias)
        return forward(self, hidden_states, height, width, rows)

    return forward_in_layout


def differentiate_depthwise_conv(
    gradient: torch.Tensor, feature_map: torch.Tensor, weight: torch.Tensor, is_frozen: bool
) -> list[torch.Tensor]:
    """The gradients of the map and, unless they are frozen, of the weight and the bias.

    Args:
        gradient: Of the result: (batch, channels, height, width).
        feature_map: What is convolved: (batch, channels, height, width).
        weight: (channels, 1, 3, 3)
        is_frozen: Whether the gradient of the map is all that is wanted.
    """
    gradients = torch.ops.aten.convolution_backward(
        gradient,
        feature_map,
        weight,
        [len(weight)],
        [1, 1],  # stride
        [1, 1],  # padding
        [1, 1],  # dilation
        False,
        [0, 0],
        len(weight),
        [True, not is_frozen, not is_frozen],
    )
    return [tensor for tensor in gradients if tensor is not None]


def _trains_compiled(conv: nn.Module, hidden_states: torch.Tensor) -> bool:
    if not computes_on_cpu(hidden_states) or not torch.is_grad_enabled() or not torch.compiler.is_compiling():
        return False
    if type(conv) is not nn.Conv2d or not is_unwatched(conv):
        return False
    return all(type(p) is nn.Parameter and p.dtype == hidden_states.dtype for p in conv._parameters.values())


@torch.library.custom_op("pvt_hf::convolve", mutates_args=())
def _convolve(
    hidden_states: torch.Tensor, height: int, width: int, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    feature_map = tokens_to_map(hidden_states.contiguous(), height, width)
    return map_to_tokens(F.conv2d(feature_map, weight, bias, padding=1, groups=len(weight))).contiguous()


@torch.library.custom_op("pvt_hf::convolve_backward", mutates_args=())
def _differentiate(
    gradient: torch.Tensor,
    hidden_states: torch.Tensor,
    height: int,
    width: int,
    weight: torch.Tensor,
    is_frozen: bool,
) -> list[torch.Tensor]:
    """The gradients of the hidden states and, unless they are frozen, of the weight and the bias."""
    gradient, feature_map = (tokens_to_map(part.contiguous(), height, width) for part in (gradient, hidden_states))
    map_gradient, *gradients = differentiate_depthwise_conv(gradient, feature_map, weight, is_frozen)
    return [tensor.contiguous() for tensor in (map_to_tokens(map_gradient), *gradients)]


@_convolve.register_fake
def _allocate(hidden_states, *_):
    return hidden_states.new_empty(hidden_states.shape)


@_differentiate.register_fake
def _allocate_gradients(gradient, hidden_states, height, width, weight, is_frozen):
    weights = [] if is_frozen else [weight, weight[:, 0, 0, 0]]
    return [tensor.new_empty(tensor.shape) for tensor in (hidden_states, *weights)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    hidden_states, ctx.height, ctx.width, weight, _ = inputs
    ctx.save_for_backward(hidden_states, weight)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    hidden_states, weight = ctx.saved_tensors
    is_frozen = not any(ctx.needs_input_grad[3:])
    found = _differentiate(gradient, hidden_states, ctx.height, ctx.width, weight, is_frozen)
    return found[0], None, None, *(found[1:] or [None, None])


_convolve.register_autograd(_backward, setup_context=_setup_context)

__all__ = ["differentiate_depthwise_conv", "keep_layout"]
