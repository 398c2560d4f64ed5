"""Metrics that are right over several processes and need little memory."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..models.annotations import encode_mask

# COCO's twelve numbers in its own order: over IoU 0.5:0.95 and 100 detections unless the name says otherwise.
COCO_METRICS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)


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


def coco_results(
    detections: Iterable[Mapping[str, torch.Tensor]], image_ids: Sequence[int], category_ids: Sequence[int]
) -> dict[int, list[dict[str, Any]]]:
    """Detections in COCO's format for results, by image.

    Args:
        detections: For each image `scores`, `labels`, `boxes` (absolute xyxy in the original image), and `masks`
            `(detections, height, width)` bool of the original image where there are any.
        image_ids: Of the images.
        category_ids: The id of each class label.

    Returns:
        For each image id its results; an image without any has an empty list, which says that it was looked at.
    """
    results = {}
    for image, image_id in zip(detections, image_ids, strict=True):
        boxes = image["boxes"].double().cpu()
        xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
        results[int(image_id)] = [
            {"image_id": int(image_id), "category_id": category_ids[label], "bbox": box, "score": score}
            for label, box, score in zip(image["labels"].tolist(), xywh, image["scores"].tolist(), strict=True)
        ]
        if "masks" in image:
            for result, mask in zip(results[int(image_id)], image["masks"].cpu().numpy(), strict=True):
                result["segmentation"] = encode_mask(mask)
    return results


def gather_results(results: dict[int, list[dict[str, Any]]]) -> dict[int, list[dict[str, Any]]]:
    """The results of all processes in each of them. An image that several of them had (the last batches are filled up)
    counts once."""
    if not (dist.is_available() and dist.is_initialized()):
        return results
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, results)
    return {image_id: found for part in parts for image_id, found in part.items()}


def coco_metrics(
    results: Mapping[int, list[dict[str, Any]]], ground_truth: str | Path | dict[str, Any], masks: bool = False
) -> dict[str, float]:
    """COCO's twelve numbers in [0, 1] (-1 where there is nothing to measure), with the names of `COCO_METRICS`.

    Args:
        results: From [`coco_results`], of every image of the ground truth.
        ground_truth: COCO json, or the path of a file with it.
        masks: Whether masks are compared instead of boxes. Sizes are then those of the masks.

    Raises:
        ValueError: If images of the ground truth have no results, or results are of other images or categories.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    if not isinstance(ground_truth, dict):
        ground_truth = json.loads(Path(ground_truth).read_text())
    wanted = {image["id"] for image in ground_truth["images"]}
    if wanted != results.keys():
        missing, others = sorted(wanted - results.keys()), sorted(results.keys() - wanted)
        raise ValueError(
            f"`results` must be of the {len(wanted)} images of the ground truth: {len(missing)} are missing "
            f"({missing[:5]}), {len(others)} are others ({others[:5]})."
        )
    found = [result for image in results.values() for result in image]
    categories = {category["id"] for category in ground_truth["categories"]}
    if unknown := {result["category_id"] for result in found} - categories:
        raise ValueError(f"`results` have categories that the ground truth does not have: {sorted(unknown)}.")
    # With a box, COCO's code would take its area for the mask's.
    drop = "bbox" if masks else "segmentation"
    found = [{name: value for name, value in result.items() if name != drop} for result in found]
    truth = COCO(ground_truth, use_deepcopy=True)
    evaluation = COCOeval_faster(truth, truth.loadRes(found), "segm" if masks else "bbox")
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    return dict(zip(COCO_METRICS, map(float, evaluation.stats), strict=True))


class ConfusionMatrix:
    """Counts of pixels by label and prediction, from which mIoU, mAcc and aAcc follow; its size does not grow.

    Args:
        num_labels: Number of classes.
        ignore_index: The label of pixels that do not count.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255):
        self.num_labels, self.ignore_index = num_labels, ignore_index
        self.counts = torch.zeros(num_labels, num_labels, dtype=torch.int64)

    def update(self, prediction: torch.Tensor, label: torch.Tensor) -> None:
        """Adds an image, or several: integers of one shape, as tensors or arrays.

        Raises:
            ValueError: If the shapes differ, or there are values that are not classes; they are listed.
        """
        prediction, label = (torch.as_tensor(np.asarray(values)).long().cpu() for values in (prediction, label))
        if prediction.shape != label.shape:
            raise ValueError(
                f"`prediction` and `label` must have one shape, got {list(prediction.shape)} and {list(label.shape)}."
            )
        counted = label != self.ignore_index
        for name, values in (("label", label[counted]), ("prediction", prediction[counted])):
            wrong = values[(values < 0) | (values >= self.num_labels)]
            if wrong.numel():
                raise ValueError(
                    f"`{name}` has the values {wrong.unique().tolist()}, the classes are 0 to {self.num_labels - 1}."
                )
        pairs = label[counted] * self.num_labels + prediction[counted]
        self.counts += pairs.bincount(minlength=self.num_labels**2).view_as(self.counts)

    def __iadd__(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        self.counts += other.counts
        return self

    def reduce(self) -> None:
        """Adds up the matrices of all processes."""
        if dist.is_available() and dist.is_initialized():
            counts = self.counts.to("cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(counts)
            self.counts = counts.cpu()

    def metrics(self) -> dict[str, Any]:
        """As mmsegmentation: `mIoU`, `mAcc` and `aAcc` in [0, 1], and `IoU` and `Acc` of each class as lists. A class
        that is nowhere is NaN and not part of the means."""
        counts = self.counts.double()
        hits, labelled = counts.diagonal(), counts.sum(dim=1)
        iou, accuracy = hits / (labelled + counts.sum(dim=0) - hits), hits / labelled
        return {
            "mIoU": float(iou.nanmean()),
            "mAcc": float(accuracy.nanmean()),
            "aAcc": float(hits.sum() / counts.sum()),
            "IoU": iou.tolist(),
            "Acc": accuracy.tolist(),
        }


def mean_iou_metric(num_labels: int, ignore_index: int = 255) -> Any:
    """[`ConfusionMatrix`] as an `evaluate.Metric` that needs no network and stores no predictions. `add`, `add_batch`
    and `compute` are those of any other, with label maps `(height, width)` as predictions and references; `compute`
    adds up what the processes of a `torch.distributed` group have."""
    import datasets
    import evaluate

    class MeanIoU(evaluate.Metric):
        def _info(self):
            maps = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
            return evaluate.MetricInfo(
                description="Mean intersection over union, mean accuracy of the classes and accuracy of the pixels.",
                citation="",
                inputs_description="Label maps.",
                features=datasets.Features({"predictions": maps, "references": maps}),
            )

        def add(self, *, prediction, reference):
            """Adds one image."""
            self.matrix.update(prediction, reference)

        def add_batch(self, *, predictions, references):
            """Adds several images."""
            for prediction, reference in zip(predictions, references, strict=True):
                self.matrix.update(prediction, reference)

        def compute(self, *, predictions=(), references=()):
            """The metrics of all images since the last call."""
            self.add_batch(predictions=predictions, references=references)
            self.matrix.reduce()
            metrics, self.matrix = self.matrix.metrics(), ConfusionMatrix(num_labels, ignore_index)
            return metrics

    metric = MeanIoU()
    metric.matrix = ConfusionMatrix(num_labels, ignore_index)
    return metric
