"""What PVT v1 and v2 share: tokens as maps and back, stochastic depth, spatial-reduction attention."""

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def tokens_to_map(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(batch, height * width, channels) -> (batch, channels, height, width): a channels-last view."""
    return tokens.reshape(tokens.shape[0], height, width, tokens.shape[2]).permute(0, 3, 1, 2)


def map_to_tokens(feature_map: torch.Tensor) -> torch.Tensor:
    """(batch, channels, height, width) -> (batch, height * width, channels): a view of a channels-last map."""
    return feature_map.permute(0, 2, 3, 1).flatten(1, 2)


def to_channels_last(feature_map: torch.Tensor) -> torch.Tensor:
    """The same values in the memory layout in which the convolutions are fastest. (`vmap` knows one layout only.)"""
    if torch._C._are_functorch_transforms_active():
        return feature_map
    return feature_map.contiguous(memory_format=torch.channels_last)


def copy_less(feature_map: torch.Tensor, convolution: nn.Module) -> torch.Tensor:
    """A map for a convolution: in PyTorch's own layout where the weights, which are in that and would be copied to the
    map's, are much larger than the map, as in the last stages of a single small image on a CPU.

    Args:
        feature_map: (batch, channels, height, width), channels-last.
        convolution: What it is for.
    """
    if torch.compiler.is_compiling() or not infers_on_cpu(feature_map):
        return feature_map
    if type(convolution) is not nn.Conv2d or convolution.weight.nbytes < 5 * feature_map.nbytes:
        return feature_map
    return feature_map.contiguous()


def is_traced(value: Any = None) -> bool:
    """Whether this run becomes a program that has to work for other sizes too.

    Args:
        value: What torch.fx, which has no switch to ask, replaces by a proxy: an input of the model, or its size.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or isinstance(value, torch.fx.Proxy)


def runs_transformed(value: Any = None) -> bool:
    """Whether a compiler, a tracer or a transform of torch.func runs this code, and has to see plain operations without
    checks of the inputs.

    Args:
        value: As for `is_traced`.
    """
    return is_traced(value) or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def computes_on_cpu(value: torch.Tensor) -> bool:
    """Whether a CPU computes from this tensor, eagerly or compiled, in its own type of numbers."""
    if is_traced(value) or torch._C._are_functorch_transforms_active():
        return False
    return value.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def infers_on_cpu(value: torch.Tensor) -> bool:
    """Whether [`computes_on_cpu`] holds without gradients."""
    return computes_on_cpu(value) and not torch.is_grad_enabled()


def is_unwatched(module: nn.Module) -> bool:
    """Whether nobody wants to see what goes through a module, nor has given it a `forward` of its own, as offloading
    does, which brings its tensors."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__


def find_autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The type in which autocast computes products on the device of a tensor, or `None` outside of it."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast_once(hidden_states: torch.Tensor) -> torch.Tensor:
    """What several products will read, as autocast would copy it for each of them. (A compiler sees to that itself.)"""
    dtype = None if runs_transformed(hidden_states) else find_autocast_dtype(hidden_states)
    is_cast = dtype is not None and hidden_states.dtype != torch.float64  # which autocast leaves alone
    return hidden_states.to(dtype) if is_cast else hidden_states


def cast_together(
    hidden_states: torch.Tensor, groups: Sequence[Sequence[nn.Module]]
) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """The weight and bias for the product that each group of linear layers is, in autocast's type, or `None` where the
    layers have to be called: adapters, quantised layers, hooks, and outside of autocast.

    Autocast would copy each weight and bias apart, and a GPU with few images waits for each of these to be started.

    Args:
        hidden_states: What the layers read, or something on its device.
        groups: Layers that read the same, all with as many outputs as inputs.
    """
    if runs_transformed(hidden_states) or (dtype := find_autocast_dtype(hidden_states)) is None:
        return None
    weights, biases = [], []
    for layer in chain.from_iterable(groups):
        if type(layer) is not nn.Linear or not is_unwatched(layer):
            return None
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        if type(weight) is not nn.Parameter or type(bias) is not nn.Parameter or weight.dtype in (dtype, torch.float64):
            return None
        weights.append(weight.view(-1))
        biases.append(bias)
    numbers = torch.cat(weights + biases).to(dtype)
    channels = bias.shape[0]
    sizes = [len(group) * channels for group in groups]
    parts = numbers.split_with_sizes([size * channels for size in sizes] + sizes)
    return [(weight.view(-1, channels), bias) for weight, bias in zip(parts, parts[len(groups) :], strict=False)]


def place_numbers(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.tensor` of numbers that Python knows, which are written on the device. A copy of them from the CPU would
    wait until a GPU has done all that was queued, and could be no part of a CUDA graph.

    Args:
        values: A few numbers.
        dtype: Of the result.
        device: Of the result.
    """
    if device.type == "cpu" or is_traced():  # an exported program has constants of its own
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])


def make_traceable(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a model's `forward` with the arguments that torch.fx has to see: `pixel_values` alone.

    It would make a proxy of every argument and of `**kwargs`, and no proxy says that nobody gave its argument.
    """

    @wraps(forward)
    def forward_pixels(self: nn.Module, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs, torch.fx.Proxy):
            args, kwargs = (), {}
        return forward(self, pixel_values, *args, **kwargs)

    vars(forward_pixels)["__signature__"] = signature(forward)
    del vars(forward_pixels)["__wrapped__"]  # torch.fx would look at that
    return forward_pixels


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """The average pooling to a fixed size, of one number per side. What is traced multiplies with two matrices, because
    an exporter unrolls PyTorch's own operation for the size that it sees."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, channels, output_size, output_size)"""
        height, width = feature_map.shape[2:]
        if not is_traced(height):
            return super().forward(feature_map)
        rows, columns = (self.average_windows(side, feature_map) for side in (height, width))
        return rows @ feature_map @ columns.transpose(0, 1)

    def average_windows(self, side: int, like: torch.Tensor) -> torch.Tensor:
        """(output_size, side): the weights of the pixels in the window of each output."""
        output = torch.arange(self.output_size, device=like.device)[:, None]
        start = output * side // self.output_size
        end = ((output + 1) * side + self.output_size - 1) // self.output_size
        pixel = torch.arange(side, device=like.device)
        return ((start <= pixel) & (pixel < end)).to(like.dtype) / (end - start)


class Dropout(nn.Dropout):
    """PyTorch's, without its calls where it drops nothing: a GPU with few images to compute waits for Python."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) if self.training and self.p else hidden_states


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, zeroes a sample's residual branch with probability `p`.

    Of hidden states (batch, tokens, channels).
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.p == 0.0 or not self.training:
            return hidden_states
        keep = hidden_states.new_empty(hidden_states.shape[0], 1, 1).bernoulli_(1 - self.p)
        return hidden_states * (keep / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """The rate of every block, per stage: linear from 0 at the first block of the model to `rate` at its last."""
    rates = iter(torch.linspace(0, rate, sum(depths), device="cpu").tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention that keeps its probabilities, with the interface of transformers' other implementations.

    Args:
        module: In training or in evaluation mode.
        query: (batch, heads, queries, head_dim)
        key: (batch, heads, reduced keys, head_dim)
        value: (batch, heads, reduced keys, head_dim)
        attention_mask: Added to the scores, or None.
        scaling: Factor of the scores.
        dropout: Probability with which an attention probability is dropped in training (default: 0).

    Returns:
        (batch, queries, heads, head_dim), and the probabilities (batch, heads, queries, reduced keys).
    """
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # (batch, heads, queries, reduced keys)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class SpatialReductionAttention(nn.Module):
    """Multi-head attention of all tokens to a spatially reduced copy of themselves (v1 section 3.3, v2 section 3.2).

    v1 and v2 differ in how they reduce and in the names of those modules (which are transformers' names, because they
    are the checkpoint format), so each subclass owns its reduction and its output projection.
    """

    def __init__(self, config: PreTrainedConfig, hidden_size: int, num_attention_heads: int):
        super().__init__()
        self.config = config
        self.num_attention_heads = num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False  # the sdpa and flash interfaces take a module without this for a causal decoder
        self.query = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.key = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.value = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)

    def project(self, hidden_states: torch.Tensor, reduced_states: torch.Tensor) -> list[torch.Tensor]:
        """(batch, tokens, channels) each -> query, key and value, each (batch, heads, tokens, head_dim)."""
        groups = [(hidden_states, [self.query]), (reduced_states, [self.key, self.value])]
        if reduced_states is hidden_states:
            groups = [(hidden_states, [self.query, self.key, self.value])]
        cast = cast_together(hidden_states, [layers for _, layers in groups])
        parts: list[torch.Tensor] = []  # each (batch, tokens, heads, head_dim)
        for index, (states, layers) in enumerate(groups):
            sizes = states.shape[0], states.shape[1]
            if cast is None:
                parts += [layer(states).reshape(*sizes, self.num_attention_heads, self.head_dim) for layer in layers]
            else:
                projected = nn.functional.linear(states, *cast[index])
                parts += projected.view(*sizes, len(layers), self.num_attention_heads, self.head_dim).unbind(2)
        return [part.transpose(1, 2) for part in parts]

    def attend(
        self, hidden_states: torch.Tensor, reduced_states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: (batch, queries, channels)
            reduced_states: (batch, reduced keys, channels)
            output_attentions: Also return the probabilities. Only the eager implementation has them, so it is used for
                this call whatever the model is configured for.

        Returns:
            (batch, queries, channels), and (batch, heads, queries, reduced keys) or None.
        """
        query, key, value = self.project(hidden_states, reduced_states)
        attention: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = eager_attention_forward
        # transformers' interfaces branch on the number of queries, which a proxy of torch.fx does not know, and
        # reshape to a size that an empty batch leaves open.
        is_odd = isinstance(query, torch.fx.Proxy) or (not runs_transformed() and len(query) == 0)
        if not output_attentions and not is_odd:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attention)
        context, weights = attention(  # (batch, queries, heads, head_dim)
            self,
            query,
            key,
            value,
            None,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        return context.flatten(2), weights if output_attentions else None
