"""Predictions of every kind of model, from PIL images and from files."""

import dataclasses

import pytest
import torch

from pvt_hf.prediction.drawing import draw
from pvt_hf.prediction.predictions import Segmentation
from tests.support.predictors import build_predictor, draw_image

DETECTORS = ("retinanet", "atss", "gfl", "sparse_rcnn", "mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "detr")


@pytest.mark.parametrize("name", ["v1", "v2", "v2_linear"])
def test_classifiers(name):
    predictor, image = build_predictor(name, top_k=2), draw_image()
    (found,) = predictor([image])
    pixel_values = predictor.image_processor(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = predictor.model(pixel_values).logits.softmax(-1)[0]
    torch.testing.assert_close(found.scores, expected)
    assert [label for label, _, _ in found.list_best()] == expected.argsort(descending=True)[:2].tolist()
    assert draw(image, found).height >= 341


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(name):
    predictor, image = build_predictor(name, threshold=0.05), draw_image()
    inputs = predictor.image_processor(image, return_tensors="pt")
    with torch.no_grad():
        outputs = predictor.model(**inputs)
    (expected,) = predictor.image_processor.post_process_object_detection(outputs, 0.05, [(60, 90)])
    (found,) = predictor([image])
    assert len(found)
    torch.testing.assert_close(found.boxes, expected["boxes"])
    assert (found.masks is None) == (not getattr(predictor.model.config, "use_masks", False))
    assert found.masks is None or found.masks.shape == (len(found), 60, 90)
    draw(image, found)
    (none,) = dataclasses.replace(predictor, threshold=0.9999)([image])
    assert not len(none) and none.best.score == pytest.approx(found.scores[0].item(), rel=1e-5)
    assert none.best.label == found.labels[0] and found.above(0.9999).best == found.list_objects()[0]
    assert none.describe() == f"nothing above 0.9999 (best: LABEL_{none.best.label} {none.best.score:.2f})"
    draw(image, none)


@pytest.mark.parametrize("name", ["semantic_fpn", "upernet"])
def test_segmenters(name):
    predictor, image = build_predictor(name), draw_image()
    (found,) = predictor([image])
    assert found.labels.shape == (60, 90)
    draw(image, found)


def test_instances_and_classes_of_mask2former():
    predictor, image = build_predictor("mask2former", threshold=0.05), draw_image()
    (found,) = predictor([image])
    draw(image, found)
    (none,) = dataclasses.replace(predictor, threshold=0.9999)([image])
    (labels,) = dataclasses.replace(predictor, subtask="semantic")([image])
    assert labels.labels.shape == (60, 90)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in ("v2", "retinanet", "mask_rcnn", "semantic_fpn", "mask2former")),
        ("semantic_fpn", {"window": 48, "stride": 32, "tta_scales": (1.5,), "tta_flip": True}),
    ],
)
def test_batches_give_what_single_images_give(name, settings):
    """Those of two sizes, of which two images of one size are computed together."""
    predictor = build_predictor(name, threshold=0.05, **settings)
    images, sizes = [draw_image(seed=1), draw_image(60, 90, seed=2), draw_image(seed=3)], set()

    def note(model, args, kwargs):
        sizes.add(len(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]))

    handle = predictor.model.register_forward_pre_hook(note, with_kwargs=True)
    found = predictor(images)
    handle.remove()
    assert max(sizes) == (3 if name in ("v2", "mask2former") else 2)  # which have one size whatever the image's
    for image, together in zip(images, found, strict=True):
        (alone,) = predictor([image])
        assert type(alone) is type(together)
        for field in ("scores", "boxes", "labels", "masks"):
            if (value := getattr(alone, field, None)) is not None:
                torch.testing.assert_close(getattr(together, field), value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "bfloat16") for name in ("v1", "v2", "retinanet", "mask_rcnn", "semantic_fpn", "mask2former")),
        *((name, "float16") for name in ("v2", "retinanet")),
    ],
)
def test_dtypes(name, dtype):
    predictor, image = build_predictor(name, threshold=0.05), draw_image()
    predictor.model.to(getattr(torch, dtype))
    (found,) = predictor([image])
    assert isinstance(found, Segmentation) or found.scores.dtype == torch.float32
