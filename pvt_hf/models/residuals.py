"""How a CPU infers a block of PVT v1 and v2: into memory to which both residual branches are added in place. (Fresh
memory takes longer to be touched than most of what is left there takes to be computed.)"""

from collections.abc import Callable
from functools import wraps
from typing import TypeAlias

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .chunks import find_branch
from .layers import SpatialReductionAttention, is_unwatched

Forward: TypeAlias = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def add_in_place(attention_path: str, projection_path: str) -> Callable[[Forward], Forward]:
    """Decorator of the `forward` of a block `(hidden_states, height, width, output_attentions)`, which has an
    `attention` and what [`~pvt_hf.models.chunks.compute_in_chunks`] wants.

    Args:
        attention_path: Where the block has its `SpatialReductionAttention`.
        projection_path: Where it has the linear layer after that.
    """

    def decorate(forward: Forward) -> Forward:
        @wraps(forward)
        def forward_in_place(
            self: nn.Module, hidden_states: torch.Tensor, height: int, width: int, output_attentions: bool = False
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            attention, projection = self.get_submodule(attention_path), self.get_submodule(projection_path)
            has_one_head = attention.num_attention_heads == 1 and attention.config._attn_implementation == "sdpa"
            is_compiling = torch.compiler.is_compiling()  # whose operators write into no memory that they are given
            if output_attentions or (is_compiling and not has_one_head):
                return forward(self, hidden_states, height, width, output_attentions)
            add_branch = find_branch(self, hidden_states)
            if add_branch is None or not _is_as_built(self.attention, attention.query, projection, hidden_states):
                return forward(self, hidden_states, height, width)
            normed = self.layer_norm_1(hidden_states)
            reduced_states = attention.reduce(normed, height, width)
            if not has_one_head:
                sums = _add_heads(attention, projection, hidden_states, normed, reduced_states)
                return add_branch(sums, None, height, width), None
            attended = _attend_one_head(attention, projection, normed, reduced_states)
            if is_compiling:
                return add_branch(hidden_states, attended, height, width), None
            return add_branch(attended.add_(hidden_states), None, height, width), None

        return forward_in_place

    return decorate


def _is_as_built(module: nn.Module, query: nn.Module, projection: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether an attention, of hidden states, may be computed without calls of these two layers, which are linear."""
    if len(hidden_states) == 0 or any(part.training or not is_unwatched(part) for part in module.modules()):
        return False
    if type(query) is not nn.Linear or type(projection) is not nn.Linear or projection.bias is None:
        return False
    tensors = [tensor for layer in (query, projection) for tensor in layer._parameters.values() if tensor is not None]
    return all(type(tensor) is nn.Parameter and tensor.dtype == hidden_states.dtype for tensor in tensors)


def _add_heads(
    attention: SpatialReductionAttention,
    projection: nn.Linear,
    hidden_states: torch.Tensor,
    normed: torch.Tensor,
    reduced_states: torch.Tensor,
) -> torch.Tensor:
    """The sum of a block's input (batch, tokens, channels) and what its attention gives.

    Args:
        attention: Of the block.
        projection: The linear layer after it.
        hidden_states: The block's input: (batch, tokens, channels).
        normed: The same, normed.
        reduced_states: What becomes keys and values: (batch, reduced keys, channels).
    """
    context, _ = attention.attend(normed, reduced_states)
    sums = torch.add(hidden_states, projection.bias, out=hidden_states.new_empty(hidden_states.shape))
    sums.flatten(0, 1).addmm_(context.flatten(0, 1), projection.weight.t())
    return sums


def _attend_one_head(
    attention: SpatialReductionAttention, projection: nn.Linear, normed: torch.Tensor, reduced_states: torch.Tensor
) -> torch.Tensor:
    """What an attention with one head gives after its projection: values, and keys if they are few, are projected
    instead of results and queries.

    `(Q x + q) . k = x . (Q' k) + q . k`, and as the probabilities are 1 in sum, `P sum(p v) + b = sum(p (P v + b))`.

    Args:
        attention: Of the block.
        projection: The linear layer after it.
        normed: The block's input, normed: (batch, tokens, channels).
        reduced_states: What becomes keys and values: (batch, reduced keys, channels).
    """
    key, value = attention.key(reduced_states), projection(attention.value(reduced_states))
    query, mask = normed, None
    # A mask, for the bias, takes longer than the projection of the queries. (A compiler would have a program for each.)
    if torch.compiler.is_compiling() or key.shape[1] > key.shape[2]:
        query = attention.query(normed)
    else:
        if (bias := attention.query.bias) is not None:
            mask = (key @ bias).mul_(attention.scaling)[:, None, None]  # (batch, 1, 1, reduced keys)
        key = key @ attention.query.weight
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    states = (part[:, None] for part in (query, key, value))  # (batch, 1 head, tokens, channels) each
    attended, _ = attend(attention, *states, mask, dropout=0.0, scaling=attention.scaling)
    return attended.flatten(2)


__all__ = ["add_in_place"]
