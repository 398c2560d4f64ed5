"""Where Python asks for a value, and has to wait if that is on a GPU: by tensors that tell, and by a GPU itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch

# What gives Python a value, or a tensor whose size depends on values.
WAITS = {"__bool__", "__float__", "__index__", "__int__", "cpu", "item", "masked_select", "nonzero", "numpy", "tolist"}
WAITS |= {"nms", "unique"}


class OnDevice(torch.Tensor):
    """Stands for a tensor on a GPU, and so does what is computed of it; on the CPU it is one as any other."""

    waits: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__") and has_mask(args[1]):
            name = "nonzero"
        if name in WAITS:
            cls.waits.append(name)
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(torch.Tensor) if name == "cpu" else result


def has_mask(index):
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


def on_device(values):
    return {key: value.as_subclass(OnDevice) for key, value in values.items()}


@contextmanager
def forbid_waits(device: torch.device) -> Iterator[None]:
    """Where Python would wait for the GPU, there is an error."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
