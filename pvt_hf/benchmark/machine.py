"""What the machine can do at most: matrix products by precision, and copies within its memory. Measured."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from .timing import Clock

# dtype of autocast, whether products of fp32 may be rounded
_PRECISIONS = {
    "fp32": (None, False),
    "tf32": (None, True),
    "bf16": (torch.bfloat16, True),
    "fp16": (torch.float16, True),
}
_SIDES = {"cuda": 8192, "cpu": 1536}  # of square matrices
_COPIED = {"cuda": 2**30, "cpu": 2**27}  # bytes, more than any cache holds
_ROUNDS = 5


@contextmanager
def use_precision(name: str, device: torch.device) -> Iterator[None]:
    """While it lasts, products are computed so.

    Args:
        name: `fp32`, `tf32`, `bf16` or `fp16`.
        device: Where.
    """
    dtype, rounds = _PRECISIONS[name]
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if rounds else "highest")
    torch.backends.cudnn.allow_tf32 = rounds
    try:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Rates(NamedTuple):
    """Of a machine.

    Attributes:
        flops: Of products of large matrices, in a second: twice the multiply-adds.
        bytes: Read and written by copies within the memory, in a second.
    """

    flops: float
    bytes: float


@cache
def measure_rates(precision: str, clock: Clock, threads: int) -> Rates:
    """The best of some rounds, warm.

    Args:
        precision: Of the products.
        clock: With the device.
        threads: Of the CPU, which are set.
    """
    device = clock.device
    side = _SIDES[device.type]
    left, right = torch.randn(2, side, side, device=device)
    source = torch.empty(_COPIED[device.type], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)

    def multiply() -> None:
        torch.mm(left, right)

    def copy() -> None:
        target.copy_(source)

    steps = 10 if device.type == "cuda" else 1
    with torch.no_grad(), use_precision(precision, device):
        if (dtype := _PRECISIONS[precision][0]) is not None:
            left, right = left.to(dtype), right.to(dtype)
        clock.time(multiply, 2 * steps)
        product = min(clock.time(multiply, steps)[0] for _ in range(_ROUNDS))
        clock.time(copy)
        copied = min(clock.time(copy, steps)[0] for _ in range(_ROUNDS))
    return Rates(2 * side**3 / product, 2 * len(source) / copied)


def name_machine(device: torch.device) -> str:
    """The processor that computes, as it calls itself.

    Args:
        device: Of the models.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def today() -> str:
    """The date of a measurement."""
    return time.strftime("%Y-%m-%d")
