"""COCO's numbers against pycocotools, mIoU against counting pixel by pixel."""

import copy
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import EvalPrediction

from pvt_hf.data.detection import read_coco
from pvt_hf.data.digits import write_scenes
from pvt_hf.evaluation.metrics import (
    COCO_METRICS,
    ConfusionMatrix,
    classification_metrics,
    classification_statistics,
    coco_metric_names,
    coco_metrics,
    coco_results,
    gather_results,
    mean_iou_metric,
)
from pvt_hf.models.annotations import read_objects
from tests.support.processes import call_in_two_processes

MEANS = ("mean_iou", "mean_accuracy", "overall_accuracy")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_scenes(tmp_path_factory.mktemp("data") / "scenes", images=30, validation=1) / "train"
    return read_coco(folder / "annotations.json", folder / "images")


def detections_of(data, noise: float, drop: float = 0.2) -> list[dict[str, torch.Tensor]]:
    """The objects, some missing, some of another class, moved by a few pixels, and some that are not there."""
    draw = np.random.default_rng(0)
    detections = []
    for index, record in enumerate(data.records):
        objects = read_objects(data.target(index), record.size, masks=True)
        objects = objects[torch.from_numpy(draw.random(len(objects)) >= drop)]
        count = len(objects)
        shift = draw.integers(-2, 3, 2).tolist() if noise else [0, 0]
        masks = torch.roll(objects.masks, shift, dims=(1, 2))
        boxes = objects.boxes + torch.from_numpy(draw.normal(0, 1, (count, 4)) * noise).float()
        labels = torch.where(torch.from_numpy(draw.random(count) < 0.1 * noise), 3, objects.class_labels)
        if noise:
            boxes = torch.cat([boxes, torch.tensor([[3.0, 4, 40, 50]])])
            labels, masks = torch.cat([labels, torch.tensor([1])]), torch.cat([masks, masks.new_ones(1, *record.size)])
        scores = torch.from_numpy(draw.random(len(labels))).float()
        detections.append({"scores": scores, "labels": labels, "boxes": boxes, "masks": masks})
    return detections


def results_of(data, noise: float = 1, **options) -> dict:
    ids = [record.image_id for record in data.records]
    return coco_results(detections_of(data, noise, **options), ids, data.category_ids)


@pytest.mark.parametrize("masks", [False, True])
def test_coco_metrics_are_pycocotools(data, masks, capsys):
    truth = data.ground_truth()
    for index in (0, 7):  # a crowd takes detections without being counted
        truth["annotations"][index]["iscrowd"] = 1
    results = results_of(data)
    ours = coco_metrics(results, truth, masks)
    assert not capsys.readouterr().out
    reference = COCO()
    reference.dataset = copy.deepcopy(truth)
    reference.createIndex()
    found = copy.deepcopy([result for image in results.values() for result in image])
    for result in found:
        result.pop("bbox" if masks else "segmentation")
    evaluation = COCOeval(reference, reference.loadRes(found), "segm" if masks else "bbox")
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    np.testing.assert_allclose([ours[name] for name in COCO_METRICS], evaluation.stats, rtol=0, atol=1e-12)
    assert 0.05 < ours["AP"] < 0.95 and ours["AP50"] > ours["AP75"] and ours["AR1"] < ours["AR100"]
    if masks:
        assert evaluation.stats[3] > 0 and evaluation.stats[5] == -1


def test_coco_metrics_are_1_for_all_and_0_for_nothing(data, tmp_path):
    truth = data.ground_truth()
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    for masks in (False, True):
        assert coco_metrics(results_of(data, 0, drop=0), tmp_path / "truth.json", masks)["AP"] == pytest.approx(1)
        assert coco_metrics({record.image_id: [] for record in data.records}, truth, masks)["AP"] == 0
    results = results_of(data)
    assert json.loads(json.dumps(results[1])) == results[1]
    results[1][0]["category_id"] = 77
    with pytest.raises(ValueError, match=r"categories that the ground truth does not have: \[77\]"):
        coco_metrics(results, truth)
    results[99] = results.pop(2)
    with pytest.raises(ValueError, match=r"of the 30 images .* 1 are missing \(\[2\]\), 1 are others \(\[99\]\)"):
        coco_metrics(results, truth)


def test_more_than_100_detections_of_an_image_count_where_they_are_asked_for():
    """150 perfect ones: COCO's own numbers stop at 100."""
    boxes = [[10 * (index % 15), 10 * (index // 15), 9, 9] for index in range(150)]
    truth = {
        "images": [{"id": 1, "height": 100, "width": 150}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [
            {"id": index + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 81, "iscrowd": 0}
            for index, box in enumerate(boxes)
        ],
    }
    results = {1: [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9} for box in boxes]}
    metrics = coco_metrics(results, truth)
    assert metrics["AP"] == pytest.approx(0.663, abs=1e-3) and metrics["AR100"] == pytest.approx(100 / 150)
    metrics = coco_metrics(results, truth, max_detections=150)
    assert tuple(metrics) == coco_metric_names(150) and "AR100" not in metrics
    assert metrics["AP"] == metrics["AR150"] == metrics["AP_small"] == pytest.approx(1)
    with pytest.raises(ValueError, match="`max_detections` must be at least 10, got 9"):
        coco_metrics(results, truth, max_detections=9)


def _gather(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0, 1, rank]), torch.tensor([0, 1, 1]))
    matrix.reduce()
    # Image 5 is in both, as where the last batch is filled up.
    results = gather_results({rank: [{"image_id": rank}], 5: [{"image_id": 5}]})
    torch.save((results, matrix.counts.tolist()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.process
def test_processes_gather_results_and_counts(tmp_path):
    call_in_two_processes(_gather, str(tmp_path))
    gathered = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    expected = {0: [{"image_id": 0}], 1: [{"image_id": 1}], 5: [{"image_id": 5}]}
    assert gathered == [(expected, [[2, 0], [1, 3]])] * 2
    assert gather_results(expected) == expected


def slow_metrics(predictions: np.ndarray, labels: np.ndarray, classes: int) -> tuple[float, float, float]:
    ious, accuracies, right, counted = [], [], 0, 0
    for label in range(classes):
        intersection = union = area = 0
        for one, other in zip(predictions.ravel().tolist(), labels.ravel().tolist(), strict=True):
            if other != 255:
                intersection += one == label and other == label
                union += one == label or other == label
                area += other == label
        right, counted = right + intersection, counted + area
        if union:
            ious.append(intersection / union)
        if area:
            accuracies.append(intersection / area)
    return sum(ious) / len(ious), sum(accuracies) / len(accuracies), right / counted


def maps(classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Class 4 is only predicted, and class 5 is nowhere."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, classes - 2, (3, 17, 23))
    labels[draw.random(labels.shape) < 0.1] = 255
    predictions = np.where(draw.random(labels.shape) < 0.6, labels, draw.integers(0, classes - 1, labels.shape))
    predictions[predictions == 255] = 2
    return predictions, labels


def test_mean_iou_equals_counting_pixel_by_pixel():
    predictions, labels = maps()
    whole, parts = ConfusionMatrix(6), [ConfusionMatrix(6) for _ in labels]
    whole.update(predictions, labels)
    for part, prediction, label in zip(parts, predictions, labels, strict=True):
        part.update(torch.from_numpy(prediction), torch.from_numpy(label.astype(np.uint8)))
    merged = ConfusionMatrix(6)
    for part in parts:
        merged += part
    assert torch.equal(merged.counts, whole.counts)
    metrics = whole.metrics()
    assert [metrics[name] for name in MEANS] == pytest.approx(slow_metrics(predictions, labels, 6))
    iou, accuracy = metrics["per_category_iou"], metrics["per_category_accuracy"]
    assert iou[4] == 0 and math.isnan(iou[5]) and math.isnan(accuracy[4])


def test_values_that_are_not_classes_are_an_error():
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=r"`label` has the values \[-1, 3, 9\], the classes are 0 to 2"):
        matrix.update(torch.tensor([0, 1, 2, 0]), torch.tensor([3, 9, 255, -1]))
    with pytest.raises(ValueError, match=r"`prediction` has the values \[3\]"):
        matrix.update(torch.tensor([3, 77]), torch.tensor([0, 255]))
    with pytest.raises(ValueError, match=r"one shape, got \[2, 2\] and \[4\]"):
        matrix.update(torch.zeros(2, 2), torch.zeros(4))
    assert not matrix.counts.any()


def test_mean_iou_metric_starts_anew_after_computing():
    predictions, labels = maps()
    metric = mean_iou_metric(6)
    expected = pytest.approx(slow_metrics(predictions, labels, 6))
    for _ in range(2):  # computing starts anew
        metric.add(prediction=predictions[0], reference=labels[0])
        metric.add_batch(predictions=predictions[1:], references=labels[1:])
        metrics = metric.compute()
        assert [metrics[name] for name in MEANS] == expected
    assert metric.compute(predictions=predictions, references=labels)["mean_iou"] == expected.expected[0]


def hub_metrics(predictions: np.ndarray, labels: np.ndarray, num_labels: int, ignore_index: int, reduce_labels: bool):
    """The arithmetic of the metric `mean_iou` on the Hub (which takes mmsegmentation's), in its own steps."""
    totals = np.zeros((3, num_labels))
    for prediction, label in zip(predictions, labels, strict=True):
        label = label.copy()
        if reduce_labels:
            label[label == 0] = 255
            label = label - 1
            label[label == 254] = 255
        counted = label != ignore_index
        prediction, label = prediction[counted], label[counted]
        for total, values in zip(totals, (prediction[prediction == label], prediction, label), strict=True):
            total += np.histogram(values, bins=num_labels, range=(0, num_labels - 1))[0]
    intersection, predicted, labelled = totals
    with np.errstate(invalid="ignore"):
        iou, accuracy = intersection / (predicted + labelled - intersection), intersection / labelled
    means = [np.nanmean(iou), np.nanmean(accuracy), intersection.sum() / labelled.sum()]
    return dict(zip(MEANS, means, strict=True)) | {"per_category_iou": iou, "per_category_accuracy": accuracy}


@pytest.mark.parametrize("settings", [(6, 255, False), (6, 1, False), (6, 255, True)], ids=str)
def test_mean_iou_metric_is_the_hubs(settings):
    """With the settings given at construction, or to `compute` as the Hub's takes them."""
    predictions, labels = maps()
    labels[labels == 255] = 0 if settings[1] == 1 else 255
    names = dict(zip(("num_labels", "ignore_index", "reduce_labels"), settings, strict=True))
    expected = hub_metrics(predictions, labels, *settings)
    images = {"predictions": list(predictions), "references": list(labels)}
    for metrics in (mean_iou_metric(**names).compute(**images), mean_iou_metric().compute(**images, **names)):
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-12, err_msg=name)


def test_mean_iou_metric_needs_settings_before_images():
    image = {"predictions": [[[0, 1]]], "references": [[[0, 0]]]}
    with pytest.raises(ValueError, match="`num_labels` is missing"):
        mean_iou_metric().add_batch(**image)
    with pytest.raises(ValueError, match="`num_labels` is missing"):
        mean_iou_metric().compute(**image)
    metric = mean_iou_metric(2)
    metric.add_batch(**image)
    with pytest.raises(ValueError, match=r"added with .*'num_labels': 2.*, `compute` got {'num_labels': 3}"):
        metric.compute(num_labels=3)
    assert metric.compute(**image, num_labels=2)["overall_accuracy"] == 0.5
    with pytest.raises(ValueError, match=r"`label` has the values \[7\]"):
        metric.compute(predictions=[[[1, 0]]], references=[[[1, 7]]])
    assert math.isnan(metric.compute()["overall_accuracy"])  # nothing is left of the wrong image
    assert metric.compute(**image, num_labels=3)["per_category_iou"].shape == (3,)
    assert metric.compute(**image)["per_category_iou"].shape == (2,)


def test_mean_iou_metric_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match="needs `pip install evaluate`"):
        mean_iou_metric(2)


def test_accuracies_and_loss_equal_those_of_sorted_logits():
    logits, labels = torch.randn(40, 12), torch.randint(0, 12, (40,))
    statistics = classification_statistics((logits, "more"), labels)
    metrics = classification_metrics(EvalPrediction(tuple(part.numpy() for part in statistics), labels.numpy()))
    order = logits.argsort(dim=1, descending=True)
    assert metrics["accuracy"] == pytest.approx((order[:, 0] == labels).float().mean().item())
    assert metrics["top5_accuracy"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).float().mean().item())
    assert metrics["loss"] == pytest.approx(-logits.log_softmax(1)[range(40), labels].mean().item(), rel=1e-6)
    assert metrics["images"] == 40
