"""What the losses need of other processes."""

import torch
import torch.distributed as dist


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over the processes of a job (mmdetection's `reduce_mean`): the tensor itself in one process.

    With losses that are divided by such means, the averaged gradients of several processes are those of one process
    with all their images.

    Args:
        values: Without a gradient, and of the same shape in every process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
