"""How detectors and segmenters are evaluated: counted batch by batch, since their outputs are too large to be kept."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.trainer_utils import EvalLoopOutput

from .trainer import VisionTrainer


class DensePredictionTrainer(VisionTrainer):
    """Trains detectors and segmenters, which own their losses, and whose outputs are not kept during an evaluation.

    A subclass counts: `start_evaluation`, then `evaluate_batch` for every batch, and in the end `evaluation_metrics`.
    Everything else, and the errors, are as of [`~pvt_hf.training.trainer.VisionTrainer`].

    Attributes:
        unmeasured: The metrics of which the last evaluation had no ground truth, such as `AP_large` where all objects
            are small. They are not among its metrics, and nothing is logged for them.
    """

    unmeasured: Sequence[str] = ()

    def start_evaluation(self) -> None:
        """Before the first batch."""
        raise NotImplementedError

    def evaluate_batch(self, outputs: Any, inputs: dict[str, Any]) -> None:
        """Counts a batch: what the model made of `inputs`, on the model's device."""
        raise NotImplementedError

    def evaluation_metrics(self) -> dict[str, float]:
        """The metrics of the images of all processes, in each of them, without a prefix; `images` among them. Those of
        which there is no ground truth are -1, as COCO has it, or NaN."""
        raise NotImplementedError

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs) -> EvalLoopOutput:
        """As in `Trainer`, without predictions in what it returns."""
        self.start_evaluation()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = self.evaluation_metrics()
        # (A loss is no number for other reasons, which shall be seen.)
        self.unmeasured = [key for key, value in found.items() if key != "loss" and not value >= 0]
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in found.items() if key not in self.unmeasured}
        return output._replace(metrics=output.metrics | metrics)

    @torch.no_grad()
    def prediction_step(
        self, model, inputs, prediction_loss_only, ignore_keys=None
    ) -> tuple[torch.Tensor | None, None, None]:
        """Counts the predictions for a batch, and returns only its loss, if the model gave one."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            outputs = model(**inputs)
        self.evaluate_batch(outputs, inputs)
        loss = outputs.get("loss")
        return None if loss is None else loss.detach().float().mean(), None, None
