"""transformers' example programs, with `import pvt_hf` added and a checkpoint of ours: they run, and (slow) they learn."""

import math

import pytest
from PIL import Image
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    pipeline,
    set_seed,
)

import pvt_hf
from pvt_hf.data.digits import CLASSES, write_scenes
from tests.support.detection_run import small_detector
from tests.support.small_models import STAGES, small_config

pytest.importorskip("albumentations")
pytest.importorskip("torchmetrics")

from tests.support import example_programs as programs  # noqa: E402  (it needs them)

RUN = {"trainer": programs.run_with_trainer, "no_trainer": programs.run_without_trainer}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scripts") / "scenes", images=8, validation=4)


def save(folder, model, image_processor):
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder


def small_classifier(folder, version):
    set_seed(0)
    models = {"v1": pvt_hf.PvtForImageClassification}
    model = models.get(version, pvt_hf.PvtV2ForImageClassification)(small_config(version, num_labels=3))
    return save(folder, model, pvt_hf.PvtImageProcessor(size={"height": 32, "width": 32}))


def small_detector_folder(folder, architecture):
    set_seed(0)
    name, options = ("mask_rcnn", {"use_masks": False}) if architecture == "faster_rcnn" else (architecture, {})
    return save(folder, small_detector(name, num_labels=3, **options), pvt_hf.PvtDetectionImageProcessor())


def small_segmenter(folder):
    set_seed(0)
    config = pvt_hf.SemanticFPNConfig(
        backbone_config=small_config("v2", out_features=STAGES), num_labels=3, neck_channels=8, head_channels=8
    )
    image_processor = pvt_hf.PvtSegmentationImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    return save(folder, pvt_hf.SemanticFPNForSemanticSegmentation(config), image_processor)


def small_mask2former(folder, version="v2"):
    set_seed(0)
    config = Mask2FormerConfig(
        backbone_config=small_config(version, out_features=STAGES),
        num_labels=3,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        encoder_feedforward_dim=8,
        dim_feedforward=8,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        train_num_points=64,
    )
    return save(folder, Mask2FormerForUniversalSegmentation(config), Mask2FormerImageProcessor(ignore_index=255))


@pytest.mark.parametrize("run, version", [("trainer", "v1"), ("no_trainer", "v2")])
def test_image_classification(tmp_path, run, version):
    program = programs.Classification(small_classifier(tmp_path / "start", version), images=16)
    losses, metrics = RUN[run](program, tmp_path / "end")
    assert len(losses) == 2 and all(map(math.isfinite, losses)) and 0 <= metrics["accuracy"] <= 1
    classify = pipeline("image-classification", model=str(tmp_path / "end"))
    assert {found["label"] for found in classify(Image.new("RGB", (40, 50)), top_k=10)} == set(CLASSES)


@pytest.mark.parametrize(
    "run, architecture",
    [("trainer", "retinanet"), ("trainer", "faster_rcnn"), ("trainer", "detr"), ("no_trainer", "retinanet")],
)
def test_object_detection(tmp_path, scenes, run, architecture):
    program = programs.Detection(small_detector_folder(tmp_path / "start", architecture), scenes)
    losses, metrics = RUN[run](program, tmp_path / "end")
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert 0 <= metrics["map"] <= 1


@pytest.mark.parametrize("run", ["trainer", "no_trainer"])
def test_semantic_segmentation(tmp_path, scenes, run):
    program = programs.SemanticSegmentation(small_segmenter(tmp_path / "start"), scenes)
    losses, metrics = RUN[run](program, tmp_path / "end")
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert 0 <= metrics["mean_iou"] <= 1 and 0 <= metrics["iou_background"] <= 1


@pytest.mark.parametrize("run", ["trainer", "no_trainer"])
def test_instance_segmentation(tmp_path, scenes, run):
    program = programs.InstanceSegmentation(small_mask2former(tmp_path / "start"), scenes)
    losses, metrics = RUN[run](program, tmp_path / "end")
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert -1 <= metrics["map"] <= 1
