"""transformers' example programs, with `import pvt_hf` and a checkpoint of ours: they run, and (slow) they learn."""

import importlib
import math

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    DeformableDetrImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    default_data_collator,
    pipeline,
    set_seed,
)
from transformers.utils import ModelOutput

import pvt_hf
from pvt_hf.data.digits import CLASSES, write_scenes
from tests.support.detection_run import small_detector
from tests.support.small_models import STAGES, small_config


@pytest.fixture(scope="module")
def programs():
    """They are imported where they run: each worker that collects this file would pay for their packages."""
    for package in ("albumentations", "torchmetrics"):
        pytest.importorskip(package)
    return importlib.import_module("tests.support.example_programs")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scripts") / "scenes", images=8, validation=4)


def small_classifier():
    model = pvt_hf.PvtForImageClassification(small_config("v1", num_labels=3))
    return model, pvt_hf.PvtImageProcessor(size={"height": 32, "width": 32})


def small_retinanet():
    return small_detector("retinanet", num_labels=3), pvt_hf.PvtDetectionImageProcessor()


def small_segmenter():
    backbone = small_config("v2", out_features=STAGES)
    config = pvt_hf.SemanticFPNConfig(backbone_config=backbone, num_labels=3, neck_channels=8, head_channels=8)
    image_processor = pvt_hf.PvtSegmentationImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    return pvt_hf.SemanticFPNForSemanticSegmentation(config), image_processor


def small_mask2former():
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim", "train_num_points"), 32)
    sizes |= dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward", "num_queries"), 8)
    config = Mask2FormerConfig(
        backbone_config=small_config("v2", out_features=STAGES),
        num_labels=3,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        **sizes,
    )
    return Mask2FormerForUniversalSegmentation(config), Mask2FormerImageProcessor(ignore_index=255)


# The program, what it starts from, its metric, and steps after which the loss has fallen to this share.
TASKS = {
    "image_classification": ("Classification", small_classifier, "accuracy", 150, 0.8),
    "object_detection": ("Detection", small_retinanet, "map", 60, 0.8),
    "semantic_segmentation": ("SemanticSegmentation", small_segmenter, "mean_iou", 60, 0.8),
    "instance_segmentation": ("InstanceSegmentation", small_mask2former, "map", 60, 0.8),
}


def start(programs, task, scenes, folder):
    """The program on a checkpoint of three other classes in `folder`."""
    set_seed(0)
    name, build, *_ = TASKS[task]
    for part in build():
        part.save_pretrained(folder)
    return getattr(programs, name)(folder, *([scenes] if task != "image_classification" else []))


@pytest.mark.process
@pytest.mark.parametrize(
    "task, run",
    [
        ("image_classification", "run_without_trainer"),
        ("object_detection", "run_with_trainer"),
        ("semantic_segmentation", "run_without_trainer"),
        ("instance_segmentation", "run_with_trainer"),
    ],
)
def test_a_program_runs(programs, scenes, tmp_path, task, run):
    """The other halves are among the slow tests."""
    losses, metrics = getattr(programs, run)(start(programs, task, scenes, tmp_path / "start"), tmp_path / "end")
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert -1 <= metrics[TASKS[task][2]] <= 1
    if task == "image_classification":
        classify = pipeline(task.replace("_", "-"), model=str(tmp_path / "end"))
        assert {found["label"] for found in classify(Image.new("RGB", (40, 50)), top_k=10)} == set(CLASSES)


def test_sizes_that_the_programs_read():
    """They take the shortest edge of a processor, or its height and width, and crop to that too: see the README."""
    assert dict(pvt_hf.PvtImageProcessor().size) == {"shortest_edge": 256}
    assert dict(pvt_hf.PvtImageProcessor(size=224).size) == {"height": 224, "width": 224}
    assert pvt_hf.PvtSegmentationImageProcessor().size["shortest_edge"] == 512


@pytest.mark.slow
@pytest.mark.parametrize("run", ["run_with_trainer", "run_without_trainer"])
@pytest.mark.parametrize("task", TASKS)
def test_a_program_learns(programs, scenes, tmp_path, task, run):
    _, _, metric, steps, share = TASKS[task]
    program = start(programs, task, scenes, tmp_path / "start")
    losses, metrics = getattr(programs, run)(program, tmp_path / "end", steps=steps, learning_rate=3e-3)
    quarter = steps // 4
    assert sum(losses[-quarter:]) < share * sum(losses[:quarter])
    assert task != "image_classification" or metrics[metric] > 0.3


@pytest.mark.parametrize(
    ("architecture", "processor_class"),
    [
        *((name, pvt_hf.PvtDetectionImageProcessor) for name in ("retinanet", "faster_rcnn", "detr")),
        ("sparse_rcnn", DeformableDetrImageProcessor),
    ],
)
def test_logits_and_boxes_are_enough_to_find_objects(architecture, processor_class):
    """`Trainer` gathers the outputs as tuples without the loss; the programs take the second and the third as logits
    and boxes, and hand over nothing else."""
    name, options = ("mask_rcnn", {"use_masks": False}) if architecture == "faster_rcnn" else (architecture, {})
    model = small_detector(name, num_labels=3, **options).eval()
    square = {"height": 96, "width": 96}
    settings = {"size": {"max_height": 96, "max_width": 96}, "pad_size": square}
    image_processor = processor_class(**settings)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((60, 90), (80, 64))]
    objects = [{"bbox": [8, 8, 30, 20], "category_id": 1, "area": 600, "iscrowd": 0}]
    annotations = [{"image_id": index, "annotations": objects} for index in range(2)]
    inputs = image_processor(images=images, annotations=annotations, return_tensors="pt")
    del inputs["pixel_mask"]
    with torch.no_grad():
        outputs = model(**inputs)
    gathered = tuple(value for name, value in outputs.items() if name != "loss")
    part = ModelOutput(logits=torch.tensor(gathered[1].numpy()), pred_boxes=torch.tensor(gathered[2].numpy()))
    sizes = torch.tensor([[60, 90], [80, 64]])
    found, wanted = (
        processor.post_process_object_detection(given, threshold=0.0, target_sizes=sizes)
        for processor, given in (
            (image_processor, part),
            (pvt_hf.PvtDetectionImageProcessor(**settings), outputs),
        )
    )
    for image, other in zip(found, wanted, strict=True):
        assert len(image["scores"]) and image.keys() == other.keys()
        for key, value in other.items():
            torch.testing.assert_close(image[key], value)


def test_the_guide_to_semantic_segmentation(tmp_path):
    """It calls the processor with lists of images and of maps, and stacks what it returns."""
    model, image_processor = small_segmenter()
    image_processor.save_pretrained(tmp_path)
    fixed = AutoImageProcessor.from_pretrained(tmp_path, size={"height": 64, "width": 64}, do_reduce_labels=True)
    images = [Image.new("RGB", size, color="red") for size in ((90, 60), (64, 80))]
    maps = [Image.new("L", image.size, color=label) for label, image in enumerate(images)]
    inputs = fixed(images, maps)
    examples = [dict(zip(inputs, values, strict=True)) for values in zip(*inputs.values(), strict=True)]
    batch = default_data_collator(examples)
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and batch["labels"].shape == (2, 64, 64)
    assert batch["labels"][0].unique().tolist() == [255] and batch["labels"][1].unique().tolist() == [0]
    assert model(**batch).loss.isfinite()


@pytest.mark.process
def test_supervision_reads_what_is_found():
    supervision = pytest.importorskip("supervision")
    model = small_detector("mask_rcnn").eval()
    image_processor = pvt_hf.PvtDetectionImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    inputs = image_processor(torch.randint(256, (3, 60, 90), dtype=torch.uint8), return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    (found,) = image_processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(60, 90)])
    detections = supervision.Detections.from_transformers(found, id2label=model.config.id2label)
    assert len(detections) == len(found["scores"]) > 0
    assert detections["class_name"][0] == model.config.id2label[int(found["labels"][0])]
    for binary in (False, True):
        (found,) = image_processor.post_process_instance_segmentation(
            outputs, threshold=0.0, target_sizes=[(60, 90)], return_binary_maps=binary
        )
        instances = supervision.Detections.from_transformers(found, id2label=model.config.id2label)
        assert instances.mask.shape == (len(detections), 60, 90)
        assert instances.class_id.tolist() == detections.class_id.tolist()
