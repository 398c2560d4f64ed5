"""How a CPU computes the MLPs of PVT v1 and v2: in chunks whose hidden states fit its cache, in compiled code too."""

import math
from collections.abc import Callable, Iterator
from functools import partial, wraps

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import GELUActivation

from .layers import is_traced, runs_transformed, tokens_to_map


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see complete inputs or outputs of the module or of a part of it."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def chunk_tokens(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator of the `forward` of an MLP, whose hidden states are several times as large as its input.

    In evaluation without gradients a CPU works in chunks of tokens whose hidden states take `chunk_bytes`, so that they
    fit its cache, unless a hook wants to see them all.

    Args:
        forward: A method `(hidden_states)` that works token by token, on hidden states `(..., channels)`. Its module
            has `chunk_bytes` and `intermediate_size`, the channels of the hidden states.

    Returns:
        A method with the same arguments and results.
    """

    @wraps(forward)
    def forward_in_chunks(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        if is_as_built(self, hidden_states, [nn.Linear, nn.Linear]):
            run = _mlp_as_operator if torch.compiler.is_compiling() else _mlp
            return run(hidden_states, self.chunk_bytes, *self.parameters())
        if runs_transformed(hidden_states) or hidden_states.device.type != "cpu" or has_hooks(self):
            return forward(self, hidden_states)
        if self.training or (torch.is_grad_enabled() and hidden_states.requires_grad):
            return forward(self, hidden_states)
        token_bytes = self.intermediate_size * hidden_states.element_size()
        return _compute_tokens(partial(forward, self), hidden_states, self.chunk_bytes // token_bytes)

    return forward_in_chunks


def chunk_rows(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator of the `forward` of an MLP with a 3 x 3 convolution in it, whose hidden states would fill the memory.

    A map of more tokens than `max_stored_tokens` has for its type of device is recomputed in the backward pass instead
    of stored; other devices store. A CPU works in chunks, of images or of their rows, whose hidden states take
    `chunk_bytes`, so that they fit its cache, unless a hook wants to see the complete map. Where code is compiled, that
    holds for inference; the compiler decides for itself what training stores.

    Args:
        forward: A method `(hidden_states, height, width, rows)` that gives these rows of the result, from hidden states
            `(batch, height * width, channels)` which hold a row of context above and below them where there is one. Its
            module has `max_stored_tokens`, `chunk_bytes` and `intermediate_size`, the channels of the hidden states.

    Returns:
        A method `(hidden_states, height, width)` that gives all rows.
    """

    @wraps(forward)
    def forward_in_chunks(self: nn.Module, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        if is_as_built(self, hidden_states, [nn.Linear, nn.Conv2d, nn.Linear]):
            run = _conv_mlp_as_operator if torch.compiler.is_compiling() else _conv_mlp
            has_relu = isinstance(self.relu, nn.ReLU)
            return run(hidden_states, height, width, self.chunk_bytes, has_relu, *self.parameters())
        compute = partial(forward, self)
        if runs_transformed(hidden_states):
            return compute(hidden_states, height, width)
        is_large = height * width > self.max_stored_tokens.get(hidden_states.device.type, math.inf)
        differentiates = torch.is_grad_enabled() and hidden_states.requires_grad
        # (Training draws its dropout in the same pieces with and without gradients: a checkpointed block runs both.)
        if not is_large and (differentiates or self.training):
            return compute(hidden_states, height, width)
        if differentiates:
            compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=self.training)
        if hidden_states.device.type != "cpu" or has_hooks(self):
            return compute(hidden_states, height, width)
        row_bytes = width * self.intermediate_size * hidden_states.element_size()
        return _compute_rows(compute, hidden_states, height, width, self.chunk_bytes // row_bytes)

    return forward_in_chunks


def is_as_built(mlp: nn.Module, hidden_states: torch.Tensor, layer_types: list[type[nn.Module]]) -> bool:
    """Whether a CPU computes inference with an MLP in which nobody has put or watches anything.

    Its tensors are then all that there is to it. The activation may write over its input, so that twice as many hidden
    states fit the cache, and compiled code has the MLP as one operator: chunk by chunk it would be code for one size,
    as a whole it is slower. Adapters, quantised layers, hooks and other activations get their modules called.

    Args:
        mlp: The MLP.
        hidden_states: Its input.
        layer_types: The classes of its parts that have parameters, in order.
    """
    if is_traced(hidden_states) or torch._C._are_functorch_transforms_active():
        return False
    if mlp.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if hidden_states.device.type != "cpu" or has_hooks(mlp):
        return False
    activation, parts = mlp.intermediate_act_fn, list(mlp.modules())
    if type(activation) is not GELUActivation or activation.act is not F.gelu:
        return False
    # (An offloaded layer has a `forward` of its own, which brings its tensors.)
    if [type(part) for part in parts if part._parameters] != layer_types or any("forward" in vars(p) for p in parts):
        return False
    return all(type(tensor) is nn.Parameter and tensor.dtype == hidden_states.dtype for tensor in mlp.parameters())


def _compute_tokens(
    compute: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """`compute` of hidden states (..., channels), `num_tokens` tokens at a time."""
    chunks = hidden_states.flatten(0, -2).split(max(1, num_tokens))
    return torch.cat([compute(chunk) for chunk in chunks]).view(hidden_states.shape)


def _compute_rows(
    compute: Callable[..., torch.Tensor], hidden_states: torch.Tensor, height: int, width: int, num_rows: int
) -> torch.Tensor:
    """`compute` of hidden states (batch, height * width, channels), `num_rows` rows at a time: several images where
    they fit completely, or else one by one."""
    num_rows = max(1, num_rows)
    images = hidden_states.split(max(1, num_rows // height))
    chunks = [chunk.flatten(0, 1) for part in images for chunk in _iter_rows(compute, part, width, num_rows)]
    return torch.cat(chunks).view(hidden_states.shape)


def _iter_rows(
    compute: Callable[..., torch.Tensor], images: torch.Tensor, width: int, num_rows: int
) -> Iterator[torch.Tensor]:
    chunks = images.split(num_rows * width, dim=1)
    for index, chunk in enumerate(chunks):
        above = [chunks[index - 1][:, -width:]] if index > 0 else []
        below = [chunks[index + 1][:, :width]] if index + 1 < len(chunks) else []
        hidden_states = torch.cat((*above, chunk, *below), dim=1) if above or below else chunk
        height = hidden_states.shape[1] // width
        yield compute(hidden_states, height, width, slice(len(above), height - len(below)))


def _mlp(
    hidden_states: torch.Tensor,
    chunk_bytes: int,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
) -> torch.Tensor:
    """The MLP of PVT v1, from hidden states (..., channels)."""

    def compute(chunk: torch.Tensor) -> torch.Tensor:
        chunk = F.linear(chunk, weight1, bias1)
        return F.linear(F.gelu(chunk, out=chunk), weight2, bias2)

    return _compute_tokens(compute, hidden_states, chunk_bytes // weight1[:, 0].nbytes)


def _conv_mlp(
    hidden_states: torch.Tensor,
    height: int,
    width: int,
    chunk_bytes: int,
    has_relu: bool,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
) -> torch.Tensor:
    """The MLP of PVT v2, from hidden states (batch, height * width, channels)."""

    def compute(chunk: torch.Tensor, height: int, width: int, rows: slice) -> torch.Tensor:
        chunk = F.linear(chunk, weight1, bias1)
        chunk = tokens_to_map(chunk.relu_() if has_relu else chunk, height, width)
        chunk = F.conv2d(chunk, conv_weight, conv_bias, padding=1, groups=len(conv_weight))
        chunk = chunk.permute(0, 2, 3, 1)[:, rows].flatten(1, 2)  # (images, tokens, hidden channels)
        return F.linear(F.gelu(chunk, out=chunk), weight2, bias2)

    return _compute_rows(compute, hidden_states, height, width, chunk_bytes // (width * weight1[:, 0].nbytes))


_mlp_as_operator = torch.library.custom_op("pvt_hf::mlp", _mlp, mutates_args=())
_conv_mlp_as_operator = torch.library.custom_op("pvt_hf::conv_mlp", _conv_mlp, mutates_args=())


@_mlp_as_operator.register_fake
@_conv_mlp_as_operator.register_fake
def _compute_nothing(hidden_states, *_):
    return hidden_states.new_empty(hidden_states.shape)


__all__ = ["chunk_rows", "chunk_tokens"]
