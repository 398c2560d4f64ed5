"""Metrics that are right over several processes and need little memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..models.annotations import encode_mask
from ..models.image_processing_segmentation import reduce_labels

if TYPE_CHECKING:
    import evaluate
    from transformers import EvalPrediction

    LabelMap: TypeAlias = torch.Tensor | np.ndarray | Sequence[Sequence[int]]
    Results: TypeAlias = Mapping[int, list[dict[str, Any]]]

# COCO's twelve numbers in its own order: over IoU 0.5:0.95 and 100 detections unless the name says otherwise.
COCO_METRICS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)


def coco_metric_names(max_detections: int = 100) -> tuple[str, ...]:
    """`COCO_METRICS` with another number of detections.

    Args:
        max_detections: Most detections of an image that count (default: 100, COCO's).
    """
    return tuple(f"AR{max_detections}" if name == "AR100" else name for name in COCO_METRICS)


def classification_statistics(
    logits: torch.Tensor | tuple[Any, ...], labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What top-1, top-5 and the loss need of the logits, for `Trainer(preprocess_logits_for_metrics=...)`.

    Args:
        logits: `(batch, num_labels)`, or the model's outputs with them first.
        labels: int64 `(batch,)`.

    Returns:
        The five best classes, int64 `(batch, 5)` (fewer if there are fewer), and the cross-entropy, float32 `(batch,)`.
    """
    logits = (logits[0] if isinstance(logits, tuple) else logits).float()
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return best, F.cross_entropy(logits, labels, reduction="none")


def classification_metrics(output: EvalPrediction) -> dict[str, float]:
    """Top-1 and top-5 accuracy as the released code counts them, for `Trainer(compute_metrics=...)`.

    Args:
        output: With what [`classification_statistics`] returns as predictions, and labels `(images,)`.

    Returns:
        `accuracy` and `top5_accuracy` in [0, 1], the mean `loss`, and the number of `images`.
    """
    (best, losses), labels = output.predictions, np.asarray(output.label_ids)
    hits = best == labels[:, None]  # (images, 5)
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
        detections: For each image `scores` `(detections,)`, `labels` `(detections,)`, `boxes` `(detections, 4)`
            (absolute xyxy in the original image), and `masks` bool `(detections, height, width)` of the original image
            where there are any.
        image_ids: Of the images.
        category_ids: The id of each class label.

    Returns:
        For each image id its results, with `bbox` in absolute xywh; an image without any has an empty list, which says
        that it was looked at.
    """
    results = {}
    for image, image_id in zip(detections, image_ids, strict=True):
        boxes = image["boxes"].double().cpu()  # (detections, 4), xyxy
        xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
        results[int(image_id)] = [
            {"image_id": int(image_id), "category_id": category_ids[label], "bbox": box, "score": score}
            for label, box, score in zip(image["labels"].tolist(), xywh, image["scores"].tolist(), strict=True)
        ]
        if "masks" in image:
            for result, mask in zip(results[int(image_id)], image["masks"].cpu().numpy(), strict=True):
                result["segmentation"] = encode_mask(mask)  # (height, width) to RLE
    return results


def gather_results(results: Results) -> Results:
    """The results of all processes in each of them. An image that several of them had (the last batches are filled up)
    counts once.

    Args:
        results: Of this process, from [`coco_results`].
    """
    if not (dist.is_available() and dist.is_initialized()):
        return results
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, results)
    return {image_id: found for part in parts for image_id, found in part.items()}


def coco_metrics(
    results: Results, ground_truth: str | Path | dict[str, Any], masks: bool = False, max_detections: int = 100
) -> dict[str, float]:
    """COCO's twelve numbers.

    Args:
        results: From [`coco_results`], of every image of the ground truth.
        ground_truth: COCO json, or the path of a file with it.
        masks: Whether masks are compared instead of boxes; sizes are then those of the masks (default: `False`).
        max_detections: Most detections of an image that count, the best ones, at least 10 (default: 100, COCO's).

    Returns:
        Numbers in [0, 1], -1 where there is nothing to measure, with the names of [`coco_metric_names`].

    Raises:
        ValueError: If images of the ground truth have no results, or results are of other images or categories.
    """
    if max_detections < 10:
        raise ValueError(f"`max_detections` must be at least 10, got {max_detections}.")
    from faster_coco_eval import COCO, COCOeval_faster

    coco = ground_truth if isinstance(ground_truth, dict) else json.loads(Path(ground_truth).read_text())
    wanted = {image["id"] for image in coco["images"]}
    if wanted != results.keys():
        missing, others = sorted(wanted - results.keys()), sorted(results.keys() - wanted)
        raise ValueError(
            f"`results` must be of the {len(wanted)} images of the ground truth: {len(missing)} are missing "
            f"({missing[:5]}), {len(others)} are others ({others[:5]})."
        )
    found = [result for image in results.values() for result in image]
    categories = {category["id"] for category in coco["categories"]}
    if unknown := {result["category_id"] for result in found} - categories:
        raise ValueError(f"`results` have categories that the ground truth does not have: {sorted(unknown)}.")
    # With a box, COCO's code would take its area for the mask's.
    drop = "bbox" if masks else "segmentation"
    found = [{name: value for name, value in result.items() if name != drop} for result in found]
    truth = COCO(coco, use_deepcopy=True)
    evaluation = COCOeval_faster(truth, truth.loadRes(found), "segm" if masks else "bbox")

    evaluation.params.maxDets = [1, 10, max_detections]
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    return dict(zip(coco_metric_names(max_detections), map(float, evaluation.stats), strict=True))


class ConfusionMatrix:
    """Counts of pixels by label and prediction, from which mean IoU and accuracies follow; its size does not grow.

    Args:
        num_labels: Number of classes.
        ignore_index: The label of pixels that do not count (default: 255).
        reduce_labels: Whether label 0 is no class, and becomes 255, and the others count from 0 (default: `False`).
    """

    def __init__(self, num_labels: int, ignore_index: int = 255, reduce_labels: bool = False):
        self.num_labels, self.ignore_index, self.reduce_labels = num_labels, ignore_index, reduce_labels
        self.counts = torch.zeros(num_labels, num_labels, dtype=torch.int64)  # (labels, predictions)

    def update(self, prediction: LabelMap, label: LabelMap) -> None:
        """Adds an image, or several of one size.

        Args:
            prediction: Class of each pixel, integers of any shape.
            label: Of each pixel, integers of the same shape.

        Raises:
            ValueError: If the shapes differ, or there are values that are not classes; they are listed.
        """
        predicted, labelled = (
            (values if isinstance(values, torch.Tensor) else torch.from_numpy(np.asarray(values))).long().cpu()
            for values in (prediction, label)
        )
        if predicted.shape != labelled.shape:
            raise ValueError(
                f"`prediction` and `label` must have one shape, got {list(predicted.shape)} and {list(labelled.shape)}."
            )
        labelled = reduce_labels(labelled) if self.reduce_labels else labelled
        counted = labelled != self.ignore_index
        labelled, predicted = labelled[counted], predicted[counted]  # (pixels,)
        for name, values in (("label", labelled), ("prediction", predicted)):
            wrong = values[(values < 0) | (values >= self.num_labels)]
            if wrong.numel():
                raise ValueError(
                    f"`{name}` has the values {wrong.unique().tolist()}, the classes are 0 to {self.num_labels - 1}."
                )
        pairs = labelled * self.num_labels + predicted  # the place of each pixel in the flattened matrix
        self.counts += pairs.bincount(minlength=self.num_labels**2).view_as(self.counts)

    def __iadd__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        self.counts += other.counts
        return self

    def reduce(self) -> None:
        """Adds up the matrices of all processes."""
        if dist.is_available() and dist.is_initialized():
            counts = self.counts.to("cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(counts)
            self.counts = counts.cpu()

    def metrics(self) -> dict[str, Any]:
        """What the pixels so far give, as mmsegmentation counts and as the Hub's metric `mean_iou` names it.

        Returns:
            `mean_iou`, `mean_accuracy` and `overall_accuracy` in [0, 1] (mmsegmentation's mIoU, mAcc and aAcc), and
            `per_category_iou` and `per_category_accuracy`, float64 `(num_labels,)`. A class that is nowhere is NaN and
            not part of the means.
        """
        counts = self.counts.double()
        hits, (_, iou) = counts.diagonal(), overlap_scores(counts)  # each (num_labels,)
        accuracy = hits / counts.sum(dim=1)
        return {
            "mean_iou": float(iou.nanmean()),
            "mean_accuracy": float(accuracy.nanmean()),
            "overall_accuracy": float(hits.sum() / counts.sum()),
            "per_category_iou": iou.numpy(),
            "per_category_accuracy": accuracy.numpy(),
        }


def overlap_scores(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dice, 2 |A and B| / (|A| + |B|), and IoU, |A and B| / |A or B|, of each class.

    Args:
        counts: Pixels by label and prediction, `(num_labels, num_labels)`, as of a [`ConfusionMatrix`].

    Returns:
        Dice and IoU, float64 `(num_labels,)` each, in [0, 1]; NaN where neither labels nor predictions have the class.
    """
    counts = counts.double()
    hits, total = counts.diagonal(), counts.sum(dim=0) + counts.sum(dim=1)  # each (num_labels,)
    return 2 * hits / total, hits / (total - hits)


def mean_iou_metric(
    num_labels: int | None = None, ignore_index: int = 255, reduce_labels: bool = False
) -> evaluate.Metric:
    """The Hub's metric `mean_iou`, with its arguments and results, on a [`ConfusionMatrix`].

    It needs no network and stores no predictions, and `compute` adds up what the processes of a `torch.distributed`
    group have. Unlike the Hub's, it raises on values that are not classes.

    Args:
        num_labels: Number of classes (default: given to `compute`, and nothing can be added before).
        ignore_index: The label of pixels that do not count (default: 255).
        reduce_labels: Whether label 0 is no class, and becomes 255, and the others count from 0 (default: `False`).

    Returns:
        A metric whose `add`, `add_batch` and `compute` take label maps, integers `(height, width)` each. `compute` also
        takes the three arguments above, for one call, and returns what [`ConfusionMatrix.metrics`] does.

    Raises:
        ImportError: If the package `evaluate` is not installed.
    """
    try:
        import datasets
        import evaluate
    except ImportError as error:
        raise ImportError("`mean_iou_metric` needs `pip install evaluate`.") from error

    settings: dict[str, Any] = {"num_labels": num_labels, "ignore_index": ignore_index, "reduce_labels": reduce_labels}

    class MeanIoU(evaluate.Metric):
        matrix: Any  # a ConfusionMatrix, where `num_labels` is known

        def _info(self) -> evaluate.MetricInfo:
            label_maps = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
            return evaluate.MetricInfo(
                description="Mean intersection over union, mean accuracy of the classes and accuracy of the pixels.",
                citation="",
                inputs_description="Label maps.",
                features=datasets.Features({"predictions": label_maps, "references": label_maps}),
            )

        def reset(self) -> None:
            """Forgets the images since the last call of `compute`."""
            self.matrix = None if num_labels is None else ConfusionMatrix(**settings)

        def add(self, *, prediction: LabelMap, reference: LabelMap) -> None:
            """Adds one image."""
            self.add_batch(predictions=[prediction], references=[reference])

        def add_batch(self, *, predictions: Iterable[LabelMap], references: Iterable[LabelMap]) -> None:
            """Adds several images."""
            if self.matrix is None:
                raise ValueError("`num_labels` is missing: give it to `mean_iou_metric`, or to `compute`.")
            for prediction, reference in zip(predictions, references, strict=True):
                self.matrix.update(prediction, reference)

        def compute(
            self, *, predictions: Iterable[LabelMap] = (), references: Iterable[LabelMap] = (), **changes: Any
        ) -> dict[str, Any]:
            """The metrics of all images since the last call, with other settings where they are given."""
            if changes and settings | changes != settings:
                if self.matrix is not None and self.matrix.counts.any():
                    raise ValueError(f"Images have been added with {settings}, `compute` got {changes}.")
                self.matrix = ConfusionMatrix(**settings | changes)
            try:
                self.add_batch(predictions=predictions, references=references)
                self.matrix.reduce()
                return self.matrix.metrics()
            finally:
                self.reset()

    metric = MeanIoU()
    metric.reset()
    return metric
