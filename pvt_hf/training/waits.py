"""Training steps that a GPU does not wait for: Python queues the next one while it works."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer


def start_reading(value: torch.Tensor) -> Callable[[], float]:
    """Begins to copy a number from its device.

    Args:
        value: A scalar.

    Returns:
        A function that gives the number. It waits for what was queued on a GPU before this call, and for nothing that
        was queued since.
    """
    value = value.detach()
    if not value.is_cuda:
        return value.item
    copied, event = value.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()

    def read() -> float:
        event.synchronize()
        return copied.item()

    return read


class QueueingTrainer(Trainer):
    """`Trainer` whose batches are copied to a GPU while that works on the one before."""

    def _prepare_input(self, data: Any) -> Any:
        """As in `Trainer`, which waits until everything that was queued before is computed."""
        if isinstance(data, torch.Tensor) and data.is_pinned() and not self.is_deepspeed_enabled:
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """As in `Trainer`, which counts on the CPU, and waits to copy the number. Labels are counted where they go."""
        for batch in batch_samples:
            if isinstance(batch.get("labels"), torch.Tensor):
                batch["labels"] = self._prepare_input(batch["labels"])
        return super()._get_num_items_in_batch(batch_samples, device)
