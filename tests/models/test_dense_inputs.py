"""What goes into the detectors and the segmenter and what is made of their outputs, in forms that users have."""

import types

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import pvt_hf
from pvt_hf.models.post_processing import complete_outputs, detr_detections, read_outputs
from tests.support.dense_models import build_dense_model

ONE_STAGE = ("retinanet", "atss", "gfl")
DETECTORS = (*ONE_STAGE, "sparse_rcnn", "mask_rcnn", "faster_rcnn", "cascade_mask_rcnn")
SIZE = {"shortest_edge": 48, "longest_edge": 64}
ORIGINAL = [(50, 70), (40, 36)]


def labels_for(name, batch_size, height=64, width=96):
    if name == "semantic_fpn":
        return torch.zeros(batch_size, height, width, dtype=torch.long)
    label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.4, 0.5, 0.3, 0.4]])}
    if name.endswith("mask_rcnn"):
        label["masks"] = torch.zeros(1, height, width, dtype=torch.bool)
        label["masks"][:, 20:40, 20:50] = True
    return [label] * batch_size


@pytest.mark.parametrize("backbone", ["v1", "v2_linear"])
@pytest.mark.parametrize("name", [*DETECTORS, "semantic_fpn"])
def test_empty_batches_give_empty_outputs(name, backbone):
    model = build_dense_model(name, backbone, depths=[1, 1, 1, 1])
    masks = [{}] if name == "semantic_fpn" else [{}, {"pixel_mask": torch.ones(0, 64, 96)}]
    with torch.no_grad():
        some = model(torch.randn(1, 3, 64, 96))
        for mask in masks:
            outputs = model(torch.randn(0, 3, 64, 96), **mask)
            assert outputs.keys() == some.keys()
            for key in some.keys() - {"level_sizes", "nms_threshold"}:
                assert outputs[key].shape == (0, *some[key].shape[1:]) and outputs[key].dtype == some[key].dtype, key
    model.train()
    outputs = model(torch.randn(0, 3, 64, 96), labels=labels_for(name, 0))
    assert outputs.loss == 0
    outputs.loss.backward()  # every parameter takes part, as distributed training wants it
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.parametrize("name", [*DETECTORS, "semantic_fpn"])
def test_weights_that_are_no_numbers_give_such_a_loss(name):
    """Which ends a training with a reason, where an error of a part of the model has none."""
    model = build_dense_model(name, depths=[1, 1, 1, 1]).train()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    assert model(torch.randn(1, 3, 64, 96), labels=labels_for(name, 1)).loss.isnan()


@pytest.mark.parametrize("name", [*DETECTORS, "semantic_fpn"])
def test_inputs_of_another_type_are_named(name):
    model, pixels = build_dense_model(name, "resnet"), torch.randn(1, 3, 64, 64)
    for wrong, got in (
        (None, "NoneType"),
        ([pixels[0]], "list"),
        (pixels.numpy(), "ndarray"),
        (pixels.int(), "torch.i"),
    ):
        with pytest.raises(TypeError, match=f"`pixel_values` must be a floating-point tensor, got {got}"):
            model(wrong, labels=labels_for(name, 1))
    with pytest.raises(ValueError, match=r"`pixel_values` must have 3 channels .*, got 1 in shape \(1, 1, 64, 64\)"):
        model(pixels[:, :1])
    if name == "semantic_fpn":
        return
    for wrong, got in (([[1]], "list"), (np.ones((1, 64, 64)), "ndarray"), (torch.ones(1, 64, 64) * 1j, "torch.c")):
        with pytest.raises(
            TypeError, match=f"`pixel_mask` must be a tensor of integers, booleans or floats, got {got}"
        ):
            model(pixels, wrong)
    with pytest.raises(ValueError, match=r"`pixel_mask` must have shape \(1, 64, 64\), .* got \(64, 64\)"):
        model(pixels, torch.ones(64, 64))


def images():
    noise = np.random.default_rng(0)
    return [noise.integers(0, 255, (*size, 3), dtype=np.uint8) for size in ORIGINAL]


@pytest.mark.parametrize("name", DETECTORS)
def test_more_padding_changes_nothing(name):
    """Outputs, losses and gradients, masks included."""
    model = build_dense_model(name, depths=[1, 1, 1, 1])
    results = []
    for settings in ({}, {"pad_size": {"height": 100, "width": 110}}):
        processor = pvt_hf.PvtDetectionImageProcessor(size=SIZE, **settings)
        inputs = processor(images(), return_tensors="pt")
        padded = inputs.pixel_values.shape[2:]
        with torch.no_grad():
            outputs = model(**inputs)
        loss = model(**inputs, labels=labels_for(name, 2, *padded)).loss
        (gradient,) = torch.autograd.grad(loss, [model.neck.lateral_convs[0].weight])
        detections = processor.post_process_object_detection(outputs, 0.1, ORIGINAL)
        results.append((padded, dict(outputs), loss, gradient, detections))
    assert [tuple(result[0]) for result in results] == [(64, 64), (100, 110)]
    # Every box of a random GFL is as large as these images, so that there is one of each class.
    assert len(results[0][-1][0]["scores"]) > (2 if name == "gfl" else 5)
    assert_close(results[1][1:], results[0][1:], rtol=0, atol=0)


def forms(outputs):
    """What programs around the model have of its outputs."""
    arrays = {key: value.numpy() for key, value in outputs.items()}
    yield types.SimpleNamespace(logits=arrays["logits"], pred_boxes=arrays["pred_boxes"])
    yield types.SimpleNamespace(logits=outputs.logits, pred_boxes=outputs.pred_boxes, loss=None)
    yield {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}
    yield ({"loss_class": np.float32(1)}, *arrays.values())  # as `Trainer` gathers
    yield tuple(arrays.values())


@pytest.mark.parametrize(("num_labels", "pad_size"), [(None, None), (3, {"height": 100, "width": 110})])
@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "detr"])
@torch.no_grad()
def test_logits_and_boxes_are_enough(name, num_labels, pad_size):
    model = build_dense_model(name, depths=[1, 1, 1, 1])
    processor = pvt_hf.PvtDetectionImageProcessor(size=SIZE, num_labels=num_labels, pad_size=pad_size)
    outputs = model(**processor(images(), return_tensors="pt"))
    for sizes in (ORIGINAL, None) if pad_size is None else (ORIGINAL,):
        expected = processor.post_process_object_detection(outputs, 0.1, sizes)
        assert all(len(image["scores"]) > 4 for image in expected)
        for form in forms(outputs):
            for found, wanted in zip(processor.post_process_object_detection(form, 0.1, sizes), expected, strict=True):
                assert found["labels"].tolist() == wanted["labels"].tolist()
                assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    if name.endswith("mask_rcnn"):
        expected = processor.post_process_instance_segmentation(outputs, 0.1, target_sizes=ORIGINAL)
        alone = types.SimpleNamespace(**{key: outputs[key] for key in ("logits", "pred_boxes", "pred_masks")})
        for form in (alone, outputs.to_tuple()):
            found = processor.post_process_instance_segmentation(form, 0.1, target_sizes=ORIGINAL)
            for image, wanted in zip(found, expected, strict=True):
                assert torch.equal(image["segmentation"], wanted["segmentation"])
                assert [s["label_id"] for s in image["segments_info"]] == [
                    s["label_id"] for s in wanted["segments_info"]
                ]
        with pytest.raises(ValueError, match="no `image_sizes`: `target_sizes` are needed"):
            processor.post_process_instance_segmentation(alone)


@torch.no_grad()
def test_mask_rcnn_has_detections_in_the_form_of_detr():
    """One class each, with its probability; what is no detection is the background."""
    model = build_dense_model("mask_rcnn")
    pixels = torch.randn(2, 3, 64, 64)
    model.config.score_threshold = model(pixels).scores[0, 10].item()  # so that not all 20 rows are detections
    outputs = model(pixels)
    found = outputs.scores > 0
    assert found.any() and not found.all()
    scores, labels = outputs.logits.softmax(-1)[..., :-1].max(-1)
    assert_close(scores, outputs.scores)
    assert torch.equal(labels[found], outputs.class_labels[found])
    assert (outputs.logits.isfinite().sum(-1) == torch.where(found, 2, 1)).all()
    for image, rows in zip(detr_detections(outputs), found, strict=True):
        assert len(image["scores"]) == rows.sum()


def test_outputs_that_do_not_suffice_are_named():
    boxes = torch.rand(1, 207, 4) * 0.2 + 0.4
    processor = pvt_hf.PvtDetectionImageProcessor(num_labels=3)
    with pytest.raises(ValueError, match=r"`outputs` must have .* got \['logits'\] without \['pred_boxes'\]"):
        processor.post_process_object_detection({"logits": torch.zeros(1, 207, 3)})
    # 9 x (4 x 4 + 2 x 2 + 3): an input of 32 x 32
    complete = complete_outputs({"logits": torch.zeros(1, 207, 3), "pred_boxes": boxes}, None, None)
    assert complete["level_sizes"].tolist() == [144, 36, 9, 9, 9]
    with pytest.raises(ValueError, match="negative boxes.*eval_do_concat_batches=False"):
        complete_outputs({"logits": torch.zeros(1, 207, 3), "pred_boxes": boxes - 100}, None, None)
    with pytest.raises(ValueError, match=r"207 anchors|200 anchors .* \(0 possibilities\).*`target_sizes`"):
        complete_outputs({"logits": torch.zeros(1, 200, 3), "pred_boxes": boxes[:, :200]}, 3, None)
    # 9 x 1023: 32 x 1504 or 128 x 384 pixels, of which the processor knows one
    ambiguous = {"logits": torch.zeros(1, 9207, 3), "pred_boxes": torch.rand(1, 9207, 4)}
    with pytest.raises(ValueError, match=r"9207 anchors .* \(2 possibilities\)"):
        complete_outputs(ambiguous, 3, None)
    assert complete_outputs(ambiguous, 3, (128, 384))["level_sizes"].tolist() == [6912, 1728, 432, 108, 27]
    assert "level_sizes" not in complete_outputs({"logits": torch.zeros(1, 207, 4), "pred_boxes": boxes}, 3, None)


def test_semantic_logits_may_be_arrays():
    logits = torch.randn(2, 3, 16, 24)
    processor = pvt_hf.PvtSegmentationImageProcessor()
    expected = processor.post_process_semantic_segmentation({"logits": logits}, [(70, 90)] * 2)
    for form in (types.SimpleNamespace(logits=logits.numpy()), types.SimpleNamespace(logits=logits), (logits.numpy(),)):
        for found, wanted in zip(
            processor.post_process_semantic_segmentation(form, [(70, 90)] * 2), expected, strict=True
        ):
            assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="`outputs` must have"):
        read_outputs({}, "logits")
