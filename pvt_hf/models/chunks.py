"""How a CPU computes the second half of a block of PVT v1 and v2: in chunks whose hidden states fit its cache."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from itertools import chain
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import GELUActivation

from .layers import infers_on_cpu, is_unwatched, runs_transformed

# The classes of the layers with parameters, in their order, and these parameters.
Layers: TypeAlias = tuple[tuple[type[nn.Module], ...], list[torch.Tensor]]
NO_LAYERS: Layers = (), []


def fit_caches(chunk_bytes: int, nbytes: int) -> int:
    """How many things fit the caches of all threads that compute them together.

    Args:
        chunk_bytes: For each thread.
        nbytes: Of one of the things.
    """
    return chunk_bytes * torch.get_num_threads() // nbytes


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see complete inputs or outputs of the module or of a part of it."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def compute_in_chunks(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator of the end of a block: the sum with its attention's result, then norm and MLP as a residual branch.

    Where a CPU infers and nobody has put or watches anything in them, all of that is computed in chunks whose hidden
    states take the MLP's `chunk_bytes` for each thread, so that they fit its cache, into memory that is used again.
    Compiled code has it as one operator: chunk by chunk it would be code for one size, as a whole it is slower.

    Args:
        forward: A method `(hidden_states, attended, *size)` of a block with `layer_norm_2`, `drop_path` and `mlp`, from
            two tensors `(batch, tokens, channels)` and, if the MLP has a convolution, the height and width of the map.

    Returns:
        A method with the same arguments and results.
    """

    @wraps(forward)
    def forward_in_chunks(
        self: nn.Module, hidden_states: torch.Tensor, attended: torch.Tensor, *size: int
    ) -> torch.Tensor:
        if (branch := find_branch(self, hidden_states, attended)) is None:
            return forward(self, hidden_states, attended, *size)
        return branch(hidden_states, attended, *size)

    return forward_in_chunks


def find_branch(block: nn.Module, *inputs: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """What computes the end of a block as a whole, if that can be; or `None`.

    Args:
        block: With `layer_norm_2`, `drop_path` and `mlp`.
        *inputs: Of the end of the block, or of the block.

    Returns:
        A function `(hidden_states, attended, *size)`, which overwrites the first, of size `(batch, tokens, channels)`
        and contiguous, if `attended` is `None`: it is in the sum already. The size of the map, `(height, width)`, is
        looked at if the MLP has a convolution.
    """
    types, tensors = find_tensors([block.layer_norm_2, block.drop_path, block.mlp], *inputs)
    if (branch := _BRANCHES.get(types)) is None:
        return None
    run, has_map = branch[torch.compiler.is_compiling()], nn.Conv2d in types
    flags = [isinstance(block.mlp.relu, nn.ReLU)] if has_map else []

    def add_branch(hidden_states: torch.Tensor, attended: torch.Tensor | None, *size: int) -> torch.Tensor:
        size = size if has_map else ()
        return run(hidden_states, attended, *size, block.mlp.chunk_bytes, block.layer_norm_2.eps, *flags, *tensors)

    return add_branch


def chunk_tokens(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator of the `forward` of an MLP, whose hidden states are several times as large as its input.

    In evaluation without gradients a CPU works in chunks of tokens whose hidden states take `chunk_bytes` for each
    thread, so that they fit its cache, unless a hook wants to see them all.

    Args:
        forward: A method `(hidden_states)` that works token by token, on hidden states `(..., channels)`. Its module
            has `chunk_bytes` and `intermediate_size`, the channels of the hidden states.

    Returns:
        A method with the same arguments and results.
    """

    @wraps(forward)
    def forward_in_chunks(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        if runs_transformed(hidden_states) or hidden_states.device.type != "cpu" or has_hooks(self):
            return forward(self, hidden_states)
        if self.training or (torch.is_grad_enabled() and hidden_states.requires_grad):
            return forward(self, hidden_states)
        token_bytes = self.intermediate_size * hidden_states.element_size()
        return _compute_tokens(partial(forward, self), hidden_states, fit_caches(self.chunk_bytes, token_bytes))

    return forward_in_chunks


def chunk_rows(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator of the `forward` of an MLP with a 3 x 3 convolution in it, whose hidden states would fill the memory.

    A map of more tokens than `max_stored_tokens` has for its type of device is recomputed in the backward pass instead
    of stored; other devices store. A CPU works in chunks, of images or of their rows, whose hidden states take
    `chunk_bytes` for each thread, so that they fit its cache, unless a hook wants to see the complete map. A compiler
    decides for itself what it stores.

    Args:
        forward: A method `(hidden_states, height, width, rows)` that gives these rows of the result, from hidden states
            `(batch, height * width, channels)` which hold a row of context above and below them where there is one. Its
            module has `max_stored_tokens`, `chunk_bytes` and `intermediate_size`, the channels of the hidden states.

    Returns:
        A method `(hidden_states, height, width)` that gives all rows.
    """

    @wraps(forward)
    def forward_in_chunks(self: nn.Module, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
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
        return _compute_rows(compute, hidden_states, height, width, fit_caches(self.chunk_bytes, row_bytes))

    return forward_in_chunks


def find_tensors(modules: Sequence[nn.Module], *inputs: torch.Tensor) -> Layers:
    """The layers of modules, if a CPU infers with them and they are all that there is to them; or none.

    Args:
        modules: Norm, stochastic depth and MLP of a block.
        *inputs: Theirs, or the block's.
    """
    if not infers_on_cpu(inputs[0]) or inputs[0].dtype != inputs[-1].dtype:
        return NO_LAYERS
    if any(part.training for module in modules for part in module.modules()):
        return NO_LAYERS
    return list_layers(modules, inputs[0].dtype)


def list_layers(modules: Sequence[nn.Module], dtype: torch.dtype) -> Layers:
    """The layers of modules, if they are all that there is to them; or none, so that adapters, quantised layers, hooks
    and other activations get their modules called.

    Args:
        modules: The last one is an MLP.
        dtype: Of the weights.
    """
    activation = modules[-1].intermediate_act_fn
    if type(activation) is not GELUActivation or activation.act is not F.gelu:
        return NO_LAYERS
    types, tensors = [], []
    for part in chain.from_iterable(module.modules() for module in modules):
        if not is_unwatched(part):
            return NO_LAYERS
        if part._parameters:
            types.append(type(part))
            tensors += part._parameters.values()
    is_plain = all(type(tensor) is nn.Parameter and tensor.dtype == dtype for tensor in tensors)
    return (tuple(types), tensors) if is_plain else NO_LAYERS


def share(number: int, most: int) -> int:
    """The least size of the fewest pieces of `number` things that have `most` at most."""
    pieces = -(-number // max(1, most))
    return -(-number // max(1, pieces))


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


def _place_result(hidden_states: torch.Tensor, attended: torch.Tensor | None) -> list[torch.Tensor]:
    """Where the end of a block goes to, and the terms of the sum that has to be there first, if it is not."""
    if attended is None:
        return [hidden_states]
    return [hidden_states.new_empty(hidden_states.shape), hidden_states, attended]


def _add(sums: torch.Tensor, *terms: torch.Tensor) -> torch.Tensor:
    return torch.add(*terms, out=sums) if terms else sums


def multiply(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`F.linear`, but the bias comes after the product, unless that would be rounded to half precision in between.
    (Before it, it is copied for every token and then read.)

    Args:
        inputs: (..., channels); in half precision (tokens, channels).
        weight: (outputs, channels)
        bias: (outputs,)
        out: Where the result goes to (default: new memory).
    """
    if inputs.dtype.itemsize < 4:
        return torch.addmm(bias, inputs, weight.t(), out=out)
    return torch.matmul(inputs, weight.t(), out=out).add_(bias)


def _add_mlp(
    hidden_states: torch.Tensor,
    attended: torch.Tensor | None,
    chunk_bytes: int,
    eps: float,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
) -> torch.Tensor:
    """The end of a block of PVT v1, from its input and what its attention gives, both (batch, tokens, channels)."""
    result, *terms = _place_result(hidden_states, attended)
    tokens = [tensor.flatten(0, 1) for tensor in (result, *terms)]
    num_tokens = share(len(tokens[0]), fit_caches(chunk_bytes, weight1[:, 0].nbytes))
    buffer = result.new_empty(num_tokens, len(weight1))
    for sums, *chunks in zip(*(tensor.split(num_tokens) for tensor in tokens), strict=True):
        normed = F.layer_norm(_add(sums, *chunks), norm_weight.shape, norm_weight, norm_bias, eps)
        hidden = multiply(normed, weight1, bias1, buffer[: len(sums)])
        torch.addmm(sums.add_(bias2), F.gelu(hidden, out=hidden), weight2.t(), out=sums)
    return result


def _add_conv_mlp(
    hidden_states: torch.Tensor,
    attended: torch.Tensor | None,
    height: int,
    width: int,
    chunk_bytes: int,
    eps: float,
    has_relu: bool,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
) -> torch.Tensor:
    """The end of a block of PVT v2, from its input and what its attention gives, both (batch, height * width,
    channels)."""
    result, *terms = _place_result(hidden_states, attended)

    def expand(out: torch.Tensor, sums: torch.Tensor, *terms: torch.Tensor) -> None:
        normed = F.layer_norm(_add(sums, *terms), norm_weight.shape, norm_weight, norm_bias, eps)
        multiply(normed, weight1, bias1, out)
        if has_relu:
            out.relu_()

    def project(hidden: torch.Tensor, sums: torch.Tensor, padding: tuple[int, int]) -> None:
        # From (images, rows, width, hidden channels), in which there may be a row of context above and below.
        hidden = F.conv2d(hidden.permute(0, 3, 1, 2), conv_weight, conv_bias, padding=padding, groups=len(conv_weight))
        hidden = hidden.permute(0, 2, 3, 1).flatten(0, 2)
        torch.addmm(sums.add_(bias2), F.gelu(hidden, out=hidden), weight2.t(), out=sums)

    maps = [tensor.unflatten(1, (height, width)) for tensor in (result, *terms)]
    num_rows = max(1, fit_caches(chunk_bytes, width * weight1[:, 0].nbytes))
    if num_rows >= height:
        _add_images(expand, project, maps, num_rows // height, len(weight1))
    else:
        _add_rows(expand, project, maps, num_rows, len(weight1))
    return result


def _add_images(
    expand: Callable[..., None],
    project: Callable[..., None],
    maps: list[torch.Tensor],
    num_images: int,
    hidden_size: int,
) -> None:
    """Several images at a time, of maps (batch, height, width, channels)."""
    num_images = share(len(maps[0]), num_images)
    buffer = maps[0].new_empty(num_images, *maps[0].shape[1:3], hidden_size)
    for images in zip(*(tensor.split(num_images) for tensor in maps), strict=True):
        tokens, hidden = [image.flatten(0, 2) for image in images], buffer[: len(images[0])]
        expand(hidden.flatten(0, 2), *tokens)
        project(hidden, tokens[0], (1, 1))


def _add_rows(
    expand: Callable[..., None], project: Callable[..., None], maps: list[torch.Tensor], num_rows: int, hidden_size: int
) -> None:
    """Rows of one image at a time, of maps (batch, height, width, channels): a window goes down the image, and keeps
    the last two rows of hidden states, which the next rows need too."""
    height, width = maps[0].shape[1:3]
    num_rows = share(height, num_rows)
    window = maps[0].new_empty(num_rows + 2, width, hidden_size)  # with a row of context above and below
    for image in zip(*maps, strict=True):
        for start in range(0, height, num_rows):
            stop = min(start + num_rows, height)
            known = start + 1 if start else 0  # rows of the image whose hidden states have been computed
            end = min(stop + 1, height)
            window[:2] = window[num_rows:].clone() if start else 0
            window[stop - start + 1] = 0  # below the image
            expand(
                window[known - start + 1 : end - start + 1].flatten(0, 1),
                *(rows[known:end].flatten(0, 1) for rows in image),
            )
            project(window[None, : stop - start + 2], image[0][start:stop].flatten(0, 1), (0, 1))


_add_mlp_as_operator = torch.library.custom_op("pvt_hf::add_mlp", _add_mlp, mutates_args=())
_add_conv_mlp_as_operator = torch.library.custom_op("pvt_hf::add_conv_mlp", _add_conv_mlp, mutates_args=())


@_add_mlp_as_operator.register_fake
@_add_conv_mlp_as_operator.register_fake
def _compute_nothing(hidden_states, *_):
    return hidden_states.new_empty(hidden_states.shape)


# By the layers with parameters of norm and MLP: what computes them, eager and compiled.
_BRANCHES: dict[tuple[type[nn.Module], ...], tuple[Callable[..., torch.Tensor], ...]] = {
    (nn.LayerNorm, nn.Linear, nn.Linear): (_add_mlp, _add_mlp_as_operator),
    (nn.LayerNorm, nn.Linear, nn.Conv2d, nn.Linear): (_add_conv_mlp, _add_conv_mlp_as_operator),
}

__all__ = ["chunk_rows", "chunk_tokens", "compute_in_chunks"]
