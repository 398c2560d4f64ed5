"""Metrics that are right over several processes and need little memory."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


def classification_statistics(logits: torch.Tensor | tuple, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What top-1, top-5 and the loss need of the logits, for `Trainer(preprocess_logits_for_metrics=...)`.

    Args:
        logits: `(batch, num_labels)`, or the model's outputs with them first.
        labels: `(batch,)`.

    Returns:
        The five best classes `(batch, 5)` (fewer if there are fewer), and the cross-entropy `(batch,)`.
    """
    logits = (logits[0] if isinstance(logits, tuple) else logits).float()
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return best, F.cross_entropy(logits, labels, reduction="none")


def classification_metrics(output: Any) -> dict[str, float]:
    """Top-1 and top-5 accuracy in [0, 1] as the official code counts them, mean loss, and the number of images.

    Args:
        output (`transformers.EvalPrediction`): With what [`classification_statistics`] returns as predictions.
    """
    (best, losses), labels = output.predictions, np.asarray(output.label_ids)
    hits = best == labels[:, None]
    return {
        "accuracy": float(hits[:, 0].mean()),
        "top5_accuracy": float(hits.any(axis=1).mean()),
        "loss": float(np.mean(losses, dtype=np.float64)),
        "images": len(labels),
    }
