"""Outputs and results that differ are counted as they are."""

import math

import pytest
import torch

import pvt_hf
from pvt_hf.exporting.comparison import CLASSIFICATION, DETECTION, FEATURES, SEGMENTATION, find_difference, find_results
from pvt_hf.exporting.programs import find_size, list_inputs, make_batch, plan_shapes
from pvt_hf.exporting.targets import TARGETS
from tests.support.dense_models import build_dense_model
from tests.support.exports import small_classifier


def test_difference_is_the_largest_share():
    expected = {"logits": torch.tensor([1.0, -4.0]), "maps": (torch.ones(2), torch.tensor([100.0])), "no": None}
    actual = {"logits": torch.tensor([1.5, -4.0]), "maps": (torch.ones(2), torch.tensor([101.0]))}
    assert find_difference(actual, expected) == (0.125, "logits")
    actual["maps"] = (torch.tensor([1.0, 1.5]), torch.tensor([100.0]))
    assert find_difference(actual, expected) == (0.5, "maps.0")
    assert find_difference({"logits": expected["logits"]}, expected)[0] == math.inf
    infinite = {"logits": torch.tensor([-math.inf, 2.0])}
    assert find_difference(infinite, infinite)[0] == 0
    assert find_difference({"logits": torch.tensor([0.0, 2.0])}, infinite)[0] == math.inf
    assert find_difference({"logits": torch.tensor([-math.inf, 3.0])}, infinite)[0] == 0.5


def test_detections_have_one_partner_each():
    """Mask R-CNN's outputs have their scores and classes: three of the model's four are found, and one is added."""
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9]])
    expected = {
        "scores": torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.2]]),
        "class_labels": torch.tensor([[0, 0, 1, 2, 2]]),
        "pred_boxes": torch.cat([boxes, boxes[:1]])[None],
    }
    actual = {name: value.clone() for name, value in expected.items()}
    actual["class_labels"][0, 3] = 1
    actual["pred_boxes"][0, 0, 0] += 0.02
    processor = pvt_hf.PvtDetectionImageProcessor()
    assert DETECTION.compare(expected, expected, processor) == (8, 8)
    assert DETECTION.compare(actual, expected, processor) == (6, 8)
    nothing = {name: value[:, 4:] for name, value in expected.items()}
    assert DETECTION.compare(nothing, nothing, processor) == (0, 0)


def test_classes_and_pixels_are_compared():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert CLASSIFICATION.compare({"logits": logits}, {"logits": logits.roll(1, 1)}, None) == (0, 2)
    maps = torch.zeros(1, 2, 3, 3)
    other = maps.clone()
    other[0, 1, 0] = 1  # a row
    assert SEGMENTATION.compare({"logits": other}, {"logits": maps}, None) == (6, 9)


@torch.no_grad()
def test_task_is_read_from_the_outputs():
    pixels = torch.randn(1, 3, 64, 64)
    models = {CLASSIFICATION: small_classifier(), SEGMENTATION: build_dense_model("semantic_fpn")}
    models |= {DETECTION: build_dense_model("detr"), FEATURES: small_classifier().base_model}
    assert all(find_results(model(pixels)) is task for task, model in models.items())


SIZES = {
    "crop": (pvt_hf.PvtImageProcessor(crop_size=96), (96, 96)),
    "squash": (pvt_hf.PvtImageProcessor(size={"height": 64, "width": 80}), (64, 80)),
    "any": (pvt_hf.PvtDetectionImageProcessor(), None),
    "padded": (pvt_hf.PvtDetectionImageProcessor(pad_size={"height": 640, "width": 608}), (640, 608)),
    "no crop": (pvt_hf.PvtImageProcessor(size={"shortest_edge": 70}, do_center_crop=False), None),
}


@pytest.mark.parametrize("name", SIZES)
def test_size_of_what_a_processor_makes(name):
    processor, size = SIZES[name]
    assert find_size(processor) == size
    image = torch.zeros(3, 90, 120, dtype=torch.uint8)
    made = tuple(processor(image, return_tensors="pt").pixel_values.shape[-2:])
    assert size is None or made == size


def test_shapes_are_fixed_where_they_have_to_be():
    model, onnx, mobile = small_classifier(), TARGETS["onnx"], TARGETS["executorch"]
    shapes = plan_shapes(model, onnx, SIZES["crop"][0])
    assert (shapes.any_batch, shapes.least_side, shapes.fixed_size, len({*shapes.checked})) == (True, 64, None, 3)
    small = plan_shapes(model, onnx, pvt_hf.PvtImageProcessor(crop_size=32))
    assert (small.least_side, small.fixed_size, small.checked) == (
        None,
        (32, 32),
        ((1, 32, 32), (2, 32, 32), (3, 32, 32)),
    )
    assert small.describe() == "batches of any size, height 32 and width 32 pixels"
    still = plan_shapes(model, mobile, SIZES["squash"][0])
    assert (still.any_batch, still.traced, {*still.checked}) == (False, (1, 64, 80), {(1, 64, 80)})
    assert still.describe() == "one image at a time, height 64 and width 80 pixels"
    assert not plan_shapes(build_dense_model("mask_rcnn"), onnx).any_batch


def test_batches_are_of_the_samples():
    names = list_inputs(build_dense_model("detr"), TARGETS["onnx"])
    assert names == ["pixel_values", "pixel_mask"] and list_inputs(small_classifier(), TARGETS["onnx"]) == names[:1]
    samples = [{"pixel_values": torch.full((1, 3, 9, 7), float(value))} for value in range(2)]
    batch = make_batch(names, (3, 64, 96), 3, samples)
    assert batch["pixel_values"].shape == (3, 3, 64, 96) and batch["pixel_mask"].shape == (3, 64, 96)
    assert batch["pixel_values"].mean(dim=(1, 2, 3)).tolist() == pytest.approx([0, 1, 0])
    assert make_batch(names, (1, 64, 96), 3, samples, seed=1)["pixel_values"].mean() == 1
    noise, same, other = (make_batch(names, (2, 64, 96), 3, seed=seed)["pixel_values"] for seed in (1, 1, 2))
    assert noise.std() > 0.5 and torch.equal(noise, same) and not torch.equal(noise, other)
