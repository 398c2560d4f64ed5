"""Where the time of a step goes: the operators that take most of it."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def profile_step(step: Callable[[], object], device: torch.device, count: int = 10, steps: int = 3) -> str:
    """A table of the operators that a step spends most time in, without what they call.

    Args:
        step: To be run.
        device: Of the models.
        count: Of the operators (default: 10).
        steps: That are profiled, after one that is not (default: 3).
    """
    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
    return profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=count)
