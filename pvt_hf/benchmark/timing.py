"""Measures steps: warm, in turn, with the clock of the device, and the memory that a step takes at its peak."""

import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

# Seconds before each measurement, in which threads of the one before stop waiting for more work in a loop.
_PAUSE = 0.05
# A step that does all its work; it may say what seconds some of its parts took.
Step = Callable[[], Mapping[str, float] | None]


@dataclass(frozen=True)
class Clock:
    """Where steps run, and what their time is.

    Attributes:
        device: Of the models.
        cpu_time: Whether time is what the CPU works for this process (in all its threads), not what passes.
        least_seconds: That a measurement lasts: as many steps as that takes.
    """

    device: torch.device
    cpu_time: bool = False
    least_seconds: float = 0.1

    @property
    def name(self) -> str:
        """What it is, for a table."""
        return "CUDA events" if self.device.type == "cuda" else "CPU time" if self.cpu_time else "wall time"

    def read(self) -> float:
        """The time in seconds, when the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.cpu_time else time.perf_counter()

    def time(self, step: Step, count: int = 1) -> tuple[float, dict[str, float]]:
        """Runs a step several times, without waiting in between.

        Args:
            step: To be run.
            count: How many times.

        Returns:
            Seconds of a step, and of its parts.
        """
        parts: dict[str, float] = {}
        start, is_cuda = self.read(), self.device.type == "cuda"
        if is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        for _ in range(count):
            for name, seconds in (step() or {}).items():
                parts[name] = parts.get(name, 0) + seconds / count
        if is_cuda:
            end.record()
        passed = self.read() - start
        return (begin.elapsed_time(end) / 1000 if is_cuda else passed) / count, parts


@dataclass
class Times:
    """Of a step, a number for each round.

    Attributes:
        seconds: Of a step.
        parts: Of its parts, by name.
    """

    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)

    def add(self, seconds: float, parts: Mapping[str, float]) -> None:
        """Adds a round."""
        self.seconds.append(seconds)
        for name, value in parts.items():
            self.parts.setdefault(name, []).append(value)


def measure(steps: Sequence[Step], rounds: int, clock: Clock, warmups: int = 5) -> list[Times]:
    """Times steps in turn, one after the other in each round, after a warm-up that is not counted, and with a pause
    before each.

    Args:
        steps: To be timed.
        rounds: How many.
        clock: With which.
        warmups: Steps of the warm-up (default: 5; on a CPU fewer, where these take more than a second).

    Returns:
        Of each step.
    """
    counts = [_warm_up(step, clock, warmups) for step in steps]
    times = [Times() for _ in steps]
    for _ in range(rounds):
        for step, count, kept in zip(steps, counts, times, strict=True):
            time.sleep(_PAUSE)
            kept.add(*clock.time(step, count))
    return times


def _warm_up(step: Step, clock: Clock, warmups: int) -> int:
    """Runs a step until it is warm; how many of them a measurement takes."""
    seconds = [clock.time(step)[0]]
    while len(seconds) < warmups and (clock.device.type == "cuda" or sum(seconds) < 1):
        seconds.append(clock.time(step)[0])
    return max(1, math.ceil(clock.least_seconds / max(min(seconds), 1e-6)))


def measure_peak(step: Step, device: torch.device) -> float:
    """The bytes that a step takes at its peak over what is held before it: on a GPU allocated memory, else what is
    resident of the process; NaN where the system does not tell.

    Args:
        step: To be run once, warm.
        device: Of the models.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    if not Path("/proc/self/clear_refs").exists():
        return math.nan
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is given back, or the step would take it again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak of what is resident starts anew
    before = _read_resident("VmRSS")
    step()
    return float(_read_resident("VmHWM") - before)


def _read_resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
