"""What a step has to do at least: multiply-adds, and bytes that its matrix products and convolutions move."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ATTENTION = "_scaled_dot_product"


class Work(NamedTuple):
    """Of the forward pass of a step.

    Attributes:
        multiply_adds: Of matrix products, convolutions and attention.
        bytes: That these read and write, weights among them. All else that a network computes could be part of one of
            them, but none of them can keep its result for the next.
    """

    multiply_adds: int
    bytes: int


class _Counter(TorchDispatchMode):
    """Adds up what the operators do that torch knows the work of."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.bytes = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result, kwargs = func(*args, **(kwargs or {})), dict(kwargs or {})
        kwargs.pop("out", None)  # it is the result
        operator = func.overloadpacket
        is_attention = operator.__name__.startswith(_ATTENTION)
        # Attention on a CPU is not known, but it does the same.
        known = torch.ops.aten._scaled_dot_product_flash_attention if is_attention else operator
        if known in flop_registry:
            written = result[0] if is_attention else result  # beside it attention returns what a backward pass wants
            count = flop_registry[known]
            self.flops += count(*args[:3], out_val=written) if is_attention else count(*args, **kwargs, out_val=written)
            tensors = [leaf for leaf in tree_leaves((args, kwargs, written)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def count_work(forward: Callable[[], object]) -> Work:
    """Runs a forward pass once, and counts what the network's own layers do: with gradients, or else a CPU would take
    ways around some of that.

    Args:
        forward: Without compilation, which hides the operators.
    """
    with torch.enable_grad(), _Counter() as counter:
        forward()
    return Work(counter.flops // 2, counter.bytes)
