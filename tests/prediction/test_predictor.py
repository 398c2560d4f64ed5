"""Predictions of every kind of model, from PIL images and from files."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

import pvt_hf
from pvt_hf.prediction.drawing import draw
from pvt_hf.prediction.predictions import Segmentation
from pvt_hf.prediction.predictor import Predictor
from tests.support.dense_models import build_dense_model
from tests.support.small_models import STAGES, randomize, small_config

DETECTORS = ("retinanet", "atss", "gfl", "sparse_rcnn", "mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "detr")


def draw_image(width=90, height=60, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def build_predictor(name, **settings):
    if name in ("v1", "v2", "v2_linear"):
        classes = {"v1": pvt_hf.PvtForImageClassification}.get(name, pvt_hf.PvtV2ForImageClassification)
        model = randomize(classes(small_config(name)))
        return Predictor(model.eval(), pvt_hf.PvtImageProcessor(crop_size=32), **settings)
    if name == "semantic_fpn":
        processor = pvt_hf.PvtSegmentationImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
        return Predictor(build_dense_model(name), processor, **settings)
    if name == "upernet":
        config = UperNetConfig(backbone_config=small_config("v2", out_features=STAGES), hidden_size=8, num_labels=3)
        config.use_auxiliary_head = False
        processor = pvt_hf.PvtSegmentationImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
        return Predictor(randomize(UperNetForSemanticSegmentation(config)).eval(), processor, **settings)
    if name == "mask2former":
        sizes = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "num_attention_heads": 2}
        sizes |= {"encoder_layers": 1, "decoder_layers": 2, "dim_feedforward": 16, "encoder_feedforward_dim": 16}
        config = Mask2FormerConfig(
            backbone_config=small_config("v2", out_features=STAGES), num_queries=6, num_labels=3, **sizes
        )
        model = Mask2FormerForUniversalSegmentation(config).eval()
        return Predictor(model, Mask2FormerImageProcessor(size={"height": 64, "width": 64}), **settings)
    processor = pvt_hf.PvtDetectionImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    return Predictor(build_dense_model(name), processor, **settings)


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


@pytest.mark.parametrize("name", ["v2", "retinanet", "mask_rcnn", "semantic_fpn", "mask2former"])
def test_batches_give_what_single_images_give(name):
    predictor = build_predictor(name, threshold=0.05)
    images = [draw_image(seed=1), draw_image(60, 90, seed=2), draw_image(seed=3)]
    for image, together in zip(images, predictor(images), strict=True):
        (alone,) = predictor([image])
        assert type(alone) is type(together)
        for field in ("scores", "boxes", "labels", "masks"):
            if (value := getattr(alone, field, None)) is not None:
                torch.testing.assert_close(getattr(together, field), value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["v1", "v2", "retinanet", "mask_rcnn", "semantic_fpn", "mask2former"])
def test_dtypes(name, dtype):
    predictor, image = build_predictor(name, threshold=0.05), draw_image()
    predictor.model.to(getattr(torch, dtype))
    (found,) = predictor([image])
    assert isinstance(found, Segmentation) or found.scores.dtype == torch.float32
